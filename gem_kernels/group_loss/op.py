"""linear_group_loss: any loss of a group of sequences and its gradient in one pass; sega_loss is one such loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import first_order_only
from gem_kernels.dispatch import choose_impl
from gem_kernels.inputs import autocast_off, linear_inputs
from gem_kernels.linear_logprob.op import linear_logprob_entropy
from gem_kernels.types import IGNORE_INDEX, GroupLoss, Impl, LogitTransform, LowRank, Operands, TokenStats, Upstream
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
    ignore_index: int = IGNORE_INDEX,
    cache_bytes: int = 1 << 30,
    impl: Impl = "auto",
) -> GroupLoss:
    """Sum over groups of `loss_fn(statistics of the group, group)`, its gradient computed in the same pass.

    Equivalent to::

        stats = linear_logprob_entropy(hidden, weight, targets, ...)
        loss = sum(loss_fn(TokenStats(*(s[cu_groups[g]:cu_groups[g + 1]] for s in stats)), g) for g in range(B))

    but a group's logits are still at hand when its gradient is due, so that the logits GEMM is not done twice. The weights
    inside loss_fn may depend on the entropies of this very pass: detach what is a weight, leave what is a term.

    Args:
        hidden, weight, targets, bias, transform, low_rank, ignore_index: as for `linear_logprob_entropy`.
        cu_groups: (B+1,) int32 or int64, offsets of the groups into the (flattened) tokens, strictly rising from 0.
        loss_fn: (TokenStats of one group, each (tokens of the group,), group index) -> scalar. Called once per group, in
            order. Its gradient reaches the statistics only: a loss_fn that uses other tensors with a gradient is refused.
        cache_bytes: logits kept between forward and backward, in bytes, > 0; a group that needs more is recomputed in
            tiles (8NDV FLOP in place of 6NDV).
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        GroupLoss(loss, stats, dropped_mass): scalar loss; statistics of every token, detached; None (exact backward).
        The gradients exist when this returns, in the dtype of their inputs (so in fp16 scale the loss inside loss_fn, not
        behind it), and backward hands them over: it can run once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index)
    check_offsets("cu_groups", cu_groups, inputs.targets.shape[0], allow_empty=False)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    check_cache_bytes(cache_bytes)
    match choose_impl("linear_group_loss", impl, inputs.hidden.dtype):
        case "reference":
            from gem_kernels.group_loss import reference

            stats = linear_logprob_entropy(
                hidden,
                weight,
                targets,
                bias=bias,
                transform=transform,
                low_rank=low_rank,
                ignore_index=ignore_index,
                impl="reference",
            )
            flat = TokenStats(*(s.reshape(-1) for s in stats))
            loss = reference.linear_group_loss(flat, cu_groups, partial(_scalar_loss, loss_fn))
            return GroupLoss(loss, TokenStats(*(s.detach() for s in stats)))
        case _:
            with autocast_off(hidden):
                operands, kept_targets, kept = inputs.compact()
                loss, *flat_stats = _GroupLoss.apply(
                    *operands,
                    kept_targets,
                    kept,
                    inputs.targets.shape[0],
                    cu_groups.tolist(),
                    loss_fn,
                    transform,
                    cache_bytes,
                    torch.is_grad_enabled(),
                )
            return GroupLoss(loss, TokenStats(*(s.view(inputs.batch_shape) for s in flat_stats)))


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
    ignore_index: int = IGNORE_INDEX,
    cache_bytes: int = 1 << 30,
    impl: Impl = "auto",
) -> GroupLoss:
    """GEM's Eq. 2 with known weights: L = - sum_s seq_weight[s] * log pi(s), log pi(s) = sum of its tokens' logprobs.

    Args:
        cu_seqlens: (S+1,) int32 or int64, offsets of the sequences into the (flattened) tokens, strictly rising from 0.
        seq_weight: (S,) floating, finite; constants (centred advantages, already divided by the number of groups).
        The rest as for `linear_group_loss`. The weights being known, the cache is filled token by token, so no sequence
        is too long for it: always 6NDV FLOP, 4NDV with a frozen head.

    Returns:
        GroupLoss(loss, stats, dropped_mass), as `linear_group_loss`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    inputs = linear_inputs(hidden, weight, targets, bias, transform, low_rank, ignore_index)
    total = inputs.targets.shape[0]
    check_offsets("cu_seqlens", cu_seqlens, total, allow_empty=False)
    w = check_seq_weight(seq_weight, cu_seqlens.shape[0] - 1, hidden)
    check_cache_bytes(cache_bytes)
    token_weight = w.repeat_interleave(cu_seqlens.diff().to(w.device), output_size=total)
    rows = max(1, cache_bytes // (4 * weight.shape[0]))
    pieces = [*range(0, total, rows), total] if total else [0]

    def piece_loss(stats: TokenStats, piece: int) -> Tensor:
        weights = token_weight[pieces[piece] : pieces[piece + 1]].to(stats.logprob.dtype)
        return -(weights * stats.logprob).sum()

    return linear_group_loss(
        hidden,
        weight,
        targets,
        torch.tensor(pieces, device=cu_seqlens.device),
        piece_loss,
        bias=bias,
        transform=transform,
        low_rank=low_rank,
        ignore_index=ignore_index,
        cache_bytes=cache_bytes,
        impl=impl,
    )


class _GroupLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        from gem_kernels.group_loss import chunked

        *operands, targets, kept, n_tokens, cu_groups, loss_fn, transform, cache_bytes, grad_enabled = args
        needed = [grad_enabled and need for need in ctx.needs_input_grad[:5]]

        def loss_and_upstream(stats: TokenStats, group: int) -> tuple[Tensor, Upstream]:
            return _differentiate(loss_fn, stats, group, any(needed))

        loss, stats, ctx.gradients = chunked.forward_backward(
            Operands(*operands), targets, kept, n_tokens, cu_groups, loss_and_upstream, transform, cache_bytes, needed
        )
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return (loss, *stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward of linear_group_loss ran before; its gradients were handed over, call the op again"
            )
        # Handing over (not copying) keeps one dweight in memory; scaling in place is safe because it happens once.
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss is None:
            return (None,) * 13
        for g in gradients:
            if g is not None:
                g.mul_(grad_loss)
        return (*gradients, *(None,) * 8)


def _scalar_loss(loss_fn: LossFn, stats: TokenStats, group: int) -> Tensor:
    loss = loss_fn(stats, group)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {came} for group {group}")
    return loss.reshape(())


def _differentiate(loss_fn: LossFn, stats: TokenStats, group: int, need_grad: bool) -> tuple[Tensor, Upstream]:
    """loss_fn's value and its gradient with respect to the group's statistics."""
    with torch.set_grad_enabled(need_grad):
        leaves = TokenStats(*(s.detach().requires_grad_(need_grad) for s in stats))
        loss = _scalar_loss(loss_fn, leaves, group)
        if not loss.requires_grad:
            return loss, Upstream(None, None, None)
        _refuse_other_leaves(loss, leaves, group)
        return loss.detach(), Upstream(*torch.autograd.grad(loss, leaves, allow_unused=True))


def _refuse_other_leaves(loss: Tensor, leaves: TokenStats, group: int) -> None:
    """A parameter that loss_fn closes over would get no gradient: say so rather than lose it."""
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
