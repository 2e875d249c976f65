"""The definition of linear_logprob_entropy: full logits, plain autograd, in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels.definition import counted, token_stats
from gem_kernels.types import LogitTransform, LowRank, TokenStats


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    low_rank: LowRank | None,
    ignore_index: int | None,
) -> TokenStats:
    """Return the statistics (N,) of hidden (N, D), weight (V, D) and targets (N,)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = counted(targets, ignore_index)
    h = hidden[keep].to(dtype)
    z = h @ weight.to(dtype).T
    if low_rank is not None:
        z = z + low_rank.scale * (h @ low_rank.a.to(dtype).T) @ low_rank.b.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return token_stats(z, targets, keep, transform)
