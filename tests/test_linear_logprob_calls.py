"""How linear_logprob_entropy may be called: shapes and strides, needed gradients, autocast, choice of the implementation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from devices import PLAIN, drawn, each_case
from numerics import (
    IMPLS,
    STATS,
    Case,
    assert_all_close,
    assert_same,
    linear_op,
    make_case,
    make_upstream,
    run_linear,
    weighted_sum,
)
from op_bounds import linear_bounds
from torch import Tensor

from gem_kernels import TokenStats
from gem_kernels.compat import INTERPRETED
from gem_kernels.gradients import Gradients

pytestmark = pytest.mark.op("linear_logprob_entropy")

Make = Callable[..., Case]
BF16 = torch.bfloat16


# --- shapes and strides -----------------------------------------------------------------------------------------------


@each_case(make=drawn(42, 10, 130), gpu={"make": drawn(42, 64, 130, dtype=BF16)})
@pytest.mark.usefixtures("small_tiles")
def test_leading_batch_shape(impl: str, make: Make, device: torch.device) -> None:
    case = make(device=device)
    d, flat = case.hidden.shape[1], linear_op(case, impl)
    shaped = linear_op(replace(case, hidden=case.hidden.view(2, 3, 7, d), targets=case.targets.view(2, 3, 7)), impl)
    one = linear_op(replace(case, hidden=case.hidden[0], targets=case.targets[0]), impl)
    for f, s, o in zip(flat, shaped, one, strict=True):
        assert s.shape == (2, 3, 7) and torch.equal(s.flatten(), f)
        assert o.shape == ()
    x = case.leaves()
    stats = linear_op(replace(x, hidden=x.hidden.view(2, 21, d), targets=x.targets.view(2, 21)), impl)
    upstream = make_upstream(42, device=device)
    weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream).backward()
    assert torch.equal(x.hidden.grad, run_linear(case, impl, upstream)["dhidden"])


@each_case(make=drawn(50, 9, 230))
@pytest.mark.usefixtures("small_tiles")
def test_int32_targets(impl: str, make: Make) -> None:
    wide, narrow, upstream = make(), make(targets_dtype=torch.int32), make_upstream(50)
    assert_same(run_linear(narrow, impl, upstream), run_linear(wide, impl, upstream))


@each_case(make=drawn(50, 9, 230, ignored=0.0), gpu={"make": drawn(50, 64, 230, dtype=BF16, ignored=0.0)})
@pytest.mark.usefixtures("small_tiles")
def test_saying_that_no_token_is_ignored_changes_no_bit(impl: str, make: Make, device: torch.device) -> None:
    case, upstream = make(device=device), make_upstream(50, device=device)
    assert_same(run_linear(case, impl, upstream, ignore_index=None), run_linear(case, impl, upstream))


@each_case(make=drawn(50, 14, 230, rank=0), gpu={"make": drawn(50, 64, 230, dtype=BF16, rank=0)})
@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs(impl: str, make: Make, device: torch.device) -> None:
    """Transposed hidden states, every second row of a weight whose other rows are NaN, int32 targets of a table."""
    case = make(device=device)
    assert case.bias is not None
    strided = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        weight=torch.stack((case.weight, torch.full_like(case.weight, float("nan"))), 1).flatten(0, 1)[::2],
        targets=torch.stack((case.targets, case.targets), 1)[:, 0].int(),
        bias=case.bias[:1].expand(230),
    )
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    upstream = make_upstream(50, device=device)

    def run(x: Case, which: str) -> dict[str, Tensor | None]:
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        stats = linear_op(replace(x, hidden=hidden, weight=weight), which)
        dhidden, dweight = torch.autograd.grad(weighted_sum(stats, upstream), (hidden, weight))
        return {**{k: s.detach() for k, s in stats._asdict().items()}, "dhidden": dhidden, "dweight": dweight}

    assert_all_close(run(strided, impl), run(strided.double(), "reference"), linear_bounds(strided, upstream))


# --- which gradients --------------------------------------------------------------------------------------------------


@each_case(make=drawn(19, 7, 115), gpu={"make": drawn(40, 64, 300, dtype=BF16)})
@pytest.mark.usefixtures("small_tiles")
def test_every_pattern_of_needed_gradients(
    impl: str, make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is not needed is None and not even allocated (prime-rl #3011); the others keep their bits."""
    made: list[Gradients] = []
    init = Gradients.__init__

    def spy(self: Gradients, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Gradients, "__init__", spy)
    case = make(device=device)
    upstream = make_upstream(case.targets.shape[0], device=device)
    full = run_linear(case, impl, upstream)
    for needs in itertools.product([False, True], repeat=5):
        made.clear()
        got = run_linear(case, impl, upstream, needs)
        for (name, value), need in zip(list(got.items())[len(STATS) :], needs, strict=True):
            assert (value is not None) == need, f"{name} with needs={needs}"
            assert value is None or torch.equal(value, full[name]), f"{name} with needs={needs}"
        if impl == "chunked" and any(needs):
            (g,) = made
            hidden, weight, bias, a, b = needs
            allocated = [t is not None for t in (g.hidden, g.weight, g.bias, g.low_hidden, g.b)]
            assert allocated == [hidden, weight, bias, hidden or a, b], needs


@each_case()
def test_no_gradient_wanted(impl: str) -> None:
    case = make_case(12, 6, 40)
    plain = linear_op(case, impl)
    assert not any(s.requires_grad for s in plain)
    x = case.leaves()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = linear_op(x, impl)
        for s, p in zip(stats, plain, strict=True):
            assert not s.requires_grad and torch.equal(s, p)


@pytest.mark.parametrize("squared", [False, True], ids=["linear", "squared"])
def test_second_order_gradients_raise(squared: bool) -> None:
    """Also where the upstream gradient is a constant (a sum): a zero would pass for the gradient's gradient there."""
    x = make_case(6, 4, 9).leaves()
    logprob = linear_op(x, "chunked").logprob
    value = logprob.square().sum() if squared else logprob.sum()
    (dhidden,) = torch.autograd.grad(value, x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        (dhidden.square().sum() + x.hidden.sum()).backward()


def test_weight_changed_before_backward_raises() -> None:
    x = make_case(6, 4, 9).leaves()
    loss = linear_op(x, "chunked").logprob.sum()
    with torch.no_grad():
        x.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- autocast ---------------------------------------------------------------------------------------------------------


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_autocast_casts_as_linear_does(impl: str) -> None:
    case, upstream = make_case(37, 12, 140), make_upstream(37)
    x = case.leaves()
    with torch.autocast("cpu", BF16):
        stats = linear_op(x, impl)
    weighted_sum(stats, upstream).backward()
    got = {**stats._asdict(), **x.gradients()}
    want = run_linear(case.to(BF16), impl, upstream)
    for name, value in got.items():
        expected = want[name]
        assert value is not None and expected is not None
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected.float()), name


@each_case(impl=IMPLS[1:])
def test_backward_under_autocast_stays_in_fp32(impl: str) -> None:
    case, upstream = make_case(37, 12, 140), make_upstream(37)
    want = run_linear(case, impl, upstream)
    x = case.leaves()
    loss = weighted_sum(linear_op(x, impl), upstream)
    with torch.autocast("cpu", BF16):
        loss.backward()
    for name, value in x.gradients().items():
        assert (value is None and want[name] is None) or torch.equal(value, want[name]), name


@each_case()
def test_mixed_dtypes_are_served_under_autocast_only(impl: str) -> None:
    case = make_case(37, 12, 140)
    mixed = replace(case, hidden=case.hidden.bfloat16())
    with torch.autocast("cpu", BF16):
        assert torch.equal(linear_op(mixed, impl).logprob, linear_op(case, impl).logprob)
    with pytest.raises(TypeError, match=r"hidden and weight must have one dtype.*autocast.*bfloat16.*float32"):
        linear_op(mixed, impl)


def test_autocast_leaves_what_linear_leaves() -> None:
    """F.linear under autocast neither narrows fp64 nor makes floats of integers."""
    case = make_case(8, 4, 20)
    with torch.autocast("cpu", BF16):
        assert linear_op(case.double(), "auto").logprob.dtype == torch.float64
        with pytest.raises(TypeError, match="hidden must be"):
            linear_op(replace(case, hidden=case.hidden.long()), "auto")


# --- choice of the implementation -------------------------------------------------------------------------------------


def test_float64_is_served_by_the_reference_alone() -> None:
    case = make_case(8, 4, 20).double()
    auto, explicit = linear_op(case, "auto"), linear_op(case, "reference")
    assert all(s.dtype == torch.float64 and torch.equal(s, e) for s, e in zip(auto, explicit, strict=True))
    with pytest.raises(ValueError, match=r"impl='chunked' cannot serve linear_logprob_entropy.*these can: reference$"):
        linear_op(case, "chunked")


def test_auto_is_chunked() -> None:
    case = make_case(8, 4, 20)
    assert all(torch.equal(a, c) for a, c in zip(linear_op(case, "auto"), linear_op(case, "chunked"), strict=True))


def test_an_explicit_impl_never_falls_back() -> None:
    case = make_case(8, 4, 20, **PLAIN)
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference, chunked, triton, got 'fast'"):
        linear_op(case, "fast")
    if INTERPRETED:
        return
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve .*: .*these can: reference, chunked$"):
        linear_op(case, "triton")
