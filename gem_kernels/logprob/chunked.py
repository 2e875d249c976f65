"""logprob_entropy, a few rows at a time: one read forward, one read and one write backward, fp32 only in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gem_kernels.streaming import LogitGradient, OnlineStats, apply_transform_, ranges
from gem_kernels.tiles import CHUNKED
from gem_kernels.types import LogitTransform, TokenStats, Upstream


def _blocks(kept: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the rows that are not ignored, and where those rows stand."""
    for rows in ranges(kept.shape[0], max(1, CHUNKED.block // columns)):
        yield rows, kept[rows]


def _transformed(logits: Tensor, at: Tensor, transform: LogitTransform) -> Tensor:
    return apply_transform_(logits.index_select(0, at).float(), transform)


def forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, ignore_index: int
) -> tuple[TokenStats, tuple[Tensor, ...]]:
    """logits (N, V) -> statistics (N,), and the tensors that backward wants to see again."""
    kept = (targets != ignore_index).nonzero().squeeze(1)
    online = OnlineStats.start(targets[kept])
    full = [torch.zeros(targets.shape, device=logits.device) for _ in TokenStats._fields]
    for rows, at in _blocks(kept, logits.shape[1]):
        online.update(_transformed(logits, at, transform), rows, 0)
    for zeros, values in zip(full, online.finish(), strict=True):
        zeros[kept] = values
    return TokenStats(*full), (kept, *online)


def backward(logits: Tensor, saved: Sequence[Tensor], upstream: Upstream, transform: LogitTransform) -> Tensor:
    """dL/dlogits (N, V) in the dtype of the logits, 0 in ignored rows."""
    kept, *online = saved
    gradient = LogitGradient(
        OnlineStats(*online), Upstream(*(None if g is None else g[kept] for g in upstream)), transform
    )
    dlogits = torch.zeros_like(logits)
    for rows, at in _blocks(kept, logits.shape[1]):
        dlogits[at] = gradient.apply_(_transformed(logits, at, transform), rows, 0).to(logits.dtype)
    return dlogits
