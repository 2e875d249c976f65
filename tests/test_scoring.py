"""topm_mean and gem_score: by hand, against the reference by the one rule, and on the ragged edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from devices import each_case
from numerics import IMPLS, assert_all_close, assert_same, generator
from op_bounds import score_bounds, topm_bounds
from torch import Tensor

from gem_kernels import Score, gem_score, topm_mean
from gem_kernels.compat import INTERPRETED

pytestmark = pytest.mark.op("topm_mean")

FUSED = [impl for impl in IMPLS if impl != "reference"]
FP32 = torch.float32


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def run_topm(values: Tensor, cu_seqlens: Tensor, m: int | float, impl: str) -> dict[str, Tensor | None]:
    """Return means and dvalues for a random upstream gradient."""
    leaf = values.detach().clone().requires_grad_()
    means = topm_mean(leaf, cu_seqlens, m, impl=impl)  # type: ignore[arg-type]
    upstream = torch.randn(means.shape, generator=generator(2), dtype=torch.float64).to(values.device)
    if means.requires_grad:
        (means * upstream.to(means.dtype)).sum().backward()
    return {"means": means.detach(), "dvalues": leaf.grad}


def check_topm(values: Tensor, cu_seqlens: Tensor, m: int | float, impl: str) -> None:
    """Hold topm_mean by `impl` to the rule, and a second run to the same bits."""
    gold, got = run_topm(values.double(), cu_seqlens, m, "reference"), run_topm(values, cu_seqlens, m, impl)
    assert_all_close(got, gold, topm_bounds(values, cu_seqlens, m, gold["dvalues"]))
    assert_same(run_topm(values, cu_seqlens, m, impl), got)


def short_sequences(impl: str) -> tuple[Tensor, Tensor]:
    """Draw values and cu_seqlens of sequences below 60 tokens; fewer for the interpreter, which is slow."""
    g = generator(0)
    lengths = torch.randint(0, 60, (12 if impl == "triton" else 70,), generator=g).tolist()
    return torch.rand(sum(lengths), generator=g), offsets(lengths)


def ragged(sequences: int, longest: int) -> tuple[Tensor, Tensor]:
    """Draw values with many ties, and cu_seqlens: lengths 0, 1, 2 and `longest` are among them."""
    g = generator(0)
    lengths = torch.randint(0, 3 * longest // 10 + 2, (sequences,), generator=g)
    lengths[:4] = torch.tensor([0, 1, 2, longest])
    values = torch.randn(int(lengths.sum()), generator=g)
    tied = torch.rand(values.shape, generator=g) < 0.3
    return values.round().where(tied, values), offsets(lengths.tolist(), torch.int64)


# --- topm_mean --------------------------------------------------------------------------------------------------------


@each_case()
def test_by_hand(impl: str) -> None:
    values = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0, -1.0, -3.0])
    cu = offsets([4, 0, 1, 2])
    for m, want in [
        (1, [5.0, 0.0, 7.0, -1.0]),
        (2, [4.0, 0.0, 7.0, -2.0]),
        (100, [2.75, 0.0, 7.0, -2.0]),
        (0.5, [4.0, 0.0, 7.0, -1.0]),
        (0.51, [10 / 3, 0.0, 7.0, -2.0]),
        (1.0, [2.75, 0.0, 7.0, -2.0]),
        (1e-12, [5.0, 0.0, 7.0, -1.0]),
    ]:
        got = topm_mean(values, cu, m, impl=impl)  # type: ignore[arg-type]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor(want), msg=f"m={m}: {got.tolist()}, expected {want}")


@each_case()
def test_fraction_counts_are_those_of_exact_arithmetic(impl: str) -> None:
    """m length is a float: 0.07 * 100 is 7.000000000000001, whose ceil is 8. The count must be 7."""
    assert math.ceil(0.07 * 100) == 8
    for percent in (7, 57) if impl == "triton" else range(1, 101):  # the interpreter is slow
        lengths = [1, 3, 10, 20, 25, 30, 70, 75, 100, 300, 1100]
        values = torch.cat([torch.arange(float(n), dtype=torch.float32) for n in lengths])
        exact = [max(1, -(-percent * n // 100)) for n in lengths]  # ceil in integers
        # The largest k of 0, 1, ..., n - 1 have the mean n - (k + 1) / 2: the mean tells the count.
        counts = 2 * (torch.tensor(lengths) - topm_mean(values, offsets(lengths), percent / 100, impl=impl)) - 1  # type: ignore[arg-type]
        assert counts.round().int().tolist() == exact, f"m={percent / 100}"


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_ties_go_by_position(impl: str) -> None:
    """Among equals the earlier token is selected, and gets the gradient."""
    values = torch.tensor([2.0, 1.0, 2.0, 2.0, 0.0, 3.0, 3.0], requires_grad=True)
    topm_mean(values, offsets([5, 2]), 2, impl=impl).sum().backward()  # type: ignore[arg-type]
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0, 0.0, 0.5, 0.5]
    many = torch.ones(200, requires_grad=True)
    topm_mean(many, offsets([150, 50]), 0.1, impl=impl).sum().backward()  # type: ignore[arg-type]
    assert many.grad is not None
    assert many.grad.nonzero().flatten().tolist() == [*range(15), *range(150, 155)]


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]


@each_case(m=[1, 2, 7, 0.3])
@pytest.mark.usefixtures("small_tiles")
def test_selects_what_a_stable_sort_selects(impl: str, m: int | float) -> None:
    """Ties, signs, both zeros, denormals, infinities and NaN; one token, none, and lengths around a block's."""
    g = generator(0)
    lengths = [1, 0, 2, 12, 31, 32, 33, 0, 150]
    draw = torch.randint(0, len(SPECIAL), (sum(lengths),), generator=g)
    values = torch.where(torch.rand(draw.shape, generator=g) < 0.5, torch.tensor(SPECIAL)[draw], (draw % 3).float() - 1)
    values[: lengths[0]] = math.nan
    values[-100:] = torch.randint(-2, 2, (100,), generator=g).float()
    ends = list(itertools.accumulate(lengths))
    means, dvalues = torch.zeros(len(lengths)), torch.zeros_like(values)
    for i, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        ordered, order = values[end - length : end].sort(descending=True, stable=True)
        count = min(m, length) if isinstance(m, int) else math.ceil(m * length - 1e-9)
        if length:
            means[i] = ordered[:count].double().mean()
            dvalues[end - length + order[:count]] = torch.tensor(1.0) / count
    leaf = values.clone().requires_grad_()
    got = topm_mean(leaf, offsets(lengths), m, impl=impl)  # type: ignore[arg-type]
    got.sum().backward()
    torch.testing.assert_close(got.detach(), means, equal_nan=True)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, dvalues)


@each_case(impl=FUSED)
def test_the_same_input_gives_the_same_bits(impl: str) -> None:
    values, cu = torch.randn(120), offsets([70, 0, 50])
    branch, answer = spans((0, 100), (40, 60), (0, 100)), spans((50, 120), (100, 110), (3, 4))

    def run() -> list[Tensor]:
        leaf = values.clone().requires_grad_()
        score = gem_score(leaf, branch, answer, m=0.3, impl=impl).score  # type: ignore[arg-type]
        means = topm_mean(leaf, cu, 0.2, impl=impl)  # type: ignore[arg-type]
        (score.sum() + (means * means).sum()).backward()
        assert leaf.grad is not None
        return [score.detach(), means.detach(), leaf.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@each_case(
    m=[1, 3, 1000, 0.1, 0.5, 1.0],
    dtype=[FP32, torch.bfloat16, torch.float16],
    draw={"short": short_sequences},
    gpu={"m": [1, 7, 0.1, 1.0], "dtype": [FP32], "draw": {"long": lambda impl: ragged(60, 5000)}},
)
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(
    impl: str,
    m: int | float,
    dtype: torch.dtype,
    draw: Callable[[str], tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    values, cu = draw(impl)
    check_topm(values.to(device, dtype), cu.to(device), m, impl)


@each_case()
def test_thousands_of_short_sequences_and_a_long_one(impl: str) -> None:
    g = generator(0)
    short, long = (150, 5_000) if impl == "triton" else (1500, 100_000)
    lengths = [*torch.randint(0, 12, (short,), generator=g).tolist(), long, 3]
    check_topm(torch.randn(sum(lengths), generator=g), offsets(lengths), 0.1, impl)


def test_short_sequences_do_not_wait_for_a_long_one() -> None:
    """Rows are padded to the longest of their bucket: one long sequence must not make every short one a bucket."""
    from gem_kernels.scoring.chunked import plan_buckets

    lengths, counts = [20] * 3000 + [29] * 2000 + [100_000], [2] * 3000 + [3] * 2000 + [3]
    assert len(list(plan_buckets(lengths, counts, block=1 << 17))) == 3
    for block in (1, 100, 1 << 17):
        buckets = list(plan_buckets(lengths, counts, block))
        assert [i for b in buckets for i in range(b.start, b.stop)] == list(range(5001))
        for b in buckets:
            assert (b.stop - b.start) * max(lengths[b]) <= block or b.stop == b.start + 1
            assert len(set(counts[b])) == 1
    assert not list(plan_buckets([], [], block=100))


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_not_a_number_and_infinity_stay_in_their_sequence(impl: str) -> None:
    values = torch.tensor([1.0, math.nan, 3.0, 4.0, 5.0, -math.inf, 6.0, -math.inf, math.inf, 0.0])
    cu = offsets([3, 2, 2, 1, 2])
    one, both = (topm_mean(values, cu, m, impl=impl).tolist() for m in (1, 2))  # type: ignore[arg-type]
    assert math.isnan(one[0]) and math.isnan(both[0])
    assert one[1:] == [5.0, 6.0, -math.inf, math.inf]
    assert both[1:] == [4.5, -math.inf, -math.inf, math.inf]


@each_case()
def test_nothing(impl: str) -> None:
    assert topm_mean(torch.zeros(0), offsets([]), 1, impl=impl).shape == (0,)  # type: ignore[arg-type]
    assert topm_mean(torch.zeros(0), offsets([0, 0]), 0.5, impl=impl).tolist() == [0.0, 0.0]  # type: ignore[arg-type]


@each_case()
def test_values_are_left_alone_and_may_be_strided(impl: str) -> None:
    values = torch.rand(40)
    strided = torch.stack((values, torch.full_like(values, math.nan)), 1)[:, 0]
    before = values.clone()
    cu = offsets([17, 23])
    assert torch.equal(topm_mean(strided, cu, 0.3, impl=impl), topm_mean(values, cu, 0.3, impl=impl))  # type: ignore[arg-type]
    assert torch.equal(values, before)


@pytest.mark.parametrize("m", [2, 0.4])
def test_reference_gradcheck(m: int | float) -> None:
    values = torch.rand(15, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: topm_mean(v, offsets([7, 0, 1, 7]), m, impl="reference"), values)


@each_case()
def test_gradient_only_where_wanted(impl: str) -> None:
    values = torch.rand(9)
    assert not topm_mean(values, offsets([9]), 2, impl=impl).requires_grad  # type: ignore[arg-type]
    with torch.inference_mode():
        assert topm_mean(values.requires_grad_(), offsets([9]), 2, impl=impl).shape == (1,)  # type: ignore[arg-type]


# --- gem_score --------------------------------------------------------------------------------------------------------


def spans(*pairs: tuple[int, int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(pairs, dtype=dtype).reshape(-1, 2)


@pytest.mark.op("gem_score")
@each_case(dtype=[torch.int32, torch.int64])
def test_score_by_hand(impl: str, dtype: torch.dtype) -> None:
    """Two candidates; tokens 4 (the marker), 7 (end of sequence) and 12 are in neither span and count nowhere."""
    entropy = torch.tensor([0.1, 2.0, 0.3, 1.0, 99.0, 0.2, 0.4, 99.0, 3.0, 1.0, 0.5, 0.7, 99.0])
    branch, answer = spans((0, 4), (8, 10), dtype=dtype), spans((5, 7), (10, 12), dtype=dtype)
    out = gem_score(entropy, branch, answer, m=0.5, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(out.branch_entropy, torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(out.final_entropy, torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(out.score, torch.tensor([1.2, 2.4]))
    only_final = gem_score(entropy, branch, answer, branch_weight=0.0, impl=impl)  # type: ignore[arg-type]
    only_branch = gem_score(entropy, branch, answer, m=2, final_weight=0.0, impl=impl)  # type: ignore[arg-type]
    weighted = gem_score(entropy, branch, answer, m=1, branch_weight=0.4, final_weight=2.0, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(only_final.score, torch.tensor([-0.3, -0.6]))
    torch.testing.assert_close(only_branch.score, torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(weighted.score, torch.tensor([0.8 - 0.6, 1.2 - 1.2]))


@pytest.mark.op("gem_score")
@each_case()
def test_empty_spans(impl: str) -> None:
    """No reasoning: no bonus. No answer: no score. Neither touches its neighbours, wherever the empty span points."""
    entropy = torch.tensor([1.0, 2.0, 3.0])
    branch, answer = spans((0, 0), (0, 2), (3, 3), (0, 1)), spans((0, 2), (3, 3), (1, 1), (2, 3))
    out = gem_score(entropy, branch, answer, impl=impl)  # type: ignore[arg-type]
    assert out.branch_entropy.tolist() == [0.0, 2.0, 0.0, 1.0]
    torch.testing.assert_close(out.final_entropy, torch.tensor([1.5, math.nan, math.nan, 3.0]), equal_nan=True)
    torch.testing.assert_close(out.score, torch.tensor([-1.5, math.nan, math.nan, -2.0]), equal_nan=True)
    none = gem_score(torch.zeros(0), spans(), spans(), impl=impl)  # type: ignore[arg-type]
    assert all(t.shape == (0,) for t in none)


def overlapping(impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw entropies, branch and answer spans: ragged, unordered, overlapping, one over all tokens, two identical."""
    g = generator(0)
    n, s = (150, 12) if impl == "triton" else (700, 60)
    entropy = torch.rand(n, generator=g) * 5
    branch, answer = (torch.randint(0, n + 1, (s, 2), generator=g).sort(1).values.int() for _ in range(2))
    branch[:4] = torch.tensor([[0, n], [n // 3, n // 2], [n // 3, n // 2], [0, 1]])
    answer[:, 1] = (answer[:, 1] + 1).clamp(max=n)
    answer[:, 0] = torch.minimum(answer[:, 0], answer[:, 1] - 1)
    return entropy, branch, answer


def one_after_another(impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sequences up to 3000 tokens; the last third of each is its answer. Empty answers, which score NaN, are left out."""
    values, cu = ragged(200, 3000)
    third = cu[:-1] + cu.diff() * 2 // 3
    branch, answer = torch.stack((cu[:-1], third), 1).int(), torch.stack((third, cu[1:]), 1).int()
    kept = answer[:, 1] > answer[:, 0]
    return values.abs(), branch[kept], answer[kept]


@pytest.mark.op("gem_score")
@each_case(m=[0.1, 3], draw=[overlapping], gpu={"m": [0.1, 5], "draw": [one_after_another]})
@pytest.mark.usefixtures("small_tiles")
def test_score_matches_gold(
    impl: str, m: int | float, draw: Callable[[str], tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> None:
    """The score, both entropies, and the gradient through both terms."""
    entropy, branch, answer = (t.to(device) for t in draw(impl))
    upstream = torch.randn(3, branch.shape[0], generator=generator(1), dtype=torch.float64).to(device)

    def run(values: Tensor, which: str) -> dict[str, Tensor]:
        leaf = values.clone().requires_grad_()
        out = gem_score(leaf, branch, answer, m=m, branch_weight=0.7, final_weight=1.3, impl=which)  # type: ignore[arg-type]
        sum((o * u.to(o.dtype)).sum() for o, u in zip(out, upstream, strict=True)).backward()
        assert leaf.grad is not None
        return {**{k: v.detach() for k, v in out._asdict().items()}, "dentropy": leaf.grad}

    bounds = score_bounds(entropy, branch, answer, m, 0.7, 1.3, upstream)
    assert_all_close(run(entropy, impl), run(entropy.double(), "reference"), bounds)


@pytest.mark.op("gem_score")
@each_case()
def test_nan_stays_with_its_candidate(impl: str) -> None:
    entropy = torch.tensor([1.0, 2.0, math.nan, 1.0, 5.0, math.nan])
    branch, answer = spans((0, 1), (2, 3), (3, 4)), spans((1, 2), (3, 4), (4, 5))
    out = gem_score(entropy, branch, answer, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(out.score, torch.tensor([-1.0, math.nan, -4.0]), equal_nan=True)
    torch.testing.assert_close(out.final_entropy, torch.tensor([2.0, 1.0, 5.0]))


@pytest.mark.op("gem_score")
@each_case()
def test_score_of_narrow_values_is_computed_in_fp32(impl: str) -> None:
    entropy = (torch.rand(4000) * 5).bfloat16()
    branch, answer = spans((0, 3000)), spans((3000, 4000))
    out, gold = (
        gem_score(e, branch, answer, m=0.5, impl=which)  # type: ignore[arg-type]
        for e, which in ((entropy, impl), (entropy.double(), "reference"))
    )
    assert isinstance(out, Score)
    assert_all_close(out._asdict(), gold._asdict(), score_bounds(entropy, branch, answer, 0.5))


@pytest.mark.op("gem_score")
def test_score_reference_gradcheck() -> None:
    entropy = torch.rand(12, dtype=torch.float64, requires_grad=True)
    branch, answer = spans((0, 5), (7, 7)), spans((5, 7), (8, 12))
    assert torch.autograd.gradcheck(lambda e: tuple(gem_score(e, branch, answer, m=2, impl="reference")), entropy)


def test_dispatch() -> None:
    values, cu, span = torch.rand(5), offsets([5]), spans((0, 5))
    for call in (
        lambda v, impl: topm_mean(v, cu, 1, impl=impl),
        lambda v, impl: gem_score(v, span, span, impl=impl).score,
    ):
        assert call(values.double(), "auto").dtype == torch.float64
        assert torch.equal(call(values, "auto"), call(values, "chunked"))
        with pytest.raises(ValueError, match=r"impl='chunked' cannot serve .*these can: reference$"):
            call(values.double(), "chunked")
        with pytest.raises(ValueError, match=r"impl='triton' cannot serve .*these can: reference(, chunked)?$"):
            call(values.double() if INTERPRETED else values, "triton")
        with pytest.raises(ValueError, match="impl must be one of"):
            call(values, "numpy")


# --- as torch operators -----------------------------------------------------------------------------------------------


def topm_and_score(values: Tensor, cu: Tensor, branch: Tensor, answer: Tensor, impl: str) -> Tensor:
    means = topm_mean(values * 2, cu, 3, impl=impl)  # type: ignore[arg-type]
    out = gem_score(values, branch, answer, m=0.3, impl=impl)  # type: ignore[arg-type]
    return (means * means).sum() + (out.score * out.final_entropy).sum() + out.branch_entropy.sum()


@each_case(impl=FUSED, dtype=[FP32, torch.bfloat16])
def test_compiles_to_one_graph_with_the_same_numbers(impl: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(topm_and_score, fullgraph=True, backend="aot_eager")
    for n in (30, 45):  # the second length is compiled with symbolic shapes
        values, cu = torch.rand(n).to(dtype), offsets([10, 0, n - 10])
        branch, answer = spans((0, 5), (10, 10), (10, 20)), spans((5, 9), (9, 10), (15, n))
        results = []
        for fn in (topm_and_score, compiled):
            leaf = values.clone().requires_grad_()
            out = fn(leaf, cu, branch, answer, impl)
            out.backward()
            results.append((out.detach(), leaf.grad))
        (eager, deager), (got, dgot) = results
        assert torch.equal(got, eager) and torch.equal(dgot, deager)


@each_case(impl=FUSED)
def test_operators_keep_the_rules_of_torch(impl: str) -> None:
    """Schemas, fake implementations and gradients; a second derivative is refused, not silently zero."""
    values, counts = torch.rand(20, requires_grad=True), torch.tensor([2, 1, 4])
    span = spans((0, 9), (9, 10), (3, 7))
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.gem_kernels.span_topm_mean.default
    torch.library.opcheck(op, (values, span, counts, impl))
    mean, threshold, cut = op(values, span, counts, impl)
    assert mean.requires_grad and not threshold.requires_grad and not cut.requires_grad
    backward = torch.ops.gem_kernels.span_topm_mean_backward.default
    saved = (torch.rand(3), values.detach(), span, counts, threshold, cut)
    torch.library.opcheck(backward, (*saved, impl))
    (dvalues,) = torch.autograd.grad(mean[0], values, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        dvalues.sum().backward()
