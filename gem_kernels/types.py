"""The types of the public API; no logic beyond the range checks of their own fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

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
    """The tensors that a tile of logits is made of: z = hidden W^T + bias + low_hidden low_weight^T."""

    hidden: Tensor  # (N, D), fp32 beside an adapter, else of weight's dtype
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_hidden: Tensor | None  # (N, r) fp32: scale * hidden a^T
    low_weight: Tensor | None  # (V, r)


class Upstream(NamedTuple):
    """Gradients of the caller's loss with respect to the statistics, (N,) each; None where not needed."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
