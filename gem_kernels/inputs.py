"""Preparation of the arguments of an op on (hidden, weight): cast, check, flatten."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gem_kernels import compat, ranks, shards
from gem_kernels.operands import Operands
from gem_kernels.types import LogitTransform, LowRank, VocabShard
from gem_kernels.validation import check_linear, check_shard, check_tensor, check_transform, values_are_readable


class LinearInputs(NamedTuple):
    """Checked, cast and flattened arguments of a linear op."""

    operands: Operands  # hidden (M, D): M = all tokens, ignored ones included
    targets: Tensor  # (M,), indices in the whole vocabulary
    ignore_index: int | None
    batch_shape: torch.Size
    shard: VocabShard | None  # None: this process holds the whole vocabulary

    @property
    def ranks(self) -> str:
        """Name of the process group that shares the vocabulary, "" if there is none (operands.RANKS)."""
        return "" if self.shard is None else self.shard.group.group_name

    @property
    def columns(self) -> int:
        """V, or an even share of it: every rank plans its memory by this number, so all ranks have the same plan."""
        if self.shard is None:
            return self.operands.weight.shape[0]
        return -(-self.shard.total // self.shard.group.size())

    def whole(self) -> LinearInputs:
        """Gather the rows of all ranks."""
        if self.shard is None:
            return self
        return self._replace(operands=ranks.whole(self.operands, self.shard), shard=None)

    def local(self) -> LinearInputs:
        """Turn targets and ignore_index into indices in this rank's rows."""
        if self.shard is None:
            return self
        rows = self.operands.weight.shape[0]
        targets = ranks.local_targets(self.targets, self.ignore_index, rows, self.shard.start)
        return self._replace(targets=targets, ignore_index=None if self.ignore_index is None else ranks.IGNORED)

    def expand(self, stats: Iterable[Tensor]) -> list[Tensor]:
        """Give the statistics of the M tokens the caller's batch shape."""
        return [s.view(self.batch_shape) for s in stats]


_T = TypeVar("_T")


def _has_autocast(t: Tensor) -> bool:
    return torch.amp.is_autocast_available(t.device.type)  # not on the meta device


def _autocast(t: _T, dtype: torch.dtype) -> _T:
    """Cast as autocast casts an argument of F.linear: fp64, integers and non-tensors stay as they are."""
    narrow = isinstance(t, Tensor) and t.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return t.to(dtype) if narrow else t  # type: ignore[attr-defined,no-any-return]


def linear_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    low_rank: LowRank | None,
    ignore_index: int | None,
    shard: VocabShard | None,
    **agreed: object,
) -> LinearInputs:
    """Cast as F.linear would under autocast, check, flatten the batch shape.

    agreed: further values that must be the same on all ranks of a shard's group; otherwise the ranks would deadlock.
    """
    factors = low_rank[:2] if isinstance(low_rank, LowRank) else ()
    if any(map(compat.is_dtensor, (hidden, weight, targets, bias, *factors))):
        hidden, weight, targets, bias, low_rank, shard = shards.local_parts(
            hidden, weight, targets, bias, low_rank, shard
        )
    if isinstance(hidden, Tensor) and _has_autocast(hidden) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = _autocast(hidden, dtype), _autocast(weight, dtype), _autocast(bias, dtype)
        if isinstance(low_rank, LowRank):
            low_rank = LowRank(_autocast(low_rank.a, dtype), _autocast(low_rank.b, dtype), low_rank.scale)
    check_transform(transform)
    arguments = (hidden, weight, targets, bias, low_rank, ignore_index)
    if shard is None:
        check_linear(*arguments, shard)
    else:
        check_shard(shard)
        if values_are_readable(check_tensor("weight", weight)):
            shards.check_linear_together(*arguments, shard, {"transform": transform, **agreed})
        else:
            check_linear(*arguments, shard)
    # Matrices keep their strides, vectors are dense.
    flat = Operands(hidden.reshape(-1, hidden.shape[-1]), weight, None if bias is None else bias.contiguous(), low_rank)
    return LinearInputs(flat, targets.reshape(-1).contiguous(), ignore_index, targets.shape, shard)


def autocast_off(t: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast inside an op, whose arithmetic is fp32 by decision: autocast would turn its GEMMs back into bf16."""
    return torch.autocast(t.device.type, enabled=False) if _has_autocast(t) else nullcontext()
