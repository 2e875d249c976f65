"""sega_loss: the sum over sequences of known weights times log-probs, and its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bounds import Bound
from devices import PLAIN, drawn, each_case
from group_losses import (
    CACHES,
    GPU_CACHES,
    OFFSETS,
    ON_GPU,
    WEIGHTS,
    D,
    N,
    V,
    make_case,
    offsets_of,
    results,
    run_sega,
    sega,
    weighted_likelihood,
)
from numerics import (
    DTYPES,
    STATS,
    TRANSFORMS,
    Case,
    Results,
    assert_all_close,
    assert_close,
    assert_same,
    linear_op,
)
from op_bounds import group_bounds

from gem_kernels import IGNORE_INDEX, GroupLoss, LogitTransform, TokenStats

pytestmark = pytest.mark.op("sega_loss")

Make = Callable[..., Case]
BF16 = torch.bfloat16
TWO_SLABS = {name: GPU_CACHES[name] for name in ("one slab", "slabs")}


def run_by_hand(case: Case) -> dict[str, Any]:
    """Compute -Σ_s w_s Σ_t log p_t from the per-token reference."""
    x = case.leaves()
    stats = linear_op(x, "reference")
    sums = [stats.logprob[a:b].sum() for a, b in itertools.pairwise(offsets_of(case))]
    loss = -(WEIGHTS.to(stats.logprob) * torch.stack(sums)).sum()
    return results(GroupLoss(loss, TokenStats(*(s.detach() for s in stats))), x)


@cache
def expected(case: Case) -> tuple[Results, dict[str, Bound]]:
    return run_by_hand(case.double()), group_bounds(case, weighted_likelihood(WEIGHTS), offsets_of(case))


def check(case: Case, impl: str, cache_bytes: int) -> None:
    assert_all_close(run_sega(case, impl, cache_bytes=cache_bytes), *expected(case))


@each_case(
    dtype=DTYPES,
    cache_bytes=CACHES,
    sizes=[(N, D, V)],
    heads={"full and plain": ({}, {"peaky": 30.0, **PLAIN})},
    gpu=[
        {"cache_bytes": TWO_SLABS, "sizes": [ON_GPU], "heads": {"plain": (PLAIN,)}},
        # without a cache a piece is one token
        {"dtype": [BF16], "cache_bytes": {"recompute": 1}, "sizes": [ON_GPU], "heads": {"plain": (PLAIN,)}},
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_sega_is_its_formula(
    impl: str,
    dtype: torch.dtype,
    cache_bytes: int,
    sizes: tuple[int, int, int],
    heads: tuple[dict[str, Any], ...],
    device: torch.device,
) -> None:
    for head in heads:
        check(make_case(*sizes, dtype=dtype, device=device, **head), impl, cache_bytes)


@each_case(
    transform=TRANSFORMS,
    peaky={"flat": None},
    cache_bytes=[CACHES["slabs"]],
    make=drawn(N, D, V),
    gpu={
        "transform": {name: TRANSFORMS[name] for name in ("identity", "combined")},
        "peaky": {"flat": None, "peaky": 30.0},
        "cache_bytes": [GPU_CACHES["slabs"]],
        "make": drawn(290, 72, 1003, dtype=BF16),
    },
)
@pytest.mark.usefixtures("small_tiles")
def test_sega_transforms(
    impl: str, transform: LogitTransform, peaky: float | None, cache_bytes: int, make: Make, device: torch.device
) -> None:
    check(make(transform=transform, peaky=peaky, device=device), impl, cache_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_sega_at_a_real_vocabulary(impl: str, device: torch.device) -> None:
    """Several tiles of the table in both directions, and logits that rise from tile to tile."""
    case = make_case(290, 64, 50_257, dtype=BF16, rank=0, device=device)
    check(replace(case, bias=torch.linspace(-150, 0, 50_257).to(case.weight)), impl, 1 << 30)


@each_case(cache_bytes=CACHES)
def test_sega_weights_of_zero_give_no_gradient(impl: str, cache_bytes: int) -> None:
    """All zero: exactly nothing. Zero for one sequence: exactly nothing for its tokens."""
    case = make_case(N, D, V)
    nothing = run_sega(case, impl, torch.zeros(6), cache_bytes=cache_bytes)
    for name, value in nothing.items():
        assert name in STATS or (value is not None and not value.any()), name
    some = run_sega(case, impl, cache_bytes=cache_bytes)["dhidden"]
    assert some is not None
    used = (WEIGHTS != 0).repeat_interleave(torch.tensor(OFFSETS).diff()) & (case.targets != IGNORE_INDEX)
    assert torch.equal(some.any(1), used)


@each_case()
def test_sega_of_equal_tokens_cancels(impl: str) -> None:
    """Weights that sum to 0 on copies of one sequence: no loss, no dweight beyond rounding, but a dhidden each."""
    one = make_case(10, D, V, ignored=0.0, rank=0)
    case = replace(one, hidden=one.hidden.repeat(3, 1), targets=one.targets.repeat(3))
    weights, offsets = torch.tensor([1.0, 0.5, -1.5]), [0, 10, 20, 30]
    got = run_sega(case, impl, weights, offsets=offsets)
    bounds = group_bounds(case, weighted_likelihood(weights), offsets)
    for name in ("loss", "dweight", "dbias"):
        value = got[name]
        assert value is not None
        assert_close(name, value, torch.zeros_like(value, dtype=torch.float64), bounds[name])
    assert got["dhidden"] is not None and bool(got["dhidden"].any(1).all())


@each_case()
def test_sega_stats_have_the_likeliest_token(impl: str) -> None:
    """max_logprob equals logprob to the last bit where the target is the likeliest token, and has no gradient."""
    case = make_case(N, D, V, peaky=30.0)
    gold, stats = linear_op(case.double(), "reference"), sega(case.leaves(), impl).stats
    gap, kept = gold.max_logprob - gold.logprob, case.targets != IGNORE_INDEX
    clear = kept & ((gap == 0) | (gap > 1e-3))  # between the two, rounding decides
    assert torch.equal((stats.logprob == stats.max_logprob)[clear], (gap == 0)[clear])
    assert not stats.max_logprob.requires_grad and not stats.max_logprob[~kept].any()


@each_case(make=drawn(N, D, V), gpu={"make": drawn(*ON_GPU, dtype=BF16, **PLAIN)})
def test_sega_frozen_head(impl: str, make: Make, device: torch.device) -> None:
    """dhidden keeps its bits, and the head gets no gradient."""
    case = make(device=device)
    x = case.leaves((True, False, False, True, True))
    sega(x, impl).loss.backward()
    assert x.weight.grad is None and (x.bias is None or x.bias.grad is None)
    assert all(t.grad is not None for t in (x.low_rank[:2] if x.low_rank else ()))
    assert x.hidden.grad is not None and torch.equal(x.hidden.grad, run_sega(case, impl)["dhidden"])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_bytes", GPU_CACHES.values(), ids=GPU_CACHES)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_sega_same_bits(impl: str, cache_bytes: int, device: torch.device) -> None:
    case = make_case(*ON_GPU, dtype=BF16, device=device)
    assert_same(*(run_sega(case, impl, cache_bytes=cache_bytes) for _ in range(2)))


@each_case()
def test_sega_shapes_and_dtypes(impl: str) -> None:
    case = make_case(N, D, V)
    plain = sega(case, impl)
    shaped = replace(case, hidden=case.hidden.view(2, 45, D), targets=case.targets.view(2, 45).int())
    out = sega(shaped, impl, WEIGHTS.bfloat16())
    assert out.loss.shape == () and out.loss.dtype == torch.float32 and torch.equal(out.loss, plain.loss)
    assert all(s.shape == (2, 45) for s in out.stats)
    assert sega(case, impl, WEIGHTS.double()).loss.dtype == torch.float32
    empty = sega(make_case(0, D, V), impl, torch.zeros(0), offsets=[0])
    assert empty.loss == 0


@each_case()
def test_sega_under_autocast(impl: str) -> None:
    case = make_case(N, D, V)
    x = case.leaves()
    with torch.autocast("cpu", BF16):
        out = sega(x, impl)
    got, want = results(out, x), run_sega(case.to(BF16), impl)
    assert_same(got, {name: None if value is None else value.float() for name, value in want.items()})


@each_case()
def test_sega_packed_is_one_by_one(impl: str) -> None:
    """Packing must not let one sequence see another."""
    case = make_case(N, D, V)
    packed = sega(case, impl).loss
    singles = [
        sega(replace(case, hidden=case.hidden[a:b], targets=case.targets[a:b]), impl, w[None], offsets=[0, b - a]).loss
        for (a, b), w in zip(itertools.pairwise(OFFSETS), WEIGHTS, strict=True)
    ]
    torch.testing.assert_close(packed, torch.stack(singles).sum(), rtol=1e-6, atol=1e-5)
