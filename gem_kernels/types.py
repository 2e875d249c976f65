"""The types of the public API; no logic beyond the range checks of their own fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORE_INDEX = -100
"""Targets of this value take no part: statistics 0, no gradient (the convention of torch.nn.functional.cross_entropy)."""

Impl = Literal["auto", "reference", "chunked", "triton"]


class TokenStats(NamedTuple):
    """Statistics of N next-token distributions, each of the shape of `targets` and fp32 (fp64 for fp64 inputs)."""

    logprob: Tensor
    """log p of the target token, nats, <= 0"""
    entropy: Tensor
    """Shannon entropy of the distribution, nats, in [0, log V]"""
    lse: Tensor
    """log sum exp of the (transformed) logits"""


class MaxTokenStats(NamedTuple):
    """TokenStats, and how likely the likeliest token is; what linear_logprob_entropy_max returns."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    max_logprob: Tensor
    """log p of the likeliest token, nats, no gradient; `logprob` equals it where the target is (one of) the likeliest"""


class GroupLoss(NamedTuple):
    """What linear_group_loss and sega_loss return."""

    loss: Tensor
    """scalar fp32, differentiable: the sum over groups"""
    stats: TokenStats
    """statistics of every token from the same pass, detached"""
    dropped_mass: Tensor | None = None
    """probability mass left out of the backward; None: the backward is exact"""


class Score(NamedTuple):
    """What gem_score returns, each (S,) fp32."""

    score: Tensor
    final_entropy: Tensor
    branch_entropy: Tensor


class LowRank(NamedTuple):
    """A LoRA adapter of the lm_head: logits += scale * (hidden a^T) b^T, with a (r, D), b (V, r)."""

    a: Tensor
    b: Tensor
    scale: float


class VocabShard(NamedTuple):
    """Where this rank's rows of the lm_head stand in a vocabulary that is spread over the ranks of a process group."""

    group: ProcessGroup
    start: int
    """index of this rank's first row in the whole vocabulary"""
    total: int
    """V, the rows of all ranks"""

    @staticmethod
    def of(weight: Tensor) -> VocabShard:
        """Of a DTensor (V, D) placed Shard(0) on a mesh of one dimension; `weight.to_local()` are the rows meant.

        Raises:
            ValueError: another placement, or not a DTensor.
        """
        from gem_kernels.vocab_parallel import shard_of

        return shard_of(weight)


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits before the softmax: z' = cap * tanh(scale * z / cap) / temperature.

    Args:
        scale: multiplies the raw logits (Cohere logit_scale, 1 / Granite logits_scaling); finite and not 0.
        softcap: bound of the tanh (Gemma 2: 30); None: no tanh.
        temperature: divides last; > 0. Leave it at 1 to score the model itself rather than a sampler.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"LogitTransform.scale must be finite and not 0, got {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"LogitTransform.softcap must be None or a finite number > 0, got {self.softcap}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"LogitTransform.temperature must be finite and > 0, got {self.temperature}")


class Operands(NamedTuple):
    """What logits are made of: z = hidden W^T + bias + scale (hidden a^T) b^T. The dtypes are the caller's."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None

    def flatten(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
        """As the arguments of a torch operator, which knows no tuples of tensors and numbers."""
        return (self.hidden, self.weight, self.bias, *(self.low_rank or (None, None, 1.0)))

    @staticmethod
    def unflatten(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Operands:
        return Operands(hidden, weight, bias, None if a is None or b is None else LowRank(a, b, scale))

    def gradient_dtype(self) -> torch.dtype:
        """Of dL/dlogits as an operand of the gradient GEMMs: that of the operands, the widest where an adapter differs."""
        return self.weight.dtype if self.low_rank is None else self.low_rank.a.dtype

    def columns(self, cols: slice) -> Operands:
        """The same for a slice of the vocabulary."""
        low = self.low_rank
        return Operands(
            self.hidden,
            self.weight[cols],
            None if self.bias is None else self.bias[cols],
            None if low is None else low._replace(b=low.b[cols]),
        )


class Upstream(NamedTuple):
    """Gradients of the caller's loss with respect to the statistics, (N,) each; None where not needed."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
