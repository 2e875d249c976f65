"""Cases, losses and runners that the tests of linear_group_loss and sega_loss share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numerics
import torch
import torch.nn.functional as F
from bounds import Bound
from numerics import Case, Results, assert_all_close
from op_bounds import LossFn, group_bounds
from torch import Tensor

from gem_kernels import GroupLoss, TokenStats, linear_group_loss, sega_loss
from gem_kernels.plan import padded

N, D, V = 90, 13, 217
ROW = 4 * padded(V)
CACHES = {"all": 1 << 30, "slabs": ROW * 30, "one group at most": ROW * 12, "recompute": 1}
ON_GPU = (290, 64, 1003)  # N, D, V
GPU_CACHES = {"one slab": 1 << 30, "slabs": 4 * 1003 * 20, "recompute": 1}

OFFSETS = [0, 11, 12, 40, 41, 77, 90]  # groups of one token, of many, of unequal size
GROUPS = {N: OFFSETS, 290: [0, 11, 12, 140, 141, 277, 290]}
"""Offsets of the groups, by the number of tokens"""
WEIGHTS = torch.tensor([0.5, -1.0, 0.75, -0.5, 0.0, 0.25])  # of sega_loss; centred, as advantages are: they sum to 0
assert WEIGHTS.sum() == 0

make_case = cache(numerics.make_case)  # no test writes into a case


# --- losses of a group ------------------------------------------------------------------------------------------------


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
    weight = stats.entropy.detach()  # weights from this very pass: what a fused cross-entropy cannot do
    return -((weight - weight.mean()) * stats.logprob).sum()


def entropy_as_a_term(stats: TokenStats, group: int) -> Tensor:
    return (stats.entropy * stats.logprob).sum() + 0.1 * stats.entropy.square().sum()


def z_loss(stats: TokenStats, group: int) -> Tensor:
    return 0.01 * stats.lse.square().sum()


def entropy_and_z_loss(stats: TokenStats, group: int) -> Tensor:
    return entropy_as_a_term(stats, group) + z_loss(stats, group)


def all_three(stats: TokenStats, group: int) -> Tensor:
    return preference(stats, group) + entropy_as_a_term(stats, group) + z_loss(stats, group)


def another_in_every_group(stats: TokenStats, group: int) -> Tensor:
    """Use each statistic in some groups only, and give no gradient at all in one group of four."""
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


def weighted_likelihood(weights: Tensor) -> LossFn:
    """Return the loss of a sequence, of which sega_loss is the sum."""
    return lambda stats, sequence: -float(weights[sequence]) * stats.logprob.sum()


# --- runs -------------------------------------------------------------------------------------------------------------


def offsets_of(case: Case) -> list[int]:
    return GROUPS[case.targets.numel()]


def _arguments(case: Case, offsets: Sequence[int] | None, impl: str) -> tuple[list[Tensor], dict[str, Any]]:
    offsets = offsets_of(case) if offsets is None else offsets
    cu_groups = torch.tensor(offsets, dtype=torch.int32, device=case.hidden.device)
    options = {"bias": case.bias, "transform": case.transform, "low_rank": case.low_rank, "impl": impl}
    return [case.hidden, case.weight, case.targets, cu_groups], options


def group_loss(
    case: Case, impl: str, loss_fn: LossFn, offsets: Sequence[int] | None = None, **settings: Any
) -> GroupLoss:
    tensors, options = _arguments(case, offsets, impl)
    return linear_group_loss(*tensors, loss_fn, **options, **settings)  # type: ignore[arg-type]


def sega(
    case: Case, impl: str, weights: Tensor = WEIGHTS, offsets: Sequence[int] | None = None, **settings: Any
) -> GroupLoss:
    tensors, options = _arguments(case, offsets, impl)
    return sega_loss(*tensors, weights.to(case.hidden.device), **options, **settings)  # type: ignore[arg-type]


def results(out: GroupLoss, x: Case, factor: float = 1.0) -> dict[str, Tensor | None]:
    """Return loss, statistics and gradients after one backward."""
    (out.loss * factor).backward()
    assert not any(s.requires_grad for s in out.stats)
    return {"loss": out.loss.detach(), **out.stats._asdict(), **x.gradients()}


def run(
    case: Case, impl: str, loss_fn: LossFn, factor: float = 1.0, needs: Sequence[bool] = (True,) * 5, **settings: Any
) -> dict[str, Tensor | None]:
    x = case.leaves(needs)
    return results(group_loss(x, impl, loss_fn, **settings), x, factor)


def run_sega(case: Case, impl: str, weights: Tensor = WEIGHTS, **settings: Any) -> dict[str, Tensor | None]:
    x = case.leaves()
    return results(sega(x, impl, weights, **settings), x)


@cache
def expected(case: Case, loss_fn: LossFn, offsets: Sequence[int], factor: float) -> tuple[Results, dict[str, Bound]]:
    """Return gold and its bounds, computed once for all implementations and cache sizes that run the same case."""
    gold = run(case.double(), "reference", loss_fn, factor, offsets=offsets)
    return gold, group_bounds(case, loss_fn, offsets, factor=factor)


def check(
    case: Case,
    impl: str,
    loss_fn: LossFn,
    factor: float = 1.0,
    offsets: Sequence[int] | None = None,
    **settings: Any,
) -> None:
    """Hold linear_group_loss by `impl` to the rule: loss, every statistic and every gradient."""
    offsets = tuple(offsets_of(case) if offsets is None else offsets)
    got = run(case, impl, loss_fn, factor, offsets=offsets, **settings)
    assert_all_close(got, *expected(case, loss_fn, offsets, factor))
