"""linear_logprob_entropy: log-probability, entropy, lse and largest log-probability of every token from (hidden, weight)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import define_operator
from gem_kernels.dispatch import choose_impl, implementation
from gem_kernels.inputs import autocast_off, linear_inputs
from gem_kernels.linear_logprob import reference
from gem_kernels.operands import (
    N_OPERANDS,
    N_STATS,
    N_UPSTREAM,
    OPERAND_ARGUMENTS,
    RANKS,
    STATE,
    STATS_RESULTS,
    UPSTREAM_ARGUMENTS,
    Operands,
    Upstream,
    differentiable,
    not_differentiable,
)
from gem_kernels.ranks import merge_ranks_
from gem_kernels.softmax import State, Transform
from gem_kernels.tokens import zero_ignored
from gem_kernels.types import IGNORE_INDEX, Impl, LogitTransform, LowRank, TokenStats, VocabShard

_IDENTITY = LogitTransform()


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _IDENTITY,
    low_rank: LowRank | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    impl: Impl = "auto",
    shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probability of the target, entropy, log-sum-exp and largest log-probability of every next-token distribution.

    Equivalent to, without the (..., V) tensors::

        z = transform(hidden.float() @ weight.float().T + bias)        # one bf16 rounding less than F.linear
        log_p = z.log_softmax(-1)
        logprob, entropy = log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
        TokenStats(logprob, entropy, z.logsumexp(-1), log_p.amax(-1).detach())

    Args:
        hidden: (..., D) bfloat16, float16, float32 (float64: `reference` only); the last hidden states.
        weight: (V, D) of the same dtype and device; the lm_head.
        targets: (...) int64 or int32 in [0, V), or `ignore_index`; already shifted: targets[t] is what hidden[t] predicts.
        bias: (V,) of the same dtype, or None.
        transform: scale, softcap and temperature applied to the logits.
        low_rank: LoRA factors of the lm_head, in the dtype of `hidden` or float32; computed in fp32.
        ignore_index: tokens with this target give 0 and get no gradient. They cost nothing, except in `chunked` on CUDA, which
            would have to wait for their number and computes them instead. None: no token is ignored. For callers that left
            them out already: nothing is looked for, sorted or read back from the device.
        impl: "auto", "reference", "chunked" or "triton"; only "auto" chooses.
        shard: where the rows of `weight` stand in a vocabulary that is spread over the ranks of a process group (tensor
            parallelism). Each rank passes its own rows of weight, bias and low_rank.b, and the same hidden, targets and
            low_rank.a; targets are indices in the whole vocabulary. All ranks call forward and backward together, and the
            upstream gradients must be the same on all. Each gets the statistics over the whole vocabulary, the gradients
            of its own rows, and those of hidden and low_rank.a summed over the ranks (in fp32, before they are rounded), so
            nothing is left to reduce. Where values are checked, the ranks check together and refuse together.
            A DTensor weight placed Shard(0) beside a Replicate() hidden says the same without a shard: pass bias and
            low_rank.b alike, targets and low_rank.a as Replicate() or plain; the statistics are plain tensors.

    Returns:
        TokenStats(logprob, entropy, lse, max_logprob), each of the shape of `targets`, fp32 (fp64 for fp64 inputs), nats.
        The prediction is right where logprob == max_logprob, which has no gradient. Those of the other three
        go to hidden, weight, bias, low_rank.a and low_rank.b; what needs none is not computed.
        Second-order gradients raise.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Target values are checked on CPU, and
            elsewhere when GEM_KERNELS_CHECK=1; unchecked, a target out of range gives NaN.

    Gradient of a row, for upstream a = dL/dlogprob, b = dL/dentropy, c = dL/dlse:
    dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H) + c p_v.
    """
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index, shard, impl=impl)
    chosen = choose_impl("linear_logprob_entropy", impl, inputs.operands.hidden)
    with autocast_off(hidden):
        if chosen == "reference":
            x, targets, ignore_index, *_ = inputs.whole()
            stats = reference.linear_logprob_entropy(
                x.hidden, x.weight, targets, x.bias, transform, x.low_rank, ignore_index
            )
        else:
            x, targets, ignore_index, *_ = inputs.local()
            settings = (*Transform.of(transform), ignore_index, chosen)
            *columns, _ = linear_logprob(*x.flatten(), targets, *settings, ranks=inputs.ranks)
            stats = TokenStats(*columns)
        return TokenStats(*inputs.expand(stats))


# --- the same as torch operators, which torch.compile keeps in its graph ------------------------------------------------


def _forward(*args: Any, ranks: str = "") -> tuple[Tensor, ...]:
    """Return the statistics (M,) fp32 of every token, and the state (len(STATE), M) for the backward."""
    *operands, targets, gain, limit, softcap, ignore_index, impl = args
    transform = Transform(gain, limit, softcap)
    values = implementation("linear_logprob", impl).forward(
        Operands.unflatten(*operands), targets, transform, ignore_index
    )
    state = State(targets, values)
    merge_ranks_(state, ranks)
    return (*zero_ignored(state.finish(), targets, ignore_index), values)


def _forward_fake(*args: Any, ranks: str = "") -> tuple[Tensor, ...]:
    targets = args[N_OPERANDS]
    shapes = [targets.shape] * N_STATS + [(len(STATE), *targets.shape)]
    return tuple(targets.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _gradients(*args: Any, ranks: str = "") -> list[Tensor]:
    """Return those gradients of (hidden, weight, bias, low_a, low_b) that are needed, given those of the statistics."""
    upstream, state, arguments = Upstream(*args[:N_UPSTREAM]), args[N_UPSTREAM], args[N_UPSTREAM + 1 :]
    *operands, targets, gain, limit, softcap, ignore_index, impl, needed = arguments
    x, transform = Operands.unflatten(*operands), Transform(gain, limit, softcap)
    backward = implementation("linear_logprob", impl).backward
    with autocast_off(state):  # backward may run inside autocast when forward did not
        grads = backward(x, targets, state, upstream, transform, ignore_index, needed, ranks)
    return [g for g in grads if g is not None]


def _gradients_fake(*args: Any, ranks: str = "") -> list[Tensor]:
    pairs = zip(args[N_UPSTREAM + 1 :], args[-1], strict=False)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in pairs if need]


linear_logprob_backward = define_operator(
    "linear_logprob_backward",
    f"({UPSTREAM_ARGUMENTS}, Tensor state, {OPERAND_ARGUMENTS}, bool[] needed, {RANKS}) -> Tensor[]",
    _gradients,
    _gradients_fake,
)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.keywords = keyword_only_inputs
    *operands, ctx.low_scale = inputs[:N_OPERANDS]
    targets, *ctx.rest = inputs[N_OPERANDS:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*not_differentiable(output))
    ctx.save_for_backward(*operands, targets, output[-1])


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *operands, targets, state = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[: len(operands)])
    arguments = (*operands, ctx.low_scale, targets, *ctx.rest, needed)
    grads = iter(linear_logprob_backward(*differentiable(upstream), state, *arguments, **ctx.keywords))
    return (*(next(grads) if need else None for need in needed), *(None,) * (2 + len(ctx.rest)))


linear_logprob = define_operator(
    "linear_logprob",
    f"({OPERAND_ARGUMENTS}, {RANKS}) -> ({STATS_RESULTS}, Tensor state)",
    _forward,
    _forward_fake,
    _backward,
    _setup_context,
)
