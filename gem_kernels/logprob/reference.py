"""The definition of logprob_entropy: plain autograd, in fp32 (fp64 for fp64 logits)."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels.definition import counted, token_stats
from gem_kernels.types import LogitTransform, TokenStats


def logprob_entropy(logits: Tensor, targets: Tensor, transform: LogitTransform, ignore_index: int | None) -> TokenStats:
    """Return the statistics (N,) of logits (N, V) and targets (N,)."""
    keep = counted(targets, ignore_index)
    z = logits[keep].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return token_stats(z, targets, keep, transform)
