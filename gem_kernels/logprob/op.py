"""logprob_entropy: the same statistics for logits that exist already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import first_order_only
from gem_kernels.dispatch import choose_impl
from gem_kernels.inputs import autocast_off
from gem_kernels.types import IGNORE_INDEX, Impl, LogitTransform, TokenStats, Upstream
from gem_kernels.validation import check_float, check_targets, check_transform

_IDENTITY = LogitTransform()


def logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    transform: LogitTransform = _IDENTITY,
    ignore_index: int = IGNORE_INDEX,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-probability of the target, entropy and log-sum-exp of every row of logits, all differentiable.

    Equivalent to `log_p = transform(logits.float()).log_softmax(-1)`, then gather, -sum(p log p) and logsumexp, without
    fp32 copies of the logits.

    Args:
        logits: (..., V) bfloat16, float16, float32 (float64: `reference` only), any strides.
        targets: (...) int64 or int32 in [0, V), or `ignore_index`; already shifted.
        transform, ignore_index, impl: as for `linear_logprob_entropy`.

    Returns:
        TokenStats(logprob, entropy, lse), each of the shape of `targets`, fp32 (fp64 for fp64 logits), nats.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    z = check_float("logits", logits)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(z.shape)}")
    check_transform(transform)
    check_targets(targets, z.shape[:-1], z.shape[-1], ignore_index, z)
    chosen = choose_impl("logprob_entropy", impl, z.dtype)
    rows, flat_targets = z.reshape(-1, z.shape[-1]), targets.reshape(-1)
    with autocast_off(z):
        if chosen == "reference":
            from gem_kernels.logprob import reference

            stats = reference.logprob_entropy(rows, flat_targets, transform, ignore_index)
        else:
            stats = TokenStats(*_Logprob.apply(rows, flat_targets, transform, ignore_index))
    return TokenStats(*(s.view(targets.shape) for s in stats))


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        from gem_kernels.logprob import chunked

        targets, ctx.transform, ignore_index = args
        stats, saved = chunked.forward(logits, targets, ctx.transform, ignore_index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *saved)
        return tuple(stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        from gem_kernels.logprob import chunked

        logits, *saved = ctx.saved_tensors
        with autocast_off(logits):
            grad = chunked.backward(logits, saved, Upstream(*upstream), ctx.transform)
        return grad, None, None, None
