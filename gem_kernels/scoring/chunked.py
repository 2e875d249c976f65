"""topm_mean over ragged spans: spans that average the same number of values share one padded matrix and one topk.

selected(t) = key_t > threshold, or key_t == threshold and t <= cut: the key and the token of the last one that a span selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gem_kernels.tiles import CHUNKED

_INFINITY = 0x7F800000


def _order_key(values: Tensor) -> Tensor:
    """Return an int32 key that orders fp32 as torch.sort does: -0.0 equals 0.0, and NaN is the largest of all."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(bits < 0, -magnitude, magnitude).masked_fill(magnitude > _INFINITY, _INFINITY + 1)


def plan_buckets(lengths: Sequence[int], counts: Sequence[int], block: int) -> Iterator[slice]:
    """Yield runs of rows with the same count and rising lengths, at least one row each.

    Padded to its last row, which is the longest, a run holds at most `block` values.
    """
    start = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths) and counts[end] == counts[start] and (end + 1 - start) * lengths[end] <= block:
            continue
        yield slice(start, end)
        start = end


def _buckets(spans: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Yield the spans of each bucket (R,); every non-empty span is in one bucket."""
    lengths = spans[:, 1] - spans[:, 0]
    order = lengths.argsort(stable=True)
    order = order[counts[order].argsort(stable=True)]
    order = order[lengths[order] > 0]
    for bucket in plan_buckets(lengths[order].tolist(), counts[order].tolist(), CHUNKED.block):
        yield order[bucket]


def forward(values: Tensor, spans: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average the largest counts (S,) int64 of values (N,) fp32 in each span (S, 2).

    Returns mean (S,) fp32, threshold (S,), an int32 key, and cut (S,), an int64 token.
    """
    mean = values.new_full(counts.shape, float("nan"))
    threshold, cut = counts.new_zeros(counts.shape, dtype=torch.int32), torch.zeros_like(counts)
    for rows in _buckets(spans, counts):
        parts = [values[start:end] for start, end in spans[rows].tolist()]
        padded = pad_sequence(parts, batch_first=True, padding_value=float("-inf"))
        taken = int(counts[rows[0]])
        largest = padded.topk(taken, dim=1, sorted=False).values  # which token of equal values it took is open
        mean[rows] = largest.sum(1) / taken
        key = _order_key(largest)
        threshold[rows], last = key.min(dim=1)
        cut[rows] = spans[rows, 1].long() - 1
        # Where not all values equal to the last one are taken, the first of them are. NaN never compares equal and -inf equals
        # the padding, so these rows are looked at too.
        equal = (padded == largest.gather(1, last[:, None])).count_nonzero(1)
        kept = (key == threshold[rows, None]).count_nonzero(1)
        tied = (equal != kept).nonzero()[:, 0]
        if len(tied):
            tie = _order_key(padded[tied]) == threshold[rows[tied], None]
            cut[rows[tied]] = spans[rows[tied], 0] + (tie.cumsum(1) == kept[tied, None]).int().argmax(1)
    return mean, threshold, cut


def backward(grad: Tensor, values: Tensor, spans: Tensor, counts: Tensor, threshold: Tensor, cut: Tensor) -> Tensor:
    """Return dvalues (N,): each selected value gets its span's gradient over the span's count; spans may overlap."""
    key, share = _order_key(values), grad / counts.clamp(min=1)
    dvalues = torch.zeros_like(values)
    for rows in _buckets(spans, counts):
        starts, lengths = spans[rows, 0].long(), (spans[rows, 1] - spans[rows, 0]).long()
        before = lengths.cumsum(0) - lengths
        place = torch.arange(int(lengths.sum()), device=values.device)
        span, at = rows.repeat_interleave(lengths), place + (starts - before).repeat_interleave(lengths)
        here, last = key[at], threshold[span]
        chosen = ((here > last) | ((here == last) & (at <= cut[span]))).nonzero()[:, 0]
        dvalues.index_add_(0, at[chosen], share[span[chosen]])
    return dvalues
