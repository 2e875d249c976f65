"""linear_logprob_entropy through one tile of logits: 2NDV FLOP forward, 2NDV + 4NDV backward (the logits once more)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gem_kernels.streaming import (
    Gradients,
    LogitGradient,
    LogitTiles,
    OnlineStats,
    accumulate_gradients,
    statistics,
)
from gem_kernels.types import LogitTransform, Operands, TokenStats, Upstream


def forward(x: Operands, targets: Tensor, transform: LogitTransform) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """The statistics, and the tensors that backward wants to see again."""
    online = statistics(LogitTiles(x, transform), targets)
    return online.finish(), tuple(online)


def backward(
    x: Operands, saved: Sequence[Tensor], upstream: Upstream, transform: LogitTransform, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients in the order of Operands, None where not needed."""
    gradients = Gradients(x, needed, passes=1)
    accumulate_gradients(LogitTiles(x, transform), LogitGradient(OnlineStats(*saved), upstream, transform), gradients)
    return gradients.like(x)
