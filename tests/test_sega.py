"""Eq. 2 in numbers: rewards, advantages, weights. test_losses.py has its identities with the gradients of other losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gem.sega import RewardKind, WeightNorm, advantages, rewards, sega_weights

NAN = float("nan")
KINDS: tuple[RewardKind, ...] = ("identity", "softmax", "rank", "bt")


def seeded(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def all_of(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0, 2.0, 5.0]])
    mask = all_of(scores)
    posterior_mean = torch.tensor([[0.1, -0.4, 0.1, 0.2]])
    assert torch.equal(rewards(scores, mask, kind="identity", tau=1.0), scores)
    assert rewards(scores, mask, kind="rank", tau=1.0).tolist() == [[0.5, 0.0, 0.5, 1.0]]
    softmax = rewards(scores, mask, kind="softmax", tau=0.5)
    torch.testing.assert_close(softmax, (scores / 0.5).exp() / (scores / 0.5).exp().sum())
    assert torch.equal(rewards(scores, mask, kind="bt", tau=1.0, posterior_mean=posterior_mean), posterior_mean)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_of_the_rest_do_not_depend_on_who_is_masked(kind: RewardKind) -> None:
    scores = seeded(1, 5)
    mask = torch.tensor([[True, True, False, True, False]])
    dirty = scores.where(mask, NAN)
    found = rewards(dirty, mask, kind=kind, tau=0.5, posterior_mean=dirty)
    few = scores[mask][None]
    alone = rewards(few, all_of(few), kind=kind, tau=0.5, posterior_mean=few)
    torch.testing.assert_close(found[mask][None], alone)
    assert bool(found[~mask].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_keep_the_order(kind: RewardKind) -> None:
    scores = seeded(4, 6)
    found = rewards(scores, all_of(scores), kind=kind, tau=0.5, posterior_mean=scores)
    assert torch.equal(found.argsort(1), scores.argsort(1))


def test_bt_reads_no_scores() -> None:
    posterior_mean = torch.tensor([[0.5, -0.5]])
    unscored = torch.tensor([[NAN, NAN]])
    assert torch.equal(
        rewards(unscored, all_of(unscored), kind="bt", tau=1.0, posterior_mean=posterior_mean), posterior_mean
    )


def test_a_group_without_members_or_with_one() -> None:
    scores, mask = seeded(2, 3), torch.tensor([[False] * 3, [False, True, False]])
    for kind in KINDS:
        reward = rewards(scores, mask, kind=kind, tau=1.0, posterior_mean=scores)
        assert bool((reward.isnan() == ~mask).all())
        assert torch.equal(advantages(reward, mask), torch.zeros_like(scores))


# -- advantages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_advantages_sum_to_zero(kind: RewardKind, dtype: torch.dtype) -> None:
    scores = seeded(16, 5, dtype=dtype)
    mask = seeded(16, 5) < 1
    reward = rewards(scores, mask, kind=kind, tau=0.5, posterior_mean=scores)
    a = advantages(reward, mask)
    assert a.dtype == dtype and bool((a[~mask] == 0).all())
    assert float(a.sum(1).abs().max()) <= 8 * torch.finfo(dtype).eps * float(a.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rloo_is_k_over_k_minus_one_times_sega(dtype: torch.dtype) -> None:
    for k, factor in ((2, 2.0), (5, 1.25), (8, 8 / 7)):
        r = seeded(3, k, dtype=dtype)
        rloo = torch.stack([r[:, i] - r[:, torch.arange(k) != i].mean(1) for i in range(k)], 1)
        torch.testing.assert_close(rloo, factor * advantages(r, all_of(r)))


def test_a_group_that_agrees_has_advantages_of_exactly_zero() -> None:
    for value in (0.1, 0.7, 1 / 3, -5.3, 1e6):
        for k in range(2, 9):
            r = torch.full((1, k), value)
            assert torch.equal(advantages(r, all_of(r)), torch.zeros(1, k))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_mass_bounds_the_positive_and_the_negative_weights_by_one() -> None:
    small, large = torch.tensor([[0.5, -0.2, -0.3]]), torch.tensor([[5.0, -2.0, -3.0]])
    mask = all_of(small)
    assert torch.equal(sega_weights(small, mask, norm="mass"), small)
    torch.testing.assert_close(sega_weights(large, mask, norm="mass"), large / 5)


def test_none_is_the_advantage_and_std_has_unit_variance_over_the_members() -> None:
    a = torch.tensor([[3.0, -1.0, -2.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert torch.equal(sega_weights(a, mask, norm="none"), a)
    w = sega_weights(a, mask, norm="std")
    assert w[0, 3] == 0
    torch.testing.assert_close(w[mask].std(unbiased=False), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_std_turns_a_group_that_agrees_into_noise_at_full_size(dtype: torch.dtype) -> None:
    agree = 1e-6 * torch.tensor([[1.0, 0.0, -1.0, 2.0, -2.0]], dtype=dtype)
    mask = all_of(agree)
    a = advantages(agree, mask)
    assert 0.7 < float(sega_weights(a, mask, norm="std").abs().max()) < 2
    assert float(sega_weights(a, mask, norm="mass").abs().max()) <= 2.1e-6


@pytest.mark.parametrize("norm", ["mass", "none", "std"])
def test_zero_stays_zero_and_tiny_stays_finite(norm: WeightNorm) -> None:
    a = torch.tensor([[0.0, 0.0], [1e-30, -1e-30]])
    w = sega_weights(a, all_of(a), norm=norm)
    assert w[0].tolist() == [0.0, 0.0]
    assert bool(w.isfinite().all()) and (norm != "std" or w[1].tolist() == [1.0, -1.0])


@pytest.mark.parametrize("norm", ["mass", "none", "std"])
def test_what_is_masked_gets_no_weight(norm: WeightNorm) -> None:
    a, mask = torch.tensor([[4.0, -4.0, NAN]]), torch.tensor([[True, True, False]])
    assert sega_weights(a, mask, norm=norm)[0, 2] == 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "best"}, ValueError, "kind must be one of .*'bt'.*, got 'best'"),
        ({"kind": "bt"}, ValueError, "needs posterior_mean .*, got None"),
        (
            {"kind": "bt", "posterior_mean": torch.zeros(1)},
            ValueError,
            r"posterior_mean and mask .* got \(1,\), \(2, 3\)",
        ),
        ({"kind": "softmax", "tau": 0.0}, ValueError, "tau must be > 0, got 0.0"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores must be floating, got torch.int64"),
        ({"scores": torch.zeros(3)}, ValueError, r"got \(3,\), \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got torch.float32"),
        (
            {"scores": torch.tensor([[0.0, 0.0, 0.0], [0.0, NAN, 0.0]])},
            ValueError,
            "scores must be finite for the members in mask, got nan for member 1 of group 1",
        ),
    ],
)
def test_rewards_refuse_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    arguments: dict[str, Any] = {"scores": torch.zeros(2, 3), "mask": mask, "kind": "identity", "tau": 1.0} | change
    with pytest.raises(error, match=message):
        rewards(**arguments)


def test_advantages_and_weights_refuse_bad_input() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="reward must be finite .* got inf for member 0 of group 0"):
        advantages(torch.tensor([[float("inf"), 0.0]]), mask)
    with pytest.raises(ValueError, match="advantage must be finite .* got nan"):
        sega_weights(torch.tensor([[NAN, 0.0]]), mask, norm="mass")
    with pytest.raises(ValueError, match="norm must be one of .*, got 'l2'"):
        sega_weights(torch.zeros(1, 2), mask, norm="l2")  # type: ignore[arg-type]
