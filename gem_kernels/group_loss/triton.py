"""A group loss without a cache: the fused kernels forward, loss_fn of every group, the fused kernels backward.

8NDV FLOP (6NDV with a frozen head) where `chunked` needs 6 (4): for when there is no memory for `cache_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gem_kernels.streaming import Transform
from gem_kernels.types import Operands, TokenStats, Upstream

_ops = torch.ops.gem_kernels  # the torch operators of linear_logprob_entropy


def forward_backward(
    x: Operands,
    targets: Tensor,
    ignore_index: int,
    cu_groups: Sequence[int],
    loss_and_upstream: Callable[[TokenStats, int], tuple[Tensor, Upstream]],
    transform: Transform,
    cache_bytes: int,
    needed: Sequence[bool],
    ranks: str,
    columns: int,
) -> tuple[Tensor, TokenStats, list[Tensor | None]]:
    """(loss, statistics of all M tokens, gradients of (hidden, weight, bias, a, b)); cache_bytes and columns are not used."""
    arguments = (*x.flatten(), targets, *transform, ignore_index, "triton")
    *values, online = _ops.linear_logprob(*arguments, ranks=ranks)
    stats, loss = TokenStats(*values), torch.zeros((), dtype=torch.float32, device=targets.device)
    upstreams = [torch.zeros_like(s) for s in stats]
    seen = set()
    for group, (start, end) in enumerate(pairwise(cu_groups)):
        group_loss, upstream = loss_and_upstream(TokenStats(*(s[start:end] for s in stats)), group)
        loss += group_loss
        for i, of_group in enumerate(upstream):
            if of_group is not None:
                upstreams[i][start:end] = of_group
                seen.add(i)
    if not any(needed):
        return loss, stats, [None] * len(needed)
    used = (g if i in seen else None for i, g in enumerate(upstreams))
    grads = iter(_ops.linear_logprob_backward(*used, online, *arguments, list(needed), ranks=ranks))
    return loss, stats, [next(grads) if need else None for need in needed]
