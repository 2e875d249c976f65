"""linear_logprob_entropy: hidden, weight -> log-probability, entropy, lse of every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import first_order_only
from gem_kernels.dispatch import choose_impl
from gem_kernels.inputs import autocast_off, linear_inputs
from gem_kernels.types import IGNORE_INDEX, Impl, LogitTransform, LowRank, Operands, TokenStats, Upstream

_IDENTITY = LogitTransform()


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _IDENTITY,
    low_rank: LowRank | None = None,
    ignore_index: int = IGNORE_INDEX,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-probability of the target, entropy and log-sum-exp of every next-token distribution, all differentiable.

    Equivalent to, without the (..., V) tensors::

        z = transform(hidden.float() @ weight.float().T + bias)        # one bf16 rounding less than F.linear
        log_p = z.log_softmax(-1)
        TokenStats(log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1))

    Args:
        hidden: (..., D) bfloat16, float16, float32 (float64: `reference` only); the last hidden states.
        weight: (V, D) of the same dtype and device; the lm_head.
        targets: (...) int64 or int32 in [0, V), or `ignore_index`; already shifted: targets[t] is what hidden[t] predicts.
        bias: (V,) of the same dtype, or None.
        transform: scale, softcap and temperature applied to the logits.
        low_rank: LoRA factors of the lm_head, in the dtype of `hidden` or float32; computed in fp32.
        ignore_index: tokens with this target give 0, get no gradient and cost nothing.
        impl: "auto", "reference", "chunked" or "triton"; only "auto" chooses.

    Returns:
        TokenStats(logprob, entropy, lse), each of the shape of `targets`, fp32 (fp64 for fp64 inputs), nats.
        Gradients go to hidden, weight, bias, low_rank.a and low_rank.b; what needs none is not computed.
        Second-order gradients raise.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Target values are checked on CPU, and
            elsewhere when GEM_KERNELS_CHECK=1; unchecked, a target out of range gives NaN.

    Gradient of a row, for upstream a = dL/dlogprob, b = dL/dentropy, c = dL/dlse:
    dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H) + c p_v.
    """
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index)
    with autocast_off(hidden):
        match choose_impl("linear_logprob_entropy", impl, inputs.hidden.dtype):
            case "reference":
                from gem_kernels.linear_logprob import reference

                stats = reference.linear_logprob_entropy(
                    inputs.hidden, inputs.weight, inputs.targets, inputs.bias, transform, inputs.low_rank, ignore_index
                )
                return TokenStats(*(s.view(inputs.batch_shape) for s in stats))
            case _:
                operands, kept_targets, kept = inputs.compact()
                return inputs.expand(TokenStats(*_LinearLogprob.apply(*operands, kept_targets, transform)), kept)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        from gem_kernels.linear_logprob import chunked

        *operands, targets, transform = args
        stats, saved = chunked.forward(Operands(*operands), targets, transform)
        ctx.set_materialize_grads(False)
        ctx.transform = transform
        ctx.save_for_backward(*operands, *saved)
        return tuple(stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        from gem_kernels.linear_logprob import chunked

        operands, saved = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:]
        with autocast_off(operands.hidden):
            grads = chunked.backward(operands, saved, Upstream(*upstream), ctx.transform, ctx.needs_input_grad[:5])
        return (*grads, None, None)
