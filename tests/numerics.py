"""The one tolerance rule of the tests, and the inputs that they run on.

The rule. For a quantity computed three times from the same (already rounded) inputs,

    gold    the reference implementation on fp64 copies of the inputs,
    eager   the reference implementation on the inputs as they are: fp32 arithmetic, results in the dtypes of the op,
    got     the implementation under test on the inputs as they are,

it must hold that

    max |got - gold|  <=  2 max |eager - gold|  +  BAND eps(dtype of got) max |gold|.

Why. Two correct fp32 algorithms that sum in another order have errors of the same size, not the same error; the factor 2 is
the room for that. The band is for the case that eager happens to be (almost) exact: storing a result rounds it by at most
eps / 2 of its size, and a gradient is rounded up to four times on its way out (the term of the GEMM, the term of the
adapter, their sum, the product with the upstream gradient), so BAND = 4 / 2 = 2. Nothing here is fitted to a result, and no
test widens it. Where a test compares a sum whose terms cancel (a row of dz, a loss), `scale` is the size of the terms, which
is what their rounding is relative to.

N tokens, D hidden size, V vocabulary, r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, LowRank, TokenStats, linear_logprob_entropy
from gem_kernels.compat import INTERPRETED

IMPLS = ("reference", "chunked", "triton") if INTERPRETED else ("reference", "chunked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATS = TokenStats._fields
BAND = 2.0

Results = Mapping[str, Tensor | None]

TRANSFORMS = {
    "identity": LogitTransform(),
    "softcap": LogitTransform(softcap=30.0),
    "scale": LogitTransform(scale=0.0625),
    "cold": LogitTransform(temperature=0.6),
    "hot": LogitTransform(temperature=1.5),
    "combined": LogitTransform(scale=2.0, softcap=5.0, temperature=0.6),
}


def assert_close(name: str, got: Tensor, eager: Tensor, gold: Tensor, *, scale: float | None = None) -> None:
    """The rule above. Infinities must be the same ones; a NaN is an error unless gold has it there too."""
    assert got.shape == gold.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(gold.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    if not gold.numel():
        return
    finite = gold.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), gold[~finite].to(got.dtype).nan_to_num(nan=7.0)), name
    got64, eager64, gold64 = (torch.where(finite, t.detach().double(), 0.0) for t in (got, eager, gold))
    info = torch.finfo(got.dtype)
    size = float(gold64.abs().max()) if scale is None else scale
    band = BAND * info.eps * max(size, info.smallest_normal)
    error, eager_error = float((got64 - gold64).abs().max()), float((eager64 - gold64).abs().max())
    assert error <= 2 * eager_error + band, (
        f"{name}: error {error:.3e} > 2 x {eager_error:.3e} (eager) + {band:.3e} (rounding of {got.dtype} at {size:.3e})"
    )


def assert_all_close(got: Results, eager: Results, gold: Results, *, scales: Mapping[str, float] | None = None) -> None:
    """The rule for every entry; what is None in one is None in all. `scales`: of the entries that are sums of terms."""
    assert got.keys() == gold.keys() == eager.keys()
    for name, value in got.items():
        reference, exact = eager[name], gold[name]
        assert (value is None) == (exact is None), f"{name}: {value} where the gold is {exact}"
        if value is not None and reference is not None and exact is not None:
            assert_close(name, value, reference, exact, scale=(scales or {}).get(name))


@dataclass(frozen=True)
class Case:
    """Inputs of the linear ops; no tensor requires a gradient."""

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
    g = torch.Generator().manual_seed(seed)

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
    g = torch.Generator().manual_seed(seed)
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
    eager = run_linear(case, "reference", upstream)
    got = eager if impl == "reference" else run_linear(case, impl, upstream)
    assert_all_close(got, eager, run_linear(case.double(), "reference", upstream))
