"""A vocabulary spread over the ranks of a process group: what the ranks exchange.

Every rank holds some rows of the weight and the hidden states of all N tokens. The ranks exchange the statistics of their
columns, 16 bytes a token, and the gradients that are sums over the vocabulary: dhidden (N, D), and (N, r) for an adapter.

`ranks` is the name of the group, as a torch operator takes no groups; "": one process holds all, and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.operands import Operands
from gem_kernels.softmax import State
from gem_kernels.types import VocabShard

IGNORED = -1
"""The ignore_index of local_targets, which lie in [0, rows]: a non-negative one could equal one of them."""


def merge_ranks_(state: State, ranks: str) -> None:
    """Turn the statistics of this rank's columns into those of the whole vocabulary, in place.

    Every rank merges all of them in the order of the ranks: the same bits everywhere, and in every run.
    """
    if not ranks or not state.values.numel():
        return
    import torch.distributed as dist

    group = compat.process_group(ranks)
    mine = state.values.contiguous()
    first, *others = parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    state.values.copy_(first)
    for part in others:
        state.merge_(part)


def sum_ranks_(terms: Iterable[Tensor | None], ranks: str) -> None:
    """Replace each tensor by its sum over the ranks, in place."""
    if not ranks:
        return
    import torch.distributed as dist

    for t in terms:
        if t is not None and t.numel():
            dist.all_reduce(t, group=compat.process_group(ranks))


def local_targets(targets: Tensor, ignore_index: int | None, rows: int, start: int) -> Tensor:
    """Turn indices in the whole vocabulary into indices in this rank's rows; `rows` (out of range) if another rank has them."""
    mine = (targets >= start) & (targets < start + rows)
    local = torch.where(mine, targets - start, rows)
    return local if ignore_index is None else local.masked_fill(targets == ignore_index, IGNORED)


class _WholeRows(torch.autograd.Function):
    """The rows of all ranks. Each rank computes everything that follows, so the gradient of its own rows is a slice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: VocabShard) -> Tensor:
        ctx.mine = slice(shard.start, shard.start + rows.shape[0])
        whole = rows.new_zeros(shard.total, *rows.shape[1:])
        whole[ctx.mine] = rows
        sum_ranks_([whole], shard.group.group_name)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.mine], None


def whole(x: Operands, shard: VocabShard) -> Operands:
    """Gather the operands of the whole vocabulary on every rank, for the reference."""

    def gathered(t: Tensor) -> Tensor:
        return _WholeRows.apply(t, shard)  # type: ignore[no-any-return]

    low = x.low_rank
    return Operands(
        x.hidden,
        gathered(x.weight),
        None if x.bias is None else gathered(x.bias),
        None if low is None else low._replace(b=gathered(low.b)),
    )
