"""logprob_entropy, the statistics of logits that exist already: by the one rule of numerics.py, and against oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from devices import CPU, each_case
from numerics import (
    DIFFERENTIABLE,
    DTYPES,
    IMPLS,
    TRANSFORMS,
    assert_all_close,
    assert_close,
    assert_same,
    generator,
    make_upstream,
    weighted_sum,
)
from op_bounds import logits_bounds, row_sum_bound
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, TokenStats, linear_logprob_entropy, logprob_entropy
from gem_kernels.compat import INTERPRETED

pytestmark = pytest.mark.op("logprob_entropy")

IDENTITY = TRANSFORMS["identity"]
SHAPES = [(17, 257), (193, 517), (128, 512), (1, 300), (5, 1), (0, 16)]
GPU_SHAPES = [(17, 257), (193, 517), (128, 512), (33, 128_256)]
SUBSETS = {"+".join(names): names for size in (1, 2, 3) for names in itertools.combinations(DIFFERENTIABLE, size)}
BF16 = torch.bfloat16
FUSED = [impl for impl in IMPLS if impl != "reference"]


def make_logits(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    size: float = 2.0,
    ignored: float = 0.2,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Draw logits (N, V) up to about 4 `size`, and targets (N,), every other one the likeliest token."""
    g = generator(3)
    logits, targets = size * torch.randn(n, v, generator=g), torch.randint(0, v, (n,), generator=g)
    if n:
        targets[::2] = logits.argmax(1)[::2]
    targets[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    return logits.to(device, dtype), targets.to(device)


def run(
    logits: Tensor,
    targets: Tensor,
    impl: str,
    upstream: Mapping[str, Tensor],
    transform: LogitTransform = IDENTITY,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Return statistics and dlogits; the logits must come out as they went in."""
    leaf = logits.detach().requires_grad_()
    before = logits.clone()
    stats = logprob_entropy(leaf, targets, transform=transform, impl=impl, **options)  # type: ignore[arg-type]
    (dlogits,) = torch.autograd.grad(weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream), leaf)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0)), "the logits were modified"
    return {**{name: s.detach() for name, s in stats._asdict().items()}, "dlogits": dlogits}


def check(
    logits: Tensor,
    targets: Tensor,
    impl: str,
    names: tuple[str, ...] = DIFFERENTIABLE,
    transform: LogitTransform = IDENTITY,
) -> None:
    """Hold logprob_entropy by `impl` to the rule, every statistic and dlogits."""
    upstream = make_upstream(targets.numel(), names, device=logits.device)
    gold = run(logits.double(), targets, "reference", upstream, transform)
    bounds = logits_bounds(logits, targets, transform, upstream)
    assert_all_close(run(logits, targets, impl, upstream, transform), gold, bounds)


# --- every implementation, by the one rule ----------------------------------------------------------------------------


@each_case(dtype=DTYPES, shape=SHAPES, gpu={"shape": GPU_SHAPES})
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    check(*make_logits(*shape, dtype=dtype, ignored=0.0 if shape[0] == 1 else 0.2, device=device), impl)


@each_case(
    dtype=DTYPES,
    shape=[(150, 511)],
    names={"all": DIFFERENTIABLE},
    gpu={"shape": GPU_SHAPES, "names": {"logprob": ("logprob",)}},
)
def test_peaky(
    impl: str, dtype: torch.dtype, shape: tuple[int, int], names: tuple[str, ...], device: torch.device
) -> None:
    check(*make_logits(*shape, dtype=dtype, size=8.0, device=device), impl, names)


@each_case(names=SUBSETS)
def test_each_statistic_alone_and_together(impl: str, names: tuple[str, ...]) -> None:
    check(*make_logits(61, 305), impl, names)


@each_case(
    transform=TRANSFORMS,
    shape=[(61, 305)],
    dtype=[torch.float32],
    gpu={"shape": [(150, 511)], "dtype": [BF16]},
)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(
    impl: str, transform: LogitTransform, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check(*make_logits(*shape, dtype, size=8.0, device=device), impl, transform=transform)


@each_case(softcap=[5.0, 15.0, 30.0, 50.0])
def test_slope_of_the_transform(impl: str, softcap: float) -> None:
    """With one token in the vocabulary dlse/dz is the slope itself; near saturation 1 - tanh^2 cancels."""
    logits = torch.linspace(-4 * softcap, 4 * softcap, 4001)[:, None]
    transform = LogitTransform(scale=1.7, softcap=softcap, temperature=0.6)
    check(logits, torch.zeros(4001, dtype=torch.int64), impl, ("lse",), transform)


@each_case()
def test_wide_rows(impl: str) -> None:
    """A row longer than the block that one step may touch."""
    check(*make_logits(3, 140_001, ignored=0.0), impl)


@each_case(v=[65_537, 151_936])
def test_digits_at_a_real_vocabulary(impl: str, v: int) -> None:
    """Sums in blocks keep the digits: every number on the way is of the size of log V, and rounded a dozen times.

    Sums of V / 16 terms in a row, as in torch's log_softmax on a CPU, lose ten times more. Uniform logits, random, and wide.
    """
    logits = 7.3 + torch.tensor([0.0, 1.0, 3.0])[:, None] * torch.randn(3, v, generator=generator(7))
    targets = torch.randint(0, v, (3,), generator=generator(8))
    got, gold = (logprob_entropy(z, targets, impl=i) for z, i in ((logits, impl), (logits.double(), "reference")))  # type: ignore[arg-type]
    for name, value in got._asdict().items():
        error = float((value.double() - getattr(gold, name)).abs().max())
        assert error <= 8 * torch.finfo(torch.float32).eps * math.log(v), name
    assert math.isclose(float(gold.entropy[0]), math.log(v), rel_tol=1e-12)


@each_case(shape=[(65_600, 3)], dtype=[torch.float32], gpu={"shape": [(70_000, 40)], "dtype": [BF16]})
def test_more_rows_than_a_grid_axis(
    impl: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check(*make_logits(*shape, dtype, device=device), impl)


@each_case(dtype=DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_the_likeliest_token(impl: str, dtype: torch.dtype) -> None:
    """max_logprob keeps the rule, and equals logprob to the last bit exactly where the target is the likeliest token."""
    logits, targets = make_logits(193, 517, dtype, size=8.0)
    stats = logprob_entropy(logits.clone().requires_grad_(), targets, impl=impl)  # type: ignore[arg-type]
    highest, logprob = stats.max_logprob, stats.logprob.detach()
    assert not highest.requires_grad
    gold = logprob_entropy(logits.double(), targets, impl="reference").max_logprob
    assert_close("max_logprob", highest, gold, logits_bounds(logits, targets, IDENTITY, {})["max_logprob"])
    kept = targets != IGNORE_INDEX
    of_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    assert torch.equal((logprob == highest)[kept], (of_target == logits.amax(1))[kept])  # the logits come exactly
    assert not highest[~kept].any() and bool((logprob <= highest).all())
    assert 0.1 < float((logprob == highest)[kept].float().mean()) < 0.9


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_all_logits_strongly_negative(impl: str) -> None:
    logits, targets = make_logits(40, 205)
    check(logits - 1e4, targets, impl)


# --- oracles ----------------------------------------------------------------------------------------------------------


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_strided_views(impl: str) -> None:
    """A shifted view of a batch, a transposed one, every second column: the caller need not copy."""
    g = generator(5)
    batch = torch.randn(3, 9, 130, generator=g)
    views = {
        "shifted": batch[:, :-1],
        "transposed": batch.transpose(0, 1),
        "columns": batch[..., ::2],
        "expanded": batch[:1, :1].expand(3, 4, 130),
        "one row": batch[0, 0],
    }
    for name, view in views.items():
        targets = torch.randint(0, view.shape[-1], view.shape[:-1], generator=g)
        leaf, copy = view.detach().requires_grad_(), view.contiguous().clone().requires_grad_()
        results = []
        for logits in (leaf, copy):
            stats = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
            assert all(s.shape == targets.shape for s in stats), name
            upstream = make_upstream(targets.numel())
            loss = weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream)
            results.append((*stats, *torch.autograd.grad(loss, logits)))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want), name


@each_case(dtype=DTYPES)
def test_agrees_with_the_linear_op(impl: str, dtype: torch.dtype) -> None:
    """With the identity for a head, hidden are the logits."""
    logits, targets = make_logits(40, 90, dtype=dtype)
    ours = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    gold = linear_logprob_entropy(logits.double(), torch.eye(90, dtype=torch.float64), targets, impl="reference")
    assert_all_close(ours._asdict(), gold._asdict(), logits_bounds(logits, targets, IDENTITY, {}))


@each_case(name=["logprob", "entropy"])
def test_gradient_of_a_row_sums_to_zero(impl: str, name: str) -> None:
    logits, targets = make_logits(80, 211, size=8.0, ignored=0.0)
    upstream = make_upstream(80, [name])
    got = run(logits, targets, impl, upstream)["dlogits"]
    assert got is not None
    bound = row_sum_bound(logits, targets, upstream)
    assert_close("sum of dz", got.double().sum(1), torch.zeros(80, dtype=torch.float64), bound)


@each_case(dtype=DTYPES)
def test_statistics_stay_in_their_range(impl: str, dtype: torch.dtype) -> None:
    for size in (1e-3, 1.0, 8.0, 80.0):
        stats = logprob_entropy(*make_logits(150, 333, dtype, size, 0.0), impl=impl)  # type: ignore[arg-type]
        assert bool((stats.max_logprob <= 0).all()) and bool((stats.entropy >= 0).all()), size
        assert bool((stats.logprob <= stats.max_logprob).all()), size
        assert bool((stats.entropy <= math.log(333) * (1 + 4 * torch.finfo(torch.float32).eps)).all()), size


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_minus_infinity_is_a_smaller_vocabulary(impl: str) -> None:
    logits, targets = make_logits(30, 200, ignored=0.0)
    targets %= 150
    masked = torch.cat((logits[:, :150], torch.full((30, 50), -math.inf)), 1)
    upstream = make_upstream(30)
    got = run(masked, targets, impl, upstream)
    dlogits = got["dlogits"]
    assert dlogits is not None and not dlogits[:, 150:].any()
    got["dlogits"] = dlogits[:, :150]
    small = logits[:, :150]
    gold = run(small.double(), targets, "reference", upstream)
    assert_all_close(got, gold, logits_bounds(small, targets, IDENTITY, upstream))


@each_case(names={"+".join(names): names for names in (("logprob",), ("entropy",), ("lse",), DIFFERENTIABLE)})
def test_target_of_probability_zero(impl: str, names: tuple[str, ...]) -> None:
    logits, targets = make_logits(20, 60, ignored=0.0)
    logits[3, targets[3]] = -math.inf
    check(logits, targets, impl, names)


@each_case()
def test_nan_stays_in_its_row(impl: str) -> None:
    logits, targets = make_logits(41, 90)
    ignored = targets == IGNORE_INDEX
    upstream = make_upstream(41)
    clean = run(logits, targets, impl, upstream)
    assert_same(run(logits.masked_fill(ignored[:, None], math.nan), targets, impl, upstream), clean)
    kept = int((~ignored).nonzero()[0])
    logits[kept, 5] = math.nan
    shown = run(logits, targets, impl, upstream)
    others = torch.arange(41) != kept
    for name, value in shown.items():
        assert value is not None and bool(value[kept].isnan().all()), name
        assert torch.equal(value[others], clean[name][others]), name


@each_case()
def test_all_ignored(impl: str) -> None:
    logits, targets = make_logits(7, 33, ignored=1.1)
    for name, value in run(logits, targets, impl, make_upstream(7)).items():
        assert value is not None and not value.any(), name


@each_case(shape=[(150, 430)], gpu={"shape": [(70_000, 40)]})
def test_same_input_same_bits(impl: str, shape: tuple[int, int], device: torch.device) -> None:
    logits, targets = make_logits(*shape, BF16, device=device)
    upstream = make_upstream(shape[0], device=device)
    assert_same(run(logits, targets, impl, upstream), run(logits, targets, impl, upstream))


# --- gradients, autocast, choice of the implementation ----------------------------------------------------------------


@each_case(shape=[(50, 430)], gpu={"shape": [(500, 1003)]})
def test_saying_that_no_token_is_ignored_changes_no_bit(
    impl: str, shape: tuple[int, int], device: torch.device
) -> None:
    logits, targets = make_logits(*shape, BF16, ignored=0.0, device=device)
    upstream = make_upstream(shape[0], device=device)
    assert_same(run(logits, targets, impl, upstream, ignore_index=None), run(logits, targets, impl, upstream))


@each_case()
def test_gradient_only_where_wanted(impl: str) -> None:
    logits, targets = make_logits(12, 40)
    plain = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    leaf = logits.clone().requires_grad_()
    assert not any(s.requires_grad for s in plain)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = logprob_entropy(leaf, targets, impl=impl)  # type: ignore[arg-type]
        assert all(not s.requires_grad and torch.equal(s, p) for s, p in zip(stats, plain, strict=True))


@each_case()
def test_autocast_changes_nothing(impl: str) -> None:
    logits, targets = make_logits(12, 40)
    plain = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        under = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_second_order_gradients_raise() -> None:
    logits = torch.randn(4, 9).requires_grad_()
    stats = logprob_entropy(logits, torch.arange(4), impl="chunked")
    (dlogits,) = torch.autograd.grad(stats.entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        (dlogits.square().sum() + logits.sum()).backward()


def test_reference_gradcheck() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, IGNORE_INDEX, 2])
    for transform in (IDENTITY, TRANSFORMS["combined"]):
        assert torch.autograd.gradcheck(
            lambda z, f=transform: logprob_entropy(z, targets, transform=f, impl="reference")[:3], logits
        )


def test_dispatch() -> None:
    logits, targets = make_logits(4, 9)
    wide = logprob_entropy(logits.double(), targets)
    assert all(s.dtype == torch.float64 for s in wide)
    with pytest.raises(ValueError, match=r"impl='chunked' cannot serve logprob_entropy.*these can: reference$"):
        logprob_entropy(logits.double(), targets, impl="chunked")
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"impl='triton' cannot serve.* on cpu; these can: reference, chunked$"):
            logprob_entropy(logits, targets, impl="triton")
    auto, chunked = (logprob_entropy(logits, targets, impl=impl) for impl in ("auto", "chunked"))  # type: ignore[arg-type]
    assert all(torch.equal(a, c) for a, c in zip(auto, chunked, strict=True))


# --- the gradient over the logits -------------------------------------------------------------------------------------


@each_case(impl=FUSED, dtype=DTYPES, shape=[(4, 7, 150)], gpu={"dtype": [BF16], "shape": [(2, 40, 1003)]})
@pytest.mark.usefixtures("small_tiles")
def test_inplace_backward_overwrites_the_logits(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> None:
    """The gradient keeps its bits in the memory of the logits, also through a view of a padded batch."""
    batch, length, v = shape
    full, targets = torch.randn(shape).to(device, dtype), torch.randint(0, v, (batch, length - 1)).to(device)
    targets[1, 2] = IGNORE_INDEX
    check((2 * full)[:, :-1], targets, impl)
    grads, memory = [], []
    for inplace in (False, True):
        leaf = full.clone().requires_grad_()
        logits = (2 * leaf)[:, :-1]
        stats = logprob_entropy(logits, targets, inplace_backward=inplace, impl=impl)  # type: ignore[arg-type]
        before = logits.detach().clone()
        (stats.logprob + 0.3 * stats.entropy).sum().backward(retain_graph=inplace)
        grads.append(leaf.grad)
        memory.append(torch.equal(before, logits.detach()))
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                stats.lse.sum().backward()
    assert torch.equal(*grads)  # type: ignore[arg-type]
    assert not grads[1][:, -1].any()
    assert memory == [True, False]


def test_inplace_backward_refuses_what_it_would_break() -> None:
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="inplace_backward would overwrite a leaf"):
        logprob_entropy(logits, targets, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward needs impl 'chunked' or 'triton'"):
        logprob_entropy(2 * logits, targets, inplace_backward=True, impl="reference")
    with pytest.raises(ValueError, match="leaf with a gradient of its own, or logits that are its view"):
        logprob_entropy(logits[:-1], targets[:-1], inplace_backward=True)
    with pytest.raises(ValueError, match=r"elements do not overlap, got \(3, 9\) with strides \(0, 1\)"):
        logprob_entropy((2 * logits)[:1].expand(3, 9), targets, inplace_backward=True)
    with pytest.raises(ValueError, match=r"elements do not overlap, got \(3, 9\) with strides \(4, 1\)"):
        logprob_entropy((2 * logits).as_strided((3, 9), (4, 1)), targets, inplace_backward=True)
    stats = logprob_entropy(2 * logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(stats.logprob.sum(), logits, create_graph=True)
    kept = 2 * logits
    square = kept.square()  # saves its input, which is overwritten before its own backward runs
    stats = logprob_entropy(kept, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + stats.logprob.sum()).backward()
