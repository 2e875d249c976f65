"""The fused Triton kernels on (hidden, weight), whose logits exist in registers only.

Statistics, 2NDV FLOP: a program owns BLOCK_N tokens and one part of the vocabulary, walks that part tile by tile, and keeps
the state of its rows; a second kernel merges the parts in their order. Gradient, 2NDV FLOP: dL/dlogits of a slice of the
vocabulary is recomputed tile by tile and written once, in the dtype of the operands, for the GEMM library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat, plan, tiles
from gem_kernels.operands import STATE, Operands, RowPart
from gem_kernels.primitives import (
    dlogits,
    fresh_state,
    load_gradient,
    load_state,
    logits_tile,
    merge_states,
    store_state,
    update_state,
)
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import FusedTile, matrix, tiling
from gem_kernels.tokens import kept_first


# Numbers that change from batch to batch are not specialised: else a kernel is compiled again when N is a multiple of 16.
@triton.jit(do_not_specialize=["N", "stride_partial", "splits", "tiles_per_split"])
def _linear_logprob_fwd_kernel(
    hidden_ptr,  # (N, D), if IGNORES kept tokens first
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    low_hidden_ptr,  # (N, R)
    low_weight_ptr,  # (V, R)
    targets_ptr,  # (N,)
    count_ptr,  # (1,): number of kept tokens, if IGNORES
    partial_ptr,  # (SPLITS, STATE, N): the state of each part of the vocabulary
    N,
    V,
    D,
    R,
    stride_partial,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    splits,
    tiles_per_split,
    gain,
    limit,
    IGNORES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # GROUP_N row blocks x all parts are in flight together: a tile of the weight is read from memory once per group, and
    # the group's hidden rows stay in the level-2 cache.
    program = tl.program_id(0)
    group = program // (GROUP_N * splits)
    group_size = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP_N, GROUP_N)
    member = program % (GROUP_N * splits)
    first_row = (group * GROUP_N + member % group_size) * BLOCK_N
    split = member // group_size
    if first_row >= (tl.load(count_ptr) if IGNORES else N):
        return

    if USE_TMA:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [stride_hidden_n, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
    else:
        hidden = hidden_ptr
        weight = weight_ptr
    rows = first_row + tl.arange(0, BLOCK_N)
    targets = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    state = fresh_state(BLOCK_N)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, BLOCK_V))):
        first_col = tile * BLOCK_V
        z = logits_tile(
            hidden,
            weight,
            bias_ptr,
            low_hidden_ptr,
            low_weight_ptr,
            first_row,
            first_col,
            N,
            V,
            D,
            R,
            stride_hidden_n,
            stride_hidden_d,
            stride_weight_v,
            stride_weight_d,
            gain,
            limit,
            HAS_BIAS,
            SOFTCAP,
            USE_TMA,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            BLOCK_R,
        )
        cols = first_col + tl.arange(0, BLOCK_V)
        state = update_state(state, z, targets, cols, first_col, tl.minimum(BLOCK_V, V - first_col))
    store_state(partial_ptr + split.to(tl.int64) * stride_partial + rows, N, state, rows < N)


@triton.jit(do_not_specialize=["N", "splits", "stride_partial"])
def _merge_partials_kernel(
    partial_ptr,  # (SPLITS, STATE, N)
    order_ptr,  # (N,): token of each row, if IGNORES; else row i is token i
    count_ptr,  # (1,), if IGNORES
    state_ptr,  # (STATE, N), by token
    N,
    splits,
    stride_partial,
    IGNORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    kept = rows < (tl.load(count_ptr) if IGNORES else N)
    state = fresh_state(BLOCK)
    for split in range(splits):
        part = partial_ptr + tl.cast(split, tl.int64) * stride_partial + rows
        state = merge_states(state, load_state(part, N, kept))
    tokens = tl.load(order_ptr + rows, mask=inside, other=0) if IGNORES else rows
    store_state(state_ptr + tokens, N, state, inside)


class _Launch:
    """Arguments that both kernels on (hidden, weight) share."""

    def __init__(
        self,
        x: Operands,
        low_hidden: Tensor | None,
        transform: Transform,
        table: Mapping[tuple[int, int, int], FusedTile],
    ) -> None:
        use_tma = compat.takes_descriptors(x.hidden, x.weight)
        if use_tma:
            compat.allow_descriptors(x.hidden.device)
        ragged = not use_tma and x.hidden.shape[1] % tiles.RAGGED != 0
        demand = (
            2 if ragged or low_hidden is not None else int(not use_tma or x.bias is not None or bool(transform.softcap))
        )
        self.tile = tile = tiles.linear_tile(table, x.hidden, demand)
        self.strides = (*x.hidden.stride(), *x.weight.stride())
        bias = x.weight if x.bias is None else x.bias  # a placeholder, as the next two are without an adapter
        low, low_weight, self.rank, block_r = x.hidden, x.weight, 1, 0
        if low_hidden is not None and x.low_rank is not None:
            low, low_weight, self.rank = low_hidden, x.low_rank.b.contiguous(), low_hidden.shape[1]
            block_r = min(32, max(16, triton.next_power_of_2(self.rank)))
        self.operands = (x.hidden, x.weight, bias, low, low_weight)
        self.meta = {
            "HAS_BIAS": x.bias is not None,
            "SOFTCAP": transform.softcap,
            "USE_TMA": use_tma,
            "EVEN_D": x.hidden.shape[1] % tile.block_d == 0,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "BLOCK_R": block_r,
            "GROUP_N": tile.group_n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def launch_forward(x: Operands, targets: Tensor, ignore_index: int | None, transform: Transform) -> Tensor:
    """Return the state (len(STATE), N) by token; the columns of ignored tokens are undefined.

    Ignored tokens come last and the programs of their rows return: they cost nothing, and nothing waits for their number.
    """
    (n, d), v, device = x.hidden.shape, x.weight.shape[0], x.hidden.device
    if n == 0 or v == 0:  # no token, or another rank holds all of the vocabulary
        return State.fresh(targets).values
    order = count = targets  # placeholders
    if ignore_index is not None:
        order, count = kept_first(targets, ignore_index)
        x, targets = x._replace(hidden=x.hidden[order]), targets[order]
    state = torch.empty(len(STATE), n, dtype=torch.float32, device=device)
    common = _Launch(x, x.adapter_hidden(), transform, tiles.LINEAR_FORWARD)
    tile = common.tile
    row_blocks, tile_count = triton.cdiv(n, tile.block_n), triton.cdiv(v, tile.block_v)
    splits = plan.vocabulary_splits(row_blocks, tile_count, tile.group_n, compat.processors(device))
    partial = torch.empty(splits, len(STATE), n, dtype=torch.float32, device=device)
    compat.launch(
        _linear_logprob_fwd_kernel,
        (row_blocks * splits,),
        *common.operands,
        targets,
        count,
        partial,
        n,
        v,
        d,
        common.rank,
        partial.stride(0),
        *common.strides,
        splits,
        triton.cdiv(tile_count, splits),
        transform.gain,
        transform.limit,
        IGNORES=ignore_index is not None,
        **common.meta,
    )
    block = 128  # a row for each thread of the four default warps
    compat.launch(
        _merge_partials_kernel,
        (triton.cdiv(n, block),),
        partial,
        order,
        count,
        state,
        n,
        splits,
        partial.stride(0),
        IGNORES=ignore_index is not None,
        BLOCK=block,
    )
    return state


@triton.jit(do_not_specialize=["N", "first", "stride_gradient"])
def _linear_logprob_bwd_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (C, D): the vocabulary's columns [first, first + C)
    bias_ptr,  # (C,)
    low_hidden_ptr,  # (N, R)
    low_weight_ptr,  # (C, R)
    targets_ptr,  # (N,)
    gradient_ptr,  # (3 + DEGREE, N): softmax.RowGradient.values
    dlogits_ptr,  # (N, C)
    N,
    C,
    D,
    R,
    first,
    stride_gradient,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_dlogits_n,
    gain,
    limit,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DEGREE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # The programs of a group of row blocks run together, so that its hidden rows and each tile of the weight are read from
    # memory once and then come from the level-2 cache.
    program = tl.program_id(0)
    col_blocks = tl.cdiv(C, BLOCK_V)
    group = program // (GROUP_N * col_blocks)
    group_size = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP_N, GROUP_N)
    member = program % (GROUP_N * col_blocks)
    first_row = (group * GROUP_N + member % group_size) * BLOCK_N
    first_col = (member // group_size) * BLOCK_V
    if USE_TMA:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [stride_hidden_n, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight_ptr, [C, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
    else:
        hidden = hidden_ptr
        weight = weight_ptr
    z = logits_tile(
        hidden,
        weight,
        bias_ptr,
        low_hidden_ptr,
        low_weight_ptr,
        first_row,
        first_col,
        N,
        C,
        D,
        R,
        stride_hidden_n,
        stride_hidden_d,
        stride_weight_v,
        stride_weight_d,
        gain,
        limit,
        HAS_BIAS,
        SOFTCAP,
        USE_TMA,
        EVEN_D,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        BLOCK_R,
    )
    # The product comes first and the row's numbers after it: loaded earlier they would hold registers through the loop over D.
    rows = first_row + tl.arange(0, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_V)
    inside = rows < N
    is_target = (first + cols)[None, :] == tl.load(targets_ptr + rows, mask=inside, other=-1)[:, None]
    gradient = load_gradient(gradient_ptr, rows, stride_gradient, inside, DEGREE)
    dz = tl.where(is_target, gradient[3][:, None], dlogits(z, gradient, gain, limit, SOFTCAP, DEGREE))
    # A column beyond C would be the first of the next row.
    out = dlogits_ptr + rows.to(tl.int64)[:, None] * stride_dlogits_n + cols[None, :]
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty), mask=inside[:, None] & (cols < C)[None, :])


def launch_dlogits(
    x: Operands, low_hidden: Tensor | None, gradient: RowGradient, first_col: int, transform: Transform, out: Tensor
) -> None:
    """Write dL/d(raw logits) (R, C) to `out` for the rows and columns of x, from column `first_col` of the vocabulary on."""
    (n, d), c = x.hidden.shape, x.weight.shape[0]
    common = _Launch(x, low_hidden, transform, tiles.LINEAR_BACKWARD)
    tile = common.tile
    compat.launch(
        _linear_logprob_bwd_kernel,
        (triton.cdiv(n, tile.block_n) * triton.cdiv(c, tile.block_v),),
        *common.operands,
        gradient.targets,
        gradient.values,
        out,
        n,
        c,
        d,
        common.rank,
        first_col,
        gradient.values.stride(0),
        *common.strides,
        out.stride(0),
        transform.gain,
        transform.limit,
        DEGREE=gradient.degree,
        **common.meta,
    )


class FusedTiles:
    """Tiles of dL/dlogits from the gradient kernel: a TileSource for Gradients.accumulate."""

    def __init__(self, x: Operands, transform: Transform) -> None:
        self.x, self.transform, self.tiling = x, transform, tiling(x.hidden, x.weight.shape[0])
        self.row_parts = RowPart.cut(x.hidden, x.adapter_hidden(), self.tiling.rows)
        self.buffer = x.hidden.new_empty(self.tiling.elements, dtype=x.gradient_dtype())

    def columns(self) -> Iterator[tuple[slice, Operands]]:
        for cols in self.tiling.columns:
            yield cols, self.x.columns(cols)

    def rows(self) -> Sequence[RowPart]:
        return self.row_parts

    def dlogits(self, gradient: RowGradient, rows: RowPart, cols: slice, part: Operands) -> Tensor:
        """Return dL/d(raw logits) (R, C) of one tile, for the gradient of its rows; the next tile overwrites it."""
        tile = part._replace(hidden=rows.hidden)
        dz = matrix(self.buffer, tile.hidden.shape[0], tile.weight.shape[0])
        launch_dlogits(tile, rows.low_hidden, gradient, cols.start, self.transform, dz)
        return dz
