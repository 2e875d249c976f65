"""The definition of the ragged scores: one sequence at a time, plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _count(m: int | float, length: int) -> int:
    # -1e-9: 0.07 * 100 is 7.000000000000001 in floats, and 7 is meant
    return min(m, length) if isinstance(m, int) else max(1, math.ceil(m * length - 1e-9))


def topm_mean(values: Tensor, spans: Tensor, m: int | float) -> Tensor:
    """Return the mean (S,) of the m largest values (N,) of each span (S, 2); NaN for an empty span."""
    means = []
    for start, end in spans.tolist():
        ordered = values[start:end].sort(descending=True, stable=True).values  # stable: ties go by position
        means.append(ordered[: _count(m, end - start)].mean() if end > start else values.new_tensor(float("nan")))
    return torch.stack(means) if means else values.new_zeros(0)
