"""The one tolerance rule of the tests, and the inputs that they run on.

The rule. Let `gold` be the result of the reference implementation on fp64 copies of the (already rounded) inputs, and `got`
that of the implementation under test on the inputs as they are. bounds.py derives what rounding alone can make of a right
computation with fp32 arithmetic, in any order and on any device: per entry, a bound `worst` on errors that may push one way
and the standard deviation `spread` of those that are independent. Storing a result adds `last`, half a unit of its dtype.
Then it must hold that

    per entry     |got - gold|  <=  worst + 7 spread + last,
    as a whole    ||got - gold||  <=  ||worst|| + ||sigma|| + 7 L,    sigma^2 = spread^2 + last^2 / 3.

Why. Seven standard deviations are exceeded with a probability of 5e-11 (bounds.py), so a right computation keeps the first line
in all the 10^8 entries that a run of the tests compares. The second sees what is only twice as bad, but everywhere: a norm
of independent roundings has an expectation of at most ||sigma||, and being a Lipschitz function of them strays from it by
7 L with the same probability. L is the largest norm of a row of sigma: roundings of other rows do not meet, and those of one
row, which a matrix mixes, move it by their norm at most. `last` is a rounding of each entry alone, so there L is its maximum.

Nothing here is fitted to a result, and no test widens it. The reference itself is held to the rule like any implementation.

N tokens, D hidden size, V vocabulary, r rank of the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from bounds import SIGMAS, STATS, Bound, rounding
from op_bounds import linear_bounds
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, LowRank, TokenStats, linear_logprob_entropy
from gem_kernels.compat import INTERPRETED

IMPLS = ("reference", "chunked", "triton") if INTERPRETED else ("reference", "chunked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = int(os.environ.get("GEM_TEST_SEED", "0"))
THREADS = int(os.environ.get("GEM_TEST_THREADS", "1"))

Results = Mapping[str, Tensor | None]

TRANSFORMS = {
    "identity": LogitTransform(),
    "softcap": LogitTransform(softcap=30.0),
    "scale": LogitTransform(scale=0.0625),
    "cold": LogitTransform(temperature=0.6),
    "hot": LogitTransform(temperature=1.5),
    "combined": LogitTransform(scale=2.0, softcap=5.0, temperature=0.6),
}


def _round_to_nearest() -> None:
    """Triton's interpreter cuts fp32 off to bf16, where every device rounds to the nearest: teach it."""
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return cut_off(x, source, target, mode)
        nearest = torch.tensor(x, dtype=torch.float32).bfloat16()  # of NumPy's array, which knows no bf16
        return nearest.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert


if INTERPRETED:
    _round_to_nearest()


def generator(seed: int) -> torch.Generator:
    """Other numbers for every GEM_TEST_SEED; for 0 those of `seed` itself."""
    return torch.Generator().manual_seed(seed + 1_000_003 * SEED)


def assert_close(name: str, got: Tensor, gold: Tensor, bound: Bound) -> None:
    """The rule above. Infinities must be the same ones; a NaN is an error unless gold has it there too."""
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
    """The rule for every entry; what is None in one is None in both."""
    assert got.keys() == gold.keys()
    for name, value in got.items():
        exact = gold[name]
        assert (value is None) == (exact is None), f"{name}: {value} where the gold is {exact}"
        if value is not None and exact is not None:
            assert_close(name, value, exact, bounds[name])


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of the linear ops; no tensor requires a gradient. Equal is only what is the same, so that it can be a key."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None
    transform: LogitTransform

    def to(self, dtype: torch.dtype) -> Case:
        return self._map(lambda _, t: t.to(dtype))

    def double(self) -> Case:
        """The same numbers in fp64."""
        return self.to(torch.float64)

    def leaves(self, needs: Sequence[bool] = (True,) * 5) -> Case:
        """Fresh copies that require a gradient where `needs` says so: hidden, weight, bias, low_rank.a, low_rank.b."""
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
) -> Case:
    """Random inputs; logits of size ~1, or with max |hidden W^T| = `peaky` and every other target the most likely token.

    `ignored`: share of the tokens with target IGNORE_INDEX (1.0: all of them). rank=0: no adapter.
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
    return Case(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        targets=targets.to(targets_dtype),
        bias=(0.5 * normal(v)).to(dtype) if bias else None,
        low_rank=low_rank,
        transform=transform,
    )


def make_upstream(n: int, names: Iterable[str] = STATS, seed: int = 1) -> dict[str, Tensor]:
    """One random upstream gradient per token and statistic, in fp64."""
    g = generator(seed)
    full = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in STATS}
    return {name: full[name] for name in names}


def weighted_sum(stats: TokenStats, upstream: Mapping[str, Tensor]) -> Tensor:
    """The scalar whose gradient with respect to each statistic is `upstream`."""
    values = stats._asdict()
    return torch.stack([(values[name] * u.to(values[name].dtype)).sum() for name, u in upstream.items()]).sum()


def run_linear(
    case: Case, impl: str, upstream: Mapping[str, Tensor], needs: Sequence[bool] = (True,) * 5
) -> dict[str, Tensor | None]:
    """Statistics and gradients of linear_logprob_entropy."""
    x = case.leaves(needs)
    stats = linear_logprob_entropy(
        x.hidden,
        x.weight,
        x.targets,
        bias=x.bias,
        transform=x.transform,
        low_rank=x.low_rank,
        impl=impl,  # type: ignore[arg-type]
    )
    if any(needs):
        weighted_sum(stats, upstream).backward()
    return {**{name: s.detach() for name, s in stats._asdict().items()}, **x.gradients()}


def check_linear(case: Case, impl: str, names: Iterable[str] = STATS) -> None:
    """linear_logprob_entropy by `impl` keeps the rule, every statistic and every gradient."""
    upstream = make_upstream(case.targets.shape[0], names)
    gold = run_linear(case.double(), "reference", upstream)
    assert_all_close(run_linear(case, impl, upstream), gold, linear_bounds(case, upstream))
