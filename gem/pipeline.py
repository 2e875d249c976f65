"""Examples -> weighted groups: candidates, Eq. 1, ranking, weights of Eq. 2. The first of GEM's two phases."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gem.calibration import WINDOW, Calibration, Signals
from gem.config import RankArguments, RolloutArguments, ScoreArguments, calibrates, comparator_weights
from gem.data import Example
from gem.distributed import awaits_shards
from gem.ends import model_ends
from gem.generators import Completion, Generator, TransformersGenerator, draw_completions
from gem.group import Group, Member
from gem.head import HeadStats, ensure_fused
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
from gem.reference import Frozen, Reference
from gem.score import apply_eq1, group_stats, read_members, sampler_gap, score_groups, warn_of_gap
from gem.sega import advantages, rewards, sega_weights
from gem_kernels import TokenStats

if TYPE_CHECKING:
    from gem.ema import WeightAverage

logger = logging.getLogger(__name__)


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

    A call is `draw`, `weigh` and `refer`. GEMTrainer calls them one by one: as a rule it weighs with the entropies of the very
    forward that it trains on, so that no forward is there for the scores alone (`two_passes` says when it cannot).

    Args:
        model: the policy, a transformers model; it is fused if it is not yet.
        tokenizer: the model's tokenizer.
        rollout: how candidates are sampled.
        score: settings of Eq. 1.
        rank: settings of the ranking and of Eq. 2's weights.
        reference: the model before training, of the KL term and of `score_with: reference` (gem.reference), or a frozen model;
            None: the model itself, at the time of the call.
        generator: where candidates come from, which has its own settings: of `rollout` only group_size and stop count then.
            None: transformers' generate on `model`.
        average: the scorer of `score_with: ema`; GEMTrainer sets it.
        pairs: examples with a human pair, which say how far to trust the signals that rank, first under the model as it is at
            the first call (gem.calibration). GEMTrainer lets the trust follow the policy.
    """

    model: nn.Module
    tokenizer: Any
    rollout: RolloutArguments
    score: ScoreArguments
    rank: RankArguments
    reference: Reference | nn.Module | None = None
    generator: Generator | None = None
    average: WeightAverage | None = None
    pairs: Sequence[Example] = ()

    def __post_init__(self) -> None:
        self.gap, self._warned = math.nan, False  # of the last scoring pass
        if not awaits_shards(self.model):
            ensure_fused(self.model)
        if isinstance(self.reference, nn.Module):
            self.reference = Frozen(self.reference, batch_tokens=self.score.score_tokens)

    @cached_property
    def calibration(self) -> Calibration | None:
        """Trust in the signals by the pairs under the model as it is at the first use; None where nothing is calibrated."""
        groups = [pair_group(example) for example in self.pairs if example.has_pair][:WINDOW]
        if not groups or not calibrates(self.rank):
            return None
        score_groups(groups, self.tokenizer, self.model, None, self.score, shared=True)
        calibration = Calibration(groups)
        trust = calibration.trust
        logger.info(
            "trust in S by %d human pairs: final term %.2f, branch term %.2f", len(groups), trust.final, trust.branch
        )
        return calibration

    @property
    def weights(self) -> Signals | None:
        """Weights of the signals in the ranking: those of Eq. 1 times the trust; None if nothing is calibrated."""
        if self.calibration is None:
            return None
        trust = self.calibration.trust
        return trust._replace(
            final=trust.final * self.score.final_weight, branch=trust.branch * self.score.branch_weight
        )

    def __call__(self, examples: Sequence[Example], progress: bool = False) -> list[Group]:
        groups = self.draw(examples, progress)
        self.weigh(groups, progress=progress)
        self.refer(groups)
        return groups

    def draw(self, examples: Sequence[Example], progress: bool = False) -> list[Group]:
        """Return a group per example: its candidates, sampled if the record brings none, then its human answers; with spans."""
        generator = self.generator or TransformersGenerator(self.model, self.tokenizer, self.rollout)
        ends = model_ends(self.model, self.tokenizer, self.rollout.stop)
        asking = [example for example in examples if not example.candidate_ids]
        drawn = draw_completions(
            generator,
            [example.sampled_from for example in asking],
            self.rollout.group_size,
            ends,
            self.tokenizer,
            progress="candidates" if progress else None,
        )
        sampled = iter(drawn)
        groups = [pair_group(example) for example in examples]
        for group, example in zip(groups, examples, strict=True):
            candidates = _candidates(example) if example.candidate_ids else [_sampled(c) for c in next(sampled)]
            group.members = [*candidates, *group.members]
        read_members(groups, self.tokenizer, ends, self.score)
        return groups

    def weigh(
        self, groups: Sequence[Group], stats: HeadStats | TokenStats | None = None, progress: bool = False
    ) -> None:
        """Fill in S, ranks and weights of every member, in place.

        Args:
            groups: from `draw`.
            stats: entropies (N,) of the members' tokens under the scorer, one member after the other, on any device. None:
                the scorer computes them in a pass of its own, and the members keep them.
            progress: show a bar.
        """
        entropy = self._scored(groups, progress) if stats is None else stats.entropy.detach().cpu()
        weigh(groups, entropy, self.score, self.rank, self.weights)

    def refer(self, groups: Sequence[Group], wanted: Callable[[Member], bool] = lambda _: True) -> None:
        """Fill in the log-probs under the reference, if there is one, of the members that are wanted and have none."""
        if self.reference is not None:
            cast(Reference, self.reference).fill(groups, wanted)

    def compare(self, members: Sequence[Member], logprob: Tensor) -> float:
        """Return gem.score.sampler_gap of members and their log-probs (N,) under the policy; warn once if it is too large."""
        found = sampler_gap(members, logprob)
        self._warned = self._warned or warn_of_gap(found)
        return found

    def two_passes(self, trained: nn.Module) -> str:
        """Return why the forward that trains a model cannot give the entropies of Eq. 1; "" if these settings let it."""
        if self.model is not trained:
            return "the candidates are those of another model"
        if type(self).weigh is not GroupMaker.weigh:
            return f"{type(self).__name__} has a weigh of its own"
        if self.score.score_with != "policy":
            return f"score_with={self.score.score_with}"
        if self.score.entropy_clip < 1:
            return f"entropy_clip={self.score.entropy_clip:g} is a quantile of the whole step"
        return ""

    def _scored(self, groups: Sequence[Group], progress: bool) -> Tensor:
        """Return the entropies (N,) of a scoring pass; the members keep them, and the log-probs if they are the reference's."""
        with self._scorer() as scorer:
            stats = group_stats(scorer, groups, self.score.score_tokens, "scores" if progress else None)
        if not groups:  # of a process that has none, while others score theirs
            return torch.zeros(0)
        members = [member for group in groups for member in group.members]
        if self.score.score_with == "policy":
            self.gap = self.compare(members, torch.cat([own.logprob for own in stats]))
        keep = self.score.score_with == "reference" or (self.reference is None and self.score.score_with == "policy")
        for member, own in zip(members, stats, strict=True):
            member.entropies = own.entropy.tolist()
            if keep:
                member.logprobs = own.logprob.tolist()
        return torch.cat([own.entropy for own in stats])

    def _scorer(self) -> AbstractContextManager[nn.Module]:
        """Return the context of the model whose entropies enter Eq. 1."""
        match self.score.score_with:
            case "reference" if self.reference is not None:
                if not hasattr(self.reference, "serving"):
                    got = type(self.reference).__name__
                    raise ValueError(
                        f"reference must be AdapterOff, Frozen or a model with score_with=reference, got {got}"
                    )
                return cast(Any, self.reference).serving()  # type: ignore[no-any-return]
            case "ema":
                if self.average is None:
                    raise ValueError(
                        "score_with=ema needs a GroupMaker that GEMTrainer got as make_groups, got one without average"
                    )
                return self.average.averaged(self.model)
            case _:
                return nullcontext(self.model)


def _sampled(completion: Completion) -> Member:
    """Return the candidate that was drawn."""
    return Member("candidate", completion.ids, sampled=True, sampler_logprobs=completion.logprobs or [])


def weigh(
    groups: Sequence[Group],
    entropy: Tensor,
    score: ScoreArguments,
    rank: RankArguments,
    weights: Signals | None = None,
) -> None:
    """Turn entropies into weights: Eq. 1, the ranking, Eq. 2. Fills in S, posterior, weight and kept, in place.

    Args:
        groups: with the spans of their members (gem.score.read_members).
        entropy: (N,) fp32, CPU, nats: of the members' tokens, one member after the other.
        score: settings of Eq. 1; a quantile of entropy_clip is one of these groups' tokens.
        rank: settings of the ranking and of the weights.
        weights: as for `weight_groups`.
    """
    if groups:
        apply_eq1([member for group in groups for member in group.members], entropy, score)
        weight_groups(groups, rank, weights)


def weight_groups(groups: Sequence[Group], arguments: RankArguments, weights: Signals | None = None) -> None:
    """Rank the members of every group by the comparators and the human pair, and set weight and kept, in place.

    Args:
        groups: with S and, for agreement, the answers of their members (gem.score).
        arguments: settings of the ranking and of the weights.
        weights: calibrated weights of the two terms of S, which then stand for those of Eq. 1 in the ranking, and a factor of
            the scores of agreement. None: S and the votes as they are.

    Raises:
        ValueError: the comparators are not what gem.config.comparator_weights expects.
    """
    comparators = comparator_weights(arguments)
    with_human = arguments.human_weight > 0
    plain, scores, votes = _scores(groups, weights)
    compared = torch.stack([{"entropy": scores, "agreement": votes}[name] for name in comparators])  # (C, B, K)
    mask = compared.isfinite().any(0) & _counted(groups, arguments, with_human)
    if arguments.filter_members and "entropy" in comparators:
        mask = keep_members(scores, mask)
    if with_human and arguments.reward == "bt":
        # The human preference is an observation of its own: it ranks the pair even where an answer has no score.
        for g, group in enumerate(groups):
            for human in (group.role("chosen"), group.role("rejected")):
                if human is not None:
                    mask[g, human] = True
    posterior = bradley_terry_posterior(
        compared,
        tau=[{"entropy": arguments.tau, "agreement": 1.0}[name] for name in comparators],
        prior_sd=arguments.prior_sd,
        weights=list(comparators.values()),
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
        min_spread = arguments.min_spread if "entropy" in comparators else 0.0
        told_apart = keep_groups(plain, posterior, mask, min_spread=min_spread)
        if "agreement" in comparators:  # a count is no noise: one vote more is told apart, however little it weighs
            told_apart |= votes_differ(votes, mask)
        kept &= told_apart
    if arguments.agreement_filter:
        kept &= torch.tensor([(with_human and group.has_pair) or agrees_in_part(group.votes) for group in groups])
    _write(groups, posterior, weight * kept[:, None], kept)


def _scores(groups: Sequence[Group], weights: Signals | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return S as Eq. 1 has it, and the scores of the comparators entropy and agreement: (B, K) each, K the most members.

    A vote counts even if its candidate leaves the ranking, with filter_members, as a copy or an outlier.
    """
    width = max(len(group.members) for group in groups)
    scores = torch.full((3, len(groups), width), torch.nan, dtype=torch.float64)
    trust = 1.0 if weights is None else weights.agreement
    for g, group in enumerate(groups):
        size = len(group.members)
        plain = [member.score for member in group.members]
        weighed = [_score(member, weights) for member in group.members]
        scores[:, g, :size] = torch.tensor(
            [plain, weighed, [trust * vote for vote in log_votes(group.votes)]], dtype=torch.float64
        )
    return scores[0], scores[1], scores[2]


def _score(member: Member, weights: Signals | None) -> float:
    """Return S with weights of its own for the two terms; NaN for a member without S."""
    if weights is None or math.isnan(member.score):
        return member.score
    return weights.branch * member.branch_entropy - weights.final * member.final_entropy


def _counted(groups: Sequence[Group], arguments: RankArguments, with_human: bool) -> Tensor:
    """Return the mask (B, K) of members that are no copies (with filter_members), nor human where the pair is left out."""
    counted = torch.zeros(len(groups), max(len(group.members) for group in groups), dtype=torch.bool)
    for g, group in enumerate(groups):
        # Human answers come first, so a candidate that repeats one of them counts as the copy.
        humans_first = sorted(
            range(len(group.members)), key=lambda i: group.members[i].role == "candidate" and with_human
        )
        unique = first_of_duplicates([_all_tokens(group.members[i]) for i in humans_first])
        first = dict(zip(humans_first, unique, strict=True))
        for i, member in enumerate(group.members):
            is_human = member.role != "candidate"
            counted[g, i] = with_human if is_human else first[i] or not arguments.filter_members
    return counted


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
