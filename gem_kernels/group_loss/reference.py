"""The definition of a group loss: the sum over groups of loss_fn on that group's statistics, plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gem_kernels.types import TokenStats


def linear_group_loss(stats: TokenStats, cu_groups: Tensor, loss_fn: Callable[[TokenStats, int], Tensor]) -> Tensor:
    """Return the scalar loss of statistics (N,), which keep their graph, and offsets (B+1,)."""
    offsets = cu_groups.tolist()
    losses = [
        loss_fn(TokenStats(*(s[start:end] for s in stats)), group)
        for group, (start, end) in enumerate(pairwise(offsets))
    ]
    return torch.stack(losses).sum() if losses else stats.logprob.sum()
