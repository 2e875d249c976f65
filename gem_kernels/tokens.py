"""The tokens of a batch that take part: ignored tokens are left out, or become zeros.

M tokens of a batch, N of them kept. An ignore_index of None says that all are kept: then nobody looks for ignored ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels.operands import Upstream
from gem_kernels.softmax import State


class Kept(NamedTuple):
    """The tokens that take part: N of the M of a batch.

    Ignored tokens are either left out, which makes them free but reads their number back from the device, or, where `at` is
    None, N = M and they become zeros, so that a NaN in an ignored token does not spread.
    """

    at: Tensor | None = None  # (N,) int64, rising
    ignored: Tensor | None = None  # (M,) bool; None: no token is

    @staticmethod
    def compacted(targets: Tensor, ignore_index: int | None) -> Kept:
        """Leave ignored tokens out; reads their number back from the device."""
        if ignore_index is None:
            return Kept()
        ignored = targets == ignore_index
        at = ignored.logical_not().nonzero().squeeze(1)
        return Kept() if at.shape == targets.shape else Kept(at, ignored)

    @staticmethod
    def masked(targets: Tensor, ignore_index: int | None) -> Kept:
        """Turn ignored tokens into zeros; reads nothing back."""
        return Kept() if ignore_index is None else Kept(None, targets == ignore_index)

    def offsets(self, cu: Sequence[int]) -> list[int]:
        """Turn offsets into the M tokens into offsets into the N."""
        return list(cu) if self.at is None else torch.searchsorted(self.at, self.at.new_tensor(cu)).tolist()

    def part(self, rows: slice, tokens: slice) -> Kept:
        """Restrict to a slice of the M tokens whose kept ones are the given slice of the N rows."""
        if self.ignored is None or (self.at is not None and rows.stop - rows.start == tokens.stop - tokens.start):
            return Kept()
        return Kept(None if self.at is None else self.at[rows] - tokens.start, self.ignored[tokens])

    def rows(self, t: Tensor) -> Tensor:
        """Select the kept tokens of (M, ...), unchanged: (N, ...)."""
        return t if self.at is None else t.index_select(0, self.at)

    def take(self, t: Tensor) -> Tensor:
        """Select the kept tokens of (M, ...), with zeros in ignored tokens that stay: (N, ...)."""
        return self.rows(t) if self.at is not None else self._zeroed(t)

    def put(self, t: Tensor) -> Tensor:
        """Scatter (N, ...) to all tokens (M, ...), with zeros in ignored ones."""
        if self.at is None or self.ignored is None:
            return self._zeroed(t)
        return t.new_zeros(self.ignored.shape[0], *t.shape[1:]).index_copy_(0, self.at, t)

    def _zeroed(self, t: Tensor) -> Tensor:
        return t if self.ignored is None else t.masked_fill(self.ignored.view(-1, *[1] * (t.ndim - 1)), 0)

    def state(self, targets: Tensor, values: Tensor) -> State:
        """Select the state of the N from targets (M,) and values (len(STATE), M)."""
        return State(self.rows(targets), self.rows(values.t()).t().contiguous())

    def upstream(self, upstream: Upstream) -> Upstream:
        return Upstream(*(None if g is None else self.take(g) for g in upstream))


def kept_first(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the order (M,) that moves ignored tokens behind the others, and the number of kept ones (), int32.

    Both stay on the device, so nothing waits for it.
    """
    ignored = targets == ignore_index
    return ignored.to(torch.int8).argsort(stable=True), ignored.logical_not().sum(dtype=torch.int32)


def zero_ignored(of_tokens: Iterable[Tensor], targets: Tensor, ignore_index: int | None) -> list[Tensor]:
    """Return each (M,) with zeros in ignored tokens."""
    zeroed = Kept.masked(targets, ignore_index)
    return [zeroed.put(t) for t in of_tokens]
