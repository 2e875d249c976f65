"""logprob_entropy in one Triton kernel each way: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels import rows_triton
from gem_kernels.operands import STATE, Upstream
from gem_kernels.softmax import RowGradient, State, Transform


def forward(logits: Tensor, targets: Tensor, transform: Transform, ignore_index: int | None) -> Tensor:
    """Return the state (len(STATE), B T) fp32 of logits (B, T, V), any strides, and targets (B T,)."""
    values = torch.empty(len(STATE), targets.shape[0], dtype=torch.float32, device=logits.device)
    rows_triton.update(logits, None, State(targets, values), 0, transform, ignore_index)
    return values


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
    gradient = RowGradient.of(State(targets, state), upstream, transform)
    rows_triton.gradient(logits, None, gradient, 0, transform, out, ignore_index)
