"""Examples -> weighted groups: rollout, Eq. 1, ranking, Eq. 2's weights. The first of GEM's two phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gem.config import RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.ends import model_ends
from gem.groups import Group, Member
from gem.head import ensure_fused
from gem.rank import Posterior, bradley_terry_posterior, first_of_duplicates, keep_groups, keep_members
from gem.rollout import generate
from gem.score import score_groups
from gem.sega import advantages, rewards, sega_weights


def pair_group(example: Example) -> Group:
    """The human part of a group: what the record says, not yet scored."""
    members = []
    if example.chosen_ids:
        members.append(Member("chosen", example.chosen_ids, given=example.chosen_given))
    if example.rejected_ids:
        members.append(Member("rejected", example.rejected_ids, given=example.rejected_given))
    prompts = {"question": example.question, "sampling_prompt_ids": example.sampling_prompt_ids}
    return Group(example.prompt, example.prompt_ids, members, **prompts)  # type: ignore[arg-type]


def sampling_prompts(examples: Sequence[Example]) -> list[list[int]]:
    """Of the examples whose candidates are sampled: what they are sampled from."""
    return [e.sampled_from for e in examples if not e.candidate_ids]


def _candidates(example: Example) -> list[Member]:
    """Those that the record brings."""
    given = example.candidates_given or [[] for _ in example.candidate_ids]
    return [Member("candidate", ids, given=g) for ids, g in zip(example.candidate_ids, given, strict=True)]


@dataclass
class GroupMaker:
    """Examples -> groups with weights, from the model as it is when called.

    reference: the frozen model of the KL term and of `score_with: reference`; None: the model itself (before training).
    """

    model: nn.Module
    tokenizer: Any
    rollout: RolloutArguments
    score: ScoreArguments
    rank: RankArguments
    reference: nn.Module | None = None

    def __post_init__(self) -> None:
        ensure_fused(self.model)
        if self.reference is not None:
            ensure_fused(self.reference)

    def __call__(self, examples: Sequence[Example], progress: bool = False) -> list[Group]:
        groups = [pair_group(example) for example in examples]
        sampled = [i for i, e in enumerate(examples) if not e.candidate_ids for _ in range(self.rollout.group_size)]
        completions = generate(
            self.model,
            self.tokenizer,
            [examples[i].sampled_from for i in sampled],
            self.rollout,
            progress="candidates" if progress else None,
        )
        drawn = [_candidates(example) for example in examples]
        for i, ids in zip(sampled, completions, strict=True):
            drawn[i].append(Member("candidate", ids, sampled=True))
        for group, candidates in zip(groups, drawn, strict=True):
            group.members = [*candidates, *group.members]
        frozen = self.reference if self.score.score_with == "reference" else None
        score_groups(
            groups,
            self.tokenizer,
            self.model if frozen is None else frozen,
            self.reference if frozen is None else None,
            self.score,
            "scores" if progress else None,
            ends=model_ends(self.model, self.tokenizer, self.rollout.stop),
        )
        weight_groups(groups, self.rank)
        return groups


def weight_groups(groups: Sequence[Group], arguments: RankArguments) -> None:
    """Rank the members of every group and set weight and kept, in place, from their scores and the human pair."""
    with_human = arguments.human_weight > 0
    width = max(len(group.members) for group in groups)
    scores = torch.full((len(groups), width), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    for g, group in enumerate(groups):
        # The human answers first: what repeats one of them is the copy.
        humans_first = sorted(
            range(len(group.members)), key=lambda i: group.members[i].role == "candidate" and with_human
        )
        unique = first_of_duplicates([_said(group.members[i]) for i in humans_first])
        first = dict(zip(humans_first, unique, strict=True))
        for i, member in enumerate(group.members):
            scores[g, i] = member.score
            is_human = member.role != "candidate"
            counts = first[i] or is_human or not arguments.filter_groups
            mask[g, i] = scores[g, i].isfinite() and counts and (with_human or not is_human)
    if arguments.filter_groups:
        mask = keep_members(scores, mask)
    for g, group in enumerate(groups):  # a human answer takes part by its observation, whatever its score
        for human in (group.role("chosen"), group.role("rejected")):
            if human is not None and with_human and arguments.reward == "bt":
                mask[g, human] = True
    posterior = bradley_terry_posterior(
        scores,
        tau=arguments.tau,
        prior_sd=arguments.prior_sd,
        human_weight=arguments.human_weight,
        chosen=_role_index(groups, "chosen") if with_human else None,
        rejected=_role_index(groups, "rejected") if with_human else None,
        mask=mask,
        steps=60,  # it stops when converged: 12 do for human_weight <= 1000, 30 for 1e9
    )
    reward = rewards(scores, mask, kind=arguments.reward, tau=arguments.tau, posterior_mean=posterior.mean)  # type: ignore[arg-type]
    weight = sega_weights(advantages(reward, mask), mask, norm=arguments.weight_norm)  # type: ignore[arg-type]
    kept = mask.sum(1) >= 2
    if arguments.filter_groups:
        kept &= keep_groups(scores, posterior, mask, min_spread=arguments.min_spread)
    _write(groups, posterior, weight * kept[:, None], kept)


def _said(member: Member) -> list[int]:
    """All tokens of a completion, in one list that equals another's only where both are the same."""
    return [*member.ids, *(token for at, given in member.given for token in (-1, at, *given))]


def _role_index(groups: Sequence[Group], role: str) -> Tensor:
    """(B,) index of the role's member, -1 unless the group has the whole human pair."""
    pairs = [(group.role("chosen"), group.role("rejected")) for group in groups]
    which = 0 if role == "chosen" else 1
    return torch.tensor([-1 if None in pair else pair[which] for pair in pairs])


def _write(groups: Sequence[Group], posterior: Posterior, weight: Tensor, kept: Tensor) -> None:
    for g, group in enumerate(groups):
        group.kept = bool(kept[g])
        for i, member in enumerate(group.members):
            member.rank_mean, member.rank_sd = float(posterior.mean[g, i]), float(posterior.sd[g, i])
            member.weight = float(weight[g, i])
