"""The row functions of a tile of logits as Triton kernels: prepare, update, gradient (rows_torch.py has them in torch).

The rows are a tile of `chunked`, or the whole matrix of logprob_entropy. The statistics read each logit once, the gradient
reads and writes it once (in place where `out` is z). Instructions cost as much time as memory here, so a step of the loop is
kept short. A program owns BLOCK_N rows and walks their columns, in fp32 registers whatever the dtype in memory.

Rows of a matrix (N, V), or of a strided batch (B, T, V): row n is at (n // T) stride_b + (n % T) stride_t.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat, tiles
from gem_kernels.primitives import (
    add_to_lanes,
    close_lanes,
    dlogits,
    fresh_state,
    load_gradient,
    load_state,
    open_lanes,
    raise_lanes,
    rises,
    store_state,
    transform_logits,
)
from gem_kernels.softmax import RowGradient, State, Transform

# Rows of logits are the tuple (where each begins (BLOCK_N,), which are read (BLOCK_N,), columns, stride of a column, bias,
# gain, limit): what the device functions below need to load transformed logits.


@triton.jit
def row_addresses(ptr, rows, rows_per_batch, stride_b, stride_t):
    """Return where these rows of a matrix (N, V) or a batch (B, T, V) begin."""
    return ptr + (rows // rows_per_batch).to(tl.int64) * stride_b + (rows % rows_per_batch).to(tl.int64) * stride_t


@triton.jit
def block_addresses(base, start, stride_v, BLOCK_V: tl.constexpr):
    """Return the addresses (BLOCK_N, BLOCK_V) of the columns from `start` on: only the first term changes in a loop."""
    lanes = tl.arange(0, BLOCK_V).to(tl.int64) * stride_v
    return (base + tl.cast(start, tl.int64) * stride_v)[:, None] + lanes[None, :]


@triton.jit
def load_logits(
    logits,
    start,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKS_ROWS: tl.constexpr,
    RAGGED: tl.constexpr,  # the block reaches beyond the last column
    BLOCK_V: tl.constexpr,
):
    """Return transformed logits (BLOCK_N, BLOCK_V) from column `start` on; -inf beyond the last one.

    A mask costs two instructions a logit, so only the last block of a row has one.
    """
    base, read, n_cols, stride_v, bias_ptr, gain, limit = logits
    at = block_addresses(base, start, stride_v, BLOCK_V)
    cols = start + tl.arange(0, BLOCK_V)
    inside = (cols < n_cols)[None, :]
    if RAGGED:
        z = tl.load(at, mask=inside & read[:, None] if MASKS_ROWS else inside, other=0.0)
    elif MASKS_ROWS:
        z = tl.load(at, mask=read[:, None], other=0.0)
    else:
        z = tl.load(at)
    z = z.to(tl.float32)
    if HAS_BIAS:  # (1, BLOCK_V) as the logits are: a vector would be moved to their threads through shared memory
        at_bias = (bias_ptr + cols)[None, :]
        z += (tl.load(at_bias, mask=inside, other=0.0) if RAGGED else tl.load(at_bias)).to(tl.float32)
    z = transform_logits(z, gain, limit, SOFTCAP)
    return tl.where(inside, z, float("-inf")) if RAGGED else z


@triton.jit
def load_target_logit(logits, column, before, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the target's logit (BLOCK_N,), `before` where its column is not one of these.

    It is read at its place: a search would cost two instructions for every logit.
    """
    base, read, n_cols, stride_v, bias_ptr, gain, limit = logits
    here = read & (column >= 0) & (column < n_cols)
    z = tl.load(base + column.to(tl.int64) * stride_v, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=here, other=0.0).to(tl.float32)
    return tl.where(here, transform_logits(z, gain, limit, SOFTCAP), before)


@triton.jit
def _add_block(
    lanes,
    logits,
    start,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKS_ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the block of logits from column `start` on to the lanes."""
    z = load_logits(logits, start, HAS_BIAS, SOFTCAP, MASKS_ROWS, RAGGED, BLOCK_V)
    new, risen = rises(lanes[0], z)
    if risen:
        lanes = raise_lanes(lanes, new)
    lanes, _ = add_to_lanes(lanes, z)
    return lanes


# Numbers that change from batch to batch are not specialised: else a kernel is compiled again when N is a multiple of 16.
@triton.jit(do_not_specialize=["n_rows", "first_col", "ignore_index", "stride_state", "rows_per_batch"])
def _row_statistics_kernel(
    z_ptr,
    bias_ptr,  # (C,)
    targets_ptr,  # (N,)
    state_ptr,  # (STATE, N)
    n_rows,
    n_cols,
    first_col,  # of these columns in the vocabulary
    ignore_index,
    stride_state,
    rows_per_batch,
    stride_b,
    stride_t,
    stride_v,
    gain,
    limit,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IGNORES: tl.constexpr,
    FRESH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1)  # rows beyond the last one read it again, without a mask
    targets = tl.load(targets_ptr + safe_rows)
    read = inside & (targets != ignore_index) if IGNORES else inside
    state_rows = state_ptr + rows.to(tl.int64)
    state = fresh_state(BLOCK_N) if FRESH else load_state(state_rows, stride_state, inside)
    base = row_addresses(z_ptr, safe_rows, rows_per_batch, stride_b, stride_t)
    logits = (base, read, n_cols, stride_v, bias_ptr, gain, limit)
    lanes = open_lanes(state, BLOCK_V)
    full = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        lanes = _add_block(lanes, logits, start, HAS_BIAS, SOFTCAP, IGNORES, False, BLOCK_V)
    if full < n_cols:
        lanes = _add_block(lanes, logits, full, HAS_BIAS, SOFTCAP, IGNORES, True, BLOCK_V)
    target_logit = load_target_logit(logits, targets - first_col, state[3], HAS_BIAS, SOFTCAP)
    store_state(state_rows, stride_state, close_lanes(lanes, target_logit), inside)


class Rows:
    """Tile, grid and addresses of the rows of a matrix (N, V) or a batch (B, T, V), as the kernels take them."""

    def __init__(self, z: Tensor) -> None:
        self.n_cols = z.shape[-1]
        self.n_rows = z.shape[0] if z.ndim == 2 else z.shape[0] * z.shape[1]
        self.tile = tiles.row_tile(tiles.ROWS, z)
        self.grid = (triton.cdiv(self.n_rows, self.tile.rows),)
        if z.ndim == 2 or z.shape[0] == 1:  # a stride of N V would be specialised, and N changes from batch to batch
            per_batch, strides = self.n_rows, (0, *z.stride()[-2:])
        else:
            per_batch, strides = z.shape[1], z.stride()
        self.address = (max(per_batch, 1), *strides)
        self.blocks = {
            "BLOCK_N": self.tile.rows,
            "BLOCK_V": min(self.tile.block, triton.next_power_of_2(self.n_cols)),
            "num_warps": self.tile.warps,
        }


def prepare(z: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """Leave raw logits as they are: the kernels apply bias and transform to what they read."""
    return z


def update(
    z: Tensor,
    bias: Tensor | None,
    state: State,
    first_col: int,
    transform: Transform,
    ignore_index: int | None = None,
) -> None:
    """Update `state` with raw logits z (N, C) or (B, T, C) of the columns from first_col on; first_col = 0 starts anew.

    Rows whose target is ignore_index are not read.
    """
    rows = Rows(z)
    if rows.n_rows == 0:
        return
    compat.launch(
        _row_statistics_kernel,
        rows.grid,
        z,
        bias if bias is not None else z,
        state.targets,
        state.values,
        rows.n_rows,
        rows.n_cols,
        first_col,
        0 if ignore_index is None else ignore_index,
        state.values.stride(0),
        *rows.address,
        transform.gain,
        transform.limit,
        HAS_BIAS=bias is not None,
        SOFTCAP=transform.softcap,
        IGNORES=ignore_index is not None,
        FRESH=first_col == 0,
        **rows.blocks,
    )


@triton.jit
def _write_block(
    out,  # (BLOCK_N,): where the rows of the gradient begin
    inside,  # (BLOCK_N,): rows that exist
    stride_out_v,
    gradient,
    logits,
    start,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEGREE: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradient of the block of logits from column `start` on."""
    z = load_logits(logits, start, HAS_BIAS, SOFTCAP, True, RAGGED, BLOCK_V)
    dz = dlogits(z, gradient, logits[5], logits[6], SOFTCAP, DEGREE)
    cols = start + tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (cols < logits[2])[None, :] if RAGGED else inside[:, None]
    tl.store(block_addresses(out, start, stride_out_v, BLOCK_V), dz.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "first_col", "ignore_index", "stride_gradient", "rows_per_batch"])
def _row_gradient_kernel(
    z_ptr,
    bias_ptr,  # (C,)
    targets_ptr,  # (N,)
    gradient_ptr,  # (3 + DEGREE, N): softmax.RowGradient.values
    out_ptr,  # may be z_ptr: every element is read before its place is written, by the same program
    n_rows,
    n_cols,
    first_col,
    ignore_index,
    stride_gradient,
    rows_per_batch,
    stride_b,
    stride_t,
    stride_v,
    stride_out_b,
    stride_out_t,
    stride_out_v,
    gain,
    limit,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IGNORES: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1)
    read = inside & (targets != ignore_index) if IGNORES else inside
    # An ignored row gets m = c_0 = c_1 = 0 and logits of 0, as logits with ignored rows have no bias: its gradient is e^0 * 0.
    gradient = load_gradient(gradient_ptr, rows, stride_gradient, read, DEGREE)
    base = row_addresses(z_ptr, rows, rows_per_batch, stride_b, stride_t)
    logits = (base, read, n_cols, stride_v, bias_ptr, gain, limit)
    out = row_addresses(out_ptr, rows, rows_per_batch, stride_out_b, stride_out_t)
    full = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        _write_block(out, inside, stride_out_v, gradient, logits, start, HAS_BIAS, SOFTCAP, DEGREE, False, BLOCK_V)
    if full < n_cols:
        _write_block(out, inside, stride_out_v, gradient, logits, full, HAS_BIAS, SOFTCAP, DEGREE, True, BLOCK_V)
    tl.debug_barrier()  # another thread of this program may have written the target's column
    column = targets - first_col
    here = read & (column >= 0) & (column < n_cols)
    at_target = gradient[3].to(out_ptr.dtype.element_ty)
    tl.store(out + column.to(tl.int64) * stride_out_v, at_target, mask=here)


def gradient(
    z: Tensor,
    bias: Tensor | None,
    gradient: RowGradient,
    first_col: int,
    transform: Transform,
    out: Tensor,
    ignore_index: int | None = None,
) -> Tensor:
    """Write dL/dz for raw logits z (N, C) or (B, T, C) of the columns from first_col on to `out`, in its dtype.

    `out` may be z. Rows whose target is ignore_index are not read and become 0.
    """
    rows, out_rows = Rows(z), Rows(out)
    if rows.n_rows == 0:
        return out
    compat.launch(
        _row_gradient_kernel,
        rows.grid,
        z,
        bias if bias is not None else z,
        gradient.targets,
        gradient.values,
        out,
        rows.n_rows,
        rows.n_cols,
        first_col,
        0 if ignore_index is None else ignore_index,
        gradient.values.stride(0),
        *rows.address,
        *out_rows.address[1:],
        transform.gain,
        transform.limit,
        HAS_BIAS=bias is not None,
        SOFTCAP=transform.softcap,
        IGNORES=ignore_index is not None,
        DEGREE=gradient.degree,
        **rows.blocks,
    )
    return out
