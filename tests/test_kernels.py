"""Errors that only the Triton kernels can make. The tests run where the kernels run on a CPU: under TRITON_INTERPRET=1.

Every other test of an op checks the numbers of the kernels: its `impl` takes "triton" too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from group_losses import run as run_group
from group_losses import run_sega
from numerics import (
    DTYPES,
    STATS,
    TRANSFORMS,
    assert_all_close,
    assert_same,
    check_linear,
    linear_op,
    make_case,
    make_upstream,
    run_linear,
)
from op_bounds import group_bounds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gem_kernels import LogitTransform, TokenStats, compat, logprob_entropy, plan, tiles
from gem_kernels.compat import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton kernels run on the CPU under TRITON_INTERPRET=1 only")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """Record every launch of the test: name of the kernel, its compile-time arguments."""
    seen: list[tuple[str, dict[str, object]]] = []
    launch = compat.launch

    def spy(kernel: object, grid: tuple[int, ...], *args: object, **meta: object) -> None:
        seen.append((kernel.__name__, meta))  # type: ignore[attr-defined]
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(compat, "launch", spy)
    return seen


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreter_rounds_to_nearest_as_devices_do(dtype: torch.dtype) -> None:
    x, y = torch.randn(1024), torch.empty(1024, dtype=dtype)
    compat.launch(_copy_kernel, (1,), x, y, BLOCK=1024)
    assert torch.equal(y, x.to(dtype))


# --- the tile of logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors_and_pointers_read_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[str, dict[str, object]]]
) -> None:
    """The branch of the copy engine (rows on 16 bytes) and the other agree on ragged rows, columns and steps of D."""
    case, upstream = make_case(77, 80, 259, dtype=dtype), make_upstream(77)
    check_linear(case, "triton")
    assert {meta["USE_TMA"] for name, meta in launches if "linear" in name} == {True}
    through_descriptors = run_linear(case, "triton", upstream)
    launches.clear()
    monkeypatch.setattr(compat, "takes_descriptors", lambda *_: False)
    through_pointers = run_linear(case, "triton", upstream)
    assert {meta["USE_TMA"] for name, meta in launches if "linear" in name} == {False}
    assert_same(through_pointers, through_descriptors)


def test_descriptors_are_for_rows_on_16_bytes_only() -> None:
    assert compat.takes_descriptors(torch.empty(3, 16), torch.empty(5, 16))
    assert not compat.takes_descriptors(torch.empty(3, 7))
    assert not compat.takes_descriptors(torch.empty(3, 17)[:, 1:])
    assert not compat.takes_descriptors(torch.empty(16, 3).T)
    assert not compat.takes_descriptors(torch.empty(16, 3), torch.empty(3, 16))
    assert not compat.takes_descriptors(torch.empty(1, 16).expand(4, 16))


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
def test_rank_of_the_adapter(rank: int) -> None:
    check_linear(make_case(33, 24, 140, rank=rank), "triton")


def test_the_vocabulary_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged statistics keep the rule for any number of programs in a row; the same split gives the same bits."""
    case, upstream = make_case(70, 16, 1000, peaky=30.0), make_upstream(70)
    for splits in (1, 2, 3, 7, 8):
        monkeypatch.setattr(plan, "vocabulary_splits", lambda *_, n=splits: n)
        check_linear(case, "triton")
        first, second = (run_linear(case, "triton", upstream) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in STATS)  # type: ignore[arg-type]


class _Largest(TorchDispatchMode):
    """Size of the largest tensor that a torch operation makes, views of `base` left out."""

    def __init__(self, base: Tensor | None = None) -> None:
        super().__init__()
        self.numel, self.known = 0, None if base is None else base.untyped_storage().data_ptr()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.known:
                self.numel = max(self.numel, t.numel())
        return out


def test_no_logits_in_memory() -> None:
    case = make_case(600, 8, 700, bias=False, rank=0)
    with _Largest() as made:
        linear_op(case, "triton")
    assert made.numel <= 8 * 700
    x = case.leaves()
    with _Largest() as made:
        linear_op(x, "triton").logprob.sum().backward()
    tile = tiles.chunk_tile(case.hidden)
    assert 600 * 700 > 10 * tile.rows * tile.cols >= 10 * made.numel * 0.9


# --- targets that nobody checked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_an_unchecked_target_out_of_range_gives_nan_and_writes_nowhere(impl: str) -> None:
    """On CUDA values are not checked, so the operator itself must keep them from other memory."""
    case = make_case(20, 8, 150, rank=0, ignored=0.0)
    bad = case.targets.clone()
    bad[3], bad[11] = 150, -7
    arguments = (case.bias, None, None, 1.0)
    good_stats, bad_stats = (
        TokenStats(
            *torch.ops.gem_kernels.linear_logprob(case.hidden, case.weight, *arguments, t, 1.0, 1.0, False, -100, impl)[
                :-1
            ]
        )
        for t in (case.targets, bad)
    )
    wrong = torch.zeros(20, dtype=torch.bool)
    wrong[[3, 11]] = True
    assert bad_stats.logprob[wrong].isnan().all()
    assert torch.equal(bad_stats.logprob[~wrong], good_stats.logprob[~wrong])
    assert torch.equal(bad_stats.entropy, good_stats.entropy)
    _, logprob, entropy, *_ = torch.ops.gem_kernels.weighted_logprob(
        case.hidden.bfloat16(), case.weight.bfloat16(), None, None, None, 1.0, bad, 1.0, 1.0, False, -100, impl,
        torch.ones(20), 1 << 20, [True, True, False, False, False],
    )  # fmt: skip
    assert logprob[wrong].isnan().all()
    assert logprob[~wrong].isfinite().all()
    assert entropy.isfinite().all()


# --- cached exponentials (group losses in bf16) -----------------------------------------------------------------------

OFFSETS = [0, 21, 40, 61]


def of_logprobs(s: TokenStats, group: int) -> Tensor:
    return -((group + 1) * s.entropy.detach() * s.logprob).sum()


def of_everything(s: TokenStats, group: int) -> Tensor:
    return (s.logprob.square() + (group - 1) * s.entropy + 0.1 * s.lse).sum()


@pytest.mark.parametrize("loss_fn", [of_logprobs, of_everything])
@pytest.mark.parametrize("transform", ["identity", "combined", "cold"])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 90_000])
@pytest.mark.parametrize("rising", [False, True], ids=["flat", "rising"])
def test_cached_exponentials(
    loss_fn: Callable[[TokenStats, int], Tensor],
    transform: str,
    cache_bytes: int,
    rising: bool,
    launches: list[tuple[str, dict[str, object]]],
) -> None:
    """Flat logits, and logits that rise along the vocabulary beyond the range of bf16, so that the reference must move.

    A loss whose gradient is more than the row times a number recomputes its logits. A softcap's slope is one, so a softcap has
    no such cache.
    """
    case = make_case(61, 16, 700, dtype=torch.bfloat16, transform=TRANSFORMS[transform], peaky=20.0)
    assert case.bias is not None
    if rising:
        steps = (
            torch.full((700,), -250.0)
            .index_fill(0, torch.arange(90, 450), -100.0)
            .index_fill(0, torch.arange(450, 700), 0.0)
        )
        case = replace(case, bias=(case.bias + steps).bfloat16())
        assert transform == "combined" or bool((case.targets >= 450).any())
    gold = run_group(case.double(), "reference", loss_fn, offsets=OFFSETS)
    got = run_group(case, "chunked", loss_fn, offsets=OFFSETS, cache_bytes=cache_bytes)
    names = {name for name, _ in launches}
    assert ("_row_exponentials_kernel" in names) == (transform != "combined")
    assert ("_fold_target_kernel" in names) == (transform != "combined" and loss_fn is of_logprobs)
    assert_all_close(got, gold, group_bounds(case, loss_fn, OFFSETS))


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=1.0)])
def test_flat_rows_and_a_strong_softcap_keep_their_digits(transform: LogitTransform) -> None:
    """Where log p + H or the slope is far below 1, rounded exponentials would spoil the gradient of the entropy."""
    case = make_case(61, 32, 600, dtype=torch.bfloat16, rank=0, bias=False, transform=transform)
    if transform.softcap is None:
        case = replace(case, hidden=case.hidden * 0.01)

    def entropy(s: TokenStats, group: int) -> Tensor:
        return -s.entropy.sum()

    gold, got = (
        run_group(x, impl, entropy, offsets=OFFSETS) for x, impl in ((case.double(), "reference"), (case, "chunked"))
    )
    assert_all_close(got, gold, group_bounds(case, entropy, OFFSETS))


def test_sega_takes_no_pass_over_the_cache(launches: list[tuple[str, dict[str, object]]]) -> None:
    """Weights times log-probs: the number of a row goes into the hidden states, so the cost is 6NDV FLOP alone."""
    case = make_case(61, 16, 300, dtype=torch.bfloat16, rank=0, bias=False)
    run_sega(case, "chunked", torch.tensor([1.0, -1.0]), offsets=[0, 30, 61])
    handed_over = "_scale_kernel"  # returns at once: the gradient of the loss is 1
    assert {name for name, _ in launches} == {"_row_exponentials_kernel", "_fold_target_kernel", handed_over}


def test_an_fp32_adapter_beside_bf16_keeps_its_digits(launches: list[tuple[str, dict[str, object]]]) -> None:
    """The adapter's gradient is fp32, so dL/dlogits is not rounded to bf16 on the way: no exponentials are cached."""
    case = make_case(61, 16, 300, dtype=torch.bfloat16)
    assert case.low_rank is not None
    case = replace(case, low_rank=case.low_rank._replace(a=case.low_rank.a.float(), b=case.low_rank.b.float()))
    gold, got = (
        run_group(x, impl, of_logprobs, offsets=OFFSETS)
        for x, impl in ((case.double(), "reference"), (case, "chunked"))
    )
    assert_all_close(got, gold, group_bounds(case, of_logprobs, OFFSETS))
    assert not any("exponentials" in name for name, _ in launches)


# --- logits that exist ------------------------------------------------------------------------------------------------


def test_one_kernel_each_way(launches: list[tuple[str, dict[str, object]]]) -> None:
    logits = torch.randn(6, 200, dtype=torch.bfloat16, requires_grad=True)
    logprob_entropy(logits, torch.randint(0, 200, (6,)), impl="triton").logprob.sum().backward()
    assert [name for name, _ in launches] == ["_row_statistics_kernel", "_row_gradient_kernel"]


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=5.0)])
def test_a_strided_batch_is_read_where_it_lies(transform: LogitTransform) -> None:
    full, targets = torch.randn(3, 9, 2 * 170), torch.randint(0, 170, (3, 8))
    views = {
        "shifted": lambda t: t[:, :-1, :170],
        "every second entry": lambda t: t[:, 1:, ::2],
        "rows apart": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1, :170],
        "vocabulary outermost": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, :-1, :170],
    }
    for name, view in views.items():
        base = view(full).detach().requires_grad_()
        assert not base.is_contiguous(), name
        with _Largest(base) as made:
            stats = logprob_entropy(base, targets, transform=transform, impl="triton")
        assert made.numel <= 4 * targets.numel(), name
        dense = view(full).detach().contiguous().requires_grad_()
        expected = logprob_entropy(dense, targets, transform=transform, impl="triton")
        (stats.logprob + stats.entropy).sum().backward()
        (expected.logprob + expected.entropy).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True)), name
        assert torch.equal(base.grad, dense.grad), name  # type: ignore[arg-type]
