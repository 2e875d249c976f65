"""SEGA as in training: the weights of a group's sequences come from the entropies of the same pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.shapes import Group
from gem_kernels import gem_score


@torch.no_grad()
def group_weights(entropy: Tensor, group: Group) -> Tensor:
    """Return weights (T,) of a group's tokens: centred scores (Eq. 1; the answer is the last quarter of a sequence), mass 1."""
    score = gem_score(entropy, group.branch, group.answer).score
    advantage = score - score.mean()
    return group.per_token(advantage / (advantage.abs().sum() / 2).clamp(min=1))


def batch_weights(entropy: Tensor, groups: Iterable[Group]) -> Tensor:
    """Return weights (N,) of all groups, for libraries that give the statistics of the whole batch."""
    return torch.cat([group_weights(entropy[group.tokens], group) for group in groups])
