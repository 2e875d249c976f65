"""logprob_entropy: the statistics of logits that exist already, held to the same rule and the same oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from numerics import (
    DTYPES,
    IMPLS,
    STATS,
    TRANSFORMS,
    assert_all_close,
    assert_close,
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
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(STATS, size)]


def make_logits(
    n: int, v: int, dtype: torch.dtype = torch.float32, size: float = 2.0, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) with largest absolute value about 4 `size`, targets (N,): every other one the most likely token."""
    g = generator(3)
    logits, targets = size * torch.randn(n, v, generator=g), torch.randint(0, v, (n,), generator=g)
    if n:
        targets[::2] = logits.argmax(1)[::2]
    targets[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    return logits.to(dtype), targets


def run(
    logits: Tensor, targets: Tensor, impl: str, upstream: Mapping[str, Tensor], transform: LogitTransform = IDENTITY
) -> dict[str, Tensor | None]:
    """Statistics and dlogits; the logits must come out as they went in."""
    leaf = logits.detach().requires_grad_()
    before = logits.clone()
    stats = logprob_entropy(leaf, targets, transform=transform, impl=impl)  # type: ignore[arg-type]
    (dlogits,) = torch.autograd.grad(weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream), leaf)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0)), "the logits were modified"
    return {**{name: s.detach() for name, s in stats._asdict().items()}, "dlogits": dlogits}


def check(
    logits: Tensor,
    targets: Tensor,
    impl: str,
    names: tuple[str, ...] = STATS,
    transform: LogitTransform = IDENTITY,
) -> None:
    upstream = make_upstream(targets.numel(), names)
    gold = run(logits.double(), targets, "reference", upstream, transform)
    bounds = logits_bounds(logits, targets, transform, upstream)
    assert_all_close(run(logits, targets, impl, upstream, transform), gold, bounds)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(*make_logits(*shape, dtype=dtype, ignored=0.0 if shape[0] == 1 else 0.2), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_peaky(impl: str, dtype: torch.dtype) -> None:
    check(*make_logits(150, 511, dtype=dtype, size=8.0), impl)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("impl", IMPLS)
def test_each_statistic_alone_and_together(impl: str, names: tuple[str, ...]) -> None:
    check(*make_logits(61, 305), impl, names)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(impl: str, transform: LogitTransform) -> None:
    check(*make_logits(61, 305, size=8.0), impl, transform=transform)


@pytest.mark.parametrize("softcap", [5.0, 15.0, 30.0, 50.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_slope_of_the_transform(impl: str, softcap: float) -> None:
    """With one token in the vocabulary dlse/dz is the slope itself; near saturation 1 - tanh^2 cancels."""
    logits = torch.linspace(-4 * softcap, 4 * softcap, 4001)[:, None]
    transform = LogitTransform(scale=1.7, softcap=softcap, temperature=0.6)
    check(logits, torch.zeros(4001, dtype=torch.int64), impl, ("lse",), transform)


@pytest.mark.parametrize("impl", IMPLS)
def test_wide_rows(impl: str) -> None:
    """A row longer than the block that one step may touch."""
    check(*make_logits(3, 140_001, ignored=0.0), impl)


@pytest.mark.parametrize("v", [65_537, 151_936])
@pytest.mark.parametrize("impl", IMPLS)
def test_digits_at_a_real_vocabulary(impl: str, v: int) -> None:
    """What sums in blocks leave of the digits: all numbers on the way are of the size of log V, and rounded a dozen times.

    Sums of V / 16 terms in a row, as in torch's log_softmax on a CPU, lose ten times more. Uniform logits, random, and wide.
    """
    logits = 7.3 + torch.tensor([0.0, 1.0, 3.0])[:, None] * torch.randn(3, v, generator=generator(7))
    targets = torch.randint(0, v, (3,), generator=generator(8))
    got, gold = (logprob_entropy(z, targets, impl=i) for z, i in ((logits, impl), (logits.double(), "reference")))  # type: ignore[arg-type]
    for name, value in got._asdict().items():
        error = float((value.double() - getattr(gold, name)).abs().max())
        assert error <= 8 * torch.finfo(torch.float32).eps * math.log(v), name
    assert math.isclose(float(gold.entropy[0]), math.log(v), rel_tol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_rows_than_a_grid_axis(impl: str) -> None:
    check(*make_logits(65_600, 3), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_all_logits_strongly_negative(impl: str) -> None:
    logits, targets = make_logits(40, 205)
    check(logits - 1e4, targets, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_strided_views(impl: str) -> None:
    """A shifted view of a batch, a transposed one, every second column: no copy is asked of the caller."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_the_linear_op(impl: str, dtype: torch.dtype) -> None:
    """With the identity for a head, hidden are the logits."""
    logits, targets = make_logits(40, 90, dtype=dtype)
    ours = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    gold = linear_logprob_entropy(logits.double(), torch.eye(90, dtype=torch.float64), targets, impl="reference")
    assert_all_close(ours._asdict(), gold._asdict(), logits_bounds(logits, targets, IDENTITY, {}))


@pytest.mark.parametrize("name", ["logprob", "entropy"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_a_row_sums_to_zero(impl: str, name: str) -> None:
    logits, targets = make_logits(80, 211, size=8.0, ignored=0.0)
    upstream = make_upstream(80, [name])
    got = run(logits, targets, impl, upstream)["dlogits"]
    assert got is not None
    bound = row_sum_bound(logits, targets, upstream)
    assert_close("sum of dz", got.double().sum(1), torch.zeros(80, dtype=torch.float64), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_stay_in_their_range(impl: str, dtype: torch.dtype) -> None:
    for size in (1e-3, 1.0, 8.0, 80.0):
        stats = logprob_entropy(*make_logits(150, 333, dtype, size, 0.0), impl=impl)  # type: ignore[arg-type]
        assert bool((stats.logprob <= 0).all()) and bool((stats.entropy >= 0).all()), size
        assert bool((stats.entropy <= math.log(333) * (1 + 4 * torch.finfo(torch.float32).eps)).all()), size


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("lse",), STATS], ids="+".join)
@pytest.mark.parametrize("impl", IMPLS)
def test_target_of_probability_zero(impl: str, names: tuple[str, ...]) -> None:
    logits, targets = make_logits(20, 60, ignored=0.0)
    logits[3, targets[3]] = -math.inf
    check(logits, targets, impl, names)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl: str) -> None:
    logits, targets = make_logits(41, 90)
    ignored = targets == IGNORE_INDEX
    upstream = make_upstream(41)
    clean = run(logits, targets, impl, upstream)
    dirty = run(logits.masked_fill(ignored[:, None], math.nan), targets, impl, upstream)
    for name, value in clean.items():
        assert value is not None and torch.equal(dirty[name], value), name
    kept = int((~ignored).nonzero()[0])
    logits[kept, 5] = math.nan
    shown = run(logits, targets, impl, upstream)
    others = torch.arange(41) != kept
    for name, value in shown.items():
        assert value is not None and bool(value[kept].isnan().all()), name
        assert torch.equal(value[others], clean[name][others]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl: str) -> None:
    logits, targets = make_logits(7, 33, ignored=1.1)
    for name, value in run(logits, targets, impl, make_upstream(7)).items():
        assert value is not None and not value.any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_same_bits(impl: str) -> None:
    logits, targets = make_logits(150, 430, torch.bfloat16)
    upstream = make_upstream(150)
    first, second = run(logits, targets, impl, upstream), run(logits, targets, impl, upstream)
    for name, value in first.items():
        assert value is not None and torch.equal(value, second[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_only_where_wanted(impl: str) -> None:
    logits, targets = make_logits(12, 40)
    plain = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    leaf = logits.clone().requires_grad_()
    assert not any(s.requires_grad for s in plain)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = logprob_entropy(leaf, targets, impl=impl)  # type: ignore[arg-type]
        assert all(not s.requires_grad and torch.equal(s, p) for s, p in zip(stats, plain, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
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
            lambda z, f=transform: tuple(logprob_entropy(z, targets, transform=f, impl="reference")), logits
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.usefixtures("small_tiles")
def test_inplace_backward_overwrites_the_logits(impl: str, dtype: torch.dtype) -> None:
    """The same bits as the gradient beside them, in their own memory, also through a view of a padded batch."""
    full, targets = torch.randn(4, 7, 150).to(dtype), torch.randint(0, 150, (4, 6))
    targets[1, 2] = -100
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
    square = kept.square()  # saves its input, which is gone when its backward comes
    stats = logprob_entropy(kept, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + stats.logprob.sum()).backward()
