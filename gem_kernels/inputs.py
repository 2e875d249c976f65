"""What every op on (hidden, weight) does to its arguments before an implementation sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gem_kernels import compat, vocab_parallel
from gem_kernels.types import LogitTransform, LowRank, Operands, Upstream, VocabShard
from gem_kernels.validation import check_linear, check_shard, check_tensor, check_transform, values_are_readable


class LinearInputs(NamedTuple):
    """Checked, cast and flattened arguments of a linear op."""

    operands: Operands  # hidden (M, D): M = all tokens, ignored ones included
    targets: Tensor  # (M,), indices in the whole vocabulary
    ignore_index: int
    batch_shape: torch.Size
    shard: VocabShard | None  # None: this process holds the whole vocabulary

    @property
    def ranks(self) -> str:
        """Who holds the vocabulary, as an operator takes it (vocab_parallel)."""
        return "" if self.shard is None else self.shard.group.group_name

    @property
    def columns(self) -> int:
        """V, or an even share of it: what a rank plans its memory by, so that all ranks have the same plan."""
        if self.shard is None:
            return self.operands.weight.shape[0]
        return -(-self.shard.total // self.shard.group.size())

    def whole(self) -> LinearInputs:
        """With the rows of all ranks."""
        if self.shard is None:
            return self
        return self._replace(operands=vocab_parallel.whole(self.operands, self.shard), shard=None)

    def local(self) -> LinearInputs:
        """With targets and ignore_index of this rank's rows."""
        if self.shard is None:
            return self
        rows = self.operands.weight.shape[0]
        targets = vocab_parallel.local_targets(self.targets, self.ignore_index, rows, self.shard.start)
        return self._replace(targets=targets, ignore_index=vocab_parallel.IGNORED)

    def expand(self, stats: Iterable[Tensor]) -> list[Tensor]:
        """Statistics of the M tokens -> in the caller's batch shape."""
        return [s.view(self.batch_shape) for s in stats]


class Kept(NamedTuple):
    """The tokens that take part: N of the M of a batch.

    Either the others are left out (they cost nothing; their number has to be read back from the device), or, where `at` is
    None, N = M and the others become zeros, so that a NaN in an ignored token stays there.
    """

    at: Tensor | None  # (N,) int64, rising
    ignored: Tensor  # (M,) bool

    @staticmethod
    def compacted(targets: Tensor, ignore_index: int) -> Kept:
        ignored = targets == ignore_index
        return Kept(ignored.logical_not().nonzero().squeeze(1), ignored)

    @staticmethod
    def masked(targets: Tensor, ignore_index: int) -> Kept:
        """Without reading anything back."""
        return Kept(None, targets == ignore_index)

    def positions(self) -> Tensor:
        return torch.arange(self.ignored.shape[0], device=self.ignored.device) if self.at is None else self.at

    def offsets(self, cu: Sequence[int]) -> list[int]:
        """Offsets into the M tokens -> into the N."""
        return list(cu) if self.at is None else torch.searchsorted(self.at, self.at.new_tensor(cu)).tolist()

    def part(self, rows: slice, tokens: slice) -> Kept:
        """Those of the tokens [start, stop), which are the rows [start, stop) of the N."""
        return Kept(None if self.at is None else self.at[rows] - tokens.start, self.ignored[tokens])

    def rows(self, t: Tensor) -> Tensor:
        """(M, ...) -> (N, ...) as they are."""
        return t if self.at is None or self.at.shape[0] == t.shape[0] else t.index_select(0, self.at)

    def take(self, t: Tensor) -> Tensor:
        """(M, ...) -> (N, ...), zeros where an ignored token is still among them."""
        return self.rows(t) if self.at is not None else t.masked_fill(self._ignored_like(t), 0)

    def put(self, t: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), 0 where ignored."""
        if self.at is None:
            return t.masked_fill(self._ignored_like(t), 0)
        m = self.ignored.shape[0]
        return t if self.at.shape[0] == m else t.new_zeros(m, *t.shape[1:]).index_copy_(0, self.at, t)

    def _ignored_like(self, t: Tensor) -> Tensor:
        return self.ignored.view(-1, *[1] * (t.ndim - 1))

    def upstream(self, upstream: Upstream) -> Upstream:
        return Upstream(*(None if g is None else self.take(g) for g in upstream))


_T = TypeVar("_T")


def _autocast(t: _T, dtype: torch.dtype) -> _T:
    """What autocast makes of an argument of F.linear: fp64 and integers stay as they are; so does what is no tensor."""
    narrow = isinstance(t, Tensor) and t.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return t.to(dtype) if narrow else t  # type: ignore[attr-defined,no-any-return]


def linear_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    low_rank: LowRank | None,
    ignore_index: int,
    shard: VocabShard | None,
    **agreed: object,
) -> LinearInputs:
    """Cast as F.linear would under autocast, check, flatten the batch shape.

    agreed: what else has to be the same on all ranks of a shard's group, lest they wait for one another.
    """
    factors = low_rank[:2] if isinstance(low_rank, LowRank) else ()
    if any(map(compat.is_dtensor, (hidden, weight, targets, bias, *factors))):
        hidden, weight, targets, bias, low_rank, shard = vocab_parallel.local_parts(
            hidden, weight, targets, bias, low_rank, shard
        )
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
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
            vocab_parallel.check_linear_together(*arguments, shard, {"transform": transform, **agreed})
        else:
            check_linear(*arguments, shard)
    # Matrices keep their strides, vectors are dense.
    flat = Operands(hidden.reshape(-1, hidden.shape[-1]), weight, None if bias is None else bias.contiguous(), low_rank)
    return LinearInputs(flat, targets.reshape(-1).contiguous(), ignore_index, targets.shape, shard)


def autocast_off(t: Tensor) -> torch.autocast:
    """Inside an op the arithmetic is fp32 by decision; autocast would turn its GEMMs back into bf16."""
    return torch.autocast(t.device.type, enabled=False)
