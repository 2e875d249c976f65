"""The Bradley-Terry posterior: MATHS's exact tests (a) to (e), masks, bad input; and the filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import choix
import pytest
import torch
from torch import Tensor

from gem.rank import (
    Posterior,
    agrees_in_part,
    bradley_terry_posterior,
    first_of_duplicates,
    keep_groups,
    keep_members,
    log_votes,
    votes_differ,
)

INF = float("inf")
NAN = float("nan")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected)}


def log_posterior(theta: Tensor, scores: Tensor, tau: float, prior_sd: float, human: tuple[int, int, float]) -> Tensor:
    """MATHS's objective, written out pair by pair: theta (K,), scores (C, K)."""
    total = -theta.square().sum() / (2 * prior_sd**2)
    for s in scores:
        for i, j in combinations(range(len(theta)), 2):
            p = torch.sigmoid((s[i] - s[j]) / tau)
            total = total + p * torch.sigmoid(theta[i] - theta[j]).log()
            total = total + (1 - p) * torch.sigmoid(theta[j] - theta[i]).log()
    chosen, rejected, n_h = human
    return total + n_h * torch.sigmoid(theta[chosen] - theta[rejected]).log()


# -- the exact tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_a_without_prior_and_human_it_is_the_centred_score(scale: float) -> None:
    scores = scale * seeded(8, 6)
    theta = bradley_terry_posterior(scores, tau=0.7, prior_sd=INF).mean
    torch.testing.assert_close(theta, (scores - scores.mean(1, keepdim=True)) / 0.7, rtol=1e-9, atol=1e-12)
    wide = bradley_terry_posterior(seeded(8, 6), tau=0.7, prior_sd=1e6).mean
    exact = bradley_terry_posterior(seeded(8, 6), tau=0.7, prior_sd=INF).mean
    torch.testing.assert_close(wide, exact, rtol=1e-6, atol=1e-6)


def test_b_a_prior_keeps_the_order_and_shrinks() -> None:
    scores = seeded(32, 6)
    spread = torch.full((32,), INF, dtype=torch.float64)
    for prior_sd in (INF, 10.0, 1.0, 0.1):
        theta = bradley_terry_posterior(scores, tau=0.5, prior_sd=prior_sd).mean
        assert torch.equal(theta.argsort(1), scores.argsort(1))
        assert bool((theta.amax(1) - theta.amin(1) < spread).all())
        spread = theta.amax(1) - theta.amin(1)


@pytest.mark.parametrize("prior_sd", [0.5, 1.0, 3.0])
def test_c_a_strong_human_preference_wins_whatever_the_scores_say(prior_sd: float) -> None:
    scores = 3 * seeded(32, 7)
    human = pairs([5] * 32, [6] * 32)
    theta = bradley_terry_posterior(scores, tau=1.0, prior_sd=prior_sd, human_weight=1000.0, **human).mean
    assert bool((theta[:, 5] > theta[:, 6]).all())


@pytest.mark.parametrize(("human_weight", "scale"), [(10.0, 0.2), (1000.0, 0.04)])
def test_c_the_others_hardly_move(human_weight: float, scale: float) -> None:
    # Halfway between the human pair, its pulls up and down cancel. Elsewhere candidates do move: a pair far apart holds the
    # others less tightly, and they spread.
    scores = torch.cat((scale * seeded(32, 5), torch.tensor([-0.5, 0.5]).expand(32, 2)), 1)
    before = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0).mean
    human = pairs([5] * 32, [6] * 32)
    after = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0, human_weight=human_weight, **human).mean
    assert bool((before[:, 5] < before[:, 6]).all() and (after[:, 5] > after[:, 6] + 1).all())
    assert float((after - before)[:, :5].abs().max()) < 0.02


def test_d_permutation_equivariant() -> None:
    scores, order = seeded(3, 4, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    place = order.argsort()
    chosen, rejected = torch.tensor([0, 2, -1, 5]), torch.tensor([1, 4, -1, 3])
    options: dict[str, Any] = {"tau": 0.5, "prior_sd": 2.0, "human_weight": 3.0}
    plain = bradley_terry_posterior(scores, chosen=chosen, rejected=rejected, **options)
    moved = bradley_terry_posterior(
        scores[..., order],
        chosen=place[chosen].where(chosen >= 0, -1),
        rejected=place[rejected].where(rejected >= 0, -1),
        **options,
    )
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=1e-9, atol=1e-9)


def test_e_choix_on_rankings_and_a_human_pair() -> None:
    """Scores far apart give p = 0 or 1: each comparator is a ranking, that is, a list of games for choix."""
    prior_sd, n_h = 1.5, 3
    scores = torch.stack([seeded(5, seed=seed).argsort().double() for seed in range(4)])  # (C, K)
    games = [(i, j) for s in scores.tolist() for i in range(5) for j in range(5) if s[i] > s[j]] + [(0, 3)] * n_h
    # choix maximises loglik - alpha |theta|^2 (its docstring calls 1 / alpha the variance; its code does not).
    expected = choix.opt_pairwise(5, games, alpha=1 / (2 * prior_sd**2), tol=1e-12)
    theta = bradley_terry_posterior(
        scores[:, None], tau=1e-3, prior_sd=prior_sd, human_weight=float(n_h), **pairs([0], [3])
    ).mean
    torch.testing.assert_close(theta[0], torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_e_choix_on_soft_comparisons() -> None:
    """S in steps of tau log 3 gives p = 1/2, 3/4, 9/10: out of 20 games 10, 15, 18."""
    level, tau, prior_sd = [0, 1, 2, 1], 0.8, 2.0
    won = {-2: 2, -1: 5, 0: 10, 1: 15, 2: 18}
    games = [(i, j) for i in range(4) for j in range(4) if i != j for _ in range(won[level[i] - level[j]])]
    expected = choix.opt_pairwise(4, games, alpha=20 / (2 * prior_sd**2), tol=1e-12)
    scores = tau * math.log(3) * torch.tensor([level], dtype=torch.float64)
    theta = bradley_terry_posterior(scores, tau=tau, prior_sd=prior_sd).mean
    torch.testing.assert_close(theta[0], torch.from_numpy(expected), rtol=0, atol=1e-6)


# -- mode, curvature and convergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_sd", [0.5, 2.0])
@pytest.mark.parametrize("comparators", [1, 3])
def test_mode_and_sd_are_those_of_the_written_out_objective(comparators: int, prior_sd: float) -> None:
    scores = seeded(comparators, 1, 5)
    found = bradley_terry_posterior(scores, tau=0.6, prior_sd=prior_sd, human_weight=4.0, **pairs([1], [3]))

    def objective(theta: Tensor) -> Tensor:
        return log_posterior(theta, scores[:, 0], 0.6, prior_sd, (1, 3, 4.0))

    theta = found.mean[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(theta), theta)
    assert float(slope.abs().max()) < 1e-9
    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(objective, theta.detach()))
    torch.testing.assert_close(found.sd[0], covariance.diagonal().sqrt(), rtol=1e-9, atol=0)


def test_sd_without_prior_is_that_of_the_contrast_against_the_mean() -> None:
    scores = seeded(4, 5)
    free = bradley_terry_posterior(scores, tau=1.0, prior_sd=INF)
    wide = bradley_terry_posterior(scores, tau=1.0, prior_sd=100.0)
    # The prior's share is the common level alone: its direction 1 / sqrt(K) is an eigenvector of the curvature.
    torch.testing.assert_close(free.sd.square(), wide.sd.square() - 100.0**2 / 5, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prior_sd", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("human_weight", [0.0, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_twelve_steps_suffice(prior_sd: float, human_weight: float, scale: float) -> None:
    scores, human = scale * seeded(40, 7), pairs([0] * 40, [1] * 40)
    arguments: dict[str, Any] = {"tau": 1.0, "prior_sd": prior_sd, "human_weight": human_weight}
    twelve = bradley_terry_posterior(scores, **human, **arguments).mean
    many = bradley_terry_posterior(scores, **human, **arguments, steps=50).mean
    torch.testing.assert_close(twelve, many, rtol=1e-8, atol=1e-8)


def test_not_converged_raises() -> None:
    with pytest.raises(RuntimeError, match="must converge in steps=2.*human_weight=1000.0 or prior_sd=3.0"):
        bradley_terry_posterior(seeded(1, 4), tau=1.0, prior_sd=3.0, human_weight=1000.0, steps=2, **pairs([0], [1]))


def test_no_mode_raises() -> None:
    # Member 2 has won its only game, and no prior holds it: its ability has no bound.
    with pytest.raises(RuntimeError, match="with prior_sd=inf every member needs comparisons"):
        bradley_terry_posterior(
            torch.tensor([[0.0, 1.0, NAN]]), tau=1.0, prior_sd=INF, human_weight=1.0, **pairs([2], [0])
        )


# -- masks, missing scores, batches ------------------------------------------------------------------------------------


def test_members_outside_the_mask_are_nan_and_change_nothing() -> None:
    scores = seeded(1, 6)
    mask = torch.tensor([[True, False, True, True, False, True]])
    full = bradley_terry_posterior(scores, tau=0.5, prior_sd=1.0, mask=mask)
    alone = bradley_terry_posterior(scores[mask][None], tau=0.5, prior_sd=1.0)
    for a, b in zip(full, alone, strict=True):
        assert bool(a[~mask].isnan().all())
        torch.testing.assert_close(a[mask][None], b, rtol=1e-12, atol=1e-12)
    unscored = scores.where(mask, torch.tensor([[NAN, NAN, NAN, NAN, INF, NAN]], dtype=torch.float64))
    for a, b in zip(full, bradley_terry_posterior(unscored, tau=0.5, prior_sd=1.0), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("prior_sd", [2.0, INF])
def test_a_member_nothing_is_said_about_keeps_its_prior(prior_sd: float) -> None:
    scores = torch.tensor([[0.0, 1.0, NAN], [NAN, 5.0, NAN]])
    mean, sd = bradley_terry_posterior(scores, tau=1.0, prior_sd=prior_sd, mask=torch.ones(2, 3, dtype=torch.bool))
    assert mean[0, 2] == 0 and sd[0, 2] == prior_sd
    assert mean[1].tolist() == [0, 0, 0] and sd[1].tolist() == [prior_sd] * 3


def test_an_unscored_human_pair_is_ranked_by_the_human() -> None:
    scores = torch.tensor([[0.3, -0.2, NAN, NAN]])
    mean, sd = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0, human_weight=2.0, **pairs([3], [2]))
    alone, alone_sd = bradley_terry_posterior(scores[:, :2], tau=1.0, prior_sd=1.0)
    torch.testing.assert_close(mean[:, :2], alone)
    torch.testing.assert_close(sd[:, :2], alone_sd)
    assert mean[0, 3] == -mean[0, 2] > 0.5 and sd[0, 2] == sd[0, 3] < 1


def test_a_human_preference_outside_the_mask_is_ignored() -> None:
    scores, mask = seeded(1, 4), torch.tensor([[True, True, True, False]])
    with_pair = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0, human_weight=9.0, mask=mask, **pairs([0], [3]))
    without = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0, mask=mask)
    for a, b in zip(with_pair, without, strict=True):
        assert torch.equal(a[mask], b[mask])


def test_comparators_add_up() -> None:
    scores = seeded(1, 4)
    twice = bradley_terry_posterior(torch.stack((scores, scores)), tau=1.0, prior_sd=1.0)
    # Two equal observations are one observation of double weight: the same as half the prior's.
    once = bradley_terry_posterior(scores, tau=1.0, prior_sd=math.sqrt(2))
    torch.testing.assert_close(twice.mean, once.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twice.sd, once.sd / math.sqrt(2), rtol=1e-9, atol=1e-9)
    nothing = bradley_terry_posterior(torch.stack((scores, torch.full_like(scores, NAN))), tau=1.0, prior_sd=1.0)
    torch.testing.assert_close(nothing, bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0))


def test_a_batch_is_its_groups_one_by_one() -> None:
    scores = seeded(2, 6, 5)
    scores[:, 1, 3] = scores[0, 2, 0] = scores[:, 3] = NAN
    human = pairs([0, -1, 4, -1, 3, 2], [1, -1, 2, -1, 0, 4])
    options: dict[str, Any] = {"tau": 0.4, "prior_sd": 1.0, "human_weight": 5.0}
    batch = bradley_terry_posterior(scores, **human, **options)
    for b in range(6):
        one = {name: index[b : b + 1] for name, index in human.items()}
        single = bradley_terry_posterior(scores[:, b : b + 1], **one, **options)
        for x, y in zip(batch, single, strict=True):
            torch.testing.assert_close(x[b], y[0], rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_the_scores_and_there_is_no_gradient(dtype: torch.dtype) -> None:
    scores = seeded(2, 3).to(dtype).requires_grad_()
    found = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0)
    exact = bradley_terry_posterior(scores.detach().double(), tau=1.0, prior_sd=1.0)
    assert all(t.dtype == dtype and not t.requires_grad for t in found)
    torch.testing.assert_close(found, Posterior(*(t.to(dtype) for t in exact)))


def test_no_groups() -> None:
    assert bradley_terry_posterior(torch.empty(0, 4), tau=1.0, prior_sd=1.0).mean.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(3)}, ValueError, r"scores must be \(B, K\) or \(C, B, K\), got \(3,\)"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores must be floating, got torch.int64"),
        ({"tau": 0.0}, ValueError, "tau must be finite and > 0, got 0.0"),
        ({"tau": NAN}, ValueError, "tau must be finite and > 0, got nan"),
        ({"tau": [1.0, 2.0]}, ValueError, r"tau must have one number per comparator \(C=1\), got \[1.0, 2.0\]"),
        ({"weights": [1.0, 1.0]}, ValueError, r"weights must have one number per comparator \(C=1\), got \[1.0, 1.0\]"),
        ({"weights": [0.0]}, ValueError, "weights must be finite and > 0, got 0.0"),
        ({"weights": [INF]}, ValueError, "weights must be finite and > 0, got inf"),
        ({"prior_sd": -1.0}, ValueError, "prior_sd must be > 0, got -1.0"),
        ({"steps": 0}, ValueError, "steps must be > 0, got 0"),
        ({"human_weight": -1.0}, ValueError, "human_weight must be finite and >= 0, got -1.0"),
        ({"human_weight": INF}, ValueError, "human_weight must be finite and >= 0, got inf"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got torch.float32"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"got \(2, 3\), \(2, 2\)"),
        ({"chosen": torch.tensor([0, 1])}, ValueError, "must be given together"),
        (pairs([0, 3], [1, 1]), ValueError, r"chosen must be -1 .no pair. or in \[0, K=3\), got \[0, 3\]"),
        (pairs([0, 1], [1, 1]), ValueError, "two different members, or both -1"),
        (pairs([0, -1], [1, 1]), ValueError, "two different members, or both -1"),
        (pairs([0], [1]), ValueError, r"chosen must be \(B=2,\), got \(1,\)"),
        ({"chosen": torch.zeros(2), "rejected": torch.ones(2)}, TypeError, "chosen must be int64, got torch.float32"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"scores": torch.zeros(2, 3), "tau": 1.0, "prior_sd": 1.0} | change
    with pytest.raises(error, match=message):
        bradley_terry_posterior(**arguments)


# -- several comparators, and agreement -----------------------------------------------------------------------------------


def votes(*answers: str) -> Tensor:
    return torch.tensor([log_votes(answers)], dtype=torch.float64)


def test_log_votes() -> None:
    found = log_votes(["4", "5", "", "4", "6", "4", ""])
    expected = [math.log(3), 0.0, NAN, math.log(3), 0.0, math.log(3), NAN]
    assert found == pytest.approx(expected, nan_ok=True) and log_votes([]) == []
    for nothing_shared in (["4", "5", ""], ["4"], ["", ""]):
        assert all(map(math.isnan, log_votes(nothing_shared)))


def test_agreement_compares_by_shares_of_the_votes() -> None:
    """p_ij = c_i / (c_i + c_j), seen in the written-out objective, whose slope at the mode is 0."""
    c = torch.tensor([3.0, 3.0, 1.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    found = bradley_terry_posterior(votes(*"aabcca"), tau=1.0, prior_sd=0.8)
    gap = found.mean[0][:, None] - found.mean[0]
    wins = (c[:, None] / (c[:, None] + c)).fill_diagonal_(0)
    slope = (wins * torch.sigmoid(-gap) - wins.mT * torch.sigmoid(gap)).sum(1) - found.mean[0] / 0.8**2
    assert float(slope.abs().max()) < 1e-9 and float(found.mean[0, 0] - found.mean[0, 2]) > 0.3


@pytest.mark.parametrize("weight", [1.0, 0.5, 7.0])
def test_agreement_alone_without_prior_is_the_centred_log_of_the_votes(weight: float) -> None:
    theta = bradley_terry_posterior(votes(*"aaaabbc"), tau=1.0, prior_sd=INF, weights=[weight]).mean[0]
    log_c = torch.tensor([4, 4, 4, 4, 2, 2, 1], dtype=torch.float64).log()
    torch.testing.assert_close(theta, log_c - log_c.mean(), rtol=1e-9, atol=1e-12)


def test_votes_that_are_equal_are_comparisons_that_nobody_wins() -> None:
    """They pull the members together; without a shared answer there is no comparison."""
    scores = seeded(1, 4)
    alone = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0)

    def beside(answers: Sequence[str]) -> Tensor:
        both = torch.stack((scores, votes(*answers)))
        return bradley_terry_posterior(both, tau=1.0, prior_sd=1.0).mean

    assert torch.equal(beside("aabb"), beside("aaaa"))
    spread = [float(theta.amax() - theta.amin()) for theta in (alone.mean, beside("aaaa"))]
    assert 0 < spread[1] < 0.9 * spread[0]
    assert torch.equal(beside("abcd"), alone.mean) and torch.equal(beside(["", "", "", ""]), alone.mean)


def test_default_weights_and_one_tau_are_those_of_every_comparator() -> None:
    scores = seeded(2, 3, 5)
    plain = bradley_terry_posterior(scores, tau=0.7, prior_sd=1.0)
    for a, b in zip(
        plain, bradley_terry_posterior(scores, tau=[0.7] * 2, prior_sd=1.0, weights=[1.0] * 2), strict=True
    ):
        assert torch.equal(a, b)


def test_a_tau_of_its_own_is_a_scale_of_the_scores() -> None:
    scores = seeded(2, 3, 5)
    found = bradley_terry_posterior(scores, tau=[0.5, 2.0], prior_sd=1.0, weights=[1.0, 3.0])
    scaled = torch.stack((scores[0] / 0.5, scores[1] / 2.0))
    for a, b in zip(found, bradley_terry_posterior(scaled, tau=1.0, prior_sd=1.0, weights=[1.0, 3.0]), strict=True):
        assert torch.equal(a, b)


def test_a_weight_of_two_is_the_comparator_twice() -> None:
    scores = seeded(2, 3, 5)
    human = pairs([0, -1, 4], [1, -1, 2])
    options: dict[str, Any] = {"prior_sd": 1.3, "human_weight": 4.0, **human}
    weighted = bradley_terry_posterior(scores, tau=[0.5, 1.0], weights=[1.0, 2.0], **options)
    twice = bradley_terry_posterior(torch.stack((scores[0], scores[1], scores[1])), tau=[0.5, 1.0, 1.0], **options)
    for a, b in zip(weighted, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.25), (3.0, 5.0)])
def test_two_members_without_prior_have_the_logit_of_the_weighted_mean(weights: tuple[float, float]) -> None:
    """A member with three votes against one with one, and S that says the opposite."""
    s, log_c = torch.tensor([[0.1, 0.6]], dtype=torch.float64), votes(*"aaab")[:, [0, 3]]
    found = bradley_terry_posterior(torch.stack((s, log_c)), tau=[0.5, 1.0], prior_sd=INF, weights=weights).mean[0]
    p = (weights[0] / (1 + math.exp(1.0)) + weights[1] * 0.75) / sum(weights)
    assert float(found[0] - found[1]) == pytest.approx(math.log(p / (1 - p)), abs=1e-9)
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
def test_comparators_of_another_mind_without_prior(scale: float) -> None:
    """Scores far apart, which Newton must not start from, and votes that say otherwise: the slope at the mode is 0."""
    scores = torch.stack((scale * seeded(1, 5), votes(*"abbbb")))
    theta = bradley_terry_posterior(scores, tau=[0.5, 1.0], prior_sd=INF, steps=60).mean[0]
    p = [
        torch.sigmoid((s[0, :, None] - s[0]) / tau).fill_diagonal_(0) for s, tau in zip(scores, (0.5, 1.0), strict=True)
    ]
    gap = theta[:, None] - theta
    wins = p[0] + p[1]
    slope = (wins * torch.sigmoid(-gap) - wins.mT * torch.sigmoid(gap)).sum(1)
    assert float(slope.abs().max()) < 1e-9 and float(theta.abs().max()) < 5


def test_comparators_that_say_the_same_add_no_ability_without_a_prior() -> None:
    """Equal p give the p of one comparator, whatever the weights; with a prior they only outweigh it."""
    log_c = votes(*"aaabbc")
    both = torch.stack((0.5 * log_c, log_c))
    options: dict[str, Any] = {"tau": [0.5, 1.0], "weights": [1.0, 2.5]}
    theta = bradley_terry_posterior(both, prior_sd=INF, **options).mean
    torch.testing.assert_close(theta, bradley_terry_posterior(log_c, tau=1.0, prior_sd=INF).mean, rtol=1e-9, atol=1e-12)
    with_prior = bradley_terry_posterior(both, prior_sd=1.0, **options).mean
    once = bradley_terry_posterior(log_c, tau=1.0, prior_sd=math.sqrt(3.5)).mean
    torch.testing.assert_close(with_prior, once, rtol=1e-9, atol=1e-12)


def test_weighted_comparators_do_not_see_the_order_of_members() -> None:
    answers, order = ["a", "b", "a", "", "c", "a"], [3, 0, 5, 1, 4, 2]
    scores = torch.stack((seeded(1, 6), votes(*answers)))
    moved_votes = votes(*(answers[i] for i in order))
    options: dict[str, Any] = {"tau": [0.5, 1.0], "prior_sd": 1.0, "weights": [1.0, 3.0], "human_weight": 4.0}
    plain = bradley_terry_posterior(scores, **options, **pairs([0], [4]))
    moved = bradley_terry_posterior(
        torch.stack((scores[0][:, order], moved_votes)), **options, **pairs([order.index(0)], [order.index(4)])
    )
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=1e-9, atol=1e-12)


def test_choix_on_votes_and_scores() -> None:
    """Votes 3:1 and 3:2 and 2:1 in 60 games, S in steps of tau log 2 in 30 games: weights 60 and 30."""
    answers, level, prior_sd = "aaabbc", [0, 1, 0, 2, 1, 0], 1.2
    c = [answers.count(a) for a in answers]
    games = []
    for i in range(6):
        for j in range(6):
            if i != j:
                won = 60 * c[i] / (c[i] + c[j]) + 30 / (1 + 2.0 ** (level[j] - level[i]))
                assert won == round(won)
                games += [(i, j)] * round(won)
    expected = choix.opt_pairwise(6, games, alpha=1 / (2 * prior_sd**2), tol=1e-12)
    scores = 0.4 * math.log(2) * torch.tensor([level], dtype=torch.float64)
    theta = bradley_terry_posterior(
        torch.stack((scores, votes(*answers))), tau=[0.4, 1.0], prior_sd=prior_sd, weights=[30.0, 60.0]
    ).mean
    torch.testing.assert_close(theta[0], torch.from_numpy(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("prior_sd", [0.3, 1.0, 3.0])
def test_weights_of_any_size(weight: float, prior_sd: float) -> None:
    scores = torch.stack((3 * seeded(1, 7), votes(*"aaaabcb")))
    for weights in ([weight, 1.0], [1.0, weight]):
        found = bradley_terry_posterior(scores, tau=[0.5, 1.0], prior_sd=prior_sd, weights=weights, steps=60)
        assert bool(found.mean.isfinite().all())


def test_a_strong_human_preference_wins_whatever_the_votes_say() -> None:
    """A pair among candidates that vote for the rejected one."""
    theta = bradley_terry_posterior(
        votes(*"abbbbbb"), tau=1.0, prior_sd=1.0, human_weight=1000.0, weights=[4.0], **pairs([0], [6])
    ).mean[0]
    assert bool(theta[0] > theta[6]) and bool((theta[1:6] > theta[6]).all())


def test_votes_differ() -> None:
    answers = ["aab", "abc", "aaa", ("a", "a", ""), ("", "", "")]
    scores = torch.cat([votes(*own) for own in answers])
    mask = torch.ones(5, 3, dtype=torch.bool)
    assert votes_differ(scores, mask).tolist() == [True, False, False, False, False]
    mask[0, 2] = False  # the lonely answer is not in the ranking
    assert not votes_differ(scores, mask).any()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("aab", True), ("aabb", True), ("abc", False), ("aaa", False), ("a", False), ("", False),
     (["a", "a", "", ""], False), (["a", "", "b"], False), (["", "a", "a", "b"], True)],
)  # fmt: skip
def test_agrees_in_part(answers: list[str], expected: bool) -> None:
    assert agrees_in_part(answers) is expected


# -- filters -----------------------------------------------------------------------------------------------------------


def test_keep_members_trims_below_tukeys_fence() -> None:
    scores = torch.tensor(
        [
            [0.0, 1.0, 2.0, 3.0, -3.1],  # Q1 = 0, Q3 = 2: the fence is at -3
            [0.0, 1.0, 2.0, 3.0, -2.9],
            [0.0, 1.0, 2.0, 3.0, 90.0],  # only the low side is trimmed
            [0.0, 1.0, 2.0, -99.0, NAN],  # four scores: too few for quartiles
            [0.7, 0.7, 0.7, 0.7, 0.7],
        ]
    )
    expected = torch.ones(5, 5, dtype=torch.bool)
    expected[0, 4] = False
    assert torch.equal(keep_members(scores, torch.ones_like(expected)), expected)


def test_keep_members_stays_inside_the_mask_and_keeps_the_unscored() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, -9.0, NAN, 50.0], [NAN] * 7])
    mask = torch.tensor([[True] * 6 + [False], [True] * 7])
    kept = keep_members(scores, mask)
    assert kept.tolist() == [[True, True, True, True, False, True, False], [True] * 7]


def test_keep_groups() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.05, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, NAN]])
    mean = torch.tensor([[-0.5, 0.5, 0.0], [-0.5, 0.5, 0.0], [-0.5, 0.5, 0.0], [-0.5, 0.5, NAN], [NAN, 0.5, NAN]])
    sd = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [1.1, 0.9, 1.3], [0.9, 0.9, NAN], [NAN, 0.1, NAN]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False], [False, True, False]])
    kept = keep_groups(scores, Posterior(mean, sd), mask, min_spread=0.1)
    # kept; scores agree; too uncertain; kept (the third member is masked); one member ranks nothing
    assert kept.tolist() == [True, False, False, True, False]
    assert keep_groups(scores, Posterior(mean, sd), mask, min_spread=0.0).tolist() == [True, True, False, True, False]


def test_keep_groups_without_scores_has_spread_zero() -> None:
    scores, mask = torch.full((1, 2), NAN), torch.ones(1, 2, dtype=torch.bool)
    posterior = bradley_terry_posterior(scores, tau=1.0, prior_sd=1.0, human_weight=20.0, **pairs([0], [1]))
    assert keep_groups(scores, posterior, mask, min_spread=0.0).tolist() == [True]
    assert keep_groups(scores, posterior, ~mask, min_spread=0.0).tolist() == [False]  # nobody in it
    assert keep_groups(scores, posterior, mask, min_spread=0.01).tolist() == [False]


def test_filters_refuse_bad_input() -> None:
    scores, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask must be bool"):
        keep_members(scores, mask.int())
    with pytest.raises(ValueError, match="one shape"):
        keep_members(scores, mask[:1])
    with pytest.raises(ValueError, match="min_spread must be >= 0, got -1"):
        keep_groups(scores, Posterior(scores, scores), mask, min_spread=-1)


def test_first_of_duplicates() -> None:
    assert first_of_duplicates([[1, 2], [1, 2, 3], (1, 2), [2, 1], [], [1, 2], []]) == [
        True,
        True,
        False,
        True,
        True,
        False,
        False,
    ]
    assert first_of_duplicates([]) == []
