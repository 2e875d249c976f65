"""The bounds of gem.head.rounding: right computations keep them, and they are not much wider than the errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gem.head.adapters import HeadParts, local_part
from gem.head.check import statistics
from gem.head.rounding import Arithmetic, growth, product_bounds, roundoff, statistics_bounds
from gem_kernels import LowRank

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T, D, V = 12, 576, 400


def cancelling(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, HeadParts]:
    """Hidden states with two entries far larger than the others, whose products nearly cancel, as in pretrained models."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(1, T, D, generator=g), torch.randn(V, D, generator=g) / D**0.5
    hidden[..., :2], weight[:, 1] = 200.0, -weight[:, 0] + 1e-3 * weight[:, 1]
    return hidden.to(dtype), HeadParts(weight.to(dtype), None, None)


def shares(got: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    return ((got.double() - exact).abs() / bound)[bound > 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_keeps_its_bound_and_uses_it(dtype: torch.dtype, seed: int) -> None:
    hidden, parts = cancelling(dtype, seed)
    expected = product_bounds(hidden, parts, Arithmetic.of(hidden, parts.weight), dtype)
    own = shares(F.linear(hidden, parts.weight), expected.exact, expected.own)
    assert float(own.max()) <= 1
    assert float(own.max()) >= (1e-3 if dtype == torch.float32 else 0.5)
    assert float(shares(F.linear(hidden.float(), parts.weight.float()), expected.exact, expected.ours).max()) <= 1


@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
def test_a_sum_in_the_worst_order_keeps_its_bound(rising: bool) -> None:
    """The terms are added one by one, the largest first or last; no library does this."""
    hidden, parts = cancelling(torch.float32)
    expected = product_bounds(hidden, parts, Arithmetic.of(hidden, parts.weight), torch.float32)
    terms = hidden[0, 0] * parts.weight  # (V, D)
    terms = terms.gather(1, terms.abs().argsort(1, descending=not rising))
    total = torch.zeros(V)
    for column in terms.unbind(1):
        total += column
    assert float(shares(total, expected.exact[0, 0], expected.own[0, 0]).max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_power_of_two_is_exact(dtype: torch.dtype) -> None:
    _, parts = cancelling(dtype)
    hidden = torch.zeros(1, 2, D, dtype=dtype)
    hidden[0, 0, 7], hidden[0, 1, 8] = 8.0, 3.0
    expected = product_bounds(hidden, parts, Arithmetic.of(hidden, parts.weight), dtype)
    assert torch.equal(expected.exact[0, 0], 8.0 * parts.weight[:, 7].double())
    rounded = roundoff(dtype) * expected.exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert torch.equal(expected.own[0, 0], rounded[0, 0])
    assert bool((expected.own[0, 1] > rounded[0, 1]).all())  # 3 w is a rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_adapter_keep_their_bound(dtype: torch.dtype) -> None:
    hidden, parts = cancelling(dtype)
    low = LowRank(0.1 * torch.randn(8, D).to(dtype), torch.randn(V, 8).to(dtype), 2.0)
    bias = torch.randn(V).to(dtype)
    bias[3] = -torch.inf
    expected = product_bounds(hidden, HeadParts(parts.weight, bias, low), Arithmetic.of(hidden, parts.weight), dtype)
    got = F.linear(hidden, parts.weight, bias) + low.scale * F.linear(F.linear(hidden, low.a), low.b)
    assert bool((got[..., 3] == -torch.inf).all() and (expected.exact[..., 3] == -torch.inf).all())
    possible = torch.arange(V) != 3
    share = shares(got[..., possible], expected.exact[..., possible], expected.own[..., possible])
    assert float(share.max()) <= 1


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("setting", "operand"), [("highest", 0.0), ("high", 2.0**-10), ("medium", 2.0**-8)])
def test_what_a_library_does_to_its_operands_counts(setting: str, operand: float) -> None:
    torch.set_float32_matmul_precision(setting)
    hidden, parts = cancelling(torch.float32)
    arithmetic = Arithmetic.of(hidden, parts.weight)
    assert arithmetic == (torch.float32, operand, roundoff(torch.float32))
    expected = product_bounds(hidden, parts, arithmetic, torch.float32)
    cut = hidden, parts.weight
    if setting == "high":
        cut = tuple((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in cut)
    if setting == "medium":
        cut = tuple(t.bfloat16().float() for t in cut)
    assert float(shares(F.linear(*cut), expected.exact, expected.own).max()) <= 1


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before torch 2.9")
def test_precision_by_the_newer_setting() -> None:
    """Once it is set, torch refuses to read the older setting."""
    hidden, parts = cancelling(torch.float32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert Arithmetic.of(hidden, parts.weight).operand == 2.0**-8
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_autocast_rounds_the_operands_first() -> None:
    hidden, parts = cancelling(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        arithmetic, got = Arithmetic.of(hidden, parts.weight), F.linear(hidden, parts.weight)
    assert arithmetic.dtype == got.dtype == torch.bfloat16
    expected = product_bounds(hidden, parts, arithmetic, got.dtype)
    assert 0.5 <= float(shares(got, expected.exact, expected.own).max()) <= 1


def test_growth_is_what_a_sum_can_collect() -> None:
    assert growth(torch.tensor([0, 1, 16, 64, 4096])).tolist() == [0, 1, 16, 32, 256]


@pytest.mark.parametrize("size", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("wide", [1.0, 12.0])
def test_statistics_keep_their_bound_and_use_it(size: float, wide: float) -> None:
    """Logits are moved by their bounds: at random, all one way, and in the directions that move one statistic most."""
    g = torch.Generator().manual_seed(0)
    z = wide * torch.randn(40, 101, generator=g, dtype=torch.float64)
    z[:, 5] = -torch.inf
    targets = torch.randint(6, 101, (40,), generator=g)
    bound = size * torch.rand(z.shape, generator=g, dtype=torch.float64)
    allowed, exact = statistics_bounds(z, bound, targets, 0.0), statistics(z, targets)
    up = torch.ones_like(z)
    log_p = z.log_softmax(-1)
    onehot = F.one_hot(targets, 101).bool()
    ways = {"up": up, "down": -up, "target": up.where(onehot, -up), "entropy": -(log_p + exact.entropy[:, None]).sign()}
    ways |= {f"random {i}": torch.randn(z.shape, generator=g, dtype=torch.float64).sign() for i in range(20)}
    used = dict.fromkeys(allowed._fields, 0.0)
    for way in ways.values():
        moved = statistics((z + way * bound).masked_fill(z.isinf(), -torch.inf), targets)
        for name, a, b, limit in zip(used, moved, exact, allowed, strict=True):
            share = float(((a - b).abs() / limit).max())
            assert share <= 1 + 1e-6, (name, share)  # what fp64 rounds
            used[name] = max(used[name], share)
    assert used["lse"] >= 0.99 and used["logprob"] >= 0.9 and used["entropy"] >= (0.9 if size < 0.1 else 0.3), used


@pytest.mark.parametrize("v", [50, 60_000])
def test_statistics_in_fp32_keep_their_bound(v: int) -> None:
    g = torch.Generator().manual_seed(0)
    z = 8 * torch.randn(30, v, generator=g)
    targets = torch.randint(0, v, (30,), generator=g)
    allowed = statistics_bounds(z.double(), torch.zeros(z.shape, dtype=torch.float64), targets, roundoff(torch.float32))
    for got, exact, limit in zip(statistics(z, targets), statistics(z.double(), targets), allowed, strict=True):
        assert bool(((got - exact).abs() <= limit).all())
        assert float(limit.max()) < 2e-3


def test_a_part_of_a_dtensor_is_its_local_one() -> None:
    class Sharded:
        def to_local(self) -> Tensor:
            return torch.ones(2)

    assert torch.equal(local_part(Sharded()), torch.ones(2)) and torch.equal(local_part(torch.zeros(3)), torch.zeros(3))
