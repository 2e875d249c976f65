"""logprob_entropy, a few rows at a time: one read forward, one read and one write backward, fp32 only in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gem_kernels.inputs import Kept
from gem_kernels.streaming import LogitGradient, OnlineStats, Transform, ranges
from gem_kernels.tiles import CHUNKED
from gem_kernels.types import Upstream


def _blocks(logits: Tensor, at: Tensor, transform: Transform) -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor]]:
    """Blocks of the kept rows `at` (N,): which of them, where they stand in the batch, their transformed logits in fp32."""
    per_batch, columns = logits.shape[1:]
    for rows in ranges(at.shape[0], max(1, CHUNKED.block // columns)):
        where = at[rows] // per_batch, at[rows] % per_batch
        yield rows, where, transform.apply_(logits[where].float())


def forward(logits: Tensor, targets: Tensor, transform: Transform, ignore_index: int) -> Tensor:
    """logits (B, T, V), any strides; targets (B T,) -> (m, s, t, z_y) (4, B T) fp32."""
    kept = Kept.compacted(targets, ignore_index)
    online = OnlineStats.start(kept.rows(targets))
    for rows, _, z in _blocks(logits, kept.positions(), transform):
        online.rows(rows).update(z, 0)
    return kept.put(online.values.t()).t().contiguous()


def backward(
    logits: Tensor,
    targets: Tensor,
    online: Tensor,
    upstream: Upstream,
    transform: Transform,
    ignore_index: int,
    out: Tensor,
) -> None:
    """out = dL/dlogits (B, T, V), 0 in ignored rows; `out` may be the logits."""
    kept = Kept.compacted(targets, ignore_index)
    stats = OnlineStats(kept.rows(targets), kept.rows(online.t()).t())
    gradient = LogitGradient.of(stats, kept.upstream(upstream), transform)
    for rows, where, z in _blocks(logits, kept.positions(), transform):
        out[where] = gradient.rows(rows).apply_(z, 0, transform).to(out.dtype)
    out[kept.ignored.view(out.shape[:2])] = 0
