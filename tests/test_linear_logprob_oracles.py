"""linear_logprob_entropy against properties that hold whatever the reference computes."""

from __future__ import annotations

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
    STATS,
    Case,
    assert_all_close,
    assert_close,
    assert_same,
    check_linear,
    linear_op,
    make_case,
    make_upstream,
    run_linear,
    weighted_sum,
)
from op_bounds import linear_bounds, row_sum_bound
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LowRank, linear_logprob_entropy

pytestmark = pytest.mark.op("linear_logprob_entropy")

Make = Callable[..., Case]
BF16 = torch.bfloat16


def dlogits(logits: Tensor, targets: Tensor, impl: str, upstream: dict[str, Tensor]) -> Tensor:
    """Return dz: with the identity for a head, hidden are the logits and dhidden is dz."""
    hidden = logits.clone().requires_grad_()
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    stats = linear_logprob_entropy(hidden, eye, targets, impl=impl)  # type: ignore[arg-type]
    (dz,) = torch.autograd.grad(weighted_sum(stats, upstream), hidden)
    return dz


# --- numbers ----------------------------------------------------------------------------------------------------------


@each_case(name=["logprob", "entropy"], size={"flat": 1.0, "peaky": 30.0})
@pytest.mark.usefixtures("small_tiles")
def test_gradient_of_a_row_sums_to_zero(impl: str, name: str, size: float) -> None:
    logits, targets = size * torch.randn(80, 211), torch.randint(0, 211, (80,))
    targets[::2] = logits.argmax(1)[::2]
    upstream = make_upstream(80, [name])
    bound = row_sum_bound(logits, targets, upstream)
    sums = dlogits(logits, targets, impl, upstream).double().sum(1)
    assert_close(f"sum of d{name}/dz", sums, torch.zeros(80, dtype=torch.float64), bound)


@each_case(dtype=DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_statistics_stay_in_their_range(impl: str, dtype: torch.dtype) -> None:
    """Log-probs above 0 collapsed a peer's reward (verl #2656)."""
    for peaky in (1e-3, 1.0, 30.0, 300.0):
        case = make_case(150, 12, 333, dtype=dtype, peaky=peaky, ignored=0.0, **PLAIN)
        stats = linear_op(case, impl)
        assert bool((stats.logprob <= stats.max_logprob).all()), peaky
        assert bool((stats.max_logprob <= 0).all()), peaky
        assert bool((stats.entropy >= 0).all()), peaky
        assert bool((stats.entropy <= math.log(333) * (1 + 4 * torch.finfo(torch.float32).eps)).all()), peaky


@each_case(dtype=[torch.float32, BF16])
@pytest.mark.usefixtures("small_tiles")
def test_true_class_gradient_keeps_its_digits(impl: str, dtype: torch.dtype) -> None:
    """1 - p from 1e-1 to 1e-5: p rounded to bf16 would be 1, and the gradient gone (Liger #1329)."""
    gaps = torch.linspace(2.0, 11.5, 39)
    logits = torch.zeros(39, 3)
    logits[:, 1] = gaps
    logits, targets = logits.to(dtype), torch.ones(39, dtype=torch.int64)
    upstream = make_upstream(39, ["logprob"])
    dz = dlogits(logits, targets, impl, upstream)[:, 1]
    gold = -upstream["logprob"] * torch.expm1(-F.cross_entropy(logits.double(), targets, reduction="none"))
    # The sum of three exponentials, near 1, is rounded twice, and each exponential divided by it once. Beside these there is
    # only the rounding of the result.
    bound = upstream["logprob"].abs() * 1.5 * torch.finfo(torch.float32).eps + gold.abs() * torch.finfo(dtype).eps
    assert bool(((dz.double() - gold).abs() <= bound).all())
    assert bool((dz != 0).all())


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_upstream_gradient_is_per_token(impl: str) -> None:
    """A peer multiplied every token by grad_output[0] (Liger #1298). Powers of two scale a row exactly."""
    case = make_case(31, 9, 140, **PLAIN)
    ones = {name: torch.ones(31, dtype=torch.float64) for name in DIFFERENTIABLE}
    factor = torch.tensor([2.0 ** (i % 7 - 3) for i in range(31)], dtype=torch.float64)
    plain = run_linear(case, impl, ones)["dhidden"]
    scaled = run_linear(case, impl, {name: factor * u for name, u in ones.items()})["dhidden"]
    assert plain is not None and torch.equal(scaled, plain * factor.float()[:, None])


@each_case(
    dtype=DTYPES,
    make=drawn(150, 40, 430),
    repeats=[1],
    gpu={"make": drawn(300, 128, 5003), "repeats": [3]},
)
@pytest.mark.usefixtures("small_tiles")
def test_same_input_same_bits(impl: str, dtype: torch.dtype, make: Make, repeats: int, device: torch.device) -> None:
    torch.set_num_threads(2)  # a race needs two
    case = make(dtype=dtype, device=device)
    upstream = make_upstream(case.targets.shape[0], device=device)
    first = run_linear(case, impl, upstream)
    for _ in range(repeats):
        assert_same(run_linear(case, impl, upstream), first)


# --- impossible tokens, ignored tokens, NaN ---------------------------------------------------------------------------


# Whole tiles of padding first, some columns in between, a ragged tail.
KEPT = {"120-250, 253-380 of 401": [(120, 250), (253, 380)]}
GPU_KEPT = {"300-400, 403-850 of 901": [(300, 400), (403, 850)]}


@each_case(
    kept=KEPT,
    make=drawn(53, 17, 401, rank=2, ignored=0.1),
    gpu={"kept": GPU_KEPT, "make": drawn(150, 64, 901, dtype=BF16, ignored=0.1)},
)
@pytest.mark.usefixtures("small_tiles")
def test_minus_infinity_in_the_bias_is_a_smaller_vocabulary(
    impl: str, kept: list[tuple[int, int]], make: Make, device: torch.device
) -> None:
    """A vocabulary padded to a round size."""
    case, columns = make(device=device), torch.cat([torch.arange(*span) for span in kept]).to(device)
    assert case.bias is not None and case.low_rank is not None
    mask = torch.ones_like(case.bias, dtype=torch.bool)
    mask[columns] = False
    n, ignored = case.targets.shape[0], case.targets == IGNORE_INDEX
    small_target = torch.randint(0, columns.shape[0], (n,)).to(device).where(~ignored, IGNORE_INDEX)
    targets = columns[small_target.clamp_min(0)].where(~ignored, IGNORE_INDEX)
    padded = replace(case, bias=case.bias.masked_fill(mask, -math.inf), targets=targets)
    a, b, scale = case.low_rank
    small = replace(
        case,
        weight=case.weight[columns],
        bias=case.bias[columns],
        low_rank=LowRank(a, b[columns], scale),
        targets=small_target,
    )
    upstream = make_upstream(n, device=device)
    got = run_linear(padded, impl, upstream)
    for name in ("dweight", "dbias", "db"):
        grad = got[name]
        assert grad is not None and not grad[mask].any(), name
        got[name] = grad[columns]
    assert_all_close(got, run_linear(small.double(), "reference", upstream), linear_bounds(small, upstream))


@each_case(names={"+".join(names): names for names in (("logprob",), ("entropy",), ("lse",), DIFFERENTIABLE)})
@pytest.mark.usefixtures("small_tiles")
def test_target_of_probability_zero(impl: str, names: tuple[str, ...]) -> None:
    """log p = -inf is the right answer; the gradients, of this row and of the others, are finite."""
    case = make_case(20, 9, 150, rank=0, ignored=0.0)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[case.targets[3]] = -math.inf
    case = replace(case, bias=bias)
    assert linear_op(case, impl).logprob[3] == -math.inf
    check_linear(case, impl, names)


@each_case(make=drawn(41, 9, 150), gpu={"make": drawn(141, 64, 350, dtype=BF16)})
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_an_ignored_row_stays_there(impl: str, make: Make, device: torch.device) -> None:
    case = make(device=device)
    upstream, ignored = make_upstream(case.targets.shape[0], device=device), case.targets == IGNORE_INDEX
    assert ignored.any()
    dirty = replace(case, hidden=case.hidden.masked_fill(ignored[:, None], math.nan))
    assert_same(run_linear(dirty, impl, upstream), run_linear(case, impl, upstream))


@each_case(make=drawn(41, 9, 150), gpu={"make": drawn(141, 64, 350, dtype=BF16, rank=0)})
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_a_kept_row_shows_and_stays_in_its_row(impl: str, make: Make, device: torch.device) -> None:
    case = make(ignored=0.0, device=device)
    n, hidden = case.targets.shape[0], case.hidden.clone()
    hidden[7, 2] = math.nan
    upstream = make_upstream(n, device=device)
    clean, dirty = (run_linear(replace(case, hidden=h), impl, upstream) for h in (case.hidden, hidden))
    others = torch.arange(n, device=device) != 7
    for name in (*STATS, "dhidden"):
        good, bad = clean[name], dirty[name]
        assert good is not None and bad is not None
        assert bool(bad[7].isnan().all()) and torch.equal(bad[others], good[others]), name
