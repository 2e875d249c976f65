"""topm_mean over ragged spans: spans of similar length are sorted together as the rows of one padded matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gem_kernels.tiles import CHUNKED


def _counts(m: int | float, lengths: Tensor) -> Tensor:
    """How many values of each span are averaged: m at most the length, or max(1, ceil(m * length)); 0 if empty."""
    if isinstance(m, int):
        return lengths.clamp(max=m)
    # -1e-9: 0.07 * 100 is 7.000000000000001 in floats, and 7 is meant
    return (lengths.double() * m - 1e-9).ceil().long().clamp(min=1).minimum(lengths)


def plan_buckets(lengths: Sequence[int], block: int) -> Iterator[slice]:
    """Rising lengths -> runs of rows that, padded to their last and longest, hold at most `block` values; at least one row."""
    start = 0
    for end, length in enumerate(lengths):
        if end > start and (end + 1 - start) * length > block:
            yield slice(start, end)
            start = end
    if len(lengths):
        yield slice(start, len(lengths))


def forward(values: Tensor, spans: Tensor, m: int | float) -> tuple[Tensor, Tensor, Tensor]:
    """values (N,), spans (S, 2) -> (mean (S,), token of each selected value (K,), span of each selected value (K,))."""
    starts, lengths = spans[:, 0].long(), (spans[:, 1] - spans[:, 0]).long()
    counts = _counts(m, lengths)
    mean = torch.full((spans.shape[0],), float("nan"), device=values.device)
    tokens, owners = [], []
    order = lengths.argsort(stable=True)
    order = order[lengths[order] > 0]
    for bucket in plan_buckets(lengths[order].tolist(), CHUNKED.block):
        rows = order[bucket]
        width = torch.arange(int(lengths[rows[-1]]), device=values.device)
        inside = width < lengths[rows, None]
        at = (starts[rows, None] + width).clamp(max=values.shape[0] - 1)
        padded = values[at].masked_fill(~inside, float("-inf"))
        largest = int(counts[rows].max())
        ordered, column = padded.sort(dim=1, descending=True, stable=True)  # stable: ties go by position
        chosen = width[:largest] < counts[rows, None]
        total = ordered[:, :largest].masked_fill(~chosen, 0.0).sum(1)
        mean[rows] = total / counts[rows]
        tokens.append((starts[rows, None] + column[:, :largest])[chosen])
        owners.append(rows.repeat_interleave(counts[rows]))
    empty = starts.new_zeros(0)
    return mean, torch.cat([empty, *tokens]), torch.cat([empty, *owners])


def backward(grad: Tensor, tokens: Tensor, owners: Tensor, spans: Tensor, n_tokens: int, m: int | float) -> Tensor:
    """d/dvalues (N,): each selected value gets its span's gradient over the span's count."""
    counts = _counts(m, (spans[:, 1] - spans[:, 0]).long())
    share = grad / counts.clamp(min=1)
    return torch.zeros(n_tokens, device=grad.device).index_add_(0, tokens, share[owners])
