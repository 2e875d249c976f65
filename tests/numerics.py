"""The one tolerance rule of the tests, and their inputs.

The rule. `gold` is the result of the reference implementation on fp64 copies of the (already rounded) inputs; `got` is the
result of the implementation under test on the inputs themselves. bounds.py derives the errors that rounding alone can cause in
a right computation in fp32, in any order and on any device: per entry, a bound `worst` on errors that may all have one sign,
and the standard deviation `spread` of independent ones. Storing a result adds `last`, half a unit of its dtype. The rule is

    per entry     |got - gold|  <=  worst + 7 spread + last,
    as a whole    ||got - gold||  <=  ||worst|| + ||sigma|| + 7 L,    sigma^2 = spread^2 + last^2 / 3.

Why. Seven standard deviations are exceeded with a probability of 5e-11 (bounds.py), so a right computation keeps the first line
in all the 10^8 entries that a run of the tests compares. The second line finds errors that are only twice too large, but
everywhere: the norm of independent roundings has an expectation of at most ||sigma||, and, as a Lipschitz function of them,
exceeds it by 7 L with the same small probability. L is the largest norm of a row of sigma: roundings of different rows do not
mix, and those of one row, which a matrix mixes, change it by their norm at most. `last` rounds each entry alone, so its L is
its maximum.

Nothing here is fitted to a result, and no test widens it. The reference keeps the rule like any implementation.

N tokens, D hidden size, V vocabulary, r rank of the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bounds import DIFFERENTIABLE, SIGMAS, STATS, Bound, rounding
from op_bounds import linear_bounds
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, LowRank, TokenStats, linear_logprob_entropy
from gem_kernels.compat import INTERPRETED

IMPLS = ("reference", "chunked", "triton") if INTERPRETED else ("reference", "chunked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = int(os.environ.get("GEM_TEST_SEED", "0"))
THREADS = int(os.environ.get("GEM_TEST_THREADS", "1"))

Results = Mapping[str, Tensor | None]
_CPU = torch.device("cpu")

TRANSFORMS = {
    "identity": LogitTransform(),
    "softcap": LogitTransform(softcap=30.0),
    "scale": LogitTransform(scale=0.0625),
    "cold": LogitTransform(temperature=0.6),
    "hot": LogitTransform(temperature=1.5),
    "combined": LogitTransform(scale=2.0, softcap=5.0, temperature=0.6),
}


def _round_to_nearest() -> None:
    """Make Triton's interpreter round fp32 to the nearest bf16, as every device does: by itself it truncates."""
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return cut_off(x, source, target, mode)
        nearest = torch.tensor(x, dtype=torch.float32).bfloat16()  # x is a NumPy array, and NumPy has no bf16
        return nearest.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert


if INTERPRETED:
    _round_to_nearest()


def generator(seed: int) -> torch.Generator:
    """Return a generator for `seed`, shifted by GEM_TEST_SEED; by 0 not at all."""
    return torch.Generator().manual_seed(seed + 1_000_003 * SEED)


def assert_close(name: str, got: Tensor, gold: Tensor, bound: Bound) -> None:
    """Apply the rule above. Infinities must agree; a NaN is an error unless gold has one there too."""
    assert got.shape == gold.shape == bound.worst.shape == bound.spread.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(gold.shape)}, with a bound of {tuple(bound.worst.shape)}"
    )
    assert got.dtype == bound.dtype, f"{name}: {got.dtype}, expected {bound.dtype}"
    if not gold.numel():
        return
    finite = gold.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), gold[~finite].to(got.dtype).nan_to_num(nan=7.0)), name
    got64, gold64, worst, spread = (
        torch.where(finite, t.detach().double(), 0.0) for t in (got, gold, bound.worst, bound.spread)
    )
    last = bound.roundings * rounding(gold64, got.dtype)
    error, allowed = (got64 - gold64).abs(), worst + SIGMAS * spread + last
    ratio = (error / allowed).nan_to_num(nan=torch.inf)
    at = int(ratio.argmax())
    assert bool((error <= allowed).all()), (
        f"{name}: error {float(error.flatten()[at]):.3e} > {float(allowed.flatten()[at]):.3e} at entry {at} of "
        f"{tuple(got.shape)}, where it should be {float(gold64.flatten()[at]):.6e}"
    )
    sigma = (spread.square() + last.square() / 3).sqrt()
    of_rows = spread.norm() if bound.mixed else (spread if spread.ndim < 2 else spread.norm(dim=-1)).max()
    lipschitz = float((of_rows.square() + last.max().square() / 3).sqrt())
    whole, most = float(error.norm()), float(worst.norm() + sigma.norm()) + SIGMAS * lipschitz
    assert whole <= most, f"{name}: error of norm {whole:.3e} > {most:.3e}, though every entry is within its bound"


def assert_all_close(got: Results, gold: Results, bounds: Mapping[str, Bound]) -> None:
    """Apply the rule to every result; a result that is None in one must be None in both."""
    assert got.keys() == gold.keys()
    for name, value in got.items():
        exact = gold[name]
        assert (value is None) == (exact is None), f"{name}: {value} where the gold is {exact}"
        if value is not None and exact is not None:
            assert_close(name, value, exact, bounds[name])


def assert_same(got: Results, want: Results, at: Tensor | None = None) -> None:
    """Compare bit by bit; per-token results only at the rows `at`, if given."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        other = want[name]
        if value is None or other is None:
            assert value is other, name
            continue
        rows = at is not None and name in (*STATS, "dhidden")
        assert torch.equal(value[at] if rows else value, other[at] if rows else other), name


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of the linear ops; no tensor requires a gradient. Compared by identity, so that a case can be a key."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None
    transform: LogitTransform

    def to(self, dtype: torch.dtype) -> Case:
        return self._map(lambda _, t: t.to(dtype))

    def on(self, device: torch.device) -> Case:
        return replace(self._map(lambda _, t: t.to(device)), targets=self.targets.to(device))

    def double(self) -> Case:
        """Return the case with its numbers in fp64."""
        return self.to(torch.float64)

    def leaves(self, needs: Sequence[bool] = (True,) * 5) -> Case:
        """Copy the case; `needs` sets requires_grad of hidden, weight, bias, low_rank.a, low_rank.b."""
        need = dict(zip(self.tensors(), needs, strict=True))
        return self._map(lambda name, t: t.detach().clone().requires_grad_(need[name]))

    def _map(self, fn: Callable[[str, Tensor], Tensor]) -> Case:
        low_rank = self.low_rank
        return replace(
            self,
            hidden=fn("hidden", self.hidden),
            weight=fn("weight", self.weight),
            bias=None if self.bias is None else fn("bias", self.bias),
            low_rank=None if low_rank is None else LowRank(fn("a", low_rank.a), fn("b", low_rank.b), low_rank.scale),
        )

    def tensors(self) -> dict[str, Tensor | None]:
        a, b = (None, None) if self.low_rank is None else self.low_rank[:2]
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias, "a": a, "b": b}

    def gradients(self) -> dict[str, Tensor | None]:
        return {f"d{name}": None if t is None else t.grad for name, t in self.tensors().items()}


def make_case(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    peaky: float | None = None,
    ignored: float = 0.2,
    bias: bool = True,
    rank: int = 3,
    transform: LogitTransform = TRANSFORMS["identity"],
    targets_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    device: torch.device = _CPU,
) -> Case:
    """Draw inputs, the same on every device; logits of size ~1, or with max |hidden W^T| = `peaky`.

    With `peaky` every other target is the likeliest token. `ignored`: share of the tokens with target IGNORE_INDEX (1.0: all
    of them). rank=0: no adapter.
    """
    g = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight = normal(n, d), normal(v, d) / d**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    if peaky is not None and n:
        logits = hidden @ weight.T
        hidden = hidden * (peaky / logits.abs().max())
        targets[::2] = logits.argmax(1)[::2]
    targets[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    low_rank = LowRank((normal(rank, d) / d**0.5).to(dtype), (0.5 * normal(v, rank)).to(dtype), 0.7) if rank else None
    case = Case(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        targets=targets.to(targets_dtype),
        bias=(0.5 * normal(v)).to(dtype) if bias else None,
        low_rank=low_rank,
        transform=transform,
    )
    return case if device == _CPU else case.on(device)


def make_upstream(
    n: int, names: Iterable[str] = DIFFERENTIABLE, seed: int = 1, device: torch.device = _CPU
) -> dict[str, Tensor]:
    """Draw one upstream gradient per token and statistic, in fp64."""
    g = generator(seed)
    full = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in DIFFERENTIABLE}
    return {name: full[name].to(device) for name in names}


def weighted_sum(stats: TokenStats, upstream: Mapping[str, Tensor]) -> Tensor:
    """Return the scalar whose gradient with respect to each statistic is `upstream`."""
    values = stats._asdict()
    return torch.stack([(values[name] * u.to(values[name].dtype)).sum() for name, u in upstream.items()]).sum()


def linear_op(case: Case, impl: str, **options: Any) -> TokenStats:
    """Return linear_logprob_entropy of a case."""
    extra = {"bias": case.bias, "transform": case.transform, "low_rank": case.low_rank, "impl": impl}
    return linear_logprob_entropy(case.hidden, case.weight, case.targets, **extra, **options)  # type: ignore[arg-type]


def run_linear(
    case: Case, impl: str, upstream: Mapping[str, Tensor], needs: Sequence[bool] = (True,) * 5, **options: Any
) -> dict[str, Tensor | None]:
    """Return statistics and gradients of linear_logprob_entropy."""
    x = case.leaves(needs)
    stats = linear_op(x, impl, **options)
    if any(needs):
        weighted_sum(stats, upstream).backward()
    return {**{name: s.detach() for name, s in stats._asdict().items()}, **x.gradients()}


def check_linear(case: Case, impl: str, names: Iterable[str] = DIFFERENTIABLE) -> None:
    """Hold linear_logprob_entropy by `impl` to the rule, every statistic and every gradient."""
    upstream = make_upstream(case.targets.shape[0], names, device=case.hidden.device)
    gold = run_linear(case.double(), "reference", upstream)
    assert_all_close(run_linear(case, impl, upstream), gold, linear_bounds(case, upstream))
