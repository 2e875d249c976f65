"""linear_logprob_entropy through one tile of logits: 2NDV FLOP forward, 2NDV + 4NDV backward (the logits once more).

On CUDA nothing is read back from the device, so ignored tokens are computed and come out as zeros; elsewhere they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gem_kernels import compat
from gem_kernels.inputs import Kept
from gem_kernels.streaming import (
    Gradients,
    LogitGradient,
    LogitTiles,
    OnlineStats,
    Transform,
    accumulate_gradients,
    statistics,
)
from gem_kernels.types import Operands, Upstream


def _kept(targets: Tensor, ignore_index: int) -> Kept:
    return (Kept.masked if compat.on_triton(targets.device) else Kept.compacted)(targets, ignore_index)


def forward(x: Operands, targets: Tensor, transform: Transform, ignore_index: int) -> Tensor:
    """(m, s, t, z_y) of every token (4, M) fp32; what stands at ignored tokens means nothing."""
    kept = _kept(targets, ignore_index)
    tiles = LogitTiles(x._replace(hidden=kept.take(x.hidden)), transform)
    online = statistics(tiles, kept.rows(targets)).values
    return online if kept.at is None else kept.put(online.t()).t().contiguous()


def backward(
    x: Operands,
    targets: Tensor,
    online: Tensor,
    upstream: Upstream,
    transform: Transform,
    ignore_index: int,
    needed: Sequence[bool],
    ranks: str,
) -> list[Tensor | None]:
    """Gradients (hidden, weight, bias, a, b), None where not needed."""
    kept = _kept(targets, ignore_index)
    mine = x._replace(hidden=kept.take(x.hidden))
    tiles, gradients = LogitTiles(mine, transform), Gradients(mine, needed, passes=1)
    stats = OnlineStats(kept.rows(targets), kept.rows(online.t()).t().contiguous())
    accumulate_gradients(tiles, LogitGradient.of(stats, kept.upstream(upstream), tiles.transform), gradients)
    dhidden, *others = gradients.finish(ranks)
    return [None if dhidden is None else kept.put(dhidden), *others]
