"""SEGA as in training: the weights of a group's sequences come from the entropies of the same pass."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.shapes import Inputs, per_token
from gem_kernels import gem_score


@torch.no_grad()
def group_weights(entropy: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return weights (T,) of a group's tokens: centred scores (Eq. 1; the answer is the last quarter of a sequence), mass 1."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    answers = ends - ((ends - starts) // 4).clamp(min=1)
    branch, answer = torch.stack((starts, answers), 1), torch.stack((answers, ends), 1)
    score = gem_score(entropy, branch, answer).score
    advantage = score - score.mean()
    return per_token(advantage / (advantage.abs().sum() / 2).clamp(min=1), cu_seqlens)


def groups(x: Inputs) -> list[tuple[slice, Tensor]]:
    """Return the tokens of every group, and the offsets of its sequences into them."""
    cu = x.cu_seqlens.long()
    found = []
    for start, end in pairwise(x.cu_groups.tolist()):
        inside = cu[(cu >= start) & (cu <= end)]
        found.append((slice(start, end), (inside - start).int()))
    return found


def batch_weights(entropy: Tensor, x: Inputs) -> Tensor:
    """Return weights (N,) of all groups, for libraries that give the statistics of the whole batch."""
    return torch.cat([group_weights(entropy[tokens], cu) for tokens, cu in groups(x)])
