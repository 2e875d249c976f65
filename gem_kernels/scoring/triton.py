"""topm_mean over ragged spans: one program selects the m largest values of one span, whatever its length.

The order is that of an int32 key per value. The m-th largest key of a span is found bit by bit, each bit by counting; then
whether a token is selected is elementwise, in the forward's sum and in the backward:

    selected(t) = key_t > threshold, or key_t == threshold and t <= cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gem_kernels.compat import launch
from gem_kernels.tiles import SPANS, row_tile

_LOWEST = tl.constexpr(-(2**31))  # below the key of every value
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _order_key(value):
    """Return an int32 key that orders as torch.sort does: -0.0 equals 0.0, and NaN is the largest of all."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > _INFINITY, _INFINITY + 1, key)


@triton.jit
def _load_keys(values_ptr, at, end, BLOCK: tl.constexpr):
    token = at + tl.arange(0, BLOCK)
    inside = token < end
    return tl.where(inside, _order_key(tl.load(values_ptr + token, mask=inside, other=0.0)), _LOWEST)


@triton.jit
def _count_at_least(candidate, head, values_ptr, start, end, BLOCK: tl.constexpr):
    """Count the keys of the span that are >= candidate (> _LOWEST). head: the keys of its first block, kept in registers."""
    hits = (head >= candidate).to(tl.int32)
    for at in range(start + BLOCK, end, BLOCK):
        hits += (_load_keys(values_ptr, at, end, BLOCK) >= candidate).to(tl.int32)
    return tl.sum(hits)


@triton.jit
def _selected(key, token, threshold, cut):
    return (key > threshold) | ((key == threshold) & (token <= cut))


@triton.jit
def _span_topm_mean_fwd_kernel(
    values_ptr,
    spans_ptr,
    counts_ptr,
    mean_ptr,
    threshold_ptr,
    cut_ptr,
    n,
    BLOCK: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    # Spans on a GPU are not checked: never read outside.
    start = tl.maximum(tl.load(spans_ptr + 2 * span).to(tl.int64), 0)
    end = tl.minimum(tl.load(spans_ptr + 2 * span + 1).to(tl.int64), n)
    count = tl.load(counts_ptr + span)

    # Raise the threshold bit by bit, from the sign down, while `count` keys or more remain. Where exactly `count` remain,
    # they are the selection and the lower bits need no look; where all are taken, no bit does.
    head = _load_keys(values_ptr, start, end, BLOCK)
    threshold = tl.full((), _LOWEST, tl.int32)
    remaining = end - start
    bit = tl.full((), 31, tl.int32)
    while (bit >= 0) & (remaining > count):
        candidate = threshold ^ (1 << bit)
        at_least = _count_at_least(candidate, head, values_ptr, start, end, BLOCK).to(tl.int64)
        threshold = tl.where(at_least >= count, candidate, threshold)
        remaining = tl.where(at_least >= count, at_least, remaining)
        bit -= 1

    cut = end
    if remaining > count:  # ties: of the keys equal to the threshold, the first `kept` are selected
        kept = count - _count_at_least(threshold + 1, head, values_ptr, start, end, BLOCK)
        seen = tl.full((), 0, tl.int64)
        for at in range(start, end, BLOCK):
            equal = _load_keys(values_ptr, at, end, BLOCK) == threshold
            rank = seen + tl.cumsum(equal.to(tl.int32), 0)
            token = at + tl.arange(0, BLOCK)
            cut = tl.minimum(cut, tl.min(tl.where(equal & (rank == kept), token, end)))
            seen += tl.sum(equal.to(tl.int32))

    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        value = tl.load(values_ptr + token, mask=token < end, other=0.0)
        total += tl.where(_selected(_order_key(value), token, threshold, cut), value, 0.0)
    tl.store(mean_ptr + span, tl.div_rn(tl.sum(total), count.to(tl.float32)))  # 0 / 0: an empty span has NaN
    tl.store(threshold_ptr + span, threshold)
    tl.store(cut_ptr + span, cut)


def forward(values: Tensor, spans: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average the largest counts (S,) int64 of values (N,) fp32 in each span (S, 2).

    Returns mean (S,) fp32, threshold (S,), an int32 key, and cut (S,), an int64 token.
    """
    tile = row_tile(SPANS, values)
    n_spans = spans.shape[0]
    mean = values.new_empty(n_spans)
    threshold = counts.new_empty(n_spans, dtype=torch.int32)
    cut = counts.new_empty(n_spans)
    launch(
        _span_topm_mean_fwd_kernel,
        (n_spans,),
        values,
        spans.contiguous(),
        counts,
        mean,
        threshold,
        cut,
        values.shape[0],
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return mean, threshold, cut


@triton.jit
def _span_topm_mean_bwd_kernel(
    share_ptr,
    values_ptr,
    spans_ptr,
    threshold_ptr,
    cut_ptr,
    by_start_ptr,
    first_ptr,
    last_ptr,
    dvalues_ptr,
    n,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    key = _order_key(tl.load(values_ptr + token, mask=token < n, other=0.0))
    dvalue = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(first_ptr + block), tl.load(last_ptr + block)):
        span = tl.load(by_start_ptr + i)
        start, end = tl.load(spans_ptr + 2 * span), tl.load(spans_ptr + 2 * span + 1)
        threshold, cut = tl.load(threshold_ptr + span), tl.load(cut_ptr + span)
        chosen = (token >= start) & (token < end) & _selected(key, token, threshold, cut)
        dvalue += tl.where(chosen, tl.load(share_ptr + span), 0.0)
    tl.store(dvalues_ptr + token, dvalue, mask=token < n)


def backward(grad: Tensor, values: Tensor, spans: Tensor, counts: Tensor, threshold: Tensor, cut: Tensor) -> Tensor:
    """Return dvalues (N,): every token adds the shares of the spans that selected it, in the order of their starts.

    Spans may overlap. Sorted by start, those that reach into a block of tokens lie between the first whose end, or that of
    one before it, is beyond the block's start, and the last that starts before the block's end.
    """
    tile = row_tile(SPANS, values)
    n = values.shape[0]
    starts, by_start = spans[:, 0].long().sort(stable=True)
    ends = spans[:, 1].long()[by_start]
    reach = ends.cummax(0).values if ends.numel() else ends
    block_starts = torch.arange(0, n, tile.block, device=values.device)
    dvalues = torch.empty_like(values)
    launch(
        _span_topm_mean_bwd_kernel,
        (block_starts.shape[0],),
        grad / counts.clamp(min=1),
        values,
        spans.contiguous(),
        threshold,
        cut,
        by_start,
        torch.searchsorted(reach, block_starts, right=True),
        torch.searchsorted(starts, block_starts + tile.block),
        dvalues,
        n,
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return dvalues
