"""Bounds of each op, composed from bounds.py: linear_logprob_entropy, logprob_entropy, group losses, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from bounds import (
    DIFFERENTIABLE,
    SIGMAS,
    STATS,
    Adapter,
    Bound,
    Logits,
    RowGradientError,
    Softmax,
    Upstream,
    linear_logits,
    product_spread,
    rounding,
    sum_spread,
    unit,
)
from torch import Tensor
from torch.func import grad_and_value, vmap

from gem_kernels import IGNORE_INDEX, LogitTransform, LowRank, TokenStats
from gem_kernels.scoring.reference import _count

LossFn = Callable[[TokenStats, int], Tensor]


def _blocks(targets: Tensor, columns: int) -> Sequence[Tensor]:
    """Split the indices of the tokens that are not ignored into blocks whose logits fit the cache of a CPU."""
    kept = (targets != IGNORE_INDEX).nonzero()[:, 0]
    logits = 1 << 16 if targets.device.type == "cpu" else 1 << 24
    return kept.split(max(8, logits // columns)) if len(kept) else ()


class LinearInputs(Protocol):
    """Fields of numerics.Case that the bounds read."""

    @property
    def hidden(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def low_rank(self) -> LowRank | None: ...
    @property
    def transform(self) -> LogitTransform: ...


# --- linear_logprob_entropy --------------------------------------------------------------------------


class _Sum:
    """Sum over all tokens, block by block: dz^T m and the terms that bound its error."""

    def __init__(self) -> None:
        self.parts: list[Tensor] | None = None
        self.terms = 0

    def add(self, left: Tensor, right: Tensor, worst: Tensor, variance: Tensor) -> None:
        """Add left^T right, (n, k) (n, m)."""
        parts = [left.T @ right, left.abs().T @ right.abs(), left.square().T @ right.square(), worst, variance]
        self.parts = parts if self.parts is None else [x.add_(y) for x, y in zip(self.parts, parts, strict=True)]
        self.terms += left.shape[0]

    def bound(self, like: Tensor, u: float, roundings: int, mixed: bool = False) -> Bound:
        if self.parts is None:
            zero = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
            return Bound(zero, zero, like.dtype)
        total, size, squares, worst, variance = self.parts
        spread = (variance + sum_spread(u, self.terms, size, total, squares).square()).sqrt()
        worst, spread = worst.view(like.shape), spread.view(like.shape)
        return Bound(worst, spread, like.dtype, roundings, mixed)


class LinearBounds:
    """Bounds of linear_logprob_entropy on a case: of every statistic and, given an upstream gradient, of every gradient.

    With cached exponentials (group_loss/exponentials.py) the terms of dz^T h are rounded twice to bf16, because the number of a
    row goes into h. Entries up to e^60 may be rescaled to a higher maximum by a factor floored at e^-87.
    """

    def __init__(
        self,
        case: LinearInputs,
        upstream: Upstream | None,
        *,
        cached: bool = False,
        roundings: int = 1,
    ) -> None:
        self.case, self.upstream, self.cached, self.u = case, upstream, cached, unit(case.hidden.dtype)
        n, device = case.targets.shape[0], case.hidden.device
        self.weight = case.weight.double()
        self.bias = None if case.bias is None else case.bias.double()
        self.rows = {name: torch.zeros(2, n, dtype=torch.float64, device=device) for name in STATS}
        self.values = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in STATS}
        self.dhidden = torch.zeros(2, n, case.hidden.shape[1], dtype=torch.float64, device=device)
        self.sums = {name: _Sum() for name in ("dweight", "dbias", "da", "db")}
        for at in _blocks(case.targets, case.weight.shape[0]):
            self._take(at)
        self.found = self._collect(roundings)

    def _take(self, at: Tensor) -> None:
        case, u = self.case, self.u
        h = case.hidden[at].double()
        low = None if case.low_rank is None else Adapter.of(h, case.low_rank, u)
        raw, spread = linear_logits(h, self.weight, self.bias, low, u)
        soft = Softmax(Logits.of(raw, spread, case.transform, u, low), case.targets[at], u)
        log_s = soft.log_total
        exact = ((soft.hit * soft.d).sum(1) - log_s, soft.entropy, soft.z.value.amax(1) + log_s, -log_s)
        for name, value in zip(STATS, exact, strict=True):
            self.values[name][at] = value
        for name, (row_worst, variance) in soft.errors().items():
            self.rows[name][:, at] = torch.stack((row_worst, variance.sqrt()))
        if self.upstream is not None:
            least = (math.exp(60 - 87),) if self.cached else ()
            self._gradients(at, h, low, RowGradientError(soft, self.upstream.rows(at), *least))

    def _gradients(self, at: Tensor, h: Tensor, low: Adapter | None, dz: RowGradientError) -> None:
        """Bound dh = dz W + s (dz b) a: the errors of dz pass W + s b a; each GEMM and each addition adds its own."""
        case, u, w = self.case, self.u, self.weight
        own, both, together = dz.narrowed(case.weight.dtype), w, True
        spread = product_spread(u, dz.value, w).square()
        if low is not None and case.low_rank is not None:
            dtype, dlow = case.low_rank.a.dtype, dz.value @ low.b
            together = dtype == case.weight.dtype  # else dz is rounded for the one GEMM alone
            through_a = low.scale * dlow @ low.a
            sums = product_spread(u, dz.value, low.b).square()
            spread += low.scale**2 * (sums @ low.a.square() + product_spread(u, dlow, low.a).square())
            spread += 2 / 3 * (u * ((dz.value @ w).abs() + through_a.abs())).square()
            both = w + low.scale * low.b @ low.a
            self._adapter_gradients(dz, h, low, dlow, sums, dz.narrowed(dtype))
        worst, upstream, variance = dz.times(both)
        variance += own @ (both if together else w).square() + spread
        self.dhidden[:, at] = torch.stack((worst + upstream, variance.sqrt()))
        twice = 2 * own if self.cached else own
        self.sums["dweight"].add(dz.value, h, *dz.transposed(h, twice))
        ones = torch.ones_like(h[:, :1])
        self.sums["dbias"].add(dz.value, ones, *dz.transposed(ones, twice))

    def _adapter_gradients(
        self, dz: RowGradientError, h: Tensor, low: Adapter, dlow: Tensor, sums: Tensor, narrowed: Tensor
    ) -> None:
        """Bound da = s (dz b)^T h and db = dz^T (s h a^T)."""
        s = abs(low.scale)
        worst, upstream, variance = dz.times(low.b)
        variance = s**2 * (variance + worst.square() / 3 + sums + narrowed @ low.b.square())
        variance += (2 * self.u * s * dlow).square() / 3
        self.sums["da"].add(low.scale * dlow, h, s * upstream.T @ h.abs(), variance.T @ h.square())
        worst, variance = dz.transposed(low.hidden, narrowed)
        self.sums["db"].add(dz.value, low.hidden, worst, variance + dz.value.square().T @ low.spread.square())

    def _collect(self, roundings: int) -> dict[str, Bound]:
        case, fp = self.case, torch.float64 if self.case.hidden.dtype == torch.float64 else torch.float32
        found = {name: Bound(*rows, fp) for name, rows in self.rows.items()}
        if self.upstream is None:
            return found
        found["dhidden"] = Bound(*self.dhidden, case.hidden.dtype, roundings)
        leaves = {"dweight": case.weight, "dbias": case.bias}
        leaves |= dict(zip(("da", "db"), case.low_rank[:2], strict=True)) if case.low_rank else {}
        found |= {k: self.sums[k].bound(t, self.u, roundings, k == "da") for k, t in leaves.items() if t is not None}
        return found


def linear_bounds(case: LinearInputs, upstream: Mapping[str, Tensor], **settings: Any) -> dict[str, Bound]:
    """Return the bounds of linear_logprob_entropy for this upstream gradient of the statistics."""
    given = Upstream.of(upstream, unit(case.hidden.dtype), case.targets.shape[0], case.hidden)
    return LinearBounds(case, given, **settings).found


# --- logprob_entropy --------------------------------------------------------------------------------------------------


def logits_bounds(
    logits: Tensor, targets: Tensor, transform: LogitTransform, upstream: Mapping[str, Tensor]
) -> dict[str, Bound]:
    """Return the bounds of logprob_entropy: logits (..., V) are exact, and their transform is the first to err."""
    u, fp = unit(logits.dtype), torch.float64 if logits.dtype == torch.float64 else torch.float32
    raw, y = logits.flatten(0, -2).double(), targets.flatten()
    given = Upstream.of(upstream, u, y.shape[0], raw)
    rows = {name: torch.zeros(2, *y.shape, dtype=torch.float64, device=raw.device) for name in STATS}
    dlogits = torch.zeros(2, *raw.shape, dtype=torch.float64, device=raw.device)
    for at in _blocks(y, raw.shape[1]):
        soft = Softmax(Logits.of(raw[at], 0.0, transform, u), y[at], u)
        errors = soft.errors()
        for name, found in rows.items():
            found[:, at] = torch.stack((errors[name].worst, errors[name].variance.sqrt()))
        dlogits[:, at] = torch.stack(RowGradientError(soft, given.rows(at)).entries())
    found = {name: Bound(*(t.view(targets.shape) for t in of_rows), fp) for name, of_rows in rows.items()}
    return found | {"dlogits": Bound(*(t.view(logits.shape) for t in dlogits), logits.dtype)}


def row_sum_bound(logits: Tensor, targets: Tensor, upstream: Mapping[str, Tensor]) -> Bound:
    """Return the bound of the exact sum over a row of dlogits (N, V) in fp32."""
    u = unit(logits.dtype)
    given = Upstream.of(upstream, u, targets.shape[0], logits)
    logits = Logits.of(logits.double(), 0.0, LogitTransform(), u)
    dz = RowGradientError(Softmax(logits, targets, u), given)
    worst, of_upstream, variance = (t[:, 0] for t in dz.times(torch.ones_like(dz.value[:1]).T))
    stored = rounding(dz.value, torch.float32).square().sum(1) / 3
    return Bound(worst + of_upstream, (variance + stored).sqrt(), torch.float64)


# --- group losses -----------------------------------------------------------------------------------------------------


class _OfLoss(NamedTuple):
    """Gradient (4, L) of a group's loss, a bound on its error, and (worst, variance) of the loss."""

    gradient: Tensor
    gradient_error: Tensor
    worst: Tensor
    variance: Tensor

    @staticmethod
    def of(loss_fn: LossFn, group: int, stats: Tensor, worst: Tensor, variance: Tensor, u: float) -> _OfLoss:
        """Bound a group's loss for statistics (4, L) with these errors, independent from token to token.

        loss_fn sums L terms of the size of derivative times statistic. Derivatives are differences in fp64, because statistics
        that loss_fn detaches, and max_logprob, move the loss too.
        """
        leaf, sums = stats.clone().requires_grad_(), u * (4 + min(stats.shape[1], 4 * stats.shape[1] ** 0.5))

        def loss_of(flat: Tensor) -> Tensor:
            *smooth, highest = flat.unbind()
            return loss_fn(TokenStats(*smooth, highest.detach()), group).reshape(())

        loss = loss_of(leaf)
        zero = torch.zeros_like(stats)
        if not stats.numel():
            return _OfLoss(zero, zero, 2 * u * loss.detach().abs(), zero.sum())
        gradient = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else zero
        step = 1e-6 * stats.abs().clamp(min=1).flatten()
        both = torch.stack((torch.diag(step), -torch.diag(step))).view(2, -1, *stats.shape) + stats
        slopes, values = vmap(vmap(grad_and_value(loss_of)))(both)
        of_loss = ((values[0] - values[1]) / (2 * step)).abs().view_as(stats)
        error = worst + SIGMAS * variance.sqrt() + sums * stats.abs()
        of_gradient = (slopes[0] - slopes[1]).abs() * (error.flatten() / (2 * step))[:, None, None]
        return _OfLoss(
            gradient,
            of_gradient.sum(0) + sums * gradient.abs(),
            sums * (of_loss * stats.abs()).sum() + 2 * u * loss.detach().abs(),
            (of_loss * (variance + worst.square() / 3).sqrt()).sum(0).square().sum(),
        )


def group_bounds(
    case: LinearInputs,
    loss_fn: LossFn,
    offsets: Sequence[int],
    *,
    factor: float = 1.0,
) -> dict[str, Bound]:
    """Return the bounds of linear_group_loss, or of sega_loss given its loss_fn, scaled by `factor` (a rounding unless ±1)."""
    u = unit(case.hidden.dtype)
    forward = LinearBounds(case, None)
    stats = torch.stack([forward.values[name] for name in STATS])
    bounds = [forward.found[name] for name in STATS]
    worst, variance = (
        torch.stack([b.worst for b in bounds]) + u * stats.abs(),
        torch.stack([b.spread for b in bounds]).square(),
    )
    parts = [
        _OfLoss.of(loss_fn, group, stats[:, i:j], worst[:, i:j], variance[:, i:j], u)
        for group, (i, j) in enumerate(pairwise(offsets))
    ]
    gradient, gradient_error = (
        torch.cat([t, *(part[i] for part in parts)], 1) for i, t in enumerate((stats[:, :0],) * 2)
    )
    smooth = slice(len(DIFFERENTIABLE))
    error = abs(factor) * (gradient_error + u * gradient.abs())
    upstream = Upstream(list(factor * gradient[smooth]), list(error[smooth]))
    roundings = 1 if abs(factor) == 1 else 2
    backward = LinearBounds(case, upstream, cached=case.weight.dtype == torch.bfloat16, roundings=roundings)
    losses = [loss_fn(TokenStats(*stats[:, i:j]), group).abs().sum() for group, (i, j) in enumerate(pairwise(offsets))]
    zero = stats.new_zeros(())
    whole = sum((part.worst for part in parts), zero) + u * min(len(parts), 4 * len(parts) ** 0.5) * sum(losses, zero)
    spread = sum((part.variance for part in parts), zero).sqrt()
    return {"loss": Bound(whole, spread, bounds[0].dtype), **backward.found}


# --- scores -----------------------------------------------------------------------------------------------------------


def _means(values: Tensor, spans: Tensor, m: int | float) -> tuple[Tensor, Tensor]:
    """Return the mean of |x| over the m largest values of each span, and the error bound of their mean: a sum, a division."""
    u, found = unit(values.dtype), torch.zeros(2, spans.shape[0], dtype=torch.float64, device=values.device)
    for i, (start, end) in enumerate(spans.tolist()):
        if end > start:
            count = _count(m, end - start)
            size = values[start:end].double().sort(descending=True).values[:count].abs().mean()
            found[:, i] = torch.stack((size, size * u * (2 + min(count, 4 * (count / 16 + 16) ** 0.5))))
    return found[0], found[1]


def _exactly(worst: Tensor, dtype: torch.dtype) -> Bound:
    return Bound(worst, torch.zeros_like(worst), dtype)


def topm_bounds(values: Tensor, cu_seqlens: Tensor, m: int | float, dvalues: Tensor) -> dict[str, Bound]:
    """Return the bounds of topm_mean and of its gradient (exactly dvalues): one rounding, and a division by a count."""
    spans, u = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1), unit(values.dtype)
    fp = torch.float64 if values.dtype == torch.float64 else torch.float32
    return {
        "means": _exactly(_means(values, spans, m)[1], fp),
        "dvalues": _exactly(3 * u * dvalues.abs(), values.dtype),
    }


def score_bounds(
    entropy: Tensor,
    branch_span: Tensor,
    answer_span: Tensor,
    m: int | float,
    branch_weight: float = 1.0,
    final_weight: float = 1.0,
    upstream: Tensor | None = None,
) -> dict[str, Bound]:
    """Return the bounds of gem_score and of its gradient, a sum of shares; upstream of (score, final, branch): (3, S)."""
    u, n = unit(entropy.dtype), entropy.shape[0]
    fp = torch.float64 if entropy.dtype == torch.float64 else torch.float32
    (branch, branch_error), (final, final_error) = (
        _means(entropy, s, of) for s, of in ((branch_span, m), (answer_span, 1.0))
    )
    branch, final = abs(branch_weight) * branch, abs(final_weight) * final
    score = abs(branch_weight) * branch_error + abs(final_weight) * final_error + 3 * u * (branch + final)
    found = {"score": score, "final_entropy": final_error, "branch_entropy": branch_error}
    bounds = {name: _exactly(worst, fp) for name, worst in found.items()}
    if upstream is None:
        return bounds
    of_score, of_final, of_branch = upstream.abs()
    shares, terms = torch.zeros(2, n, dtype=torch.float64, device=entropy.device)
    for spans, of, size in (
        (branch_span, m, abs(branch_weight) * of_score + of_branch),
        (answer_span, 1.0, abs(final_weight) * of_score + of_final),
    ):
        for (start, end), share in zip(spans.tolist(), size, strict=True):
            if end > start:
                count = _count(of, end - start)
                chosen = start + entropy[start:end].sort(descending=True, stable=True).indices[:count]
                shares[chosen] += share / count
                terms[chosen] += 1
    return bounds | {"dentropy": _exactly(u * (5 + terms) * shares, entropy.dtype)}
