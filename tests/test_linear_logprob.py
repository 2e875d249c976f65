"""linear_logprob_entropy against fp64: every statistic and every gradient, by the one rule of numerics.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import PLAIN, drawn, each_case
from numerics import (
    DIFFERENTIABLE,
    DTYPES,
    TRANSFORMS,
    Case,
    assert_close,
    check_linear,
    generator,
    linear_op,
    make_case,
    make_upstream,
    run_linear,
)
from op_bounds import linear_bounds
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, LowRank

pytestmark = pytest.mark.op("linear_logprob_entropy")

Make = Callable[..., Case]
BF16 = torch.bfloat16
SHAPES = [(17, 31, 257), (193, 70, 517), (252, 123, 507), (128, 64, 512), (1, 16, 300), (5, 8, 1), (0, 8, 16)]
# The copy engine (TMA) can read rows of 64, 128 and 256 numbers, and not the others.
GPU_SHAPES = [(17, 31, 257), (193, 70, 517), (252, 123, 507), (256, 128, 1024), (300, 256, 50257)]
SUBSETS = {"+".join(names): names for size in (1, 2, 3) for names in itertools.combinations(DIFFERENTIABLE, size)}
GPU_SUBSETS = {name: SUBSETS[name] for name in ("logprob", "entropy", "lse", "logprob+entropy")}


def closed_form(case: Case, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute MATHS.md by hand in fp64, without autograd: the check of the reference. No ignored tokens."""
    x, f = case.double(), case.transform
    raw = x.hidden @ x.weight.T
    if x.bias is not None:
        raw = raw + x.bias
    if x.low_rank is not None:
        raw = raw + x.low_rank.scale * (x.hidden @ x.low_rank.a.T @ x.low_rank.b.T)
    squashed = f.scale * raw if f.softcap is None else f.softcap * torch.tanh(f.scale * raw / f.softcap)
    slope = f.scale / f.temperature * (1 if f.softcap is None else 1 - (squashed / f.softcap) ** 2)
    z = squashed / f.temperature
    p = torch.softmax(z, -1)
    onehot = F.one_hot(x.targets.long(), z.shape[1]).double()
    entropy = torch.distributions.Categorical(logits=z).entropy()
    logprob = -F.cross_entropy(z, x.targets.long(), reduction="none")
    a, b, c = (upstream[name][:, None] for name in DIFFERENTIABLE)
    dz = (a * (onehot - p) - b * p * (p.log() + entropy[:, None]) + c * p) * slope
    out = {"logprob": logprob, "entropy": entropy, "lse": z.exp().sum(-1).log(), "max_logprob": p.amax(-1).log()}
    out |= {"dhidden": dz @ x.weight, "dweight": dz.T @ x.hidden, "dbias": dz.sum(0)}
    if x.low_rank is not None:
        s, (lora_a, lora_b) = x.low_rank.scale, x.low_rank[:2]
        out["dhidden"] = out["dhidden"] + s * dz @ lora_b @ lora_a
        out |= {"da": s * (dz @ lora_b).T @ x.hidden, "db": s * dz.T @ (x.hidden @ lora_a.T)}
    return out


# --- the reference is right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_reference_is_the_closed_form(transform: LogitTransform) -> None:
    case = make_case(23, 11, 37, ignored=0.0, transform=transform)
    upstream = make_upstream(23)
    want = closed_form(case, upstream)
    got = run_linear(case.double(), "reference", upstream)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("transform", [TRANSFORMS["identity"], TRANSFORMS["combined"]], ids=["identity", "combined"])
def test_reference_gradcheck(transform: LogitTransform) -> None:
    x = make_case(4, 3, 6, transform=transform).double().leaves()
    assert x.bias is not None and x.low_rank is not None

    def stats(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        low_rank = LowRank(a, b, 0.7)
        found = linear_op(replace(x, hidden=hidden, weight=weight, bias=bias, low_rank=low_rank), "reference")
        return found[: len(DIFFERENTIABLE)]

    assert torch.autograd.gradcheck(stats, (x.hidden, x.weight, x.bias, x.low_rank.a, x.low_rank.b))


# --- every implementation, by the one rule ----------------------------------------------------------------------------


@each_case(dtype=DTYPES, shape=SHAPES, gpu=[{"shape": GPU_SHAPES}, {"dtype": [BF16], "shape": [(0, 64, 130)]}])
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    check_linear(make_case(*shape, dtype=dtype, ignored=0.0 if shape[0] == 1 else 0.2, device=device), impl)


@each_case()
def test_matches_gold_on_the_tiles_of_the_table(impl: str) -> None:
    check_linear(make_case(1090, 12, 4111), impl)


@each_case(dtype=DTYPES, shape=[(97, 33, 211)], gpu={"shape": [(193, 70, 517), (256, 128, 1024)]})
@pytest.mark.usefixtures("small_tiles")
def test_plain_head(impl: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    check_linear(make_case(*shape, dtype=dtype, ignored=0.0, device=device, **PLAIN), impl)


@each_case(dtype=DTYPES, make=drawn(120, 40, 523), gpu={"make": drawn(120, 64, 50257, **PLAIN)})
@pytest.mark.usefixtures("small_tiles")
def test_peaky(impl: str, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    check_linear(make(dtype=dtype, peaky=30.0, device=device), impl)


@each_case(dtype=DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_the_likeliest_token(impl: str, dtype: torch.dtype) -> None:
    """max_logprob keeps the rule, and equals logprob to the last bit exactly where the target is the likeliest token."""
    case = make_case(193, 70, 517, dtype=dtype, peaky=30.0)
    stats, gold = linear_op(case.leaves(), impl), linear_op(case.double(), "reference")
    highest = stats.max_logprob
    assert not highest.requires_grad
    assert_close("max_logprob", highest, gold.max_logprob, linear_bounds(case, {})["max_logprob"])
    kept = case.targets != IGNORE_INDEX
    assert not highest[~kept].any() and bool((stats.logprob <= highest).all())
    gap = gold.max_logprob - gold.logprob
    clear = kept & ((gap == 0) | (gap > 1e-3))  # between the two, rounding decides
    assert torch.equal((stats.logprob == highest)[clear], (gap == 0)[clear])
    assert 0.1 < float((stats.logprob == highest)[kept].float().mean()) < 0.9  # bias and adapter move many


@each_case(
    names=SUBSETS,
    make=drawn(61, 20, 305),
    gpu={"names": GPU_SUBSETS, "make": drawn(256, 128, 1024, dtype=BF16, **PLAIN)},
)
@pytest.mark.usefixtures("small_tiles")
def test_each_statistic_alone_and_together(impl: str, names: tuple[str, ...], make: Make, device: torch.device) -> None:
    check_linear(make(device=device), impl, names)


@each_case(
    transform=TRANSFORMS,
    peaky={"flat": None, "peaky": 30.0},
    make=drawn(61, 20, 305),
    seeds=[4],
    gpu={"make": drawn(252, 128, 507, dtype=BF16, **PLAIN), "seeds": [1]},
)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(
    impl: str, transform: LogitTransform, peaky: float | None, make: Make, seeds: int, device: torch.device
) -> None:
    for seed in range(seeds):
        check_linear(make(transform=transform, peaky=peaky, seed=seed, device=device), impl)


@each_case()
def test_peaky_bf16_at_a_real_vocabulary(impl: str) -> None:
    """The acceptance criterion: |z| up to 30, V = 50277; log-prob and entropy within 2e-5."""
    case = make_case(24, 16, 50277, dtype=BF16, peaky=30.0, ignored=0.0, **PLAIN)
    gold, got = linear_op(case.double(), "reference"), linear_op(case, impl)
    for name in ("logprob", "entropy"):
        assert (getattr(got, name).double() - getattr(gold, name)).abs().max() <= 2e-5, name
    check_linear(case, impl)


@each_case(v=[65_537, 151_936])
def test_digits_at_a_real_vocabulary(impl: str, v: int) -> None:
    """The digits that sums over V leave, as in test_logprob.py, for uniform and for random logits: columns of the weight."""
    case = make_case(2, 2, v, ignored=0.0, **PLAIN)
    weight = torch.stack((torch.full((v,), 7.3), torch.randn(v, generator=generator(7))), 1)
    case = replace(case, hidden=torch.eye(2), weight=weight)
    gold, got = linear_op(case.double(), "reference"), linear_op(case, impl)
    for name, value in got._asdict().items():
        error = float((value.double() - getattr(gold, name)).abs().max())
        assert error <= 8 * torch.finfo(torch.float32).eps * math.log(v), name


@each_case(make=drawn(65_600, 2, 3, **PLAIN), gpu={"make": drawn(70_000, 16, 40, dtype=BF16, **PLAIN)})
def test_more_rows_than_a_grid_axis(impl: str, make: Make, device: torch.device) -> None:
    """65,536 rows crashed a peer (Liger #1294)."""
    check_linear(make(device=device), impl)


@each_case(dtype=DTYPES, make=drawn(40, 12, 205, rank=0), gpu={"make": drawn(140, 64, 505, rank=0)})
@pytest.mark.usefixtures("small_tiles")
def test_all_logits_strongly_negative(impl: str, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    case = make(dtype=dtype, device=device)
    case = replace(case, bias=torch.full_like(case.weight[:, 0], -1e4))
    assert all(bool(s.isfinite().all()) for s in linear_op(case, impl))
    check_linear(case, impl)


@each_case(make=drawn(9, 8, 120), gpu={"make": drawn(70, 64, 300, dtype=BF16)})
@pytest.mark.usefixtures("small_tiles")
def test_all_ignored(impl: str, make: Make, device: torch.device) -> None:
    case = make(ignored=1.0, device=device)
    n = case.targets.shape[0]
    assert bool((case.targets == IGNORE_INDEX).all())
    for name, value in run_linear(case, impl, make_upstream(n, device=device)).items():
        assert value is not None and not value.any(), name


# --- adapters ---------------------------------------------------------------------------------------------------------


@each_case(
    dtype=[BF16],
    make=drawn(44, 16, 190),
    gpu={"dtype": [BF16, torch.float16], "make": drawn(130, 64, 517, rank=8)},
)
@pytest.mark.usefixtures("small_tiles")
def test_adapter_in_fp32_beside_a_narrow_model(impl: str, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    """peft's layout. The adapter must also change the result: a peer ignored it silently (TRL #4612)."""
    case = make(dtype=dtype, device=device)
    check_linear(replace(case, low_rank=make(device=device).low_rank), impl)
    without = linear_op(replace(case, low_rank=None), impl).logprob
    assert (linear_op(case, impl).logprob - without).abs().max() > 0.1


@each_case(gpu={})
def test_adapter_that_cancels_the_weight(impl: str, device: torch.device) -> None:
    """dhidden is the sum of two GEMMs that nearly cancel: rounding each to bf16 first would leave noise."""
    case = make_case(44, 16, 190, dtype=BF16, device=device)
    eye = torch.eye(16, dtype=BF16, device=device)
    check_linear(replace(case, low_rank=LowRank(eye, -0.99 * case.weight, 1.0)), impl)


@each_case()
def test_an_adapter_is_a_merged_weight(impl: str) -> None:
    case = make_case(30, 16, 90, ignored=0.0).double()
    assert case.low_rank is not None
    merged = case.weight + case.low_rank.scale * case.low_rank.b @ case.low_rank.a
    whole = linear_op(replace(case, weight=merged, low_rank=None), "reference")
    narrow = linear_op(make_case(30, 16, 90, ignored=0.0), impl)
    for one, other in zip(whole, narrow, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)
