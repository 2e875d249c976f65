"""SEGA, Eq. 2 of GEM (arXiv 2511.13007): scores of a group -> weights of its members' log-probabilities.

    r_i = f(S_i),    A_i = r_i - mean(r),    w_i proportional to A_i,    L = -(1/B) sum_q sum_i w_i log pi(a_i | q)

Pure functions. B groups, K members of a group; `mask` (B, K) bool is true for members that take part, whose values must be
finite. f = listwise_dpo needs the policy's log-ratios and is in gem/losses.py.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

RewardKind = Literal["identity", "softmax", "rank", "bt"]
WeightNorm = Literal["mass", "none", "std"]


def rewards(
    scores: Tensor, mask: Tensor, *, kind: RewardKind, tau: float, posterior_mean: Tensor | None = None
) -> Tensor:
    """Return the reward r_i = f(S_i) of each member.

    Args:
        scores: (B, K), floating; higher is better; finite for the members unless kind is bt.
        mask: (B, K) bool.
        kind: identity  r = S
              softmax   r = softmax(S / tau) over the members
              rank      r = share of the other members that i beats, a tie counting half; in [0, 1]
              bt        r = mean of the Bradley-Terry posterior (gem.rank); scores and tau are not read
        tau: temperature of the softmax, in units of the scores, > 0.
        posterior_mean: (B, K), floating, finite for the members; required by bt.

    Returns:
        (B, K) in the dtype of scores or posterior_mean, whichever was read; NaN outside the mask.

    Raises:
        TypeError: values not floating or mask not bool.
        ValueError: shapes differ, kind is unknown, tau is not > 0, posterior_mean is missing, or a member's value is
            not finite.
    """
    if kind not in get_args(RewardKind):
        raise ValueError(f"kind must be one of {get_args(RewardKind)}, got {kind!r}")
    if kind == "bt":
        if posterior_mean is None:
            raise ValueError('kind="bt" needs posterior_mean (gem.rank.bradley_terry_posterior), got None')
        _check("posterior_mean", posterior_mean, mask)
        return posterior_mean.where(mask, torch.nan)
    _check("scores", scores, mask)
    match kind:
        case "identity":
            reward = scores
        case "softmax":
            if not tau > 0:
                raise ValueError(f"tau must be > 0, got {tau}")
            # A group without members gives NaN here; its row is masked to NaN below anyway.
            reward = torch.softmax((scores / tau).where(mask, -torch.inf), dim=1)
        case "rank":
            others = mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
            gap = scores[:, :, None] - scores[:, None, :]
            beaten = ((1 + gap.sign()) / 2).where(others, 0.0).sum(2)
            reward = beaten / (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    return reward.where(mask, torch.nan)


def advantages(reward: Tensor, mask: Tensor) -> Tensor:
    """Return A_i = r_i - mean(r) over the members of the group (Eq. 2).

    The mean includes i itself. Leaving it out (RLOO) multiplies A by k / (k - 1) and changes nothing else.

    Args:
        reward: (B, K), floating, finite for the members.
        mask: (B, K) bool.

    Returns:
        (B, K) in the dtype of `reward`; each row sums to 0. Exactly 0 outside the mask, for groups with fewer than two
        members, and for groups whose rewards are all equal.
    """
    _check("reward", reward, mask)
    # Subtracting the best first makes equal rewards exactly 0 (the mean of equal floats may be off by one bit), and a
    # common offset costs no precision.
    best = reward.where(mask, -torch.inf).amax(1, keepdim=True)
    behind = (reward - best).where(mask, 0.0)
    mean = behind.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (behind - mean).where(mask, 0.0)


def sega_weights(advantage: Tensor, mask: Tensor, *, norm: WeightNorm) -> Tensor:
    """Return the weights w of Eq. 2 from the advantages A.

    Args:
        advantage: (B, K), floating, finite for the members.
        mask: (B, K) bool.
        norm: mass  w = A / max(1, sum|A| / 2): the positive weights of a group add up to at most 1, and so do the
                    negative ones. The small advantages of a group that agrees stay small.
              none  w = A
              std   w = A / sqrt(mean(A^2)) over the members; 0 where all A are 0. A group that agrees to within 1e-6
                    gets weights as large as any other: noise at full size.

    Returns:
        (B, K) in the dtype of `advantage`; exactly 0 outside the mask.
    """
    _check("advantage", advantage, mask)
    a = advantage.where(mask, 0.0)
    match norm:
        case "mass":
            return a / (a.abs().sum(1, keepdim=True) / 2).clamp(min=1)
        case "none":
            return a
        case "std":
            # Divide by the largest first: in float32, squares of advantages below 1e-23 would underflow.
            largest = a.abs().amax(1, keepdim=True)
            unit = a / largest.where(largest > 0, 1.0)
            std = (unit.square().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).sqrt()
            return unit / std.where(std > 0, 1.0)
        case _:
            raise ValueError(f"norm must be one of {get_args(WeightNorm)}, got {norm!r}")


def _check(name: str, values: Tensor, mask: Tensor) -> None:
    """Raise unless values (B, K) are floating, mask (B, K) is bool, and values are finite where mask is true."""
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating, got {values.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if values.ndim != 2 or mask.shape != values.shape:
        raise ValueError(
            f"expected {name} and mask of one shape (B, K), got {tuple(values.shape)}, {tuple(mask.shape)}"
        )
    bad = (mask & ~values.isfinite()).nonzero()
    if len(bad):
        b, k = bad[0].tolist()
        raise ValueError(
            f"{name} must be finite for the members in mask, got {values[b, k].item()} for member {k} of group {b}; "
            f"take members without a score out of the mask"
        )
