"""The definition of linear_logprob_entropy: full logits, plain autograd, in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gem_kernels.types import LogitTransform, LowRank, MaxTokenStats


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    low_rank: LowRank | None,
    ignore_index: int,
) -> MaxTokenStats:
    """hidden (N, D), weight (V, D), targets (N,) -> statistics (N,)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = targets != ignore_index
    h = hidden[keep].to(dtype)
    z = h @ weight.to(dtype).T
    if low_rank is not None:
        z = z + low_rank.scale * (h @ low_rank.a.to(dtype).T) @ low_rank.b.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
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
    max_logprob = -log_total.detach()

    zero = h.new_zeros(targets.shape)
    return MaxTokenStats(*(zero.masked_scatter(keep, s) for s in (logprob, entropy, lse, max_logprob)))
