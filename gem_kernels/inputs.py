"""What every op on (hidden, weight) does to its arguments before an implementation sees them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gem_kernels.types import LogitTransform, LowRank, Operands, TokenStats
from gem_kernels.validation import check_linear, check_transform


class LinearInputs(NamedTuple):
    """Checked, cast and flattened arguments of a linear op."""

    hidden: Tensor  # (M, D), M = all tokens, ignored ones included
    weight: Tensor  # (V, D)
    targets: Tensor  # (M,)
    bias: Tensor | None
    low_rank: LowRank | None
    ignore_index: int
    batch_shape: torch.Size

    def compact(self) -> tuple[Operands, Tensor, Tensor]:
        """(operands, targets, kept): the N tokens that are not ignored, and where they stand among the M.

        They are left out before the GEMM, not masked in it: they cost nothing, and a NaN in one stays there.
        """
        kept = (self.targets != self.ignore_index).nonzero().squeeze(1)
        hidden, targets = self.hidden, self.targets
        if kept.shape[0] != targets.shape[0]:
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        low_hidden = low_weight = None
        if self.low_rank is not None:
            # fp32 whatever the dtype: rounding s h a^T to bf16 would be a second rounding of the logits, and rounding the
            # two terms of dhidden (through weight, through a) before their sum would leave noise where they cancel.
            hidden = hidden.float()
            low_hidden = self.low_rank.scale * (hidden @ self.low_rank.a.float().T)
            low_weight = self.low_rank.b
        return Operands(hidden, self.weight, self.bias, low_hidden, low_weight), targets, kept

    def expand(self, stats: TokenStats, kept: Tensor) -> TokenStats:
        """Statistics of the N kept tokens -> of all M tokens in the caller's batch shape, 0 where ignored."""
        if kept.shape[0] != self.targets.shape[0]:
            zeros = stats.logprob.new_zeros(self.targets.shape)
            stats = TokenStats(*(zeros.index_copy(0, kept, s) for s in stats))
        return TokenStats(*(s.view(self.batch_shape) for s in stats))


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
) -> LinearInputs:
    """Cast as F.linear would under autocast, check, flatten the batch shape."""
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = _autocast(hidden, dtype), _autocast(weight, dtype), _autocast(bias, dtype)
        if isinstance(low_rank, LowRank):
            low_rank = LowRank(_autocast(low_rank.a, dtype), _autocast(low_rank.b, dtype), low_rank.scale)
    check_transform(transform)
    check_linear(hidden, weight, targets, bias, low_rank, ignore_index)
    return LinearInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        low_rank,
        ignore_index,
        targets.shape,
    )


def autocast_off(t: Tensor) -> torch.autocast:
    """Inside an op the arithmetic is fp32 by decision; autocast would turn its GEMMs back into bf16."""
    return torch.autocast(t.device.type, enabled=False)
