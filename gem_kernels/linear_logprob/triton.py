"""linear_logprob_entropy in Triton: logits only ever in registers.

Forward, 2NDV FLOP: a program owns BLOCK_N tokens and one part of the vocabulary, walks that part tile by tile, and keeps
(m, s, t, z_y) of its rows; a second kernel merges the parts in their order. Backward, 2NDV + 4NDV: dL/dlogits of a slice of
the vocabulary is recomputed tile by tile and written once, in the dtype of the operands; the two products with it are the
GEMM library's.

Tokens that are ignored are sorted behind the others and their number stays on the device: programs beyond it return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat, tiles
from gem_kernels.inputs import Kept
from gem_kernels.primitives import LOWEST, dlogits, logits_tile, online_merge, online_update, pick_target
from gem_kernels.streaming import (
    Gradients,
    LogitGradient,
    OnlineStats,
    Transform,
    adapter_hidden,
    buffer_size,
    matrix,
    ranges,
)
from gem_kernels.tiles import FusedTile
from gem_kernels.types import Operands, Upstream


# Numbers that change from batch to batch are not specialised: a kernel is compiled once, not once for N = 16 k and once more.
@triton.jit(do_not_specialize=["N", "splits", "tiles_per_split"])
def _linear_logprob_fwd_kernel(
    hidden_ptr,  # (N, D), kept tokens first
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    low_hidden_ptr,  # (N, R)
    low_weight_ptr,  # (V, R)
    targets_ptr,  # (N,)
    count_ptr,  # (1,): number of kept tokens
    partial_ptr,  # (SPLITS, 4, N): m, s, t, z_y of each part of the vocabulary
    N,
    V,
    D,
    R,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    splits,
    tiles_per_split,
    gain,
    limit,
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
    if first_row >= tl.load(count_ptr):
        return

    if USE_TMA:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [stride_hidden_n, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
    else:
        hidden = hidden_ptr
        weight = weight_ptr
    rows = first_row + tl.arange(0, BLOCK_N)
    targets = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    maximum = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.full((BLOCK_N,), float("nan"), tl.float32)  # so a target out of range gives NaN
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
        target_logit = pick_target(target_logit, z, targets, cols, first_col, tl.minimum(BLOCK_V, V - first_col))
        maximum, total, weighted, _ = online_update(maximum, total, weighted, z)

    out = partial_ptr + split.to(tl.int64) * 4 * N + rows
    inside = rows < N
    tl.store(out, maximum, mask=inside)
    tl.store(out + N, total, mask=inside)
    tl.store(out + 2 * N, weighted, mask=inside)
    tl.store(out + 3 * N, target_logit, mask=inside)


@triton.jit(do_not_specialize=["N", "splits"])
def _merge_partials_kernel(
    partial_ptr,  # (SPLITS, 4, N)
    order_ptr,  # (N,): token of each row
    count_ptr,  # (1,)
    online_ptr,  # (4, N), by token
    N,
    splits,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = rows < tl.load(count_ptr)
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.full((BLOCK,), float("nan"), tl.float32)
    for split in range(splits):
        part = partial_ptr + tl.cast(split, tl.int64) * 4 * N + rows
        part_maximum = tl.load(part, mask=kept, other=0.0)
        part_total = tl.load(part + N, mask=kept, other=0.0)
        part_weighted = tl.load(part + 2 * N, mask=kept, other=0.0)
        part_target = tl.load(part + 3 * N, mask=kept, other=0.0)
        maximum, total, weighted = online_merge(maximum, total, weighted, part_maximum, part_total, part_weighted)
        target_logit = tl.where(part_target == part_target, part_target, target_logit)  # NaN: not in this part
    inside = rows < N
    out = online_ptr + tl.load(order_ptr + rows, mask=inside, other=0)
    tl.store(out, maximum, mask=inside)
    tl.store(out + N, total, mask=inside)
    tl.store(out + 2 * N, weighted, mask=inside)
    tl.store(out + 3 * N, target_logit, mask=inside)


def forward(x: Operands, targets: Tensor, transform: Transform, ignore_index: int) -> Tensor:
    """(m, s, t, z_y) of every token (4, M) fp32; what stands at ignored tokens means nothing. No host synchronisation."""
    ignored = targets == ignore_index
    order, count = ignored.to(torch.int8).argsort(stable=True), ignored.logical_not().sum(dtype=torch.int32)
    return launch_forward(x._replace(hidden=x.hidden[order]), targets[order], order, count, transform)


class _Launch:
    """What both kernels on (hidden, weight) are launched with."""

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
        demand = 2 if ragged or low_hidden is not None else int(not use_tma or x.bias is not None or transform.softcap)
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


def launch_forward(x: Operands, targets: Tensor, order: Tensor, count: Tensor, transform: Transform) -> Tensor:
    """The statistics of rows sorted so that the first `count` (a tensor on the device) are kept, at tokens order[row]."""
    (n, d), v, device = x.hidden.shape, x.weight.shape[0], x.hidden.device
    if n == 0 or v == 0:  # another rank holds all of the vocabulary
        return OnlineStats.start(targets).values
    online = torch.empty(4, n, dtype=torch.float32, device=device)
    common = _Launch(x, adapter_hidden(x), transform, tiles.LINEAR_FORWARD)
    tile = common.tile
    row_blocks, tile_count = triton.cdiv(n, tile.block_n), triton.cdiv(v, tile.block_v)
    splits = tiles.vocabulary_splits(min(row_blocks, tile.group_n), tile_count, compat.processors(device))
    tiles_per_split = triton.cdiv(tile_count, splits)
    splits = triton.cdiv(tile_count, tiles_per_split)  # no empty part
    partial = torch.empty(splits, 4, n, dtype=torch.float32, device=device)
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
        *common.strides,
        splits,
        tiles_per_split,
        transform.gain,
        transform.limit,
        **common.meta,
    )
    block = 128
    compat.launch(
        _merge_partials_kernel, (triton.cdiv(n, block),), partial, order, count, online, n, splits, BLOCK=block
    )
    return online


@triton.jit(do_not_specialize=["N", "first"])
def _linear_logprob_bwd_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (C, D): the vocabulary's columns [first, first + C)
    bias_ptr,  # (C,)
    low_hidden_ptr,  # (N, R)
    low_weight_ptr,  # (C, R)
    targets_ptr,  # (N,)
    maximum_ptr,  # (N,), and so are the next three
    constant_ptr,
    slope_ptr,
    at_target_ptr,
    dlogits_ptr,  # (N, C)
    N,
    C,
    D,
    R,
    first,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    stride_dlogits_n,
    gain,
    limit,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
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
    rows = first_row + tl.arange(0, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_V)
    inside = rows < N
    is_target = (first + cols)[None, :] == tl.load(targets_ptr + rows, mask=inside, other=-1)[:, None]
    maximum = tl.load(maximum_ptr + rows, mask=inside, other=0.0)
    constant = tl.load(constant_ptr + rows, mask=inside, other=0.0)
    slope = tl.load(slope_ptr + rows, mask=inside, other=0.0) if ENTROPY else constant
    at_target = tl.load(at_target_ptr + rows, mask=inside, other=0.0)
    dz = dlogits(z, maximum, constant, slope, at_target, is_target, gain, limit, SOFTCAP, ENTROPY)
    out = dlogits_ptr + rows.to(tl.int64)[:, None] * stride_dlogits_n + cols[None, :]
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty), mask=inside[:, None] & (cols < C)[None, :])


def backward(
    x: Operands,
    targets: Tensor,
    online: Tensor,
    upstream: Upstream,
    transform: Transform,
    ignore_index: int,
    needed: Sequence[bool],
    ranks: str,
) -> list[Tensor | None]:
    """Gradients (hidden, weight, bias, a, b), None where not needed. Reads back the number of kept tokens, once."""
    kept = Kept.compacted(targets, ignore_index)
    mine = x._replace(hidden=kept.take(x.hidden))
    stats = OnlineStats(kept.rows(targets), kept.rows(online.t()).t().contiguous())
    gradient = LogitGradient.of(stats, kept.upstream(upstream), transform)
    gradients = Gradients(mine, needed, passes=1)
    low_hidden = adapter_hidden(mine)
    n, v = mine.hidden.shape[0], mine.weight.shape[0]
    shape = tiles.chunk_tile(mine.hidden)
    buffer = mine.hidden.new_empty(buffer_size(n, v, shape), dtype=mine.gradient_dtype())
    for cols in ranges(v, shape.cols):
        part, dweight = mine.columns(cols), gradients.open(cols)
        for rows in ranges(n, shape.rows):
            tile = part._replace(hidden=mine.hidden[rows])
            low = None if low_hidden is None else low_hidden[rows]
            dz = matrix(buffer, tile.hidden.shape[0], tile.weight.shape[0])
            launch_dlogits(tile, low, gradient.rows(rows), cols.start, transform, dz)
            gradients.add_hidden(dz, part, rows)
            gradients.add_weight(dz, tile.hidden, low, cols, dweight)
        gradients.close(cols, dweight)
    dhidden, *others = gradients.finish(ranks)
    return [None if dhidden is None else kept.put(dhidden), *others]


def launch_dlogits(
    x: Operands, low_hidden: Tensor | None, gradient: LogitGradient, first_col: int, transform: Transform, out: Tensor
) -> None:
    """out = dL/d(raw logits) (R, C) of the rows and columns of x, whose first column is `first_col` of the vocabulary."""
    (n, d), c = x.hidden.shape, x.weight.shape[0]
    common = _Launch(x, low_hidden, transform, tiles.LINEAR_BACKWARD)
    tile = common.tile
    compat.launch(
        _linear_logprob_bwd_kernel,
        (triton.cdiv(n, tile.block_n) * triton.cdiv(c, tile.block_v),),
        *common.operands,
        gradient.targets,
        gradient.maximum,
        gradient.constant,
        gradient.slope if gradient.slope is not None else gradient.constant,
        gradient.at_target,
        out,
        n,
        c,
        d,
        common.rank,
        first_col,
        *common.strides,
        out.stride(0),
        transform.gain,
        transform.limit,
        ENTROPY=gradient.slope is not None,
        **common.meta,
    )
