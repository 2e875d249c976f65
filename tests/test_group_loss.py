"""linear_group_loss: for any loss of the statistics and any size of the cache, the loss and gradients of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from devices import drawn, each_case
from group_losses import (
    CACHES,
    GPU_CACHES,
    LOSSES,
    ON_GPU,
    D,
    N,
    V,
    all_three,
    check,
    entropy_and_z_loss,
    group_loss,
    likelihood,
    likelihood_of_equals,
    make_case,
    run,
    run_sega,
    sega_with_its_own_entropies,
)
from numerics import DTYPES, STATS, TRANSFORMS, Case, assert_all_close, assert_same, linear_op
from op_bounds import LossFn, linear_bounds
from torch import Tensor

from gem_kernels import IGNORE_INDEX, LogitTransform, TokenStats

pytestmark = pytest.mark.op("linear_group_loss")

BF16, FP32 = torch.bfloat16, torch.float32


# --- the loss and its gradients, by the one rule ----------------------------------------------------------------------


@each_case(
    dtype=[FP32],
    loss_fn=LOSSES,
    cache_bytes=CACHES,
    sizes=[(N, D, V, 3)],
    gpu={
        "dtype": [BF16, FP32],
        "loss_fn": [sega_with_its_own_entropies, entropy_and_z_loss],
        "cache_bytes": GPU_CACHES,
        "sizes": [(*ON_GPU, 4)],
    },
)
@pytest.mark.usefixtures("small_tiles")
def test_matches_gold(
    impl: str,
    dtype: torch.dtype,
    loss_fn: LossFn,
    cache_bytes: int,
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> None:
    *sizes, rank = sizes
    check(make_case(*sizes, rank=rank, dtype=dtype, device=device), impl, loss_fn, cache_bytes=cache_bytes)


@each_case(dtype=DTYPES, cache_bytes=CACHES)
@pytest.mark.usefixtures("small_tiles")
def test_dtypes(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    check(make_case(N, D, V, dtype=dtype, peaky=30.0), impl, sega_with_its_own_entropies, cache_bytes=cache_bytes)
    check(make_case(N, D, V, dtype=dtype), impl, all_three, cache_bytes=cache_bytes)


@each_case(dtype=[BF16, torch.float16])
def test_narrow_weight_gradient_is_summed_in_fp32(impl: str, dtype: torch.dtype) -> None:
    """300 slabs that all push one way: a sum in bf16 stops growing (Liger #1391, Megatron #2739)."""
    case = make_case(300, 5, 11, dtype=dtype, ignored=0.0, rank=0)
    case = replace(case, hidden=case.hidden.abs(), targets=torch.zeros_like(case.targets))
    check(case, impl, likelihood_of_equals, offsets=range(301), cache_bytes=1)


@each_case(transform=TRANSFORMS, cache_bytes=CACHES)
@pytest.mark.usefixtures("small_tiles")
def test_transforms(impl: str, transform: LogitTransform, cache_bytes: int) -> None:
    check(make_case(N, D, V, transform=transform), impl, all_three, cache_bytes=cache_bytes)


@each_case()
def test_default_tiles(impl: str) -> None:
    check(make_case(N, D, V, bias=False, rank=0), impl, all_three)


@each_case(factor=[-2.5, 0.0])
@pytest.mark.usefixtures("small_tiles")
def test_loss_scaled_afterwards(impl: str, factor: float) -> None:
    check(make_case(N, D, V), impl, all_three, factor=factor)


@each_case(
    impl=["chunked"],  # all share this
    dtype=DTYPES,
    factor=[1.0, 0.1, -3.0, 0.0, math.nan, math.inf],
    shape=[(40_003,), (3, 5), (1,), (0, 7)],
    gpu={"shape": [(5_000_001,)]},
)
def test_a_gradient_is_scaled_in_fp32_and_rounded_once(
    impl: str, dtype: torch.dtype, factor: float, shape: tuple[int, ...], device: torch.device
) -> None:
    gradient = torch.randn(shape, device=device).to(dtype)
    gradient.view(-1)[:1] = 0.0  # 0 * inf is NaN
    scalar = torch.tensor(factor, device=device)
    for g in (gradient, gradient.new_empty(*shape, 2)[..., 0].copy_(gradient)):  # dense and not
        expected = (g.float() * factor).to(dtype)
        torch.ops.gem_kernels.scale_gradient_(g, scalar)
        assert torch.equal(g.isnan(), expected.isnan()) and torch.equal(g.nan_to_num(), expected.nan_to_num())


@each_case(impl=["chunked"], dtype=[BF16, torch.float16])
def test_a_gradient_times_one_is_not_passed_over(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    """A signalling NaN stays as it is: any arithmetic would make it a quiet one."""
    signalling = torch.tensor([{BF16: 0x7F81, torch.float16: 0x7C01}[dtype]], dtype=torch.int16, device=device)
    for factor, touched in ((1.0, False), (2.0, True)):
        gradient = signalling.clone().view(dtype)
        torch.ops.gem_kernels.scale_gradient_(gradient, torch.tensor(factor, device=device))
        assert torch.equal(gradient.view(torch.int16), signalling) != touched


@each_case()
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


@each_case(
    cache_bytes=CACHES,
    loss_fn=[all_three],
    make=drawn(N, D, V, dtype=BF16),
    gpu={"cache_bytes": GPU_CACHES, "loss_fn": [entropy_and_z_loss], "make": drawn(*ON_GPU, dtype=BF16)},
)
@pytest.mark.usefixtures("small_tiles")
def test_same_input_same_bits(impl: str, cache_bytes: int, loss_fn: LossFn, make, device: torch.device) -> None:
    case = make(device=device)
    first, second = (run(case, impl, loss_fn, cache_bytes=cache_bytes) for _ in range(2))
    assert_same(first, second)


# --- groups and ignored tokens ----------------------------------------------------------------------------------------


@each_case(dtype=DTYPES, cache_bytes=CACHES)
@pytest.mark.usefixtures("small_tiles")
def test_groups_with_every_token_ignored(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    """First, in the middle and last; then all of them. loss_fn still gets such a group, as zeros of its length."""
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


@each_case(
    cache_bytes=CACHES,
    make=drawn(N, D, V, ignored=0.0),
    gpu={"cache_bytes": GPU_CACHES, "make": drawn(*ON_GPU, dtype=BF16, ignored=0.0)},
)
@pytest.mark.usefixtures("small_tiles")
def test_saying_that_no_token_is_ignored_changes_no_bit(
    impl: str, cache_bytes: int, make: Callable[..., Case], device: torch.device
) -> None:
    case = make(device=device)
    settings = {"cache_bytes": cache_bytes}
    assert_same(run(case, impl, all_three, ignore_index=None, **settings), run(case, impl, all_three, **settings))
    assert_same(run_sega(case, impl, ignore_index=None, **settings), run_sega(case, impl, **settings))


@each_case()
@pytest.mark.usefixtures("small_tiles")
def test_nan_in_an_ignored_row_stays_there(impl: str) -> None:
    case = make_case(N, D, V)
    ignored = case.targets == IGNORE_INDEX
    dirty = replace(case, hidden=case.hidden.masked_fill(ignored[:, None], math.nan))
    assert_same(run(dirty, impl, all_three), run(case, impl, all_three))


@each_case(cache_bytes=CACHES)
def test_stats_are_those_of_the_per_token_op(impl: str, cache_bytes: int) -> None:
    case = make_case(N, D, V)
    gold, bounds = linear_op(case.double(), "reference")._asdict(), linear_bounds(case, {})
    for x in (case, case.leaves()):
        assert_all_close(group_loss(x, impl, likelihood, cache_bytes=cache_bytes).stats._asdict(), gold, bounds)


# --- max_logprob ------------------------------------------------------------------------------------------------------


@each_case(cache_bytes=CACHES)
@pytest.mark.usefixtures("small_tiles")
def test_the_likeliest_token(impl: str, cache_bytes: int) -> None:
    """In loss_fn and in the result max_logprob equals logprob to the last bit where the target is the likeliest token."""
    case = make_case(N, D, V, peaky=30.0)
    gold = linear_op(case.double(), "reference")
    gap, kept = gold.max_logprob - gold.logprob, case.targets != IGNORE_INDEX
    clear = kept & ((gap == 0) | (gap > 1e-3))  # between the two, rounding decides
    seen: list[Tensor] = []

    def loss_fn(stats: TokenStats, group: int) -> Tensor:
        assert not stats.max_logprob.requires_grad
        seen.append((stats.logprob == stats.max_logprob).detach())
        return -(stats.max_logprob.exp() * stats.logprob).sum()

    stats = group_loss(case.leaves(), impl, loss_fn, cache_bytes=cache_bytes).stats
    equal = stats.logprob == stats.max_logprob
    assert torch.equal(torch.cat(seen), equal)
    assert torch.equal(equal[clear], (gap == 0)[clear])
    assert not stats.max_logprob[~kept].any() and bool((stats.logprob <= stats.max_logprob).all())
    check(case, impl, loss_fn, cache_bytes=cache_bytes)


@each_case(cache_bytes=CACHES)
def test_a_loss_of_max_logprob_alone_is_a_constant(impl: str, cache_bytes: int) -> None:
    """Like a loss that uses no statistic: its value counts, and its gradient is zero."""
    case = make_case(N, D, V)

    def loss_fn(stats: TokenStats, group: int) -> Tensor:
        return stats.max_logprob.sum()

    x = case.leaves()
    out = group_loss(x, impl, loss_fn, cache_bytes=cache_bytes)
    torch.testing.assert_close(out.loss.detach(), out.stats.max_logprob.sum(), rtol=1e-5, atol=1e-5)
    if out.loss.requires_grad:
        out.loss.backward()
    assert all(g is None or not g.any() for g in x.gradients().values())
