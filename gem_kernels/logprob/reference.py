"""The definition of logprob_entropy: plain autograd, in fp32 (fp64 for fp64 logits)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gem_kernels.types import LogitTransform, TokenStats


def logprob_entropy(logits: Tensor, targets: Tensor, transform: LogitTransform, ignore_index: int) -> TokenStats:
    """logits (N, V), targets (N,) -> statistics (N,)."""
    keep = targets != ignore_index
    z = logits[keep].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature

    # Shifted by the maximum, all terms are of one sign and nothing cancels. 0 log 0 = 0, and so is its gradient.
    maximum = z.detach().amax(-1, keepdim=True)
    d = z - maximum
    e = d.exp()
    total, weighted = e.sum(-1), (e * d.masked_fill(d == -math.inf, 0.0)).sum(-1)
    log_total = total.log()
    logprob = d.gather(-1, targets[keep].long()[:, None])[:, 0] - log_total
    entropy = log_total - weighted / total
    lse = maximum[:, 0] + log_total

    zero = z.new_zeros(targets.shape)
    return TokenStats(*(zero.masked_scatter(keep, s) for s in (logprob, entropy, lse)))
