"""linear_logprob_entropy: against fp64 by the one rule, and against what must hold whatever the reference says."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DTYPES,
    IMPLS,
    STATS,
    TRANSFORMS,
    Case,
    assert_all_close,
    assert_close,
    check_linear,
    generator,
    make_case,
    make_upstream,
    run_linear,
    weighted_sum,
)
from op_bounds import linear_bounds, row_sum_bound
from torch import Tensor

from gem_kernels import (
    IGNORE_INDEX,
    LogitTransform,
    LowRank,
    TokenStats,
    linear_logprob_entropy,
    linear_logprob_entropy_max,
)
from gem_kernels.compat import INTERPRETED
from gem_kernels.streaming import Gradients

pytestmark = pytest.mark.op("linear_logprob_entropy")

SHAPES = [(17, 31, 257), (193, 70, 517), (252, 123, 507), (128, 64, 512), (1, 16, 300), (5, 8, 1), (0, 8, 16)]
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(STATS, size)]


def op(case: Case, impl: str, **kwargs: object) -> TokenStats:
    return linear_logprob_entropy(
        case.hidden,
        case.weight,
        case.targets,
        bias=case.bias,
        transform=case.transform,
        low_rank=case.low_rank,
        impl=impl,  # type: ignore[arg-type]
        **kwargs,  # type: ignore[arg-type]
    )


def closed_form(case: Case, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """MATHS.md by hand in fp64, without autograd: what the reference itself is held against. No ignored tokens."""
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
    a, b, c = (upstream[name][:, None] for name in STATS)
    dz = (a * (onehot - p) - b * p * (p.log() + entropy[:, None]) + c * p) * slope
    out = {"logprob": logprob, "entropy": entropy, "lse": z.exp().sum(-1).log()}
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
        return tuple(op(replace(x, hidden=hidden, weight=weight, bias=bias, low_rank=LowRank(a, b, 0.7)), "reference"))

    assert torch.autograd.gradcheck(stats, (x.hidden, x.weight, x.bias, x.low_rank.a, x.low_rank.b))


# --- every statistic and every gradient, by the one rule --------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_linear(make_case(*shape, dtype=dtype, ignored=0.0 if shape[0] == 1 else 0.2), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_matches_gold_on_the_tiles_of_the_table(impl: str) -> None:
    check_linear(make_case(1090, 12, 4111), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_plain_head(impl: str, dtype: torch.dtype) -> None:
    check_linear(make_case(97, 33, 211, dtype=dtype, bias=False, rank=0, ignored=0.0), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_peaky(impl: str, dtype: torch.dtype) -> None:
    check_linear(make_case(120, 40, 523, dtype=dtype, peaky=30.0), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_the_likeliest_token(impl: str, dtype: torch.dtype) -> None:
    """max_logprob by the rule, and equal to logprob, to the last bit, exactly where the target is the likeliest."""
    case = make_case(193, 70, 517, dtype=dtype, peaky=30.0)

    def run(x: Case, name: str) -> tuple[Tensor, Tensor]:
        arguments = {"bias": x.bias, "transform": x.transform, "low_rank": x.low_rank, "impl": name}
        stats = linear_logprob_entropy_max(x.hidden, x.weight, x.targets, **arguments)  # type: ignore[arg-type]
        assert not stats.max_logprob.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(stats[:3], op(x, name), strict=True))
        return stats.logprob.detach(), stats.max_logprob

    logprob, highest = run(case.leaves(), impl)
    gold_logprob, gold = run(case.double(), "reference")
    assert_close("max_logprob", highest, gold, linear_bounds(case, {})["max_logprob"])
    kept = case.targets != IGNORE_INDEX
    assert not highest[~kept].any() and bool((logprob <= highest).all())
    clear = kept & ((gold_logprob == gold) | (gold - gold_logprob > 1e-3))  # no rounding decides
    assert torch.equal((logprob == highest)[clear], (gold_logprob == gold)[clear])
    assert 0.1 < float((logprob == highest)[kept].float().mean()) < 0.9  # bias and adapter move many


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_each_statistic_alone_and_together(impl: str, names: tuple[str, ...]) -> None:
    check_linear(make_case(61, 20, 305), impl, names)


@pytest.mark.parametrize("peaky", [None, 30.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(impl: str, transform: LogitTransform, peaky: float | None) -> None:
    for seed in range(4):
        check_linear(make_case(61, 20, 305, transform=transform, peaky=peaky, seed=seed), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_peaky_bf16_at_a_real_vocabulary(impl: str) -> None:
    """The acceptance criterion: |z| up to 30, V = 50277; log-prob and entropy within 2e-5."""
    case = make_case(24, 16, 50277, dtype=torch.bfloat16, peaky=30.0, bias=False, rank=0, ignored=0.0)
    gold, got = op(case.double(), "reference"), op(case, impl)
    for name in ("logprob", "entropy"):
        assert (getattr(got, name).double() - getattr(gold, name)).abs().max() <= 2e-5, name
    check_linear(case, impl)


@pytest.mark.parametrize("v", [65_537, 151_936])
@pytest.mark.parametrize("impl", IMPLS)
def test_digits_at_a_real_vocabulary(impl: str, v: int) -> None:
    """As in test_logprob.py, for uniform and random logits that are a column of the weight: the digits of the sums alone."""
    case = make_case(2, 2, v, bias=False, rank=0, ignored=0.0)
    weight = torch.stack((torch.full((v,), 7.3), torch.randn(v, generator=generator(7))), 1)
    case = replace(case, hidden=torch.eye(2), weight=weight)
    gold, got = op(case.double(), "reference"), op(case, impl)
    for name, value in got._asdict().items():
        error = float((value.double() - getattr(gold, name)).abs().max())
        assert error <= 8 * torch.finfo(torch.float32).eps * math.log(v), name


@pytest.mark.parametrize("impl", IMPLS)
def test_more_rows_than_a_grid_axis(impl: str) -> None:
    """65,536 rows crashed a peer (Liger #1294)."""
    check_linear(make_case(65_600, 2, 3, rank=0, bias=False), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_all_logits_strongly_negative(impl: str, dtype: torch.dtype) -> None:
    case = make_case(40, 12, 205, dtype=dtype, rank=0)
    case = replace(case, bias=torch.full((205,), -1e4, dtype=dtype))
    assert all(bool(s.isfinite().all()) for s in op(case, impl))
    check_linear(case, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_all_ignored(impl: str) -> None:
    case = make_case(9, 8, 120, ignored=1.0)
    assert bool((case.targets == IGNORE_INDEX).all())
    results = run_linear(case, impl, make_upstream(9))
    for name, value in results.items():
        assert value is not None and not value.any(), name


# --- shapes, strides, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_leading_batch_shape(impl: str) -> None:
    case = make_case(42, 10, 130)
    flat = op(case, impl)
    shaped = op(replace(case, hidden=case.hidden.view(2, 3, 7, 10), targets=case.targets.view(2, 3, 7)), impl)
    one = op(replace(case, hidden=case.hidden[0], targets=case.targets[0]), impl)
    for f, s, o in zip(flat, shaped, one, strict=True):
        assert s.shape == (2, 3, 7) and torch.equal(s.flatten(), f)
        assert o.shape == ()
    x = case.leaves()
    stats = op(replace(x, hidden=x.hidden.view(2, 21, 10), targets=x.targets.view(2, 21)), impl)
    upstream = make_upstream(42)
    weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream).backward()
    assert torch.equal(x.hidden.grad, run_linear(case, impl, upstream)["dhidden"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_int32_targets(impl: str) -> None:
    wide, narrow = make_case(50, 9, 230), make_case(50, 9, 230, targets_dtype=torch.int32)
    upstream = make_upstream(50)
    for name, value in run_linear(wide, impl, upstream).items():
        assert torch.equal(value, run_linear(narrow, impl, upstream)[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs(impl: str) -> None:
    """Transposed, every second row, expanded: the numbers count, not how they lie."""
    case = make_case(50, 14, 230, rank=0)
    strided = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        weight=torch.stack((case.weight, torch.full_like(case.weight, float("nan"))), 1).flatten(0, 1)[::2],
        targets=torch.stack((case.targets, case.targets), 1)[:, 0],
        bias=case.bias[:1].expand(230),
    )
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    upstream = make_upstream(50)

    def run(x: Case, which: str) -> dict[str, Tensor]:
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        stats = op(replace(x, hidden=hidden, weight=weight), which)
        dhidden, dweight = torch.autograd.grad(weighted_sum(stats, upstream), (hidden, weight))
        return {**{k: s.detach() for k, s in stats._asdict().items()}, "dhidden": dhidden, "dweight": dweight}

    assert_all_close(run(strided, impl), run(strided.double(), "reference"), linear_bounds(strided, upstream))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_adapter_in_fp32_beside_a_bf16_model(impl: str) -> None:
    """peft's layout; also the adapter must change the result (silently ignored by a peer: TRL #4612)."""
    case = make_case(44, 16, 190, dtype=torch.bfloat16)
    assert case.low_rank is not None
    exact = make_case(44, 16, 190).low_rank
    check_linear(replace(case, low_rank=exact), impl)
    without = op(replace(case, low_rank=None), impl).logprob
    assert (op(case, impl).logprob - without).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_adapter_that_cancels_the_weight(impl: str) -> None:
    """dhidden is the sum of two GEMMs that nearly cancel: rounding each to bf16 first would leave noise."""
    case = make_case(44, 16, 190, dtype=torch.bfloat16)
    check_linear(replace(case, low_rank=LowRank(torch.eye(16).bfloat16(), -0.99 * case.weight, 1.0)), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_is_a_merged_weight(impl: str) -> None:
    case = make_case(30, 16, 90, ignored=0.0).double()
    assert case.low_rank is not None
    merged = case.weight + case.low_rank.scale * case.low_rank.b @ case.low_rank.a
    whole = op(replace(case, weight=merged, low_rank=None), "reference")
    narrow = op(make_case(30, 16, 90, ignored=0.0), impl)
    for one, other in zip(whole, narrow, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_every_pattern_of_needed_gradients(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not needed is None, and is not even allocated (prime-rl #3011); what is needed has the same bits."""
    made: list[Gradients] = []
    init = Gradients.__init__

    def spy(self: Gradients, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Gradients, "__init__", spy)
    case, upstream = make_case(19, 7, 115), make_upstream(19)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_wanted(impl: str) -> None:
    case = make_case(12, 6, 40)
    plain = op(case, impl)
    assert not any(s.requires_grad for s in plain)
    x = case.leaves()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = op(x, impl)
        for s, p in zip(stats, plain, strict=True):
            assert not s.requires_grad and torch.equal(s, p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_upstream_gradient_is_per_token(impl: str) -> None:
    """A peer multiplied every token by grad_output[0] (Liger #1298). Powers of two scale a row exactly."""
    case = make_case(31, 9, 140, bias=False, rank=0)
    ones = {name: torch.ones(31, dtype=torch.float64) for name in STATS}
    factor = torch.tensor([2.0 ** (i % 7 - 3) for i in range(31)], dtype=torch.float64)
    plain = run_linear(case, impl, ones)["dhidden"]
    scaled = run_linear(case, impl, {name: factor * u for name, u in ones.items()})["dhidden"]
    assert plain is not None and torch.equal(scaled, plain * factor.float()[:, None])


@pytest.mark.parametrize("squared", [False, True], ids=["linear", "squared"])
def test_second_order_gradients_raise(squared: bool) -> None:
    """Also where the upstream gradient needs none (a sum): there a constant would pass for the gradient's gradient."""
    x = make_case(6, 4, 9).leaves()
    logprob = op(x, "chunked").logprob
    value = logprob.square().sum() if squared else logprob.sum()
    (dhidden,) = torch.autograd.grad(value, x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        (dhidden.square().sum() + x.hidden.sum()).backward()


def test_weight_changed_before_backward_raises() -> None:
    x = make_case(6, 4, 9).leaves()
    loss = op(x, "chunked").logprob.sum()
    with torch.no_grad():
        x.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- oracles ----------------------------------------------------------------------------------------------------------


def dlogits(logits: Tensor, targets: Tensor, impl: str, upstream: dict[str, Tensor], **kwargs: object) -> Tensor:
    """dz itself: with the identity for a head, hidden are the logits and dhidden is dz."""
    hidden = logits.clone().requires_grad_()
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    stats = linear_logprob_entropy(hidden, eye, targets, impl=impl, **kwargs)  # type: ignore[arg-type]
    (dz,) = torch.autograd.grad(weighted_sum(stats, upstream), hidden)
    return dz


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("name", ["logprob", "entropy"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_gradient_of_a_row_sums_to_zero(impl: str, name: str, size: float) -> None:
    logits, targets = size * torch.randn(80, 211), torch.randint(0, 211, (80,))
    targets[::2] = logits.argmax(1)[::2]
    upstream = make_upstream(80, [name])
    bound = row_sum_bound(logits, targets, upstream)
    sums = dlogits(logits, targets, impl, upstream).double().sum(1)
    assert_close(f"sum of d{name}/dz", sums, torch.zeros(80, dtype=torch.float64), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_statistics_stay_in_their_range(impl: str, dtype: torch.dtype) -> None:
    """log-probs above 0 collapsed a peer's reward (verl #2656)."""
    for peaky in (1e-3, 1.0, 30.0, 300.0):
        case = make_case(150, 12, 333, dtype=dtype, peaky=peaky, bias=False, rank=0, ignored=0.0)
        stats = op(case, impl)
        assert bool((stats.logprob <= 0).all()), peaky
        assert bool((stats.entropy >= 0).all()), peaky
        assert bool((stats.entropy <= math.log(333) * (1 + 4 * torch.finfo(torch.float32).eps)).all()), peaky


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_minus_infinity_in_the_bias_is_a_smaller_vocabulary(impl: str) -> None:
    """A vocabulary padded to a round size; a whole tile of padding first, some in between, a ragged tail of it."""
    v = 401
    kept = torch.cat((torch.arange(120, 250), torch.arange(253, 380)))
    case = make_case(53, 17, v, rank=2, ignored=0.1)
    assert case.bias is not None and case.low_rank is not None
    mask = torch.ones(v, dtype=torch.bool)
    mask[kept] = False
    small_target = torch.randint(0, kept.shape[0], (53,)).where(case.targets != IGNORE_INDEX, IGNORE_INDEX)
    targets = kept[small_target.clamp_min(0)].where(small_target != IGNORE_INDEX, IGNORE_INDEX)
    padded = replace(case, bias=case.bias.masked_fill(mask, -math.inf), targets=targets)
    a, b, scale = case.low_rank
    small = replace(
        case,
        weight=case.weight[kept],
        bias=case.bias[kept],
        low_rank=LowRank(a, b[kept], scale),
        targets=small_target,
    )
    upstream = make_upstream(53)
    got = run_linear(padded, impl, upstream)
    for name in ("dweight", "dbias", "db"):
        grad = got[name]
        assert grad is not None and not grad[mask].any(), name
        got[name] = grad[kept]
    assert_all_close(got, run_linear(small.double(), "reference", upstream), linear_bounds(small, upstream))


@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("lse",), STATS], ids="+".join)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_target_of_probability_zero(impl: str, names: tuple[str, ...]) -> None:
    """log p = -inf is the right answer; its gradients, and those of the other rows, are finite."""
    case = make_case(20, 9, 150, rank=0, ignored=0.0)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[case.targets[3]] = -math.inf
    case = replace(case, bias=bias)
    assert op(case, impl).logprob[3] == -math.inf
    check_linear(case, impl, names)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_an_ignored_row_stays_there(impl: str) -> None:
    case, upstream = make_case(41, 9, 150), make_upstream(41)
    ignored = case.targets == IGNORE_INDEX
    assert ignored.any()
    clean = run_linear(case, impl, upstream)
    dirty = run_linear(replace(case, hidden=case.hidden.masked_fill(ignored[:, None], math.nan)), impl, upstream)
    for name, value in clean.items():
        assert value is not None and torch.equal(dirty[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_a_kept_row_shows_and_stays_in_its_row(impl: str) -> None:
    case, upstream = make_case(41, 9, 150, ignored=0.0), make_upstream(41)
    hidden = case.hidden.clone()
    hidden[7, 2] = math.nan
    clean, dirty = (run_linear(replace(case, hidden=h), impl, upstream) for h in (case.hidden, hidden))
    others = torch.arange(41) != 7
    for name in (*STATS, "dhidden"):
        good, bad = clean[name], dirty[name]
        assert good is not None and bad is not None
        assert bool(bad[7].isnan().all()) and torch.equal(bad[others], good[others]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_same_input_same_bits(impl: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)  # a race needs two
    case, upstream = make_case(150, 40, 430, dtype=dtype), make_upstream(150)
    first, second = run_linear(case, impl, upstream), run_linear(case, impl, upstream)
    for name, value in first.items():
        assert value is not None and torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
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
    # The sum of three exponentials, near 1, is rounded twice, and what is divided by it once: that, and the rounding of the
    # result, is all there may be.
    bound = upstream["logprob"].abs() * 1.5 * torch.finfo(torch.float32).eps + gold.abs() * torch.finfo(dtype).eps
    assert bool(((dz.double() - gold).abs() <= bound).all())
    assert bool((dz != 0).all())


# --- autocast and dispatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_tiles")
def test_autocast_casts_as_linear_does(impl: str) -> None:
    case, upstream = make_case(37, 12, 140), make_upstream(37)
    x = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        stats = op(x, impl)
    weighted_sum(stats, upstream).backward()
    got = {**stats._asdict(), **x.gradients()}
    want = run_linear(case.to(torch.bfloat16), impl, upstream)
    for name, value in got.items():
        expected = want[name]
        assert value is not None and expected is not None
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected.float()), name


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_backward_under_autocast_stays_in_fp32(impl: str) -> None:
    case, upstream = make_case(37, 12, 140), make_upstream(37)
    want = run_linear(case, impl, upstream)
    x = case.leaves()
    loss = weighted_sum(op(x, impl), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for name, value in x.gradients().items():
        assert (value is None and want[name] is None) or torch.equal(value, want[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_are_served_under_autocast_only(impl: str) -> None:
    case = make_case(37, 12, 140)
    mixed = replace(case, hidden=case.hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(mixed, impl).logprob, op(case, impl).logprob)
    with pytest.raises(TypeError, match=r"hidden and weight must have one dtype.*autocast.*bfloat16.*float32"):
        op(mixed, impl)


def test_autocast_leaves_what_linear_leaves() -> None:
    """F.linear under autocast does not narrow fp64, and does not make floats of integers."""
    case = make_case(8, 4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(case.double(), "auto").logprob.dtype == torch.float64
        with pytest.raises(TypeError, match="hidden must be"):
            op(replace(case, hidden=case.hidden.long()), "auto")


def test_float64_is_served_by_the_reference_alone() -> None:
    case = make_case(8, 4, 20).double()
    auto, explicit = op(case, "auto"), op(case, "reference")
    assert all(s.dtype == torch.float64 and torch.equal(s, e) for s, e in zip(auto, explicit, strict=True))
    with pytest.raises(ValueError, match=r"impl='chunked' cannot serve linear_logprob_entropy.*these can: reference$"):
        op(case, "chunked")


def test_auto_is_chunked() -> None:
    case = make_case(8, 4, 20)
    assert all(torch.equal(a, c) for a, c in zip(op(case, "auto"), op(case, "chunked"), strict=True))


def test_an_explicit_impl_never_falls_back() -> None:
    case = make_case(8, 4, 20)
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference, chunked, triton, got 'fast'"):
        op(case, "fast")
    if INTERPRETED:
        return
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve .*: .*these can: reference, chunked$"):
        op(case, "triton")
