"""The tokens of a batch that take part: ignored tokens are left out, or become zeros.

M tokens of a batch, N of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    at: Tensor | None  # (N,) int64, rising
    ignored: Tensor  # (M,) bool

    @staticmethod
    def compacted(targets: Tensor, ignore_index: int) -> Kept:
        """Leave ignored tokens out; reads their number back from the device."""
        ignored = targets == ignore_index
        return Kept(ignored.logical_not().nonzero().squeeze(1), ignored)

    @staticmethod
    def masked(targets: Tensor, ignore_index: int) -> Kept:
        """Turn ignored tokens into zeros; reads nothing back."""
        return Kept(None, targets == ignore_index)

    def positions(self) -> Tensor:
        return torch.arange(self.ignored.shape[0], device=self.ignored.device) if self.at is None else self.at

    def offsets(self, cu: Sequence[int]) -> list[int]:
        """Turn offsets into the M tokens into offsets into the N."""
        return list(cu) if self.at is None else torch.searchsorted(self.at, self.at.new_tensor(cu)).tolist()

    def part(self, rows: slice, tokens: slice) -> Kept:
        """Restrict to a slice of the M tokens whose kept ones are the given slice of the N rows."""
        return Kept(None if self.at is None else self.at[rows] - tokens.start, self.ignored[tokens])

    def rows(self, t: Tensor) -> Tensor:
        """Select the kept tokens of (M, ...), unchanged: (N, ...)."""
        return t if self.at is None or self.at.shape[0] == t.shape[0] else t.index_select(0, self.at)

    def take(self, t: Tensor) -> Tensor:
        """Select the kept tokens of (M, ...), with zeros in ignored tokens that stay: (N, ...)."""
        return self.rows(t) if self.at is not None else t.masked_fill(self._ignored_like(t), 0)

    def put(self, t: Tensor) -> Tensor:
        """Scatter (N, ...) to all tokens (M, ...), with zeros in ignored ones."""
        if self.at is None:
            return t.masked_fill(self._ignored_like(t), 0)
        m = self.ignored.shape[0]
        return t if self.at.shape[0] == m else t.new_zeros(m, *t.shape[1:]).index_copy_(0, self.at, t)

    def _ignored_like(self, t: Tensor) -> Tensor:
        return self.ignored.view(-1, *[1] * (t.ndim - 1))

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
