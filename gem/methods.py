"""The methods that the demo and the evidence compare: from a start, a few human pairs and many prompts to a trained model.

    trained = train_method(METHODS["GEM"], start, tokenizer, pairs, prompts, folder, seed=0, rate=2e-5, budget=Budget())

Every method takes the same number of optimizer steps, and those that sample, as many completions; METHODS lists every other
difference between them. `trained.spent` says what was spent.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from gem.answers import most_frequent
from gem.config import (
    GuardArguments,
    LossArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
    UnlabeledArguments,
)
from gem.data import Example
from gem.generators import Completion, TransformersGenerator
from gem.group import Group
from gem.head import ensure_fused, unfuse
from gem.mixing import mix
from gem.pipeline import GroupMaker, pair_group, weight_groups
from gem.rails import Verdict
from gem.trainer import GEMTrainer

Kind = Literal["pairs", "ranked", "voted", "online", "rloo"]
"""How a method trains.

    pairs   on the human pairs alone, whose prompts may get candidates of the start
    ranked  DPO on the best against the worst candidate of each group of the start's samples, filtered and ranked by S
    voted   supervised, on the human answers and on one candidate of the start that the vote of its group is for
    online  GEM: fresh candidates at every step, for prompts with and without a human pair
    rloo    TRL's RLOOTrainer, with the same prompts
"""
Reward = Literal["majority", "model", "perfect"]


@dataclass(frozen=True)
class Method:
    """Settings of one method, from the start on."""

    kind: Kind
    loss: LossArguments = field(default_factory=LossArguments)
    rank: RankArguments = field(default_factory=RankArguments)
    score: ScoreArguments = field(default_factory=ScoreArguments)
    reward: Reward | None = None  # of rloo
    candidates: bool = False  # pairs: whether their groups have candidates of the start
    unlabeled: bool = True  # online: whether it sees prompts without a human pair
    shuffled: bool = False  # online: S of the candidates of a group are dealt out at random


@dataclass(frozen=True)
class Budget:
    """What every method may spend.

    Raises:
        ValueError: micro_batch does not divide prompts.
    """

    steps: int = 80  # of the optimizer
    prompts: int = 16  # of a step
    group_size: int = 5  # completions sampled of a prompt
    max_new_tokens: int = 32
    unlabeled_share: float = UnlabeledArguments().unlabeled_share  # most of the prompts without a human pair
    rollout_batch_size: int = 512  # completions that are sampled together
    micro_batch: int = 0  # prompts of one forward and backward; 0: all of a step

    def __post_init__(self) -> None:
        if self.micro_batch and self.prompts % self.micro_batch:
            raise ValueError(f"micro_batch must divide the prompts of a step, {self.prompts}, got {self.micro_batch}")

    @property
    def micro(self) -> int:
        """The number of prompts of one forward and backward."""
        return self.micro_batch or self.prompts


@dataclass
class Trained:
    """A trained model and how it came about."""

    model: Any  # a transformers model
    history: list[dict[str, float]]  # Trainer's log
    spent: dict[str, float]  # optimizer_steps, sampled_tokens, seconds
    verdicts: list[Verdict] = field(default_factory=list)  # of the guard rails
    maker: GroupMaker | None = None  # of a method that trains online


def _sft_term(loss: str, weight: float) -> LossArguments:
    return LossArguments(loss=loss, sft_weight=weight)


_LITERAL_LOSS = LossArguments(kl_weight=0.0, sft_weight=0.0, taper=False)
_LITERAL_RANK = RankArguments(
    human_weight=0.0, reward="identity", weight_norm="std", filter_groups=False, calibrate=False
)

METHODS: dict[str, Method] = {
    "SFT": Method("pairs", LossArguments(loss="sft")),
    "RFT": Method("voted", LossArguments(loss="sft")),
    "DPO": Method("pairs", _sft_term("dpo", 0.0)),
    "DPO + SFT": Method("pairs", _sft_term("dpo", 0.1)),
    "IPO": Method("pairs", _sft_term("ipo", 0.0)),
    "IPO + SFT": Method("pairs", _sft_term("ipo", 0.1)),
    "PRO": Method("pairs", _sft_term("pro", 0.1), candidates=True),
    "listwise DPO": Method("pairs", _sft_term("listwise_dpo", 0.1), candidates=True),
    "reward model + RLOO": Method("rloo", reward="model"),
    "RLOO majority": Method("rloo", reward="majority"),
    "perfect reward": Method("rloo", reward="perfect"),
    "GEM": Method("online"),
    "GEM + agreement": Method("online", rank=RankArguments(comparators=["entropy", "agreement"])),
    "literal GEM": Method("online", _LITERAL_LOSS, _LITERAL_RANK),
    # the paper's ablations, and ours
    "GEM without terminal entropy": Method("online", score=ScoreArguments(final_weight=0.0)),
    "GEM without branching entropy": Method("online", score=ScoreArguments(branch_weight=0.0)),
    "GEM without both": Method("online", score=ScoreArguments(final_weight=0.0, branch_weight=0.0)),
    "filtering + DPO": Method("ranked", _sft_term("dpo", 0.1), RankArguments(filter_members=True)),
    "GEM without human pair": Method(
        "online", LossArguments(sft_weight=0.0), RankArguments(human_weight=0.0, calibrate=False)
    ),
    "GEM without unlabeled prompts": Method("online", unlabeled=False),
    "GEM without calibration": Method("online", rank=RankArguments(calibrate=False)),
    "GEM filtered by agreement": Method("online", rank=RankArguments(agreement_filter=True)),
    "GEM with random S": Method("online", shuffled=True),
    "GEM by agreement alone": Method("online", rank=RankArguments(comparators=["agreement"])),
    "GEM + agreement filtering members": Method(
        "online", rank=RankArguments(comparators=["entropy", "agreement"], filter_members=True)
    ),
}


@dataclass
class _Arm:
    """A method at work: its settings, data and models, and the tokens that it samples."""

    method: Method
    budget: Budget
    start: Any
    model: Any  # a copy of the start, to be trained
    tokenizer: Any
    pairs: list[Example]
    prompts: list[Example]  # without human answers
    sampled_tokens: int = 0

    @property
    def rollout(self) -> RolloutArguments:
        budget = self.budget
        return RolloutArguments(
            group_size=budget.group_size,
            max_new_tokens=budget.max_new_tokens,
            rollout_batch_size=budget.rollout_batch_size,
        )

    @property
    def draws(self) -> int:
        """The number of prompts that the budget lets a method train on, with repetitions."""
        return self.budget.steps * self.budget.prompts

    def mixed(self, pairs: Sequence[Any], prompts: Sequence[Any]) -> list[Any]:
        """Return both kinds in the budget's shares, often enough for all steps to be one round."""
        return filled(mix(pairs, prompts, self.budget.unlabeled_share), self.draws)

    def generator(self, model: nn.Module) -> Callable[..., list[list[Completion]]]:
        """Return a generator on a model that adds up its tokens."""
        own = TransformersGenerator(model, self.tokenizer, self.rollout)

        def count(*arguments: Any, **keywords: Any) -> list[list[Completion]]:
            drawn = own(*arguments, **keywords)
            self.sampled_tokens += sum(len(completion.ids) for completions in drawn for completion in completions)
            return drawn

        return count

    def maker(self, model: nn.Module) -> GroupMaker:
        """Return the maker of groups whose candidates, scores and ranks are a model's."""
        kind = ShuffledScores if self.method.shuffled else GroupMaker
        rank, score = self.method.rank, self.method.score
        draw = self.generator(model)
        return kind(model, self.tokenizer, self.rollout, score, rank, self.start, generator=draw, pairs=self.pairs)

    def groups(self) -> list[Group]:
        """Return the groups that a method of kind pairs, voted or ranked trains on."""
        match self.method.kind:
            case "pairs" if self.method.candidates:
                # Fresh candidates whenever a pair comes again.
                return self.maker(self.start)(filled(self.pairs, self.draws))
            case "pairs":
                groups = [pair_group(example) for example in self.pairs]
                if self.method.loss.loss in ("dpo", "ipo"):
                    self.maker(self.start).refer(groups)
                return filled(groups, self.draws)
            case "voted":
                voted = [winner for group in self._candidates(self.prompts) if (winner := voted_group(group))]
                return self.mixed([pair_group(example) for example in self.pairs], voted)
            case _:
                groups = self.maker(self.start)(self._affordable([*self.pairs, *self.prompts]))
                return filled([duel for group in groups if (duel := best_and_worst(group))], self.draws)

    def _affordable(self, examples: list[Example]) -> list[Example]:
        return examples[: self.draws]

    def _candidates(self, examples: list[Example]) -> list[Group]:
        """Return candidates of the start for as many prompts as the budget lets a method sample from."""
        return self.maker(self.start).draw(self._affordable(examples)) if examples else []


class ShuffledScores(GroupMaker):
    """GroupMaker that deals out the scores of a group among its candidates at random: S without information."""

    def weigh(self, groups: Sequence[Group], stats: Any = None, progress: bool = False) -> None:
        super().weigh(groups, stats, progress)
        for group in groups:
            scored = [member for member in group.members if member.role == "candidate"]
            order = torch.randperm(len(scored)).tolist()
            terms = [(scored[i].score, scored[i].final_entropy, scored[i].branch_entropy) for i in order]
            for member, dealt in zip(scored, terms, strict=True):
                member.score, member.final_entropy, member.branch_entropy = dealt
        weight_groups(groups, self.rank, self.weights)


def filled(items: Sequence[Any], n: int) -> list[Any]:
    """Return the items, repeated in order if they are fewer than n."""
    return list(items) if len(items) >= n else list(islice(cycle(items), n))


def voted_group(group: Group) -> Group | None:
    """Return a group whose chosen answer is the first candidate of the most frequent answer; None without two equal votes."""
    answer, votes = most_frequent(group.votes)
    if votes < 2:
        return None
    winner = group.members[group.votes.index(answer)]
    return replace(group, members=[replace(winner, role="chosen", sampled=False)])


def best_and_worst(group: Group) -> Group | None:
    """Return a group with the best member of the ranking as chosen and the worst as rejected; None if it was filtered out."""
    ranked = sorted((m for m in group.members if m.rank_mean == m.rank_mean), key=lambda m: m.rank_mean)  # not NaN
    if not group.kept or len(ranked) < 2:
        return None
    worst, best = ranked[0], ranked[-1]
    return replace(group, members=[replace(best, role="chosen"), replace(worst, role="rejected")])


def train_method(
    method: Method,
    start: Any,
    tokenizer: Any,
    pairs: Sequence[Example],
    prompts: Sequence[Example],
    folder: Path,
    *,
    seed: int,
    rate: float,
    budget: Budget,
    answers: Mapping[str, str] | None = None,
    evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
    **training: Any,
) -> Trained:
    """Train a copy of the start.

    Args:
        method: one of METHODS, or another.
        start: a transformers model; it stays as it is, and is the reference of every KL term. The copy shares what is not
            trained, as under adapters.
        tokenizer: the model's tokenizer.
        pairs: examples with a human pair.
        prompts: examples of which the prompt alone is read.
        folder: the trainer's output_dir; it gets the log, trainer_state.json.
        seed: of the order of the data and of what is sampled.
        rate: learning rate, constant.
        budget: what may be spent.
        answers: the right answer (gem.answers.normalise) by prompt, for the perfect reward.
        evaluation: model -> metrics, where `training` asks for it; not for rloo, which is TRL's.
        training: further settings of TrainingArguments.

    Raises:
        ValueError: there are no pairs, or no answers for a perfect reward.
        Diverged: a number is not finite.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one example, got none")
    began = time.perf_counter()
    set_seed(seed)
    bare = [replace(e, chosen_ids=[], rejected_ids=[], chosen_given=[], rejected_given=[]) for e in prompts]
    frozen = {id(p): p for p in start.parameters() if not p.requires_grad}  # under adapters: most of the model
    arm = _Arm(method, budget, start, copy.deepcopy(start, frozen), tokenizer, list(pairs), bare)
    settings = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": budget.steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "use_cpu": start.device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        **training,
    }
    trained = _train_rloo(arm, settings, answers) if method.kind == "rloo" else _train(arm, settings, evaluation)
    trained.spent = {
        "optimizer_steps": budget.steps * (2 if method.reward == "model" else 1),  # the reward model takes as many
        "sampled_tokens": arm.sampled_tokens,
        "seconds": time.perf_counter() - began,
    }
    return trained


def _train(arm: _Arm, settings: dict[str, Any], evaluation: Any) -> Trained:
    """Train with GEMTrainer."""
    maker, data = None, []
    if arm.method.kind == "online":
        maker = arm.maker(arm.model)
        data = arm.mixed(arm.pairs, arm.prompts if arm.method.unlabeled else [])
    trainer = GEMTrainer(
        arm.model,
        TrainingArguments(
            per_device_train_batch_size=arm.budget.micro,
            gradient_accumulation_steps=arm.budget.prompts // arm.budget.micro,
            **settings,
        ),
        loss=arm.method.loss,
        guard=GuardArguments(stop_patience=0, stop_growth=0, stop_idle=0),  # a comparison needs equal budgets
        train_dataset=data or arm.groups(),
        processing_class=arm.tokenizer,
        make_groups=maker,
        evaluation=evaluation,
    )
    trainer.train()
    trainer.save_state()
    return Trained(arm.model, trainer.state.log_history, {}, trainer.verdicts(), maker)


def _train_rloo(arm: _Arm, settings: dict[str, Any], answers: Mapping[str, str] | None) -> Trained:
    """Train with TRL's RLOOTrainer on all prompts alike."""
    from gem.integrations.rloo import majority_reward, model_reward, perfect_reward, train_rloo  # TRL is an extra

    match arm.method.reward:
        case "perfect":
            if answers is None:
                raise ValueError("answers must be given for a perfect reward, got None")
            reward = perfect_reward(answers)
        case "model":
            reward = model_reward(arm.start, arm.tokenizer, filled(arm.pairs, arm.draws), arm.budget, settings)
        case _:
            reward = majority_reward
    examples = arm.mixed(arm.pairs, arm.prompts)
    ensure_fused(arm.model)
    unfuse(arm.model)  # TRL puts a forward of its own before the model's, and gem's head would not find its own again
    history, arm.sampled_tokens = train_rloo(
        arm.model, arm.start, arm.tokenizer, examples, reward, arm.method.score.markers, arm.budget, settings
    )
    return Trained(arm.model, history, {})
