"""linear_group_loss and sega_loss: any loss of the statistics, whatever the cache holds, is what autograd would make of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numerics
import pytest
import torch
import torch.nn.functional as F
from bounds import Bound
from numerics import (
    DTYPES,
    IMPLS,
    STATS,
    TRANSFORMS,
    Case,
    Results,
    assert_all_close,
    assert_close,
)
from op_bounds import LossFn, group_bounds, linear_bounds
from torch import Tensor

from gem_kernels import (
    IGNORE_INDEX,
    GroupLoss,
    LogitTransform,
    LowRank,
    TokenStats,
    linear_group_loss,
    linear_logprob_entropy,
    sega_loss,
)
from gem_kernels.compat import INTERPRETED
from gem_kernels.group_loss.chunked import plan_slabs
from gem_kernels.streaming import Gradients, padded

pytestmark = pytest.mark.op("linear_group_loss")

N, D, V = 90, 13, 217
OFFSETS = [0, 11, 12, 40, 41, 77, 90]  # groups of one token, of many, of unequal size
ROW = 4 * padded(V)
CACHES = {"all": 1 << 30, "slabs": ROW * 30, "one group at most": ROW * 12, "recompute": 1}


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[: (len(x) + 1) // 2].sum(), x[(len(x) + 1) // 2 :].sum()


def likelihood(stats: TokenStats, group: int) -> Tensor:
    return -(group + 1.0) * stats.logprob.sum()


def likelihood_of_equals(stats: TokenStats, group: int) -> Tensor:
    return -stats.logprob.sum()


def preference(stats: TokenStats, group: int) -> Tensor:
    chosen, rejected = halves(stats.logprob)
    return -F.logsigmoid(0.3 * (chosen - rejected))


def sega_with_its_own_entropies(stats: TokenStats, group: int) -> Tensor:
    weight = stats.entropy.detach()  # what makes linear_group_loss more than a fused cross-entropy
    return -((weight - weight.mean()) * stats.logprob).sum()


def entropy_as_a_term(stats: TokenStats, group: int) -> Tensor:
    return (stats.entropy * stats.logprob).sum() + 0.1 * stats.entropy.square().sum()


def z_loss(stats: TokenStats, group: int) -> Tensor:
    return 0.01 * stats.lse.square().sum()


def all_three(stats: TokenStats, group: int) -> Tensor:
    return preference(stats, group) + entropy_as_a_term(stats, group) + z_loss(stats, group)


def another_in_every_group(stats: TokenStats, group: int) -> Tensor:
    """Each statistic is looked at by some groups only, and one group gives no gradient at all."""
    return (stats.logprob.sum(), stats.entropy.sum(), stats.lse.sum(), torch.tensor(3.0))[group % 4]


LOSSES = [
    likelihood,
    preference,
    sega_with_its_own_entropies,
    entropy_as_a_term,
    z_loss,
    all_three,
    another_in_every_group,
]


def group_loss(case: Case, impl: str, loss_fn: LossFn, offsets: Sequence[int] = OFFSETS, **kwargs: object) -> GroupLoss:
    return linear_group_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.tensor(offsets, dtype=torch.int32),
        loss_fn,
        bias=case.bias,
        transform=case.transform,
        low_rank=case.low_rank,
        impl=impl,  # type: ignore[arg-type]
        **kwargs,  # type: ignore[arg-type]
    )


def results(out: GroupLoss, x: Case, factor: float = 1.0) -> dict[str, Tensor | None]:
    """Loss, statistics and gradients after one backward."""
    (out.loss * factor).backward()
    assert out.dropped_mass is None
    assert not any(s.requires_grad for s in out.stats)
    return {"loss": out.loss.detach(), **out.stats._asdict(), **x.gradients()}


def run(
    case: Case, impl: str, loss_fn: LossFn, factor: float = 1.0, needs: Sequence[bool] = (True,) * 5, **kwargs: object
) -> dict[str, Tensor | None]:
    x = case.leaves(needs)
    return results(group_loss(x, impl, loss_fn, **kwargs), x, factor)  # type: ignore[arg-type]


@cache
def expected(case: Case, loss_fn: LossFn, offsets: Sequence[int], factor: float) -> tuple[Results, dict[str, Bound]]:
    """Gold and its bounds, once for all implementations and sizes of the cache that meet the same case."""
    gold = run(case.double(), "reference", loss_fn, factor, offsets=offsets)
    return gold, group_bounds(case, loss_fn, offsets, factor=factor)


def check(
    case: Case, impl: str, loss_fn: LossFn, factor: float = 1.0, offsets: Sequence[int] = OFFSETS, **kwargs: object
) -> None:
    got = run(case, impl, loss_fn, factor, offsets=offsets, **kwargs)  # type: ignore[arg-type]
    assert_all_close(got, *expected(case, loss_fn, tuple(offsets), factor))


make_case = cache(numerics.make_case)  # no test writes into a case


# --- the loss and its gradients, by the one rule ----------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(impl: str, loss_fn: LossFn, cache_bytes: int) -> None:
    check(make_case(N, D, V), impl, loss_fn, cache_bytes=cache_bytes)


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_dtypes(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    check(make_case(N, D, V, dtype=dtype, peaky=30.0), impl, sega_with_its_own_entropies, cache_bytes=cache_bytes)
    check(make_case(N, D, V, dtype=dtype), impl, all_three, cache_bytes=cache_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_narrow_weight_gradient_is_summed_in_fp32(impl: str, dtype: torch.dtype) -> None:
    """300 slabs that all push one way: a sum in bf16 stops growing (Liger #1391, Megatron #2739)."""
    case = make_case(300, 5, 11, dtype=dtype, ignored=0.0, rank=0)
    case = replace(case, hidden=case.hidden.abs(), targets=torch.zeros_like(case.targets))
    check(case, impl, likelihood_of_equals, offsets=range(301), cache_bytes=1)


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(impl: str, transform: LogitTransform, cache_bytes: int) -> None:
    check(make_case(N, D, V, transform=transform), impl, all_three, cache_bytes=cache_bytes)


@pytest.mark.parametrize("impl", IMPLS)
def test_default_tiles(impl: str) -> None:
    check(make_case(N, D, V, bias=False, rank=0), impl, all_three)


@pytest.mark.parametrize("factor", [-2.5, 0.0])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_loss_scaled_afterwards(impl: str, factor: float) -> None:
    check(make_case(N, D, V), impl, all_three, factor=factor)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_leading_batch_shape(impl: str) -> None:
    case = make_case(N, D, V)
    shaped = replace(case, hidden=case.hidden.view(3, 30, D), targets=case.targets.view(3, 30))
    flat, batched = (run(c, impl, all_three) for c in (case, shaped))
    for name, value in batched.items():
        want = flat[name]
        assert value is not None and want is not None
        assert torch.equal(value, want.view(value.shape)), name
    assert all(batched[name].shape == (3, 30) for name in STATS)


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_same_input_same_bits(impl: str, cache_bytes: int) -> None:
    case = make_case(N, D, V, dtype=torch.bfloat16)
    first, second = (run(case, impl, all_three, cache_bytes=cache_bytes) for _ in range(2))
    for name, value in first.items():
        assert value is not None and torch.equal(value, second[name]), name


# --- groups and ignored tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_groups_with_every_token_ignored(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    """First, in the middle and last; then all of them. loss_fn still sees such a group, as zeros of its length."""
    case = make_case(N, D, V, dtype=dtype)
    targets = case.targets.clone()
    for start, end in ((0, 12), (40, 41), (77, 90)):
        targets[start:end] = IGNORE_INDEX
    check(replace(case, targets=targets), impl, all_three, cache_bytes=cache_bytes)
    nothing = run(
        replace(case, targets=torch.full_like(targets, IGNORE_INDEX)), impl, likelihood, cache_bytes=cache_bytes
    )
    for name, value in nothing.items():
        assert value is not None and not value.any(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_an_ignored_row_stays_there(impl: str) -> None:
    case = make_case(N, D, V)
    ignored = case.targets == IGNORE_INDEX
    dirty = replace(case, hidden=case.hidden.masked_fill(ignored[:, None], math.nan))
    clean, got = run(case, impl, all_three), run(dirty, impl, all_three)
    for name, value in clean.items():
        assert value is not None and torch.equal(got[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_no_groups(impl: str) -> None:
    case = make_case(0, D, V)
    got = run(case, impl, likelihood, offsets=[0])
    assert got["loss"] == 0 and got["logprob"].shape == (0,)
    assert not got["dweight"].any()


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("impl", IMPLS)
def test_stats_are_those_of_the_per_token_op(impl: str, cache_bytes: int) -> None:
    case = make_case(N, D, V)
    wide, bounds = case.double(), linear_bounds(case, {})
    gold = linear_logprob_entropy(
        wide.hidden, wide.weight, wide.targets, bias=wide.bias, low_rank=wide.low_rank, impl="reference"
    )._asdict()
    for x in (case, case.leaves()):
        assert_all_close(group_loss(x, impl, likelihood, cache_bytes=cache_bytes).stats._asdict(), gold, bounds)


@pytest.mark.parametrize("seed", range(4))
def test_slabs_cover_the_groups(seed: int) -> None:
    """Every group in one slab, in order; a slab is within the cache or a single group."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (40,), generator=g)
    offsets = [0, *lengths.cumsum(0).tolist()]
    for cache_rows in (0, 1, 7, 8, 30, 1000):
        slabs = plan_slabs(offsets, cache_rows)
        assert [group for s in slabs for group in range(s.first, s.last)] == list(range(40))
        for slab in slabs:
            assert (slab.start, slab.stop) == (offsets[slab.first], offsets[slab.last])
            assert slab.stop - slab.start <= cache_rows or slab.last == slab.first + 1
        for one, other in itertools.pairwise(slabs):  # greedy: the next group would not have fitted
            assert offsets[other.first + 1] - one.start > cache_rows


# --- which gradients, and when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [CACHES["all"], CACHES["slabs"], 1], ids=["all", "slabs", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_wanted(impl: str) -> None:
    """Nothing needs one, or nobody may have one: the same loss and statistics, and nothing kept."""
    case = make_case(N, D, V)
    plain = group_loss(case, impl, all_three)
    assert not plain.loss.requires_grad
    x = case.leaves()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = group_loss(x, impl, all_three)
        assert not out.loss.requires_grad and torch.equal(out.loss, plain.loss)
        assert all(torch.equal(s, p) for s, p in zip(out.stats, plain.stats, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_raises(impl: str) -> None:
    """The gradients are handed over, not copied: what would be wrong the second time must not come out silently."""
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
        torch.autograd.grad(sega(x, "chunked", WEIGHTS).loss, x.hidden, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
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


# --- loss_fn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_loss(impl: str) -> None:
    """A group without a gradient is no error; neither are all of them."""
    x = make_case(N, D, V).leaves()
    out = group_loss(x, impl, lambda stats, group: torch.tensor(2.0))
    assert out.loss == 2.0 * (len(OFFSETS) - 1)
    if out.loss.requires_grad:
        out.loss.backward()
        assert all(g is None or not g.any() for g in x.gradients().values())


@pytest.mark.parametrize("returned", [lambda s, g: s.logprob, lambda s, g: 1.0, lambda s, g: None, lambda s, g: s])
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_fn_must_return_a_scalar_tensor(impl: str, returned: LossFn) -> None:
    case = make_case(20, D, V)
    for x in (case, case.leaves()):
        with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got .* for group 0"):
            group_loss(x, impl, returned, offsets=[0, 10, 20])


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_an_error_in_loss_fn_comes_through(impl: str) -> None:
    def broken(stats: TokenStats, group: int) -> Tensor:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        group_loss(make_case(N, D, V).leaves(), impl, broken)


# --- SEGA -------------------------------------------------------------------------------------------------------------


def sega(case: Case, impl: str, seq_weight: Tensor, offsets: Sequence[int] = OFFSETS, **kwargs: object) -> GroupLoss:
    return sega_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.tensor(offsets),
        seq_weight,
        bias=case.bias,
        transform=case.transform,
        low_rank=case.low_rank,
        impl=impl,  # type: ignore[arg-type]
        **kwargs,  # type: ignore[arg-type]
    )


def run_sega(case: Case, impl: str, seq_weight: Tensor, **kwargs: object) -> dict[str, Tensor | None]:
    x = case.leaves()
    return results(sega(x, impl, seq_weight, **kwargs), x)  # type: ignore[arg-type]


def run_sega_by_hand(case: Case, seq_weight: Tensor) -> dict[str, Tensor | None]:
    """-Σ_s w_s Σ_t log p_t on the per-token reference."""
    x = case.leaves()
    stats = linear_logprob_entropy(
        x.hidden,
        x.weight,
        x.targets,
        bias=x.bias,
        transform=x.transform,
        low_rank=x.low_rank,
        impl="reference",
    )
    sums = [stats.logprob[a:b].sum() for a, b in itertools.pairwise(OFFSETS)]
    loss = -(seq_weight.to(stats.logprob.dtype) * torch.stack(sums)).sum()
    return results(GroupLoss(loss, TokenStats(*(s.detach() for s in stats))), x)


WEIGHTS = torch.tensor([0.5, -1.0, 0.75, -0.5, 0.0, 0.25])  # centred, as advantages are: they sum to 0
assert WEIGHTS.sum() == 0


def weighted_likelihood(weights: Tensor) -> LossFn:
    """The loss of a sequence, of which sega_loss is the sum."""
    return lambda stats, sequence: -weights[sequence].to(stats.logprob.dtype) * stats.logprob.sum()


@cache
def expected_of_sega(case: Case) -> tuple[Results, dict[str, Bound]]:
    return run_sega_by_hand(case.double(), WEIGHTS), group_bounds(case, weighted_likelihood(WEIGHTS), OFFSETS)


def check_sega(case: Case, got: dict[str, Tensor | None]) -> None:
    assert_all_close(got, *expected_of_sega(case))


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_sega_is_its_formula(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    for case in (make_case(N, D, V, dtype=dtype), make_case(N, D, V, dtype=dtype, peaky=30.0, bias=False, rank=0)):
        check_sega(case, run_sega(case, impl, WEIGHTS, cache_bytes=cache_bytes))


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_sega_transforms(impl: str, transform: LogitTransform) -> None:
    case = make_case(N, D, V, transform=transform)
    check_sega(case, run_sega(case, impl, WEIGHTS, cache_bytes=CACHES["slabs"]))


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("impl", IMPLS)
def test_sega_weights_of_zero_give_no_gradient(impl: str, cache_bytes: int) -> None:
    """All zero: exactly nothing. Zero for one sequence: exactly nothing for its tokens."""
    case = make_case(N, D, V)
    nothing = run_sega(case, impl, torch.zeros(6), cache_bytes=cache_bytes)
    for name, value in nothing.items():
        assert name in STATS or (value is not None and not value.any()), name
    some = run_sega(case, impl, WEIGHTS, cache_bytes=cache_bytes)["dhidden"]
    assert some is not None
    used = (WEIGHTS != 0).repeat_interleave(torch.tensor(OFFSETS).diff()) & (case.targets != IGNORE_INDEX)
    assert torch.equal(some.any(1), used)


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("impl", IMPLS)
def test_sega_of_equal_tokens_cancels(impl: str) -> None:
    """Weights that sum to 0 on copies of one sequence: no loss, no dweight beyond rounding, but a dhidden each."""
    one = make_case(10, D, V, ignored=0.0, rank=0)
    case = replace(one, hidden=one.hidden.repeat(3, 1), targets=one.targets.repeat(3))
    weight = torch.tensor([1.0, 0.5, -1.5])
    got = run_sega(case, impl, weight, offsets=[0, 10, 20, 30])
    bounds = group_bounds(case, weighted_likelihood(weight), [0, 10, 20, 30])
    for name in ("loss", "dweight", "dbias"):
        value = got[name]
        assert value is not None
        assert_close(name, value, torch.zeros_like(value, dtype=torch.float64), bounds[name])
    assert got["dhidden"] is not None and bool(got["dhidden"].any(1).all())


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("impl", IMPLS)
def test_sega_frozen_head(impl: str) -> None:
    x = make_case(N, D, V).leaves((True, False, False, True, True))
    sega(x, impl, WEIGHTS).loss.backward()
    assert x.weight.grad is None and x.bias is not None and x.bias.grad is None
    assert all(t is not None and t.grad is not None for t in (x.hidden, *x.low_rank[:2]))


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("impl", IMPLS)
def test_sega_shapes_and_dtypes(impl: str) -> None:
    case = make_case(N, D, V)
    plain = sega(case, impl, WEIGHTS)
    shaped = replace(case, hidden=case.hidden.view(2, 45, D), targets=case.targets.view(2, 45).int())
    out = sega(shaped, impl, WEIGHTS.bfloat16())
    assert out.loss.shape == () and out.loss.dtype == torch.float32 and torch.equal(out.loss, plain.loss)
    assert all(s.shape == (2, 45) for s in out.stats)
    assert sega(case, impl, WEIGHTS.double()).loss.dtype == torch.float32
    empty = sega(make_case(0, D, V), impl, torch.zeros(0), offsets=[0])
    assert empty.loss == 0


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize("impl", IMPLS)
def test_sega_packed_is_one_by_one(impl: str) -> None:
    """Packing must not let one sequence see another."""
    case = make_case(N, D, V)
    packed = sega(case, impl, WEIGHTS).loss
    singles = [
        sega(replace(case, hidden=case.hidden[a:b], targets=case.targets[a:b]), impl, w[None], offsets=[0, b - a]).loss
        for (a, b), w in zip(itertools.pairwise(OFFSETS), WEIGHTS, strict=True)
    ]
    torch.testing.assert_close(packed, torch.stack(singles).sum(), rtol=1e-6, atol=1e-5)


# --- autocast and dispatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("call", [lambda c, i: group_loss(c, i, likelihood), lambda c, i: sega(c, i, WEIGHTS)])
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


def test_low_rank_alone_trains() -> None:
    """LoRA on a frozen model: hidden, weight and bias need nothing, and the adapter gets its gradient."""
    x = make_case(N, D, V).leaves((False, False, False, True, True))
    assert isinstance(x.low_rank, LowRank)
    group_loss(x, "chunked", likelihood).loss.backward()
    assert x.hidden.grad is None and x.weight.grad is None
    assert bool(x.low_rank.a.grad.any()) and bool(x.low_rank.b.grad.any())
