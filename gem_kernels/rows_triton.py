"""The row functions of a tile of logits as Triton kernels: prepare, update, gradient (rows_torch.py has them in torch).

The rows are a tile of `chunked`, or the whole matrix of logprob_entropy. The kernels are bound by memory: the statistics read
each logit once, the gradient reads and writes it once (in place where `out` is z). A program owns BLOCK_N rows and walks their
columns, in fp32 registers whatever the dtype in memory.

Rows of a matrix (N, V), or of a strided batch (B, T, V): row n is at (n // T) stride_b + (n % T) stride_t.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat, tiles
from gem_kernels.primitives import (
    dlogits,
    fresh_state,
    load_gradient,
    load_state,
    store_state,
    transform_logits,
    update_state,
)
from gem_kernels.softmax import RowGradient, State, Transform


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
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1)
    read = inside & (targets != ignore_index) if IGNORES else inside
    state_rows = state_ptr + rows.to(tl.int64)
    state = fresh_state(BLOCK_N) if FRESH else load_state(state_rows, stride_state, inside)
    base = z_ptr + (rows // rows_per_batch).to(tl.int64) * stride_b + (rows % rows_per_batch).to(tl.int64) * stride_t
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = read[:, None] & (cols < n_cols)[None, :]
        z = tl.load(base[:, None] + cols.to(tl.int64)[None, :] * stride_v, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
        z = tl.where(mask, transform_logits(z, gain, limit, SOFTCAP), float("-inf"))
        width = tl.minimum(BLOCK_V, n_cols - start)
        state = update_state(state, z, targets, first_col + cols, first_col + start, width)
    store_state(state_rows, stride_state, state, inside)


class Rows:
    """Tile, grid and addresses of the rows of a matrix (N, V) or a batch (B, T, V), as the kernels take them."""

    def __init__(self, z: Tensor) -> None:
        self.n_cols = z.shape[-1]
        self.n_rows = z.shape[0] if z.ndim == 2 else z.shape[0] * z.shape[1]
        self.tile = tiles.row_tile(tiles.ROWS, z)
        self.grid = (triton.cdiv(self.n_rows, self.tile.rows),)
        per_batch, strides = (self.n_rows, (0, *z.stride())) if z.ndim == 2 else (z.shape[1], z.stride())
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
    gradient = load_gradient(gradient_ptr, rows, stride_gradient, read, DEGREE)
    batch = (rows // rows_per_batch).to(tl.int64)
    member = (rows % rows_per_batch).to(tl.int64)
    base = z_ptr + batch * stride_b + member * stride_t
    out = out_ptr + batch * stride_out_b + member * stride_out_t
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = (cols < n_cols)[None, :] & inside[:, None]
        wide = cols.to(tl.int64)[None, :]
        z = tl.load(base[:, None] + wide * stride_v, mask=mask & read[:, None], other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
        z = transform_logits(z, gain, limit, SOFTCAP)
        is_target = (first_col + cols)[None, :] == targets[:, None]
        dz = dlogits(z, gradient, is_target, gain, limit, SOFTCAP, DEGREE)
        if IGNORES:
            dz = tl.where(read[:, None], dz, 0.0)
        tl.store(out[:, None] + wide * stride_out_v, dz.to(out_ptr.dtype.element_ty), mask=mask)


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
