"""Scores of whole sequences from per-token values: topm_mean, and GEM's Eq. 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gem_kernels.autograd import define_operator
from gem_kernels.dispatch import choose_impl, implementation
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
    (mean,) = _means("topm_mean", values, [(spans, m)], impl)
    return _empty_is_zero(mean, spans)


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
    """Score sequences by GEM's Eq. 1 (arXiv 2511.13007): low entropy in the answer, high entropy in the reasoning.

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
    branch, final = _means("gem_score", entropy, [(branch_span, m), (answer_span, 1.0)], impl)  # 1.0: the mean of all
    branch = _empty_is_zero(branch, branch_span)
    return Score(branch_weight * branch - final_weight * final, final, branch)


def _check_values(name: str, values: object) -> int:
    v = check_float(name, values)
    if v.ndim != 1:
        raise ValueError(f"{name} must be (N,), got {tuple(v.shape)}")
    return v.shape[0]


def _empty_is_zero(mean: Tensor, spans: Tensor) -> Tensor:
    return mean.masked_fill(spans[:, 0] == spans[:, 1], 0.0)


def _means(op: str, values: Tensor, spans_m: list[tuple[Tensor, int | float]], impl: Impl) -> tuple[Tensor, ...]:
    """Return the means (S,) of each (spans (S, 2), m), NaN where a span is empty."""
    chosen = choose_impl(op, impl, values)
    if chosen == "reference":
        from gem_kernels.scoring import reference

        wide = values if values.dtype == torch.float64 else values.float()
        return tuple(reference.topm_mean(wide, spans, m) for spans, m in spans_m)
    spans = torch.cat([spans for spans, _ in spans_m])
    counts = torch.cat([_counts(m, s[:, 1] - s[:, 0]) for s, m in spans_m])
    mean, _, _ = _span_topm_mean(values.float().contiguous(), spans, counts, chosen)
    return tuple(mean.split([s.shape[0] for s, _ in spans_m]))


def _counts(m: int | float, lengths: Tensor) -> Tensor:
    """Return how many values of each span are averaged: min(m, length), or max(1, ceil(m * length)); 0 if empty."""
    lengths = lengths.long()
    if isinstance(m, int):
        return lengths.clamp(max=m)
    # -1e-9: 0.07 * 100 is 7.000000000000001 in floats, and 7 is meant
    return (lengths.double() * m - 1e-9).ceil().long().clamp(min=1).minimum(lengths)


# --- the same as torch operators, which torch.compile keeps in its graph: of fixed shapes, whatever is selected -------


def _forward(values: Tensor, spans: Tensor, counts: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    means: tuple[Tensor, Tensor, Tensor] = implementation("scoring", impl).forward(values, spans, counts)
    return means


def _forward_fake(values: Tensor, spans: Tensor, counts: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(counts.shape), counts.new_empty(counts.shape, dtype=torch.int32), torch.empty_like(counts)


def _gradient(grad: Tensor, *saved: Any) -> Tensor:
    *tensors, impl = saved
    dvalues: Tensor = implementation("scoring", impl).backward(grad, *tensors)
    return dvalues


def _gradient_fake(grad: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


_span_topm_mean_backward = define_operator(
    "span_topm_mean_backward",
    "(Tensor grad, Tensor values, Tensor spans, Tensor counts, Tensor threshold, Tensor cut, str impl) -> Tensor",
    _gradient,
    _gradient_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    values, spans, counts, ctx.impl = inputs
    _, threshold, cut = output
    ctx.save_for_backward(values, spans, counts, threshold, cut)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None]:
    return _span_topm_mean_backward(grad, *ctx.saved_tensors, ctx.impl), None, None, None


_span_topm_mean = define_operator(
    "span_topm_mean",
    "(Tensor values, Tensor spans, Tensor counts, str impl) -> (Tensor mean, Tensor threshold, Tensor cut)",
    _forward,
    _forward_fake,
    _backward,
    _setup_context,
)
