"""The tensors that ops pass to their implementations, and the schemas by which they cross torch's dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gem_kernels.types import LowRank, TokenStats

_T = TypeVar("_T")

STATE = ("maximum", "total", "weighted", "target_logit")
"""Running statistics of a row of logits z, in the order of their rows in a state tensor (len(STATE), N) fp32:
m = max z, s = Σ e^(z-m), t = Σ e^(z-m) (z-m), and the target's logit z_y."""


class Operands(NamedTuple):
    """The factors of the logits z = hidden W^T + bias + scale (hidden a^T) b^T, in the caller's dtypes."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None

    def flatten(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
        """Return the arguments that OPERAND_ARGUMENTS declares: an operator takes no tuple of tensors and numbers."""
        return (self.hidden, self.weight, self.bias, *(self.low_rank or (None, None, 1.0)))

    @staticmethod
    def unflatten(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Operands:
        """Invert flatten."""
        return Operands(hidden, weight, bias, None if a is None or b is None else LowRank(a, b, scale))

    def gradient_dtype(self) -> torch.dtype:
        """Return the dtype of dL/dlogits in the gradient GEMMs: the operands', or the adapter's where that is wider."""
        return self.weight.dtype if self.low_rank is None else self.low_rank.a.dtype

    def columns(self, cols: slice) -> Operands:
        """Return the operands of a slice of the vocabulary."""
        low = self.low_rank
        return Operands(
            self.hidden,
            self.weight[cols],
            None if self.bias is None else self.bias[cols],
            None if low is None else low._replace(b=low.b[cols]),
        )

    def adapter_hidden(self) -> Tensor | None:
        """Return scale h a^T (N, r) in fp32 whatever the dtype: in bf16 the logits would be rounded a second time."""
        return (
            None if self.low_rank is None else self.low_rank.scale * (self.hidden.float() @ self.low_rank.a.float().T)
        )


class RowPart(NamedTuple):
    """Some rows of the hidden states. All tiles of these rows share its views: to make one takes the host a microsecond."""

    rows: slice
    hidden: Tensor  # (R, D)
    low_hidden: Tensor | None  # (R, r) fp32

    @staticmethod
    def cut(hidden: Tensor, low_hidden: Tensor | None, parts: Sequence[slice]) -> list[RowPart]:
        return [RowPart(rows, hidden[rows], None if low_hidden is None else low_hidden[rows]) for rows in parts]


class Upstream(NamedTuple):
    """Gradients of the caller's loss with respect to the differentiable statistics, (N,) each; None where not needed."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None


# --- arguments and results of torch operators: their schemas are made of these ----------------------------------------

TRANSFORM_ARGUMENTS = "float gain, float limit, bool softcap"  # the fields of softmax.Transform
OPERAND_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_a, Tensor? low_b, float low_scale, "
    f"Tensor targets, {TRANSFORM_ARGUMENTS}, int? ignore_index, str impl"
)
N_OPERANDS = 6  # of OPERAND_ARGUMENTS, before the targets
RANKS = '*, str ranks=""'
"""Keyword of an operator whose targets are indices in the rows of this rank: the name of the process group that shares the
vocabulary; "": one process holds all of it."""
UPSTREAM_ARGUMENTS = ", ".join(f"Tensor? {name}" for name in Upstream._fields)
STATS_RESULTS = ", ".join(f"Tensor {name}" for name in TokenStats._fields)
N_STATS, N_UPSTREAM = len(TokenStats._fields), len(Upstream._fields)
_DIFFERENTIABLE = [TokenStats._fields.index(name) for name in Upstream._fields]


def differentiable(of_stats: Sequence[_T]) -> list[_T]:
    """Select what belongs to the differentiable statistics, in the order of Upstream."""
    return [of_stats[i] for i in _DIFFERENTIABLE]


def not_differentiable(of_stats: Sequence[_T]) -> list[_T]:
    """Select the rest of the results of an operator: other statistics, and what follows them."""
    return [t for i, t in enumerate(of_stats) if i not in _DIFFERENTIABLE]
