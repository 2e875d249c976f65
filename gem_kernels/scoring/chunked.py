"""topm_mean over ragged spans: spans of similar length are the rows of one padded matrix.

selected(t) = key_t > threshold, or key_t == threshold and t <= cut: the key and the token of the last one that a span selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gem_kernels.tiles import CHUNKED

_INFINITY = 0x7F800000


def _order_key(values: Tensor) -> Tensor:
    """int32 that orders fp32 as torch.sort does: -0.0 equals 0.0, and NaN is the largest of all."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(bits < 0, -magnitude, magnitude).masked_fill(magnitude > _INFINITY, _INFINITY + 1)


def plan_buckets(lengths: Sequence[int], block: int) -> Iterator[slice]:
    """Rising lengths -> runs of rows that, padded to their last and longest, hold at most `block` values; at least one row."""
    start = 0
    for end, length in enumerate(lengths):
        if end > start and (end + 1 - start) * length > block:
            yield slice(start, end)
            start = end
    if len(lengths):
        yield slice(start, len(lengths))


def _padded_rows(spans: Tensor, n_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every span that is not empty, in buckets: span (R,), token of each of its places (R, longest), place inside it?"""
    starts, lengths = spans[:, 0].long(), (spans[:, 1] - spans[:, 0]).long()
    order = lengths.argsort(stable=True)
    order = order[lengths[order] > 0]
    for bucket in plan_buckets(lengths[order].tolist(), CHUNKED.block):
        rows = order[bucket]
        width = torch.arange(int(lengths[rows[-1]]), device=spans.device)
        yield rows, (starts[rows, None] + width).clamp(max=n_tokens - 1), width < lengths[rows, None]


def forward(values: Tensor, spans: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (N,) fp32, spans (S, 2), counts (S,) int64 -> mean (S,) fp32, threshold (S,) int32 key, cut (S,) int64 token."""
    mean = values.new_full(counts.shape, float("nan"))
    threshold, cut = counts.new_zeros(counts.shape, dtype=torch.int32), torch.zeros_like(counts)
    for rows, at, inside in _padded_rows(spans, values.shape[0]):
        padded = values[at].masked_fill_(~inside, float("-inf"))
        taken = counts[rows, None]
        largest = padded.topk(int(taken.max()), dim=1).values  # falling; which token of equal values it took is open
        rank = torch.arange(largest.shape[1], device=values.device)
        mean[rows] = largest.masked_fill(rank >= taken, 0.0).sum(1) / counts[rows]
        key, last = _order_key(padded), _order_key(largest.gather(1, taken - 1))
        kept = taken - (key > last).sum(1, keepdim=True)  # of those equal to the last, the first in position
        column = ((key == last).cumsum(1) == kept).int().argmax(1, keepdim=True)
        threshold[rows], cut[rows] = last[:, 0], at.gather(1, column)[:, 0]
    return mean, threshold, cut


def backward(grad: Tensor, values: Tensor, spans: Tensor, counts: Tensor, threshold: Tensor, cut: Tensor) -> Tensor:
    """d/dvalues (N,): each selected value gets its span's gradient over the span's count; spans may overlap."""
    key, share = _order_key(values), grad / counts.clamp(min=1)
    dvalues = torch.zeros_like(values)
    for rows, at, inside in _padded_rows(spans, values.shape[0]):
        here, last = key[at], threshold[rows, None]
        chosen = inside & ((here > last) | ((here == last) & (at <= cut[rows, None])))
        dvalues.index_add_(0, at.flatten(), torch.where(chosen, share[rows, None], 0.0).flatten())
    return dvalues
