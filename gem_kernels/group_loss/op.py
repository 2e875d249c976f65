"""linear_group_loss: any loss of a group of sequences and its gradient in one pass; sega_loss is one such loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.autograd import define_operator, first_order_only
from gem_kernels.dispatch import choose_impl, implementation
from gem_kernels.group_loss import reference
from gem_kernels.inputs import LinearInputs, autocast_off, linear_inputs
from gem_kernels.linear_logprob.reference import linear_logprob_entropy as reference_statistics
from gem_kernels.operands import (
    N_OPERANDS,
    N_STATS,
    OPERAND_ARGUMENTS,
    RANKS,
    STATS_RESULTS,
    Operands,
    Upstream,
    differentiable,
)
from gem_kernels.softmax import Transform
from gem_kernels.types import IGNORE_INDEX, GroupLoss, Impl, LogitTransform, LowRank, TokenStats, VocabShard
from gem_kernels.validation import check_cache_bytes, check_offsets, check_seq_weight

LossFn = Callable[[TokenStats, int], Tensor]

_IDENTITY = LogitTransform()


def linear_group_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_groups: Tensor,
    loss_fn: LossFn,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _IDENTITY,
    low_rank: LowRank | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    cache_bytes: int = 1 << 30,
    impl: Impl = "auto",
    shard: VocabShard | None = None,
) -> GroupLoss:
    """Sum over groups of `loss_fn(statistics of the group, group)`, its gradient computed in the same pass.

    Equivalent to::

        stats = linear_logprob_entropy(hidden, weight, targets, ...)
        loss = sum(loss_fn(TokenStats(*(s[cu_groups[g]:cu_groups[g + 1]] for s in stats)), g) for g in range(B))

    but a group's logits are still at hand when its gradient is due, so that the logits GEMM is not done twice. The weights
    inside loss_fn may depend on the entropies of this very pass: detach what is used as a weight, keep what is differentiated.

    Args:
        hidden, weight, targets, bias, transform, low_rank, ignore_index: as for `linear_logprob_entropy`.
        cu_groups: (B+1,) int32 or int64, offsets of the groups into the (flattened) tokens, strictly rising from 0.
        loss_fn: (TokenStats of one group, each (tokens of the group,), group index) -> scalar. Called once per group, in
            order. Its gradient reaches logprob, entropy and lse (max_logprob is a constant): a loss_fn that uses other tensors
            with a gradient is refused.
        cache_bytes: logits kept between forward and backward, in bytes, > 0; a group that needs more is recomputed in
            tiles (8NDV FLOP in place of 6NDV). bf16 on CUDA takes 2 bytes a logit, and is recomputed too where loss_fn
            differentiates entropy or lse; the rest takes 4. Small groups share it, on a CPU up to 256 MiB at a time.
            Where they do not all fit, a bf16 or fp16 weight that needs a gradient has it summed in fp32, 4DV bytes more. So
            if all groups together need no more than cache_bytes + 4DV (on a CPU 256 MiB + 4DV), they are kept together, and
            nothing is summed. `triton` keeps none (8NDV).
        impl: "auto", "reference", "chunked" or "triton".
        shard: as for `linear_logprob_entropy`; cu_groups, cache_bytes and loss_fn are the same on all ranks, and loss_fn gets
            the same statistics on all: it must be deterministic, and must not raise on one of them alone. Slabs are
            planned for an even share of the vocabulary; a rank that holds more may have to recompute.

    Returns:
        GroupLoss(loss, stats): scalar loss; statistics of every token, detached.
        The gradients exist when this returns, in the dtype of their inputs (so in fp16 scale the loss inside loss_fn, not
        behind it), and backward hands them over: it can run once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    # loss_fn is Python: under torch.compile all of this stays outside the graph, in one break.
    run = _outside_graphs if torch.compiler.is_compiling() else _linear_group_loss
    return run(
        hidden, weight, targets, cu_groups, loss_fn, bias, transform, low_rank, ignore_index, cache_bytes, impl, shard
    )


def _linear_group_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_groups: Tensor,
    loss_fn: LossFn,
    bias: Tensor | None,
    transform: LogitTransform,
    low_rank: LowRank | None,
    ignore_index: int | None,
    cache_bytes: int,
    impl: Impl,
    shard: VocabShard | None,
) -> GroupLoss:
    agreed = {"cu_groups": cu_groups, "cache_bytes": cache_bytes, "impl": impl}
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index, shard, **agreed)
    check_offsets("cu_groups", cu_groups, inputs.targets.shape[0], allow_empty=False)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    check_cache_bytes(cache_bytes)
    chosen = choose_impl("linear_group_loss", impl, inputs.operands.hidden)
    if chosen == "reference":
        stats = _reference_statistics(inputs, transform)
        loss = reference.linear_group_loss(stats, cu_groups, partial(_scalar_loss, loss_fn))
        return GroupLoss(loss, TokenStats(*inputs.expand(s.detach() for s in stats)))
    x, my_targets, ignore_index, *_ = inputs.local()
    *tensors, low_scale = x.flatten()
    with autocast_off(hidden):
        loss, *flat_stats = _GroupLoss.apply(
            *tensors,
            low_scale,
            my_targets,
            ignore_index,
            cu_groups.tolist(),
            loss_fn,
            Transform.of(transform),
            cache_bytes,
            torch.is_grad_enabled(),
            chosen,
            inputs.ranks,
            inputs.columns,
        )
    return GroupLoss(loss, TokenStats(*inputs.expand(flat_stats)))


def _outside_graphs(*args: Any) -> GroupLoss:
    return cast(GroupLoss, torch.compiler.disable(_linear_group_loss)(*args))


def sega_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    seq_weight: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = _IDENTITY,
    low_rank: LowRank | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    cache_bytes: int = 1 << 30,
    impl: Impl = "auto",
    shard: VocabShard | None = None,
) -> GroupLoss:
    """GEM's Eq. 2 with known weights: L = - sum_s seq_weight[s] * log pi(s), log pi(s) = sum of its tokens' logprobs.

    Args:
        cu_seqlens: (S+1,) int32 or int64, offsets of the sequences into the (flattened) tokens, strictly rising from 0.
        seq_weight: (S,) floating, finite; constants (centred advantages, already divided by the number of groups).
        The rest as for `linear_group_loss`. The weights being known, the cache is filled token by token, so no sequence
        is too long for it: 6NDV FLOP, 4NDV with a frozen head, wherever cache_bytes holds the logits of a token.

    Returns:
        GroupLoss(loss, stats), as `linear_group_loss`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    agreed = {"cu_seqlens": cu_seqlens, "seq_weight": seq_weight, "cache_bytes": cache_bytes, "impl": impl}
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index, shard, **agreed)
    total = inputs.targets.shape[0]
    check_offsets("cu_seqlens", cu_seqlens, total, allow_empty=False)
    w = check_seq_weight(seq_weight, cu_seqlens.shape[0] - 1, hidden)
    check_cache_bytes(cache_bytes)
    token_weight = w.repeat_interleave(cu_seqlens.diff().to(w.device), output_size=total)
    chosen = choose_impl("sega_loss", impl, inputs.operands.hidden)
    if chosen == "reference":
        stats = _reference_statistics(inputs, transform)
        loss = -(token_weight.to(stats.logprob.dtype) * stats.logprob).sum()
        return GroupLoss(loss, TokenStats(*inputs.expand(s.detach() for s in stats)))
    x, my_targets, ignore_index, *_ = inputs.local()
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in x.flatten()[:5]]
    with autocast_off(hidden):
        loss, *results = weighted_logprob(
            *x.flatten(),
            my_targets,
            *Transform.of(transform),
            ignore_index,
            chosen,
            token_weight.float(),
            cache_bytes,
            needed,
            ranks=inputs.ranks,
            columns=inputs.columns,
        )
    return GroupLoss(loss, TokenStats(*inputs.expand(results[:N_STATS])))


def _reference_statistics(inputs: LinearInputs, transform: LogitTransform) -> TokenStats:
    """Return the statistics (M,) of the flattened tokens over the whole vocabulary, with their graph."""
    x, targets, ignore_index, *_ = inputs.whole()
    with autocast_off(x.hidden):
        return reference_statistics(x.hidden, x.weight, targets, x.bias, transform, x.low_rank, ignore_index)


# --- sega_loss as a torch operator, which torch.compile keeps in its graph -----------------------------------------------


def _forward(*args: Any, ranks: str = "", columns: int = 0) -> tuple[Tensor, ...]:
    """Return -Σ token_weight logprob, the statistics, and the gradients of the loss (empty where not needed)."""
    *operands, targets, gain, limit, softcap, ignore_index, impl, token_weight, cache_bytes, needed = args
    x, total = Operands.unflatten(*operands), targets.shape[0]
    columns, transform = columns or x.weight.shape[0], Transform(gain, limit, softcap)
    backend = implementation("group_loss", impl)
    pieces = backend.pieces(x, transform, cache_bytes, needed, columns, total)  # they fit, whatever the sequences are

    def piece_loss(stats: TokenStats, piece: int) -> tuple[Tensor, Upstream]:
        weights = token_weight[pieces[piece] : pieces[piece + 1]]
        return -(weights * stats.logprob).sum(), Upstream(logprob=-weights)

    loss, stats, grads = backend.forward_backward(
        x,
        targets,
        ignore_index,
        pieces,
        piece_loss,
        transform,
        cache_bytes,
        needed,
        ranks,
        columns,
    )
    return (loss, *stats, *(loss.new_empty(0) if g is None else g for g in grads))


def _forward_fake(*args: Any, **_: Any) -> tuple[Tensor, ...]:
    targets, needed = args[N_OPERANDS], args[-1]
    stats = (targets.new_empty(targets.shape, dtype=torch.float32) for _ in TokenStats._fields)
    grads = (
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if need
        else targets.new_empty(0, dtype=torch.float32)
        for t, need in zip(args, needed, strict=False)
    )
    return (targets.new_empty((), dtype=torch.float32), *stats, *grads)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.needed, ctx.n_inputs = inputs[-1], len(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.gradients = output[1 + N_STATS :]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if (
        torch.is_grad_enabled()
    ):  # create_graph=True: they were computed in forward and have no graph, so a second derivative would silently be 0
        raise RuntimeError("sega_loss: second-order gradients are not implemented")
    grads = _hand_over(
        ctx, [g if need else None for g, need in zip(ctx.gradients or (), ctx.needed, strict=False)], grad_loss
    )
    return (*grads, *(None,) * (ctx.n_inputs - len(grads)))


weighted_logprob = define_operator(
    "weighted_logprob",
    f"({OPERAND_ARGUMENTS}, Tensor token_weight, int cache_bytes, bool[] needed, {RANKS}, int columns=0) -> "
    f"(Tensor loss, {STATS_RESULTS}, Tensor hidden, Tensor weight, Tensor bias, Tensor low_a, Tensor low_b)",
    _forward,
    _forward_fake,
    _backward,
    _setup_context,
)


def _scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by factor (), in place. Usually that is 1: then a pass over dweight would be for nothing."""
    if compat.on_triton(gradient.device) and gradient.is_contiguous():
        from gem_kernels.scale_triton import scale_

        scale_(gradient, factor)
    elif gradient.device.type != "cpu" or factor.item() != 1:  # on the CPU alone nothing waits for the number
        gradient.mul_(factor)


def _scale_gradient_fake(*_: Any) -> None:
    return None


scale_gradient_ = define_operator(
    "scale_gradient_", "(Tensor(a!) gradient, Tensor factor) -> ()", _scale_gradient_, _scale_gradient_fake
)


def _hand_over(ctx: Any, gradients: Sequence[Tensor | None], grad_loss: Tensor | None) -> list[Tensor | None]:
    """Return the gradients made in forward, scaled in place by the gradient of the loss.

    In place, so that only one dweight exists; backward can therefore run once.
    """
    if ctx.gradients is None:
        raise RuntimeError("backward of a group loss ran before; its gradients were handed over, call the op again")
    ctx.gradients = None
    if grad_loss is None:
        return [None] * len(gradients)
    for g in gradients:
        if g is not None:
            scale_gradient_(g, grad_loss)
    return list(gradients)


class _GroupLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *operands, targets, ignore_index, cu_groups, loss_fn, transform, cache_bytes, grad_enabled, impl = args[:-2]
        needed = [grad_enabled and need for need in ctx.needs_input_grad[:5]]

        def loss_and_upstream(stats: TokenStats, group: int) -> tuple[Tensor, Upstream]:
            return _differentiate(loss_fn, stats, group, any(needed))

        loss, stats, ctx.gradients = implementation("group_loss", impl).forward_backward(
            Operands.unflatten(*operands),
            targets,
            ignore_index,
            cu_groups,
            loss_and_upstream,
            transform,
            cache_bytes,
            needed,
            *args[-2:],
        )
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return (loss, *stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_hand_over(ctx, ctx.gradients, grad_loss), *(None,) * 11)


def _scalar_loss(loss_fn: LossFn, stats: TokenStats, group: int) -> Tensor:
    loss = loss_fn(stats, group)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {came} for group {group}")
    return loss.reshape(())


def _differentiate(loss_fn: LossFn, stats: TokenStats, group: int, need_grad: bool) -> tuple[Tensor, Upstream]:
    """Return loss_fn's value and its gradient with respect to the group's statistics."""
    with torch.set_grad_enabled(need_grad):
        leaves = TokenStats(*(s.detach() for s in stats))
        inputs = [s.requires_grad_(need_grad) for s in differentiable(leaves)]
        loss = _scalar_loss(loss_fn, leaves, group)
        if not loss.requires_grad:
            return loss, Upstream()
        _refuse_other_leaves(loss, leaves, group)
        return loss.detach(), Upstream(*torch.autograd.grad(loss, inputs, allow_unused=True))


def _refuse_other_leaves(loss: Tensor, leaves: TokenStats, group: int) -> None:
    """Raise if loss_fn depends on another tensor that requires a gradient, because that gradient would be lost."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only AccumulateGrad nodes have one
        if leaf is not None and not any(leaf is mine for mine in leaves):
            raise ValueError(
                f"loss_fn of group {group} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is not "
                "one of its statistics; that gradient would be lost: detach it, or add its term outside"
            )
        stack.extend(parent for parent, _ in node.next_functions)
