"""A group loss without a cache: the fused kernels forward, loss_fn of every group, the fused kernels backward.

8NDV FLOP (6NDV with a frozen head) where `chunked` needs 6 (4): for when there is no memory for `cache_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gem_kernels import fused
from gem_kernels.gradients import Gradients
from gem_kernels.operands import Operands, Upstream
from gem_kernels.ranks import merge_ranks_
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tokens import Kept, zero_ignored
from gem_kernels.types import TokenStats


def pieces(
    x: Operands, transform: Transform, cache_bytes: int, needed: Sequence[bool], columns: int, total: int
) -> list[int]:
    """Return the offsets of one group of `total` tokens: without a cache there is no reason for more."""
    return [0, total] if total else [0]


def forward_backward(
    x: Operands,
    targets: Tensor,
    ignore_index: int | None,
    cu_groups: Sequence[int],
    loss_and_upstream: Callable[[TokenStats, int], tuple[Tensor, Upstream]],
    transform: Transform,
    cache_bytes: int,
    needed: Sequence[bool],
    ranks: str,
    columns: int,
) -> tuple[Tensor, TokenStats, list[Tensor | None]]:
    """Return the loss, the statistics of all M tokens, and the gradients of (hidden, weight, bias, a, b).

    cache_bytes and columns are not used.
    """
    values = fused.launch_forward(x, targets, ignore_index, transform)
    state = State(targets, values)
    merge_ranks_(state, ranks)
    stats = TokenStats(*zero_ignored(state.finish(), targets, ignore_index))
    loss = torch.zeros((), dtype=torch.float32, device=targets.device)
    upstreams: dict[str, Tensor] = {}
    for group, (start, end) in enumerate(pairwise(cu_groups)):
        group_loss, upstream = loss_and_upstream(TokenStats(*(s[start:end] for s in stats)), group)
        loss += group_loss
        for name, of_group in upstream._asdict().items():
            if of_group is not None:
                upstreams.setdefault(name, loss.new_zeros(targets.shape))[start:end] = of_group
    if not any(needed):
        return loss, stats, [None] * len(needed)
    kept = Kept.compacted(targets, ignore_index)
    mine = x._replace(hidden=kept.take(x.hidden))
    gradient = RowGradient.of(kept.state(targets, values), kept.upstream(Upstream(**upstreams)), transform)
    gradients = Gradients(mine, needed, passes=1)
    gradients.accumulate(fused.FusedTiles(mine, transform), gradient)
    dhidden, *others = gradients.finish(ranks)
    return loss, stats, [None if dhidden is None else kept.put(dhidden), *others]
