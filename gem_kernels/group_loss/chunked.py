"""A group loss and its gradient in one walk over the groups: 6NDV FLOP, 4NDV with a frozen head.

Consecutive groups whose logits fit `cache_bytes` form a slab. A slab is: logits GEMM into the cache -> statistics ->
loss_fn of each group and its gradient with respect to the statistics -> dlogits in place -> the two gradient GEMMs.
A group too large for the cache is a slab of its own whose logits are computed twice (8NDV), in tiles.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels.streaming import Gradients, LogitGradient, LogitTiles, accumulate_gradients, statistics
from gem_kernels.types import LogitTransform, Operands, TokenStats, Upstream


class Slab(NamedTuple):
    """Groups [first, last) whose kept tokens are rows [start, stop) of the compacted batch."""

    first: int
    last: int
    start: int
    stop: int


def plan_slabs(row_offsets: Sequence[int], row_bytes: int, cache_bytes: int) -> list[Slab]:
    """Greedy: as many whole groups as fit, at least one. row_offsets (B+1,) are the kept tokens' group offsets."""
    slabs, first = [], 0
    last_group = len(row_offsets) - 1
    while first < last_group:
        fits = row_offsets[first] + cache_bytes // row_bytes
        last = min(max(bisect.bisect_right(row_offsets, fits) - 1, first + 1), last_group)
        slabs.append(Slab(first, last, row_offsets[first], row_offsets[last]))
        first = last
    return slabs


def forward_backward(
    x: Operands,
    targets: Tensor,
    kept: Tensor,
    n_tokens: int,
    cu_groups: Sequence[int],
    loss_and_upstream: Callable[[TokenStats, int], tuple[Tensor, Upstream]],
    transform: LogitTransform,
    cache_bytes: int,
    needed: Sequence[bool],
) -> tuple[Tensor, TokenStats, list[Tensor | None]]:
    """(loss, statistics of all n_tokens, gradients in the order of Operands).

    x, targets: the N kept tokens; kept (N,): where they stand among the n_tokens that cu_groups speaks of.
    loss_and_upstream: the statistics of one group -> its loss and dloss/dstatistics.
    """
    row_offsets = torch.searchsorted(kept, torch.tensor(cu_groups, device=kept.device)).tolist()
    row_bytes = 4 * x.weight.shape[0]
    slabs = plan_slabs(row_offsets, row_bytes, cache_bytes)
    gradients = Gradients(x, needed, passes=len(slabs))
    stats = TokenStats(*(torch.zeros(n_tokens, device=x.hidden.device) for _ in TokenStats._fields))
    loss = torch.zeros((), device=x.hidden.device)
    for slab in slabs:
        rows = slice(slab.start, slab.stop)
        part = x._replace(hidden=x.hidden[rows], low_hidden=None if x.low_hidden is None else x.low_hidden[rows])
        tiles = LogitTiles(part, transform)
        fits = row_bytes * (slab.stop - slab.start) <= cache_bytes
        cache: list[Tensor] | None = [] if fits and any(needed) else None
        online = statistics(tiles, targets[rows], cache)
        for full, values in zip(stats, online.finish(), strict=True):
            full[kept[rows]] = values

        upstreams = []
        for group in range(slab.first, slab.last):
            tokens = slice(cu_groups[group], cu_groups[group + 1])
            group_loss, upstream = loss_and_upstream(TokenStats(*(s[tokens] for s in stats)), group)
            loss += group_loss
            upstreams.append(upstream)
        if any(needed):
            base = cu_groups[slab.first]
            rows_in_slab = kept[rows] - base
            slab_upstream = Upstream(
                *(None if g is None else g[rows_in_slab] for g in _concatenate(upstreams, cu_groups, slab.first))
            )
            accumulate_gradients(tiles, LogitGradient(online, slab_upstream, transform), gradients, slab.start, cache)
    return loss, stats, gradients.like(x)


def _concatenate(upstreams: Sequence[Upstream], cu_groups: Sequence[int], first: int) -> Upstream:
    """The groups' upstream gradients in a row; None for a statistic that no loss of the slab looked at."""
    lengths = [cu_groups[first + i + 1] - cu_groups[first + i] for i in range(len(upstreams))]
    columns = []
    for of_groups in zip(*upstreams, strict=True):
        seen = next((g for g in of_groups if g is not None), None)
        columns.append(
            None
            if seen is None
            else torch.cat(
                [seen.new_zeros(n) if g is None else g for g, n in zip(of_groups, lengths, strict=True)],
            )
        )
    return Upstream(*columns)
