"""A group loss and its gradient in one walk over the groups: 6NDV FLOP, 4NDV with a frozen head.

Consecutive groups whose logits fit the cache form a slab. A slab is: logits GEMM into the cache -> statistics ->
loss_fn of each group and its gradient with respect to the statistics -> dlogits in place -> the two gradient GEMMs.
All slabs use one buffer. A group too large for `cache_bytes` is a slab of its own whose logits are computed twice (8NDV), in
tiles. plan.py cuts the slabs.

With Triton and bf16 operands the cache holds exponentials in bf16 (exponentials.py), elsewhere and under a softcap logits in
fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.gradients import Gradients
from gem_kernels.logit_tiles import LogitTiles
from gem_kernels.operands import Operands, Upstream
from gem_kernels.plan import Cache, padded
from gem_kernels.ranks import merge_ranks_
from gem_kernels.softmax import RowGradient, Transform
from gem_kernels.tiles import slab_bytes
from gem_kernels.tokens import Kept
from gem_kernels.types import TokenStats


def _caches_exponentials(x: Operands, transform: Transform) -> bool:
    """True if a slab's cache holds exponentials in bf16, which has the range of fp32 that they need; fp16 has not."""
    narrow = x.weight.dtype == x.gradient_dtype() == torch.bfloat16
    return narrow and not transform.softcap and compat.on_triton(x.weight.device)


def _cache(x: Operands, transform: Transform, cache_bytes: int, needed: Sequence[bool], columns: int) -> Cache:
    """Return the memory for so many columns of the vocabulary."""
    logit = 2 if _caches_exponentials(x, transform) else 4
    rounded = needed[1] and x.weight.dtype != torch.float32  # dweight, of which several slabs need a wider sum
    return Cache(
        row=logit * padded(columns),
        shared=slab_bytes(x.hidden.device, cache_bytes),
        most=cache_bytes,
        spare=4 * x.weight.shape[1] * columns if rounded else 0,
    )


def pieces(
    x: Operands, transform: Transform, cache_bytes: int, needed: Sequence[bool], columns: int, total: int
) -> list[int]:
    """Return the offsets of groups of `total` tokens that suit forward_backward, for a loss that takes any groups."""
    return _cache(x, transform, cache_bytes, needed, columns).pieces(total)


class _Logits:
    """A slab's statistics and, with a cache, its fp32 logits, tile by tile."""

    def __init__(self, x: Operands, targets: Tensor, transform: Transform, cache: Tensor | None, ranks: str) -> None:
        self.tiles = LogitTiles(x, transform, cache)
        self.state = self.tiles.statistics(targets)
        merge_ranks_(self.state, ranks)

    def backward(self, upstream: Upstream, into: Gradients, first_row: int) -> None:
        into.accumulate(self.tiles, RowGradient.of(self.state, upstream, self.tiles.transform), first_row)


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

    loss_and_upstream: maps the statistics of one group to its loss and dloss/dstatistics.
    columns: the vocabulary for which slabs are planned. It is the same on all ranks, because they exchange once in a slab; each
        rank caches the slabs that fit its own rows.
    """
    # Leaving tokens out costs a read-back, and there are none in a captured graph; the groups' offsets were read back anyway.
    static = targets.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = (Kept.masked if static else Kept.compacted)(targets, ignore_index)
    mine, my_targets = x._replace(hidden=kept.take(x.hidden)), kept.rows(targets)
    exponentials, width = _caches_exponentials(x, transform), padded(x.weight.shape[0])
    planned, own_cache = (_cache(x, transform, cache_bytes, needed, v) for v in (columns, x.weight.shape[0]))
    slabs, cached_rows = planned.plan(kept.offsets(cu_groups), own_cache)
    if not any(needed):
        cached_rows = -1
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
        if own is not None and exponentials and width > 0:  # a rank may hold no row of the vocabulary
            from gem_kernels.group_loss.exponentials import Exponentials

            logits: _Logits | Exponentials = Exponentials(part, my_targets[rows], transform, own, ranks)
        else:
            logits = _Logits(part, my_targets[rows], transform, own, ranks)
        for full, values in zip(stats, logits.state.finish(), strict=True):
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
    """Concatenate the groups' upstream gradients; None for a statistic that no loss of the slab depends on."""
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
