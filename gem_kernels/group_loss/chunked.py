"""A group loss and its gradient in one walk over the groups: 6NDV FLOP, 4NDV with a frozen head.

Consecutive groups whose logits fit the cache form a slab. A slab is: logits GEMM into the cache -> statistics ->
loss_fn of each group and its gradient with respect to the statistics -> dlogits in place -> the two gradient GEMMs.
All slabs use one buffer. A group too large for `cache_bytes` is a slab of its own whose logits are computed twice (8NDV), in
tiles.

With Triton and bf16 operands the cache holds exponentials in bf16 (exponentials.py), elsewhere and under a softcap logits in
fp32.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gem_kernels import compat, vocab_parallel
from gem_kernels.inputs import Kept
from gem_kernels.streaming import (
    Gradients,
    LogitGradient,
    LogitTiles,
    OnlineStats,
    Transform,
    accumulate_gradients,
    padded,
    statistics,
)
from gem_kernels.tiles import slab_bytes
from gem_kernels.types import Operands, TokenStats, Upstream


class Slab(NamedTuple):
    """Groups [first, last) whose kept tokens are rows [start, stop) of the kept ones."""

    first: int
    last: int
    start: int
    stop: int


def plan_slabs(row_offsets: Sequence[int], rows: int) -> list[Slab]:
    """Greedy: as many whole groups as fit into `rows`, at least one. row_offsets (B+1,): the kept tokens' group offsets."""
    slabs, first = [], 0
    last_group = len(row_offsets) - 1
    while first < last_group:
        last = min(max(bisect.bisect_right(row_offsets, row_offsets[first] + rows) - 1, first + 1), last_group)
        slabs.append(Slab(first, last, row_offsets[first], row_offsets[last]))
        first = last
    return slabs


class _Logits:
    """A slab's statistics and, with a cache, its fp32 logits, tile by tile."""

    def __init__(self, x: Operands, targets: Tensor, transform: Transform, cache: Tensor | None, ranks: str) -> None:
        self.tiles, self.cache = LogitTiles(x, transform), cache
        self.online: OnlineStats = statistics(self.tiles, targets, self.cache)
        vocab_parallel.merge_(self.online, ranks)

    def backward(self, upstream: Upstream, into: Gradients, first_row: int) -> None:
        gradient = LogitGradient.of(self.online, upstream, self.tiles.transform)
        accumulate_gradients(self.tiles, gradient, into, first_row, self.cache)


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
    """(loss, statistics of all M tokens, gradients of (hidden, weight, bias, a, b)) for x and targets of all M tokens.

    loss_and_upstream: the statistics of one group -> its loss and dloss/dstatistics.
    columns: what a slab is planned for, the same on all ranks, as they meet once in a slab; cached is what fits each of them.
    """
    # Leaving tokens out costs a read-back, and there are none in a captured graph; the groups' offsets were read back anyway.
    static = targets.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = (Kept.masked if static else Kept.compacted)(targets, ignore_index)
    mine, my_targets = x._replace(hidden=kept.take(x.hidden)), kept.rows(targets)
    # bf16 has the range of fp32, which exponentials with a common reference need; fp16 has not.
    narrow = x.weight.dtype == x.gradient_dtype() == torch.bfloat16
    exponentials = narrow and not transform.softcap and compat.on_triton(x.weight.device)
    width = padded(x.weight.shape[0])
    logit_bytes = 2 if exponentials else 4
    row_bytes = logit_bytes * width
    planned_rows = slab_bytes(x.hidden.device, cache_bytes) // (logit_bytes * padded(columns))
    slabs = plan_slabs(kept.offsets(cu_groups), planned_rows)
    fitting = [slab.stop - slab.start for slab in slabs if row_bytes * (slab.stop - slab.start) <= cache_bytes]
    cached_rows = max(fitting, default=-1) if any(needed) else -1  # of the largest slab that is cached; -1: none is
    cache_dtype = torch.bfloat16 if exponentials else torch.float32
    cache = torch.empty(max(cached_rows, 0) * width, dtype=cache_dtype, device=targets.device)
    gradients = Gradients(mine, needed, passes=len(slabs))
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": targets.device}
    stats = TokenStats(*(torch.zeros(targets.shape, **fp32) for _ in TokenStats._fields))
    loss = torch.zeros((), **fp32)
    for slab in slabs:
        rows, tokens = slice(slab.start, slab.stop), slice(cu_groups[slab.first], cu_groups[slab.last])
        in_slab = kept.part(rows, tokens)
        part = mine._replace(hidden=mine.hidden[rows])
        own = cache if slab.stop - slab.start <= cached_rows else None
        if own is not None and exponentials and width > 0:
            from gem_kernels.group_loss.exponentials import Exponentials

            logits: _Logits | Exponentials = Exponentials(part, my_targets[rows], transform, own, ranks)
        else:
            logits = _Logits(part, my_targets[rows], transform, own, ranks)
        for full, values in zip(stats, logits.online.finish(), strict=True):
            full[tokens] = in_slab.put(values)

        upstreams = []
        for group in range(slab.first, slab.last):
            of_group = slice(cu_groups[group], cu_groups[group + 1])
            group_loss, upstream = loss_and_upstream(TokenStats(*(s[of_group] for s in stats)), group)
            loss += group_loss
            upstreams.append(upstream)
        if any(needed):
            logits.backward(in_slab.upstream(_concatenate(upstreams, cu_groups, slab.first)), gradients, slab.start)
    dhidden, *others = gradients.finish(ranks)
    return loss, stats, [None if dhidden is None else kept.put(dhidden), *others]


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
