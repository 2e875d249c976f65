"""The definition of the statistics of a token, for the references of the ops; no implementation uses it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gem_kernels.types import LogitTransform, TokenStats


def counted(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Return (N,) bool: true for the tokens whose target is not ignored, all of them where ignore_index is None."""
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def token_stats(logits: Tensor, targets: Tensor, keep: Tensor, transform: LogitTransform) -> TokenStats:
    """Return the statistics (N,) of raw logits (K, V) fp32 or fp64 of the K kept tokens; ignored tokens get 0.

    Args:
        targets, keep: (N,); keep is true for K of them.
    """
    z = transform.scale * logits
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature

    # Shifted by the maximum, all terms are of one sign and nothing cancels. 0 log 0 = 0, and so is its gradient.
    maximum = z.detach().amax(-1, keepdim=True)
    d = z - maximum
    e = d.exp()
    total, weighted = e.sum(-1), (e * d.masked_fill(d == -math.inf, 0.0)).sum(-1)
    log_total = total.log()
    stats = TokenStats(
        logprob=d.gather(-1, targets[keep].long()[:, None])[:, 0] - log_total,
        entropy=log_total - weighted / total,
        lse=maximum[:, 0] + log_total,
        max_logprob=-log_total.detach(),
    )
    zero = logits.new_zeros(targets.shape)
    return TokenStats(*(zero.masked_scatter(keep, s) for s in stats))
