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

    log_p = z.log_softmax(-1)
    logprob = log_p.gather(-1, targets[keep].long()[:, None])[:, 0]
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)  # 0 log 0 = 0, and so is its gradient
    entropy = -(log_p.exp() * finite).sum(-1)
    lse = z.logsumexp(-1)
    max_logprob = log_p.detach().amax(-1)

    zero = h.new_zeros(targets.shape)
    return MaxTokenStats(*(zero.masked_scatter(keep, s) for s in (logprob, entropy, lse, max_logprob)))
