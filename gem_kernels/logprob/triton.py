"""logprob_entropy in one Triton kernel each way: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels.row_kernels import logit_gradient, update_statistics
from gem_kernels.streaming import LogitGradient, OnlineStats, Transform
from gem_kernels.types import Upstream


def forward(logits: Tensor, targets: Tensor, transform: Transform, ignore_index: int) -> Tensor:
    """logits (B, T, V), any strides; targets (B T,) -> (m, s, t, z_y) (4, B T) fp32."""
    online = OnlineStats(targets, torch.empty(4, targets.shape[0], dtype=torch.float32, device=logits.device))
    update_statistics(logits, None, online, 0, transform, ignore_index)
    return online.values


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
    gradient = LogitGradient.of(OnlineStats(targets, online), upstream, transform)
    logit_gradient(logits, None, gradient, 0, transform, out, ignore_index)
