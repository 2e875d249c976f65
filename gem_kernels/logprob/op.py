"""logprob_entropy: the statistics of linear_logprob_entropy for logits that exist already."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import define_operator
from gem_kernels.dispatch import choose_impl, implementation
from gem_kernels.inputs import autocast_off
from gem_kernels.logprob import reference
from gem_kernels.operands import (
    N_STATS,
    STATE,
    STATS_RESULTS,
    TRANSFORM_ARGUMENTS,
    UPSTREAM_ARGUMENTS,
    Upstream,
    differentiable,
    not_differentiable,
)
from gem_kernels.softmax import State, Transform
from gem_kernels.tokens import zero_ignored
from gem_kernels.types import IGNORE_INDEX, Impl, LogitTransform, TokenStats
from gem_kernels.validation import check_float, check_targets, check_transform

_IDENTITY = LogitTransform()


def logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    transform: LogitTransform = _IDENTITY,
    ignore_index: int | None = IGNORE_INDEX,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-probability of the target, entropy, log-sum-exp and largest log-probability of every row of logits.

    Equivalent to `log_p = transform(logits.float()).log_softmax(-1)`, then gather, -sum(p log p), logsumexp and amax, without
    fp32 copies of the logits.

    Args:
        logits: (..., V) bfloat16, float16, float32 (float64: `reference` only), any strides; a view of a (B, T, V) batch
            such as logits[:, :-1] is read where it lies.
        targets: (...) int64 or int32 in [0, V), or `ignore_index`; already shifted.
        inplace_backward: the gradient overwrites the logits, so that no second (..., V) tensor exists. For logits that
            are not read again; backward can run once.
        transform, ignore_index, impl: as for `linear_logprob_entropy`.

    Returns:
        TokenStats(logprob, entropy, lse, max_logprob), each of the shape of `targets`, fp32 (fp64 for fp64 logits), nats;
        all but max_logprob are differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    z = check_float("logits", logits)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(z.shape)}")
    check_transform(transform)
    check_targets(targets, z.shape[:-1], z.shape[-1], ignore_index, z)
    chosen = choose_impl("logprob_entropy", impl, z)
    if inplace_backward:
        _check_overwritable(z, chosen)
    flat_targets = targets.reshape(-1).contiguous()
    with autocast_off(z):
        if chosen == "reference":
            rows = z.reshape(-1, z.shape[-1])
            stats = reference.logprob_entropy(rows, flat_targets, transform, ignore_index)
        else:
            # (B, T, V) is as far as the kernels follow strides: a view of any batch such as logits[:, :-1]
            shape = (*[1] * (3 - z.ndim), *z.shape) if z.ndim < 3 else (math.prod(z.shape[:-2]), *z.shape[-2:])
            batch = z.reshape(shape)
            results = logprob(batch, flat_targets, *Transform.of(transform), ignore_index, inplace_backward, chosen)
            stats = TokenStats(*results[:N_STATS])
    return TokenStats(*(s.view(targets.shape) for s in stats))


def _check_overwritable(logits: Tensor, impl: str) -> None:
    if impl == "reference":
        raise ValueError("inplace_backward needs impl 'chunked' or 'triton', the reference keeps its logits")
    base = None if torch.compiler.is_compiling() else logits._base
    if any(t is not None and t.is_leaf and t.requires_grad for t in (logits, base)):
        raise ValueError(
            "inplace_backward would overwrite a leaf with a gradient of its own, or logits that are its view"
        )
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"inplace_backward needs logits whose elements do not overlap, got {tuple(logits.shape)} with strides "
                f"{logits.stride()}"
            )
        reach += (size - 1) * stride


# --- the same as torch operators, which torch.compile keeps in its graph ------------------------------------------------


def _forward(
    logits: Tensor,
    targets: Tensor,
    gain: float,
    limit: float,
    softcap: bool,
    ignore_index: int | None,
    inplace: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    """Return the statistics (N,) fp32 of logits (B, T, V), N = B T, and the state (len(STATE), N) for the backward."""
    state = implementation("logprob", impl).forward(logits, targets, Transform(gain, limit, softcap), ignore_index)
    stats = State(targets, state).finish()
    return (*zero_ignored(stats, targets, ignore_index), state)


def _forward_fake(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shapes = [targets.shape] * N_STATS + [(len(STATE), *targets.shape)]
    return tuple(targets.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _write_gradient(logits: Tensor, args: tuple[Any, ...], out: Tensor) -> None:
    *upstream, state, targets, gain, limit, softcap, ignore_index, impl = args
    transform = Transform(gain, limit, softcap)
    implementation("logprob", impl).backward(logits, targets, state, Upstream(*upstream), transform, ignore_index, out)


def _gradient(logits: Tensor, *args: Any) -> Tensor:
    """Return dL/dlogits (B, T, V), dense, in the dtype of the logits."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(logits, args, out)
    return out


def _gradient_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradient_inplace(logits: Tensor, *args: Any) -> None:
    _write_gradient(logits, args, logits)
    torch.autograd.graph.increment_version(logits)  # autograd raises if another op saved these logits


def _gradient_inplace_fake(*_: Any) -> None:
    return None


_GRADIENT_ARGUMENTS = (
    f"{UPSTREAM_ARGUMENTS}, Tensor state, Tensor targets, {TRANSFORM_ARGUMENTS}, int? ignore_index, str impl"
)

logprob_backward = define_operator(
    "logprob_backward", f"(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor", _gradient, _gradient_fake
)
logprob_backward_ = define_operator(
    "logprob_backward_",
    f"(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()",
    _gradient_inplace,
    _gradient_inplace_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.transform, ctx.inplace, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*not_differentiable(output))
    ctx.save_for_backward(logits, targets, output[-1])


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, state = ctx.saved_tensors  # raises where the logits have been overwritten
    if ctx.inplace and torch.is_grad_enabled():
        raise RuntimeError("logprob_entropy(inplace_backward=True): second-order gradients are not implemented")
    write = logprob_backward_ if ctx.inplace else logprob_backward
    grad = write(logits, *differentiable(upstream), state, targets, *ctx.transform, ctx.impl)
    return (logits if ctx.inplace else grad, *(None,) * 7)


logprob = define_operator(
    "logprob",
    f"(Tensor logits, Tensor targets, {TRANSFORM_ARGUMENTS}, int? ignore_index, bool inplace_backward, str impl) "
    f"-> ({STATS_RESULTS}, Tensor state)",
    _forward,
    _forward_fake,
    _backward,
    _setup_context,
)
