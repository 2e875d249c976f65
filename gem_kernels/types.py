"""The types of the public API."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    max_logprob: Tensor
    """log p of the likeliest token, nats, without a gradient; equal to `logprob` where the target is the likeliest token"""


class GroupLoss(NamedTuple):
    """The result of linear_group_loss and sega_loss."""

    loss: Tensor
    """scalar fp32, differentiable: the sum over groups"""
    stats: TokenStats
    """statistics of every token from the same pass, detached"""


class Score(NamedTuple):
    """The result of gem_score, each (S,) fp32."""

    score: Tensor
    final_entropy: Tensor
    branch_entropy: Tensor


class LowRank(NamedTuple):
    """A LoRA adapter of the lm_head: logits += scale * (hidden a^T) b^T, with a (r, D), b (V, r)."""

    a: Tensor
    b: Tensor
    scale: float


class VocabShard(NamedTuple):
    """Place of this rank's rows of the lm_head in a vocabulary that is spread over the ranks of a process group."""

    group: ProcessGroup
    start: int
    """index of this rank's first row in the whole vocabulary"""
    total: int
    """V, the rows of all ranks"""

    @staticmethod
    def of(weight: Tensor) -> VocabShard:
        """Read the shard from a DTensor (V, D) placed Shard(0) on a mesh of one dimension.

        `weight.to_local()` holds the rows that the shard describes.

        Raises:
            ValueError: another placement, or not a DTensor.
        """
        if not (hasattr(weight, "device_mesh") and hasattr(weight, "placements")):
            raise ValueError(f"VocabShard.of needs a DTensor, got {type(weight).__name__}")
        from torch.distributed.tensor import Shard

        mesh, placements, total = weight.device_mesh, weight.placements, weight.shape[0]
        if mesh.ndim != 1 or placements != (Shard(0),):
            raise ValueError(
                f"a vocabulary is spread over the ranks by placements (Shard(dim=0),) on a mesh of one dimension, "
                f"got {placements} on {mesh}"
            )
        rows = -(-total // mesh.size())  # of every rank but the last ones, as torch.chunk splits
        (place,) = mesh.get_coordinate()
        return VocabShard(mesh.get_group(), min(place * rows, total), total)


@dataclass(frozen=True)
class LogitTransform:
    """Transform of the logits before the softmax: z' = cap * tanh(scale * z / cap) / temperature.

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
