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
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(-1, targets[keep].long()[:, None])[:, 0]
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)  # 0 log 0 = 0, and so is its gradient
    entropy = -(log_p.exp() * finite).sum(-1)
    zero = z.new_zeros(targets.shape)
    return TokenStats(*(zero.masked_scatter(keep, s) for s in (logprob, entropy, z.logsumexp(-1))))
