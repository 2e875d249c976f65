"""Scores of whole sequences from per-token values: topm_mean, and GEM's Eq. 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gem_kernels.dispatch import choose_impl
from gem_kernels.types import Impl, Score
from gem_kernels.validation import check_float, check_m, check_offsets, check_same_device, check_spans


def topm_mean(values: Tensor, cu_seqlens: Tensor, m: int | float, *, impl: Impl = "auto") -> Tensor:
    """Mean of the m largest values of every sequence, differentiable.

    Equivalent to `[values[a:b].sort(descending=True, stable=True).values[:m].mean() for a, b in the sequences]`.

    Args:
        values: (N,) floating; read as fp32 (fp64: `reference` only).
        cu_seqlens: (S+1,) int32 or int64 offsets of the sequences, not falling from 0 to N.
        m: a count (int >= 1, at most the length is taken) or a fraction (float in (0, 1]): max(1, ceil(m * length)),
            a product within 1e-9 of an integer counting as that integer.
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        (S,) fp32; 0 for an empty sequence. Among equal values the earlier token is selected, and gets the gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    n = _check_values("values", values)
    check_offsets("cu_seqlens", cu_seqlens, n, allow_empty=True)
    check_same_device("cu_seqlens", cu_seqlens, "values", values)
    check_m(m)
    spans = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), dim=1)
    return _empty_is_zero(_span_topm_mean("topm_mean", values, spans, m, impl), spans)


def gem_score(
    entropy: Tensor,
    branch_span: Tensor,
    answer_span: Tensor,
    *,
    m: int | float = 0.1,
    branch_weight: float = 1.0,
    final_weight: float = 1.0,
    impl: Impl = "auto",
) -> Score:
    """GEM's Eq. 1 (arXiv 2511.13007): certain of the answer, exploring on the way.

    S = - final_weight * mean of H over the answer + branch_weight * mean of the m largest H of the reasoning.

    Args:
        entropy: (N,) floating, nats: entropies of the packed completion tokens.
        branch_span: (S, 2) int32 or int64, [start, end) of each sequence's reasoning in the packed tokens.
        answer_span: (S, 2) likewise, of its final answer. A token in neither span (marker, end of sequence) counts nowhere.
        m: as for `topm_mean`; the paper's share rho of high-entropy tokens.
        branch_weight: the paper's lambda; 0 is its ablation without branch entropy.
        final_weight: 0 is its ablation without terminal entropy.
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        Score(score, final_entropy, branch_entropy), each (S,) fp32, nats, differentiable. An empty branch gives 0, an empty
        answer NaN (score and final_entropy), so that a candidate which never answered cannot be ranked by accident.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    n = _check_values("entropy", entropy)
    for name, span in (("branch_span", branch_span), ("answer_span", answer_span)):
        check_spans(name, span, n)
        check_same_device(name, span, "entropy", entropy)
    if branch_span.shape != answer_span.shape:
        raise ValueError(
            f"answer_span must have the shape of branch_span {tuple(branch_span.shape)}, got {tuple(answer_span.shape)}"
        )
    check_m(m)
    branch = _empty_is_zero(_span_topm_mean("gem_score", entropy, branch_span, m, impl), branch_span)
    final = _span_topm_mean("gem_score", entropy, answer_span, 1.0, impl)  # all of them: the mean
    return Score(branch_weight * branch - final_weight * final, final, branch)


def _check_values(name: str, values: object) -> int:
    v = check_float(name, values)
    if v.ndim != 1:
        raise ValueError(f"{name} must be (N,), got {tuple(v.shape)}")
    return v.shape[0]


def _empty_is_zero(mean: Tensor, spans: Tensor) -> Tensor:
    return mean.masked_fill(spans[:, 0] == spans[:, 1], 0.0)


def _span_topm_mean(op: str, values: Tensor, spans: Tensor, m: int | float, impl: Impl) -> Tensor:
    """(S,) means, NaN where a span is empty."""
    match choose_impl(op, impl, values.dtype):
        case "reference":
            from gem_kernels.scoring import reference

            return reference.topm_mean(values if values.dtype == torch.float64 else values.float(), spans, m)
        case _:
            mean: Tensor = _SpanTopmMean.apply(values.float(), spans, m)
            return mean


class _SpanTopmMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: Tensor, m: int | float) -> Tensor:
        from gem_kernels.scoring import chunked

        mean, tokens, owners = chunked.forward(values, spans, m)
        ctx.m, ctx.n_tokens = m, values.shape[0]
        ctx.save_for_backward(tokens, owners, spans)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from gem_kernels.scoring import chunked

        tokens, owners, spans = ctx.saved_tensors
        return chunked.backward(grad, tokens, owners, spans, ctx.n_tokens, ctx.m), None, None
