"""Examples -> weighted groups: rollout, Eq. 1, ranking, weights of Eq. 2. The first of GEM's two phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gem.config import RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.ends import model_ends
from gem.group import Group, Member
from gem.head import ensure_fused
from gem.rank import Posterior, bradley_terry_posterior, first_of_duplicates, keep_groups, keep_members
from gem.rollout import Sampler, TransformersSampler, sample_completions
from gem.score import score_groups
from gem.sega import advantages, rewards, sega_weights


def pair_group(example: Example) -> Group:
    """Return a group with only the human answers of a record, not yet scored."""
    members = []
    if example.chosen_ids:
        members.append(Member("chosen", example.chosen_ids, given=example.chosen_given))
    if example.rejected_ids:
        members.append(Member("rejected", example.rejected_ids, given=example.rejected_given))
    about = {"question": example.question, "sampling_prompt_ids": example.sampling_prompt_ids, "where": example.where}
    return Group(example.prompt, example.prompt_ids, members, **about)  # type: ignore[arg-type]


def sampling_prompts(examples: Sequence[Example], rollout: RolloutArguments) -> list[list[int]]:
    """Return the prompts that candidates are sampled from: of the examples without their own, if any are asked for."""
    return [e.sampled_from for e in examples if rollout.group_size and not e.candidate_ids]


def _candidates(example: Example) -> list[Member]:
    """Return the candidates that the record brings."""
    given = example.candidates_given or [[] for _ in example.candidate_ids]
    return [Member("candidate", ids, given=g) for ids, g in zip(example.candidate_ids, given, strict=True)]


@dataclass
class GroupMaker:
    """Callable that turns examples into weighted groups, with the model's weights at the time of the call.

    Args:
        model: the policy, a transformers model; it is fused if it is not yet.
        tokenizer: the model's tokenizer.
        rollout: how candidates are sampled.
        score: settings of Eq. 1.
        rank: settings of the ranking and of Eq. 2's weights.
        reference: frozen model of the KL term and of `score_with: reference`; None: the model itself (before training).
        sampler: rollout backend of the candidates, which has its own settings: of `rollout` only group_size and stop count
            then. None: transformers' generate on `model`.
    """

    model: nn.Module
    tokenizer: Any
    rollout: RolloutArguments
    score: ScoreArguments
    rank: RankArguments
    reference: nn.Module | None = None
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        ensure_fused(self.model)
        if self.reference is not None:
            ensure_fused(self.reference)

    def __call__(self, examples: Sequence[Example], progress: bool = False) -> list[Group]:
        groups = self.draw(examples, progress)
        self.weigh(groups, progress)
        return groups

    def draw(self, examples: Sequence[Example], progress: bool = False) -> list[Group]:
        """Return a group per example: its candidates, sampled if the record brings none, then its human answers."""
        sampler = self.sampler or TransformersSampler(self.model, self.tokenizer, self.rollout)
        ends = model_ends(self.model, self.tokenizer, self.rollout.stop)
        sampled = [i for i, e in enumerate(examples) if not e.candidate_ids for _ in range(self.rollout.group_size)]
        prompts = [examples[i].sampled_from for i in sampled]
        completions = sample_completions(
            sampler, prompts, ends, self.tokenizer, progress="candidates" if progress else None
        )
        candidates = [_candidates(example) for example in examples]
        for i, ids in zip(sampled, completions, strict=True):
            candidates[i].append(Member("candidate", ids, sampled=True))
        groups = [pair_group(example) for example in examples]
        for group, members in zip(groups, candidates, strict=True):
            group.members = [*members, *group.members]
        return groups

    def weigh(self, groups: Sequence[Group], progress: bool = False) -> None:
        """Fill in statistics, spans, S, ranks and weights of every member, in place."""
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


def weight_groups(groups: Sequence[Group], arguments: RankArguments) -> None:
    """Rank the members of every group by their scores and the human pair, and set weight and kept, in place."""
    with_human = arguments.human_weight > 0
    scores, mask = _scores(groups, arguments, with_human)
    if arguments.filter_groups:
        mask = keep_members(scores, mask)
    if with_human and arguments.reward == "bt":
        # The human preference is an observation of its own: it ranks the pair even where an answer has no score.
        for g, group in enumerate(groups):
            for human in (group.role("chosen"), group.role("rejected")):
                if human is not None:
                    mask[g, human] = True
    posterior = bradley_terry_posterior(
        scores,
        tau=arguments.tau,
        prior_sd=arguments.prior_sd,
        human_weight=arguments.human_weight,
        chosen=_role_index(groups, "chosen") if with_human else None,
        rejected=_role_index(groups, "rejected") if with_human else None,
        mask=mask,
        steps=60,  # an upper bound: 12 suffice for human_weight <= 1000, 30 for 1e9
    )
    reward = rewards(scores, mask, kind=arguments.reward, tau=arguments.tau, posterior_mean=posterior.mean)  # type: ignore[arg-type]
    weight = sega_weights(advantages(reward, mask), mask, norm=arguments.weight_norm)  # type: ignore[arg-type]
    kept = mask.sum(1) >= 2
    if arguments.filter_groups:
        kept &= keep_groups(scores, posterior, mask, min_spread=arguments.min_spread)
    _write(groups, posterior, weight * kept[:, None], kept)


def _scores(groups: Sequence[Group], arguments: RankArguments, with_human: bool) -> tuple[Tensor, Tensor]:
    """Return S and the mask of the members that take part, each (B, K), K the size of the largest group.

    A member takes part if it has a score, is no duplicate (with filter_groups), and is not human where the pair is left out.
    """
    width = max(len(group.members) for group in groups)
    scores = torch.full((len(groups), width), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    for g, group in enumerate(groups):
        # Human answers come first, so a candidate that repeats one of them counts as the copy.
        humans_first = sorted(
            range(len(group.members)), key=lambda i: group.members[i].role == "candidate" and with_human
        )
        unique = first_of_duplicates([_all_tokens(group.members[i]) for i in humans_first])
        first = dict(zip(humans_first, unique, strict=True))
        for i, member in enumerate(group.members):
            scores[g, i] = member.score
            is_human = member.role != "candidate"
            counts = first[i] or is_human or not arguments.filter_groups
            mask[g, i] = scores[g, i].isfinite() and counts and (with_human or not is_human)
    return scores, mask


def _all_tokens(member: Member) -> list[int]:
    """Return all tokens of a completion as one list; two lists are equal only if the completions are."""
    return [*member.ids, *(token for at, given in member.given for token in (-1, at, *given))]


def _role_index(groups: Sequence[Group], role: str) -> Tensor:
    """Return the index (B,) of the role's member, -1 where a group lacks one of the human pair."""
    pairs = [(group.role("chosen"), group.role("rejected")) for group in groups]
    which = 0 if role == "chosen" else 1
    return torch.tensor([-1 if None in pair else pair[which] for pair in pairs])


def _write(groups: Sequence[Group], posterior: Posterior, weight: Tensor, kept: Tensor) -> None:
    """Store the posterior, the weights (B, K) and kept (B,) in the groups."""
    for g, group in enumerate(groups):
        group.kept = bool(kept[g])
        for i, member in enumerate(group.members):
            member.rank_mean, member.rank_sd = float(posterior.mean[g, i]), float(posterior.sd[g, i])
            member.weight = float(weight[g, i])
