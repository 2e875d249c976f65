"""Ranking of the members of a group: a Bradley-Terry posterior over their scores, and filters of what training uses.

Pure functions. B groups, K members of a group (candidates and, if given, the human chosen and rejected response),
C comparators; `mask` (B, K) bool is true for members that take part.

A ranking by one scalar only keeps its order. Information beyond S comes from the human preference, from several
comparators and from the posterior's uncertainty. docs/ranking.md has the maths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Convergence is quadratic: after a Newton step of this size, the error is about its square.
_CONVERGED_STEP = 1e-5


class Posterior(NamedTuple):
    """Abilities of the members in log-odds, each (B, K); NaN for a member that takes no part."""

    mean: Tensor
    """theta at the mode."""
    sd: Tensor
    """sqrt(diag(H^-1)) at the mode: Laplace's approximation."""


@torch.no_grad()
def bradley_terry_posterior(
    scores: Tensor,
    *,
    tau: float | Sequence[float],
    prior_sd: float,
    weights: Sequence[float] | None = None,
    human_weight: float = 0.0,
    chosen: Tensor | None = None,
    rejected: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 12,
) -> Posterior:
    """Fit Bradley-Terry abilities of the members of each group to their scores and, if the group has one, a human pair.

    theta maximises, by Newton's method with the exact Hessian in float64,

        sum_c w_c sum_{i<j} [p_ij log s(theta_i - theta_j) + (1 - p_ij) log s(theta_j - theta_i)]
            + n_h log s(theta_chosen - theta_rejected) - |theta|^2 / (2 prior_sd^2),     p_ij = s((S_i - S_j) / tau)

    where s is the logistic function, and p, S and tau are those of the comparator c. This is our definition of the paper's
    "Bayesian ranking scheme". The sum of a comparator is over the pairs for which it has two finite scores. A member without
    any comparison keeps its prior: mean 0, sd prior_sd.

    prior_sd = inf leaves the constant vector free; we fix it by mean zero. One comparator and no human pair then give
    theta = (S - mean S) / tau exactly. sd is then that of the contrast theta_i - mean theta, and meaningful while the gaps
    are below about 30 tau: beyond, float64 loses the curvature.

    Args:
        scores: (B, K), or (C, B, K) for C comparators; floating; higher is better; NaN means no score.
        tau: temperature of the comparisons, in units of the scores, > 0; one of all comparators, or C.
        prior_sd: standard deviation of the prior of theta, in log-odds, > 0; may be inf.
        weights: C numbers w_c > 0, how many comparisons each pair of a comparator counts for. Default: 1 each.
        human_weight: n_h >= 0, the number of comparisons that the human preference counts for.
        chosen, rejected: (B,) int64 indices into K of the human pair, both or neither; -1 in both: the group has no pair.
        mask: (B, K) bool. A human preference about a member outside it is ignored. Default: the members with a finite
            score from some comparator, and the human pair.
        steps: most Newton steps, >= 1; 12 suffice for human_weight <= 1000 and prior_sd <= 3.

    Returns:
        Posterior in the dtype of `scores`, without gradient.

    Raises:
        TypeError: scores not floating, mask not bool, chosen or rejected not int64.
        ValueError: a shape, a range or an index is wrong, or only one of chosen and rejected is given.
        RuntimeError: not converged in `steps`. With prior_sd = inf, a missing mode ends here too: the ability of a member
            with no comparison but the human preference goes to infinity.
    """
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores must be (B, K) or (C, B, K), got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating, got {scores.dtype}")
    for name, positive in (("prior_sd", prior_sd), ("steps", steps)):
        if not positive > 0:
            raise ValueError(f"{name} must be > 0, got {positive}")
    if not 0 <= human_weight < float("inf"):
        raise ValueError(f"human_weight must be finite and >= 0, got {human_weight}")

    s_cbk = (scores if scores.ndim == 3 else scores[None]).double()
    tau_c = _per_comparator("tau", tau, s_cbk)
    weight_c = _per_comparator("weights", 1.0 if weights is None else weights, s_cbk)
    finite = s_cbk.isfinite()
    groups, pair = _human_pairs(chosen, rejected, s_cbk)
    if mask is None:
        member = finite.any(0)
        member[groups[:, None], pair] = True
    else:
        _check_mask(mask, s_cbk[0])
        member = mask
        kept = member[groups[:, None], pair].all(1)
        groups, pair = groups[kept], pair[kept]

    # wins (B, K, K): how often i beat j, over all comparators. (j, i) is computed too, as 1 - s(x) would round.
    compared = (finite & member).double()
    compared = compared[..., :, None] * compared[..., None, :]
    compared.diagonal(dim1=-2, dim2=-1).zero_()
    known = s_cbk.where(finite, 0.0)
    won = torch.sigmoid((known[..., :, None] - known[..., None, :]) / tau_c[..., None])
    wins = (weight_c[..., None] * compared * won).sum(0)
    wins[groups, pair[:, 0], pair[:, 1]] += human_weight
    games = wins + wins.mT

    precision = prior_sd**-2.0
    # One comparator without a prior: Newton starts at the solution. A prior, or a comparator of another mind, pulls abilities
    # together, so it starts at 0, inside the basin: from far apart, where the likelihood is flat, the first step overshoots.
    alone = precision == 0 and len(s_cbk) == 1
    theta = _centred(s_cbk[0], finite[0] & member) / tau_c[0] if alone else torch.zeros_like(s_cbk[0])
    for _ in range(steps):
        step = (_inverse(_curvature(theta, games, precision)) @ _slope(theta, wins, precision)[..., None])[..., 0]
        theta = theta + step
        if bool((step.abs() < _CONVERGED_STEP).all()):
            break
    else:
        raise RuntimeError(
            f"the Bradley-Terry posterior must converge in steps={steps}, but the last step moved an ability by "
            f"{step.abs().max().item():.1e}; allow more steps, or lower human_weight={human_weight} or "
            f"prior_sd={prior_sd} (with prior_sd=inf every member needs comparisons)"
        )
    variance = _inverse(_curvature(theta, games, precision)).diagonal(dim1=-2, dim2=-1)
    sd = torch.where(games.sum(-1) > 0, variance.sqrt(), prior_sd)
    return Posterior(*(t.where(member, torch.nan).to(scores.dtype) for t in (theta, sd)))


def keep_members(scores: Tensor, mask: Tensor) -> Tensor:
    """Trim low outliers, S < Q1 - 1.5 (Q3 - Q1): Tukey's fence, with quartiles by interpolation.

    Args:
        scores: (B, K), floating. A member without a finite score does not enter the quartiles and is not trimmed.
        mask: (B, K) bool. A group with fewer than 5 scored members in it is left alone: an outlier would set its quartiles.

    Returns:
        (B, K) bool, `mask` without the outliers.
    """
    _check_mask(mask, scores)
    scored = mask & scores.isfinite()
    values = scores.double().where(scored, torch.nan)
    q1, q3 = (torch.nanquantile(values, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    low = scored & (scored.sum(1, keepdim=True) >= 5) & (values < q1 - 1.5 * (q3 - q1))
    return mask & ~low


def keep_groups(scores: Tensor, posterior: Posterior, mask: Tensor, *, min_spread: float) -> Tensor:
    """Select the groups worth training on: their scores differ, and by more than the uncertainty of the ranking.

    A group is kept if spread(S) >= min_spread and spread(posterior.mean) >= mean(posterior.sd), where spread is max - min
    over the members. The second condition is our choice: the best leads the worst by at least one member's uncertainty.
    posterior.sd includes the uncertainty of the group's common level, prior_sd / sqrt(K), so a wide prior drops more groups.

    Args:
        scores: (B, K), floating. Members without a finite score do not count in spread(S); with fewer than two others it
            is 0.
        posterior: (B, K), finite for the members of the mask.
        mask: (B, K) bool. A group without two members is dropped.
        min_spread: in units of the scores, >= 0.

    Returns:
        (B,) bool.
    """
    _check_mask(mask, scores)
    if not min_spread >= 0:
        raise ValueError(f"min_spread must be >= 0, got {min_spread}")
    count = mask.sum(1)
    mean_sd = posterior.sd.where(mask, 0.0).sum(1) / count.clamp(min=1)
    differ = _spread(scores, mask & scores.isfinite()) >= min_spread
    return (count >= 2) & differ & (_spread(posterior.mean, mask) >= mean_sd)


def first_of_duplicates(completions: Sequence[Sequence[int]]) -> list[bool]:
    """Mark the first of each set of completions with equal tokens: True for it, False for its later copies."""
    seen: set[tuple[int, ...]] = set()
    first = []
    for completion in completions:
        tokens = tuple(completion)
        first.append(tokens not in seen)
        seen.add(tokens)
    return first


def log_votes(answers: Sequence[str]) -> list[float]:
    """Return the scores of the agreement comparator: log c_i, with c_i the number of members with the answer of member i.

    At tau 1, p_ij = c_i / (c_i + c_j): of the votes for the answer of i or of j, the share for that of i. Where no two members
    share an answer, as in free text, there is nothing to agree on, and all scores are NaN.

    Args:
        answers: of the members of a group; "": the member does not vote, and its score is NaN.
    """
    counts = Counter(answer for answer in answers if answer)
    shared = max(counts.values(), default=0) > 1
    return [math.log(counts[answer]) if answer and shared else math.nan for answer in answers]


def votes_differ(votes: Tensor, mask: Tensor) -> Tensor:
    """Return whether answers of the mask have different numbers of votes, (B,), from `log_votes` (B, K)."""
    return _spread(votes, mask & votes.isfinite()) > 0


def agrees_in_part(answers: Sequence[str]) -> bool:
    """Return whether at least two members that vote share an answer, and not all do; "": the member does not vote."""
    counts = Counter(answer for answer in answers if answer)
    return len(counts) > 1 and max(counts.values()) > 1


def _slope(theta: Tensor, wins: Tensor, precision: float) -> Tensor:
    """Return the gradient (B, K) of the log-posterior, as a difference of small terms that vanishes to full precision."""
    gap = theta[:, :, None] - theta[:, None, :]
    return (wins * torch.sigmoid(-gap) - wins.mT * torch.sigmoid(gap)).sum(-1) - precision * theta


def _curvature(theta: Tensor, games: Tensor, precision: float) -> Tensor:
    """Return the negative Hessian (B, K, K) of the log-posterior: a weighted graph Laplacian plus the prior's precision."""
    gap = theta[:, :, None] - theta[:, None, :]
    weight = games * torch.sigmoid(gap) * torch.sigmoid(-gap)
    return torch.diag_embed(weight.sum(-1) + precision) - weight


def _inverse(curvature: Tensor) -> Tensor:
    """Return the inverse; without a prior the pseudo-inverse, which leaves the undetermined mean of theta as it is."""
    inverse: Tensor = torch.linalg.pinv(curvature, hermitian=True)
    return inverse


def _centred(scores: Tensor, valid: Tensor) -> Tensor:
    """Return S - mean(S) over the valid members, (B, K); 0 for the others."""
    s = scores.where(valid, 0.0)
    return (s - s.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)).where(valid, 0.0)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return max - min over the mask, (B,); 0 where it has no member."""
    spread = values.where(mask, -torch.inf).amax(1) - values.where(mask, torch.inf).amin(1)
    return spread.where(mask.any(1), 0.0)


def _per_comparator(name: str, values: float | Sequence[float], s_cbk: Tensor) -> Tensor:
    """Return one positive number per comparator as (C, 1, 1), from one for all or from C."""
    c = len(s_cbk)
    listed = list(values) if isinstance(values, Sequence) else [values] * c
    if len(listed) != c:
        raise ValueError(f"{name} must have one number per comparator (C={c}), got {listed}")
    for value in listed:
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    return s_cbk.new_tensor(listed)[:, None, None]


def _human_pairs(chosen: Tensor | None, rejected: Tensor | None, s_cbk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the groups (P,) that have a human pair, and the (chosen, rejected) indices (P, 2) of the pairs."""
    b, k = s_cbk.shape[1:]
    if chosen is None and rejected is None:
        return s_cbk.new_empty(0, dtype=torch.int64), s_cbk.new_empty(0, 2, dtype=torch.int64)
    if chosen is None or rejected is None:
        raise ValueError("chosen and rejected must be given together, got one of them")
    for name, index in (("chosen", chosen), ("rejected", rejected)):
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {index.dtype}")
        if index.shape != (b,):
            raise ValueError(f"{name} must be (B={b},), got {tuple(index.shape)}")
        if bool(((index < -1) | (index >= k)).any()):
            raise ValueError(f"{name} must be -1 (no pair) or in [0, K={k}), got {index.tolist()}")
    pair = torch.stack((chosen, rejected), 1)
    one_sided = (chosen == -1) != (rejected == -1)
    if bool((one_sided | ((chosen == rejected) & (chosen >= 0))).any()):
        raise ValueError(f"chosen and rejected must be two different members, or both -1, got {pair.tolist()}")
    groups = (chosen >= 0).nonzero()[:, 0]
    return groups, pair[groups]


def _check_mask(mask: Tensor, values: Tensor) -> None:
    """Raise unless mask is bool and of the shape (B, K) of values."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if values.ndim != 2 or mask.shape != values.shape:
        raise ValueError(
            f"expected values and mask of one shape (B, K), got {tuple(values.shape)}, {tuple(mask.shape)}"
        )
