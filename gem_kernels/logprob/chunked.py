"""logprob_entropy, a few rows at a time: one read forward, one read and one write backward, fp32 only in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gem_kernels import rows_torch
from gem_kernels.operands import Upstream
from gem_kernels.plan import ranges
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import CHUNKED
from gem_kernels.tokens import Kept


def _blocks(logits: Tensor, kept: Kept, transform: Transform) -> Iterator[tuple[slice, tuple[Tensor, Tensor], Tensor]]:
    """Yield blocks of the kept rows: the rows, their places in the batch, their transformed logits in fp32."""
    batch, per_batch, columns = logits.shape
    at = torch.arange(batch * per_batch, device=logits.device) if kept.at is None else kept.at
    for rows in ranges(at.shape[0], max(1, CHUNKED.block // columns)):
        where = at[rows] // per_batch, at[rows] % per_batch
        yield rows, where, rows_torch.prepare(logits[where].float(), None, transform)


def forward(logits: Tensor, targets: Tensor, transform: Transform, ignore_index: int | None) -> Tensor:
    """Return the state (len(STATE), B T) fp32 of logits (B, T, V), any strides, and targets (B T,)."""
    kept = Kept.compacted(targets, ignore_index)
    state = State.fresh(kept.rows(targets))
    for rows, _, z in _blocks(logits, kept, transform):
        rows_torch.update(z, None, state.rows(rows), 0, transform)
    return kept.put(state.values.t()).t().contiguous()


def backward(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    upstream: Upstream,
    transform: Transform,
    ignore_index: int | None,
    out: Tensor,
) -> None:
    """Write dL/dlogits (B, T, V) to `out`, which may be the logits; 0 in ignored rows."""
    kept = Kept.compacted(targets, ignore_index)
    gradient = RowGradient.of(kept.state(targets, state), kept.upstream(upstream), transform)
    for rows, where, z in _blocks(logits, kept, transform):
        out[where] = rows_torch.gradient(z, None, gradient.rows(rows), 0, transform, z).to(out.dtype)
    if kept.ignored is not None:
        out[kept.ignored.view(out.shape[:2])] = 0
