"""How linear_group_loss may be called: its groups and slabs, needed gradients, what loss_fn may do, autocast, dispatch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from devices import each_case
from group_losses import (
    CACHES,
    OFFSETS,
    D,
    N,
    V,
    all_three,
    group_loss,
    likelihood,
    make_case,
    preference,
    results,
    run,
    sega,
)
from numerics import Case
from op_bounds import LossFn
from torch import Tensor

from gem_kernels import GroupLoss, LowRank, TokenStats
from gem_kernels.compat import INTERPRETED
from gem_kernels.gradients import Gradients

pytestmark = pytest.mark.op("linear_group_loss")


# --- groups -----------------------------------------------------------------------------------------------------------


@each_case()
def test_no_tokens_no_groups(impl: str) -> None:
    case = make_case(0, D, V)
    got = run(case, impl, likelihood, offsets=[0])
    assert got["loss"] == 0 and got["logprob"].shape == (0,)
    assert not got["dweight"].any()


@each_case(cache_bytes=CACHES)
@pytest.mark.usefixtures("small_tiles")
def test_loss_fn_is_called_once_per_group_in_order(impl: str, cache_bytes: int) -> None:
    case = make_case(N, D, V)
    seen: list[tuple[int, TokenStats]] = []

    def loss_fn(stats: TokenStats, group: int) -> Tensor:
        seen.append((group, TokenStats(*(s.detach().clone() for s in stats))))
        return likelihood(stats, group)

    stats = group_loss(case.leaves(), impl, loss_fn, cache_bytes=cache_bytes).stats
    assert [group for group, _ in seen] == list(range(len(OFFSETS) - 1))
    for field, whole in enumerate(stats):
        assert torch.equal(torch.cat([s[field] for _, s in seen]), whole)


# --- which gradients, and when ----------------------------------------------------------------------------------------


@each_case(cache_bytes={"all": CACHES["all"], "slabs": CACHES["slabs"], "recompute": 1})
@pytest.mark.usefixtures("small_tiles")
def test_every_pattern_of_needed_gradients(impl: str, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head costs neither GEMM nor memory (prime-rl #3011, Liger #1441)."""
    made: list[Gradients] = []
    init = Gradients.__init__

    def spy(self: Gradients, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Gradients, "__init__", spy)
    case = make_case(31, 7, 115)
    offsets = [0, 9, 20, 31]
    full = run(case, impl, all_three, offsets=offsets, cache_bytes=cache_bytes)
    for needs in itertools.product([False, True], repeat=5):
        if not any(needs):
            continue
        made.clear()
        got = run(case, impl, all_three, offsets=offsets, needs=needs, cache_bytes=cache_bytes)
        for name, need in zip(case.leaves().gradients(), needs, strict=True):
            value = got[name]
            assert (value is not None) == need, f"{name} with needs={needs}"
            assert value is None or torch.equal(value, full[name]), f"{name} with needs={needs}"
        if impl == "chunked":
            (g,) = made
            hidden, weight, bias, a, b = needs
            allocated = [t is not None for t in (g.hidden, g.weight, g.bias, g.low_hidden, g.b)]
            assert allocated == [hidden, weight, bias, hidden or a, b], needs


@each_case()
def test_no_gradient_wanted(impl: str) -> None:
    """No input requires a gradient, or gradients are switched off: the same loss and statistics, and nothing kept."""
    case = make_case(N, D, V)
    plain = group_loss(case, impl, all_three)
    assert not plain.loss.requires_grad
    x = case.leaves()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = group_loss(x, impl, all_three)
        assert not out.loss.requires_grad and torch.equal(out.loss, plain.loss)
        assert all(torch.equal(s, p) for s, p in zip(out.stats, plain.stats, strict=True))


@each_case()
def test_second_backward_raises(impl: str) -> None:
    """Backward hands the gradients over without a copy, so a second one would be wrong: it must raise."""
    x = make_case(N, D, V).leaves()
    loss = group_loss(x, impl, likelihood).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_second_backward_raises_even_with_retain_graph() -> None:
    x = make_case(N, D, V).leaves()
    loss = group_loss(x, "chunked", likelihood).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="group loss ran before"):
        loss.backward()


def test_second_order_gradients_raise() -> None:
    x = make_case(N, D, V).leaves()
    (dhidden,) = torch.autograd.grad(group_loss(x, "chunked", likelihood).loss, x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dhidden.square().sum() + x.hidden.sum()).backward()
    with pytest.raises(RuntimeError, match="sega_loss: second-order"):
        torch.autograd.grad(sega(x, "chunked").loss, x.hidden, create_graph=True)


@each_case()
def test_gradients_add_up_over_calls(impl: str) -> None:
    """Gradient accumulation: two calls before one step, each with its own graph."""
    case = make_case(N, D, V)
    once = run(case, impl, preference)
    x = case.leaves()
    first, second = (group_loss(x, impl, preference).loss for _ in range(2))
    (first + second).backward()
    for name, value in x.gradients().items():
        assert value is not None
        torch.testing.assert_close(value, 2 * once[name], rtol=1e-6, atol=1e-7)


def test_low_rank_alone_trains() -> None:
    """LoRA on a frozen model: only the adapter needs a gradient, and gets it."""
    x = make_case(N, D, V).leaves((False, False, False, True, True))
    assert isinstance(x.low_rank, LowRank)
    group_loss(x, "chunked", likelihood).loss.backward()
    assert x.hidden.grad is None and x.weight.grad is None
    assert bool(x.low_rank.a.grad.any()) and bool(x.low_rank.b.grad.any())


# --- loss_fn ----------------------------------------------------------------------------------------------------------


@each_case()
def test_constant_loss(impl: str) -> None:
    """A group without a gradient is no error; neither are all of them."""
    x = make_case(N, D, V).leaves()
    out = group_loss(x, impl, lambda stats, group: torch.tensor(2.0))
    assert out.loss == 2.0 * (len(OFFSETS) - 1)
    if out.loss.requires_grad:
        out.loss.backward()
        assert all(g is None or not g.any() for g in x.gradients().values())


RETURNED = {
    "per token": lambda s, g: s.logprob,
    "float": lambda s, g: 1.0,
    "None": lambda s, g: None,
    "TokenStats": lambda s, g: s,
}


@each_case(returned=RETURNED)
def test_loss_fn_must_return_a_scalar_tensor(impl: str, returned: LossFn) -> None:
    case = make_case(20, D, V)
    for x in (case, case.leaves()):
        with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got .* for group 0"):
            group_loss(x, impl, returned, offsets=[0, 10, 20])


@each_case()
def test_loss_fn_may_return_one_element(impl: str) -> None:
    case = make_case(20, D, V, ignored=0.0)

    def fn(stats: TokenStats, group: int) -> Tensor:
        return stats.logprob.sum() if group else stats.logprob.sum(0, keepdim=True)

    assert group_loss(case.leaves(), impl, fn, offsets=[0, 10, 20]).loss.shape == ()


def test_loss_fn_that_uses_a_parameter_raises() -> None:
    """Its gradient would be lost. A detached one, and a graph of its own, are fine."""
    x = make_case(20, D, V).leaves()
    temperature = torch.tensor([2.0], requires_grad=True)
    derived = temperature.exp()
    for used in (temperature, derived):
        with pytest.raises(
            ValueError, match=r"loss_fn of group 0 uses a tensor of shape \(1,\) that requires a gradient"
        ):
            group_loss(x, "chunked", lambda s, g, used=used: (s.logprob * used).sum(), offsets=[0, 20])
    with pytest.raises(ValueError, match="loss_fn of group 0 uses a tensor"):
        group_loss(x, "chunked", lambda s, g: temperature.sum(), offsets=[0, 20])
    group_loss(x, "chunked", lambda s, g: (s.logprob * temperature.detach()).sum(), offsets=[0, 20]).loss.backward()


@each_case()
def test_an_error_in_loss_fn_comes_through(impl: str) -> None:
    def broken(stats: TokenStats, group: int) -> Tensor:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        group_loss(make_case(N, D, V).leaves(), impl, broken)


# --- autocast and dispatch --------------------------------------------------------------------------------------------


@each_case()
def test_autocast_casts_as_linear_does(impl: str) -> None:
    case = make_case(N, D, V)
    x = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = group_loss(x, impl, all_three)
    got, want = results(out, x), run(case.to(torch.bfloat16), impl, all_three)
    for name, value in got.items():
        expected = want[name]
        assert value is not None and expected is not None
        assert value.dtype == torch.float32 and torch.equal(value, expected.float()), name


@pytest.mark.parametrize(
    "call", [lambda c, i: group_loss(c, i, likelihood), sega], ids=["linear_group_loss", "sega_loss"]
)
def test_dispatch(call: Callable[[Case, str], GroupLoss]) -> None:
    case = make_case(N, D, V)
    assert call(case.double(), "auto").loss.dtype == torch.float64
    assert torch.equal(call(case, "auto").loss, call(case, "chunked").loss)
    with pytest.raises(ValueError, match=r"impl='chunked' cannot serve .*these can: reference$"):
        call(case.double(), "chunked")
    if not INTERPRETED:
        with pytest.raises(ValueError, match=r"impl='triton' cannot serve .*these can: reference, chunked$"):
            call(case, "triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        call(case, "cuda")
