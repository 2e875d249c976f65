"""The rule of numerics.py: it passes right computations in any order of their sums, and refuses wrong ones.

Distance of the bound from the error of eager PyTorch, as max bound / max error and, in brackets, norm of the bound / norm of
the error (one thread, AVX-512; the ratio of two maxima is luck, that of two norms is not):

    case                         logprob   entropy   lse       dhidden   dweight   dbias     da        db
    193 x 70 x 517, fp32         23 (10)   18 (13)   18 (11)   19 (9)    16 (4)    30 (7)    16 (6)    11 (4)
    193 x 70 x 517, bf16         29 (12)   24 (14)   20 (11)   6 (2)     8 (2)     8 (2)     5 (2)     10 (2)
    61 x 20 x 305, fp32          13 (10)   21 (13)   13 (10)   40 (10)   57 (6)    60 (7)    20 (5)    59 (7)
    120 x 40 x 523, peaky, fp32  18 (6)    9 (4)     14 (5)    129 (22)  130 (16)  129 (16)  134 (24)  58 (15)
    1090 x 12 x 4111, fp32       13 (10)   28 (18)   10 (8)    28 (10)   21 (6)    51 (11)   20 (5)    20 (3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from numerics import (
    DIFFERENTIABLE,
    STATS,
    TRANSFORMS,
    Case,
    assert_all_close,
    generator,
    make_case,
    make_upstream,
    run_linear,
)
from op_bounds import linear_bounds
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16)


# --- products (n, k) (k, m) in fp32, in several orders ------------------------------------------------------------------


def library(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def from_the_end(a: Tensor, b: Tensor) -> Tensor:
    return a.flip(1) @ b.flip(0)


def in_chunks(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x @ y for x, y in zip(a.split(37, 1), b.split(37), strict=True)]).sum(0)


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    terms = [x[:, None] * y for x, y in zip(a.T, b, strict=True)]
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def one_by_one_shuffled(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1])
    for i in torch.randperm(a.shape[1]).tolist():
        total += a[:, i, None] * b[i]
    return total


def in_bf16(a: Tensor, b: Tensor) -> Tensor:
    """Multiply with the fault: partial sums are kept in bf16."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for x, y in zip(a.split(16, 1), b.split(16), strict=True):
        total = (total.float() + x @ y).bfloat16()
    return total.float()


# --- the computation, by hand -------------------------------------------------------------------------------------------


def compute(
    case: Case,
    upstream: dict[str, Tensor],
    *,
    of_logits: Product = library,
    of_hidden: Product = library,
    of_weight: Product = library,
    rounded: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Compute MATHS.md in fp32 with the given products, without softcap. As in kernels, dz has the operands' dtype."""
    h, w = case.hidden.float(), case.weight.float()
    z = of_logits(h, w.T)
    low = case.low_rank
    if low is not None:
        through = low.scale * of_logits(h, low.a.float().T)
        z = z + of_logits(through, low.b.float().T)
    if case.bias is not None:
        z = z + case.bias.float()
    gain = case.transform.scale / case.transform.temperature
    z = (gain * z).to(rounded).float()
    kept, y = case.targets >= 0, case.targets.clamp(min=0)[:, None]
    ones = torch.ones(z.shape[1], 1)
    maximum = z.amax(1, keepdim=True)
    d = z - maximum
    e = d.exp()
    total, weighted = of_logits(e, ones), of_logits(e * d.clamp(min=-1e30), ones)
    stats = (d.gather(1, y) - total.log(), total.log() - weighted / total, maximum + total.log(), -total.log())
    a, b, c = (upstream.get(name, torch.zeros(len(kept))).float()[:, None] * kept[:, None] for name in DIFFERENTIABLE)
    p = e / total
    dz = p * (c - a - b * (d - weighted / total))
    dz = (gain * dz.scatter_add(1, y, a)).to(case.weight.dtype).float()
    results = {name: torch.where(kept, s[:, 0], 0) for name, s in zip(STATS, stats, strict=True)}
    results |= {"dhidden": of_hidden(dz, w), "dweight": of_weight(dz.T, h), "dbias": None, "da": None, "db": None}
    if case.bias is not None:
        results["dbias"] = of_weight(dz.T, torch.ones(len(kept), 1))[:, 0]
    if low is not None:
        dlow = low.scale * of_hidden(dz, low.b.float())
        results["dhidden"] += dlow @ low.a.float()
        results |= {"da": of_weight(dlow.T, h), "db": of_weight(dz.T, through)}
    leaves = case.tensors()
    return {k: v if v is None or k in STATS else v.to(leaves[k[1:]].dtype) for k, v in results.items()}  # type: ignore[union-attr]


def check(case: Case, got: dict[str, Tensor | None], upstream: dict[str, Tensor]) -> None:
    assert_all_close(got, run_linear(case.double(), "reference", upstream), linear_bounds(case, upstream))


# --- right computations pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peaky", [None, 30.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", [library, from_the_end, in_chunks, pairwise, one_by_one_shuffled])
def test_any_order_passes(product: Product, dtype: torch.dtype, peaky: float | None) -> None:
    for seed in range(20):
        case = make_case(21, 20, 150, dtype=dtype, peaky=peaky, transform=TRANSFORMS["cold"], seed=seed)
        upstream = make_upstream(21, seed=seed)
        check(case, compute(case, upstream, of_logits=product, of_hidden=product, of_weight=product), upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_compared_with_itself_passes(dtype: torch.dtype) -> None:
    case, upstream = make_case(21, 20, 150, dtype=dtype), make_upstream(21)
    gold = run_linear(case.double(), "reference", upstream)
    leaves = case.tensors()
    rounded = {
        k: v if v is None else v.to(torch.float32 if k in STATS else leaves[k[1:]].dtype) for k, v in gold.items()
    }  # type: ignore[union-attr]
    assert_all_close(rounded, gold, linear_bounds(case, upstream))


# --- wrong ones are refused ---------------------------------------------------------------------------------------------


def without_a_column(case: Case) -> Case:
    """Leave out the last column of the vocabulary, which is no target."""
    assert case.bias is not None
    return replace(case, bias=case.bias.index_fill(0, torch.tensor([case.bias.shape[0] - 1]), -torch.inf))


FAULTS: dict[str, tuple[Callable[[Case, dict[str, Tensor]], dict[str, Tensor | None]], str]] = {
    "logits in bf16": (lambda case, up: compute(case, up, rounded=torch.bfloat16), "logprob|entropy|lse"),
    "no gradient of the entropy": (lambda case, up: compute(case, {n: up[n] for n in ("logprob", "lse")}), "dhidden"),
    "no temperature": (lambda case, up: compute(replace(case, transform=TRANSFORMS["identity"]), up), "logprob"),
    "one column too few": (lambda case, up: compute(without_a_column(case), up), "logprob|entropy|lse"),
    "logits summed in bf16": (lambda case, up: compute(case, up, of_logits=in_bf16), "logprob|entropy|lse"),
    "dhidden summed in bf16": (lambda case, up: compute(case, up, of_hidden=in_bf16), "dhidden"),
    "dweight summed in bf16": (lambda case, up: compute(case, up, of_weight=in_bf16), "dweight"),
    "the first token's upstream": (lambda case, up: compute(case, {n: u[:1].expand(len(u)) for n, u in up.items()}), "dhid"),
}  # fmt: skip


@pytest.mark.parametrize("adapter", [0, 3], ids=["plain", "adapter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault: str, dtype: torch.dtype, adapter: int) -> None:
    wrong, named = FAULTS[fault]
    for seed in range(3):
        case = make_case(300, 24, 601, dtype=dtype, rank=adapter, ignored=0.1, transform=TRANSFORMS["cold"], seed=seed)
        case = replace(case, targets=case.targets.clamp(max=599))
        upstream = make_upstream(300, seed=seed)
        check(case, compute(case, upstream), upstream)
        with pytest.raises(AssertionError, match=rf"^({named})\w*: error"):
            check(case, wrong(case, upstream), upstream)


def test_a_fault_in_one_entry_is_named() -> None:
    case, upstream = make_case(21, 20, 150), make_upstream(21)
    got = compute(case, upstream)
    assert got["dweight"] is not None
    got["dweight"][17, 3] += 1e-4
    with pytest.raises(AssertionError, match=rf"dweight: error .* at entry {17 * 20 + 3} of \(150, 20\)"):
        check(case, got, upstream)


def test_twice_the_rounding_everywhere_is_refused() -> None:
    """Every entry of a bf16 gradient is off by nearly its own rounding: the norm shows it."""
    case, upstream = make_case(193, 70, 517, dtype=torch.bfloat16), make_upstream(193)
    got, bounds = run_linear(case, "reference", upstream), linear_bounds(case, upstream)
    gold = run_linear(case.double(), "reference", upstream)
    assert gold["dweight"] is not None
    signs = torch.randint(0, 2, gold["dweight"].shape, generator=generator(5)) * 2 - 1
    got["dweight"] = (gold["dweight"] + signs * 6 * bounds["dweight"].spread).bfloat16()
    with pytest.raises(AssertionError, match="dweight: error of norm .* though every entry is within its bound"):
        assert_all_close(got, gold, bounds)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_that_is_not_finite_is_refused(value: float) -> None:
    case, upstream = make_case(21, 20, 150), make_upstream(21)
    got = run_linear(case, "reference", upstream)
    assert got["dhidden"] is not None
    got["dhidden"][2, 1] = value
    with pytest.raises(AssertionError, match="dhidden: error"):
        check(case, got, upstream)


def test_another_dtype_is_refused() -> None:
    case, upstream = make_case(21, 20, 150, dtype=torch.bfloat16), make_upstream(21)
    got = run_linear(case, "reference", upstream)
    assert got["logprob"] is not None
    with pytest.raises(AssertionError, match=r"logprob: torch.bfloat16, expected torch.float32"):
        check(case, {**got, "logprob": got["logprob"].bfloat16()}, upstream)


# --- and the bound is not far from eager --------------------------------------------------------------------------------


@pytest.mark.parametrize("peaky", [None, 30.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_is_near_what_eager_shows(dtype: torch.dtype, peaky: float | None) -> None:
    """In norm, the bound of an fp32 result is below 60 errors of eager PyTorch, that of a bf16 result below 3."""
    case, upstream = make_case(193, 70, 517, dtype=dtype, peaky=peaky), make_upstream(193)
    gold, bounds = run_linear(case.double(), "reference", upstream), linear_bounds(case, upstream)
    for name, value in run_linear(case, "reference", upstream).items():
        exact = gold[name]
        assert value is not None and exact is not None
        bound = bounds[name]
        last = torch.finfo(value.dtype).eps / 2 * exact.abs()
        allowed = bound.worst.norm() + (bound.spread.square() + last.square() / 3).sum().sqrt()
        looseness = float(allowed / (value.double() - exact).norm())
        assert looseness < (60 if value.dtype == torch.float32 else 3), f"{name}: {looseness}"
