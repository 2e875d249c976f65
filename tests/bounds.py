"""Bounds on the error that rounding alone causes in a right implementation: the basis of the rule of numerics.py.

They are evaluated in fp64 at the exact values, per entry; nothing is fitted to a result. u = eps / 2.

The model. One operation rounds its result by at most u of it. Roundings of different operations are independent, uniform and of
mean zero, so each has a standard deviation of u / sqrt(3) of the result. Equal numbers round alike, and a row may hold many
equal entries, so errors of single entries are added up, not averaged. An error therefore has two parts,

    worst    a bound on errors that may all have one sign (absolute values are added),
    spread   the standard deviation of independent errors (variances are added),

and an error beyond worst + 7 spread has a probability of 2 exp(-7^2 / 2) < 5e-11: such sums are sub-Gaussian.

A sum of n terms x in any order. Every addition errs by u of a partial sum, and partial sums are at most S = sum |x|. If the
order is independent of the signs, the partial sums are a random walk pinned to its end: they exceed |sum x| + c sqrt(sum x^2)
with a probability of 2 exp(-2 c^2) (Kolmogorov). So spread = u sqrt(n / 3) P, with P the smaller of S and
|sum x| + 2 sqrt(sum x^2): a walk c / 2 times too far and roundings beyond 14 / c of their deviations coincide with a
probability of 4 exp(-28) at most. Rigorously, the error is at most n u S.

A sum over the vocabulary is never a single chain of additions: it goes by pairs, or by tiles of 64 columns with 4 roundings to
merge one. n counts the roundings that one term passes, V / 16 + 16 at most.

Elementary functions. exp(x) errs by 4u of itself (2 units in the last place), and by 2u |x| of itself for the rounding of x
and of x log2(e); log and tanh by 4u. A transform of the logits is a few roundings of its result.

To first order, every other error is the derivative of the result times the error of its inputs. If the logits move by at most
e, a softmax changes by a relative exp(2 e) - 1 at most. By the mean value theorem that factor on the derivatives makes the
first order rigorous.

N tokens, D hidden size, V vocabulary, r rank of the adapter; rows of an fp64 tensor are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels import LogitTransform, LowRank, TokenStats

STATS = TokenStats._fields
DIFFERENTIABLE = STATS[:3]  # max_logprob has no gradient
SIGMAS = 7.0
_TINY = 2.0**-126  # what fp32 may flush to zero


@dataclass(frozen=True)
class Bound:
    """Bound on the errors of a tensor before it is rounded to its dtype, `roundings` times."""

    worst: Tensor
    spread: Tensor
    dtype: torch.dtype = torch.float32
    roundings: int = 1
    mixed: bool = False  # every rounding reaches every entry; else rows (the last dimension) are independent


def unit(dtype: torch.dtype) -> float:
    """Return u of the arithmetic on inputs of this dtype: fp32, or fp64, whose gold has errors of its own."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-24


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest change by one rounding to dtype: half a unit, and half of the smallest fp16 or a flush to zero."""
    least = 2.0**-25 if dtype == torch.float16 else _TINY
    return torch.finfo(dtype).eps / 2 * value.abs() + least


def sum_spread(u: float, n: float, size: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Return the spread of a sum of n roundings: `size` = sum |x|, `total` = sum x, `squares` = sum x^2."""
    partial = torch.minimum(size, total.abs() + 2 * squares.sqrt())
    return u * torch.minimum(math.sqrt(n / 3) * partial, n / SIGMAS * size)


def product_spread(u: float, a: Tensor, b: Tensor) -> Tensor:
    """Return the spread of the GEMM a b, (n, k) (k, m)."""
    return sum_spread(u, a.shape[1], a.abs() @ b.abs(), a @ b, a.square() @ b.square())


# --- logits -----------------------------------------------------------------------------------------------------------


class Logits(NamedTuple):
    """Transformed logits z' = f(z) (N, V) with bounds of their errors; f', df'/dz' and the error of f' itself."""

    value: Tensor
    worst: Tensor
    spread: Tensor
    slope: Tensor
    bend: Tensor
    slope_error: float
    adapter: Adapter | None

    @staticmethod
    def of(
        raw: Tensor, spread: Tensor | float, transform: LogitTransform, u: float, adapter: Adapter | None = None
    ) -> Logits:
        """Transform raw logits: z' = L tanh(g z) has f' = g L (1 - (z'/L)^2) and df'/dz' = -2 g z'/L; z' = g z has f' = g.

        Argument, function and product round z' by 8u of it, by 4u without tanh, or not at all. 1 - tanh^2 cancels near
        saturation, so it errs by 8u of its largest value.
        """
        gain, known = transform.scale / transform.temperature, raw.isfinite()
        if transform.softcap is not None:
            limit = transform.softcap / transform.temperature
            inner = transform.scale / transform.softcap
            share = torch.tanh(inner * raw)
            value, slope, bend = limit * share, gain * (1 - share.square()), -2 * inner * share
            own, slope_error = 8 * u * value.abs(), 8 * u * abs(gain)
        else:
            value, slope, bend = gain * raw, torch.full_like(raw, gain), torch.zeros_like(raw)
            own, slope_error = (0.0 if gain == 1 else 4 * u) * value.abs(), 4 * u * abs(gain)
        spread = (slope.abs() * spread).where(known, 0)
        return Logits(value, own.where(known, 0), spread, slope.where(known, 0), bend, slope_error, adapter)

    def variance(self) -> Tensor:
        """Return the variance of every entry, the errors that the columns of a row share included."""
        shared = 0 if self.adapter is None else self.adapter.spread.square() @ self.adapter.b.square().T
        return self.spread.square() + self.slope.square() * shared

    def largest_error(self) -> Tensor:
        """Return the largest error of a logit of each row."""
        return (self.worst + SIGMAS * self.variance().sqrt()).amax(1)


class Adapter(NamedTuple):
    """s h a^T (N, r) and its spread, which all columns of a row share, with a, b and s."""

    hidden: Tensor
    spread: Tensor
    a: Tensor
    b: Tensor
    scale: float

    @staticmethod
    def of(hidden: Tensor, low_rank: LowRank, u: float) -> Adapter:
        a, b, scale = low_rank.a.double(), low_rank.b.double(), low_rank.scale
        exact = scale * hidden @ a.T
        spread = abs(scale) * product_spread(u, hidden, a.T) + u * exact.abs()
        return Adapter(exact, spread, a, b, scale)


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Adapter | None, u: float
) -> tuple[Tensor, Tensor]:
    """Return z = h W^T + (s h a^T) b^T + bias and the spread of its GEMMs and additions, for the given s h a^T."""
    z, variance = hidden @ weight.T, product_spread(u, hidden, weight.T).square()
    size, additions = z.abs(), 0
    if low is not None:
        through = low.hidden @ low.b.T
        variance += product_spread(u, low.hidden, low.b.T).square()
        z, size, additions = z + through, size + through.abs(), additions + 1
    if bias is not None:
        z, size, additions = z + bias, size + bias.abs(), additions + 1
    return z, (variance + additions / 3 * (u * size).square()).sqrt()


# --- statistics -------------------------------------------------------------------------------------------------------


class RowError(NamedTuple):
    """Error of one number per row (N,)."""

    worst: Tensor
    variance: Tensor


class Softmax:
    """p, d = z - max z, s = sum e^d, and dbar = sum p d of rows of logits, so that log p = d - log s and H = log s - dbar."""

    def __init__(self, z: Logits, targets: Tensor, u: float) -> None:
        self.z, self.u, self.v = z, u, z.value.shape[1]
        d = z.value - z.value.amax(1, keepdim=True)
        exps = d.exp()
        total = exps.sum(1)
        self.p, self.log_total = exps / total[:, None], total.log()
        self.d = d.where(d.isfinite(), 0)
        self.mean = (self.p * self.d).sum(1)
        self.entropy = self.log_total - self.mean
        self.centred = (d - self.mean[:, None]).where(d.isfinite(), 0)  # log p + H
        self.hit = torch.zeros_like(self.p).scatter_(1, targets.long()[:, None], 1.0)
        self.exp_error = u * (4 + 2 * self.d.abs())  # of e^d, relative
        chain = min(self.v, self.v / 16 + 16)
        self.chain = u * min(math.sqrt(chain / 3), chain / SIGMAS)  # of s and of sum e^d d, relative: all of one sign
        self.largest_error = z.largest_error()
        self.growth = torch.exp(2 * self.largest_error)

    def _through(self, derivative: Tensor) -> RowError:
        """Propagate the errors of the logits to a number with this derivative (N, V) with respect to them."""
        z = self.z
        variance = (derivative * z.spread).square().sum(1)
        if z.adapter is not None:
            variance += ((derivative * z.slope) @ z.adapter.b * z.adapter.spread).square().sum(1)
        return RowError((derivative.abs() * z.worst).sum(1), variance)

    def _of_exps(self, derivative: Tensor) -> Tensor:
        return (derivative.abs() * self.exp_error).sum(1) + self.v * _TINY

    def total_error(self) -> RowError:
        """Return the relative error of s: the logits, the exponentials, the sum. d log s / dz = p."""
        worst, variance = self._through(self.p)
        return RowError(worst + self._of_exps(self.p), variance + self.chain**2)

    def errors(self) -> dict[str, RowError]:
        """Return the errors of log p_y = d_y - log s, H = log s - dbar, lse = m + log s and max log p = -log s.

        d log p_y / dz = 1[y] - p and dH / dz = -p (log p + H). A relative error x of e^d moves log s by p x and dbar by
        p (d - dbar) x, so H by p (1 - (d - dbar)) x; one of s moves H by 1 + dbar times it; the products e^d d by u |dbar|.
        d max log p / dz = 1[argmax] - p, unless another logit is so near that errors may make it the maximum: then the
        maximum itself errs by the largest error of a logit.
        """
        u, p, log_s, mean, h = self.u, self.p, self.log_total, self.mean.abs(), self.entropy
        d_y = (self.hit * self.d).sum(1).abs()
        exps, chain = self._of_exps(p), self.chain**2
        peak = self.z.value.argmax(1, keepdim=True)
        gap = (self.z.value.gather(1, peak) - self.z.value.scatter(1, peak, -torch.inf).amax(1, keepdim=True))[:, 0]
        near = gap <= 2 * self.largest_error
        is_peak = torch.zeros_like(p).scatter_(1, peak, (~near[:, None]).to(p.dtype))
        own = {
            "logprob": (self.hit - p, exps + u * (3 * d_y + 5 * log_s), chain),
            "entropy": (
                p * self.centred,
                self._of_exps(p * (1 - self.centred)) + u * (4 * log_s + 5 * mean + h),
                chain * ((1 + self.mean).square() + mean.square()),
            ),
            "lse": (p, exps + u * (4 * log_s + (self.z.value.amax(1) + log_s).abs()), chain),
            "max_logprob": (is_peak - p, exps + self.largest_error.where(near, 0) + 4 * u * log_s, chain),
        }
        found = {}
        for name, (derivative, extra, square) in own.items():
            worst, variance = self._through(derivative)
            found[name] = RowError(self.growth * (worst + extra), self.growth.square() * (variance + square))
        return found


# --- the gradient of the logits ---------------------------------------------------------------------------------------


class Upstream(NamedTuple):
    """a = dL/dlogprob, b = dL/dH, c = dL/dlse (N,), and a bound on the error of each."""

    values: Sequence[Tensor]
    errors: Sequence[Tensor]

    @staticmethod
    def of(given: Mapping[str, Tensor], u: float, n: int, like: Tensor) -> Upstream:
        """Return gradients that are given exactly and rounded once."""
        zero = torch.zeros(n, dtype=torch.float64, device=like.device)
        values = [given.get(name, zero).double() for name in DIFFERENTIABLE]
        return Upstream(values, [u * x.abs() for x in values])

    def rows(self, at: Tensor) -> Upstream:
        return Upstream([x[at] for x in self.values], [x[at] for x in self.errors])


class RowGradientError:
    """dz_v = (a 1[v=y] + p_v k_v) f', k_v = c - a - b (log p_v + H), and its errors.

    Errors of one entry: those of z'_v, with dz_v / dz'_v = p (k - b) f' + (a 1[v=y] + p k) df'/dz' at fixed numbers of the row;
    those of e^d, of the sum k and of f'. Errors of the row, one number for all v times a vector R: s and H, which multiply
    p (k - b) and b p; the row's part of k; a, b and c.
    """

    def __init__(self, soft: Softmax, upstream: Upstream, least: float = _TINY) -> None:
        """least: softmax entries up to this may be lost."""
        a, b, c = (x[:, None] for x in upstream.values)
        z, u, p, hit = soft.z, soft.u, soft.p, soft.hit
        k = c - a - b * soft.centred
        inner = p * k + a * hit
        self.value = inner * z.slope
        slope = z.slope.abs()
        through = p * (k - b) * z.slope + inner * z.bend
        flushed = least * (a.abs() + c.abs() + b.abs() * (100 + soft.mean.abs()[:, None])) * slope
        self.worst = through.abs() * z.worst + flushed
        log_s = soft.log_total[:, None]  # the target's are exp(log p_y) and log p_y + H
        terms = a.abs() + c.abs() + b.abs() * (1 + soft.d.abs() + soft.mean.abs()[:, None] + log_s)
        of_exp = soft.exp_error + 4 * u * (1 + log_s)
        own = slope * ((p * k).abs() * of_exp + 4 * u * (p * terms + a.abs() * hit))
        own += inner.abs() * z.slope_error
        self.variance = (through * z.spread).square() + own.square() / 3
        self.of_adapter = None if z.adapter is None else (through * z.slope, z.adapter)
        total, entropy = soft.total_error(), soft.errors()["entropy"]
        a, b, c = (x.abs() for x in upstream.values)
        of_row = 4 * u * (a + c + b * (1 + soft.mean.abs())) + u * b * soft.entropy
        self.shared = [
            (p * (k - upstream.values[1][:, None]) * z.slope, total),
            (p * z.slope, RowError(b * entropy.worst + of_row, b.square() * entropy.variance)),
        ]
        vectors = ((hit - p) * z.slope, p * soft.centred * z.slope, p * z.slope)
        self.upstream = [(r, e) for r, e in zip(vectors, upstream.errors, strict=True) if bool(e.any())]
        self.growth = soft.growth[:, None]

    def narrowed(self, dtype: torch.dtype) -> Tensor:
        """Return the variance of the rounding of dz to the operands' dtype, on its way into a GEMM in 16 bits."""
        if dtype.itemsize > 2:
            return torch.zeros_like(self.value)
        return rounding(self.value, dtype).square() / 3

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return (worst, spread) of dz itself."""
        assert self.of_adapter is None
        worst, variance = self.worst.clone(), self.variance.clone()
        for r, e in self.shared:
            worst += r.abs() * e.worst[:, None]
            variance += r.square() * e.variance[:, None]
        for r, e in self.upstream:
            worst += r.abs() * e[:, None]
        return self.growth * worst, self.growth * variance.sqrt()

    def times(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (worst of the row, worst of upstream, variance) of dz m, (N, V) (V, k), for the errors of dz alone.

        The columns of a row have errors of their own and share those of the row.
        """
        worst, variance = self.worst @ m.abs(), self.variance @ m.square()
        for r, e in self.shared:
            along = r @ m
            worst += along.abs() * e.worst[:, None]
            variance += along.square() * e.variance[:, None]
        if self.of_adapter is not None:
            through, low = self.of_adapter
            # s h a^T has r numbers per row, each shared by all columns
            for b, spread in zip(low.b.T, low.spread.T, strict=True):
                variance += ((through * b) @ m).square() * spread.square()[:, None]
        upstream = torch.zeros_like(worst)
        for r, e in self.upstream:
            upstream += (r @ m).abs() * e[:, None]
        return self.growth * worst, self.growth * upstream, self.growth.square() * variance

    def transposed(self, m: Tensor, narrowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return (worst, variance) of dz^T m, (V, N) (N, k): rows are independent, except for the upstream of one loss."""
        variance = self.variance + self.worst.square() / 3
        for r, e in self.shared:
            variance += r.square() * (e.variance + e.worst.square() / 3)[:, None]
        if self.of_adapter is not None:
            through, low = self.of_adapter
            variance += through.square() * (low.spread.square() @ low.b.square().T)
        upstream = torch.zeros_like(self.value)
        for r, e in self.upstream:
            upstream += r.abs() * e[:, None]
        variance = self.growth.square() * variance + narrowed
        return (self.growth * upstream).T @ m.abs(), variance.T @ m.square()
