"""Held-out numbers: preference accuracy three ways beside length alone, AUROC of the score, task accuracy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

from gem.config import EvalArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.groups import Group, Member
from gem.head import ensure_fused
from gem.rollout import generate
from gem.score import score_groups, token_stats
from gem.spans import find_spans

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")


class Evaluation:
    """A model -> metrics on held-out examples. Build it on the model before training: that one is the reference.

    Metrics (shares unless said otherwise; a metric that cannot be had, such as an AUROC when all answers are right, is
    absent):
        preference_sum, _token, _reference: pairs with r(chosen) > r(rejected); r = log pi, log pi per token, or log pi minus
            the reference's; a tie counts half. preference_length: what length alone reaches, in its better direction.
        accuracy_greedy, accuracy_sampled: completions whose final answer is that of the chosen completion.
        auroc: how well S tells right from wrong sampled completions; truncated, and in nats or tokens: final_entropy,
            branch_entropy, length.

    After a call, `completions` holds the first greedy completions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Sequence[Example],
        rollout: RolloutArguments,
        score: ScoreArguments,
        arguments: EvalArguments,
    ) -> None:
        self.tokenizer, self.rollout, self.score = tokenizer, rollout, score
        self.samples = arguments.eval_samples
        self.examples = list(examples[: arguments.eval_limit] if arguments.eval_limit else examples)
        self.pairs = [e for e in self.examples if e.rejected_ids]
        self.expected = [self._answer(e.chosen_ids) for e in self.examples]
        self.completions: list[dict[str, str]] = []
        ensure_fused(model)
        self.reference = self._pair_logprobs(model)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        ensure_fused(model)
        metrics = {**self._preference(model), **self._task(model)}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _pair_logprobs(self, model: nn.Module) -> Tensor:
        """(P, 2) summed log-probs of chosen and rejected."""
        sequences = [(e.prompt_ids, ids) for e in self.pairs for ids in (e.chosen_ids, e.rejected_ids)]
        stats = token_stats(model, sequences, batch_tokens=self.score.score_tokens)
        return torch.tensor([float(s.logprob.sum()) for s in stats]).view(-1, 2)

    def _preference(self, model: nn.Module) -> dict[str, float]:
        if not self.pairs:
            return {}
        logprob = self._pair_logprobs(model)
        length = torch.tensor([[len(e.chosen_ids), len(e.rejected_ids)] for e in self.pairs])
        longer = preference_accuracy(length.float())
        return {
            "preference_sum": preference_accuracy(logprob),
            "preference_token": preference_accuracy(logprob / length),
            "preference_reference": preference_accuracy(logprob - self.reference),
            "preference_length": max(longer, 1 - longer),
        }

    def _task(self, model: nn.Module) -> dict[str, float]:
        prompts = [e.prompt_ids for e in self.examples]
        greedy = generate(model, self.tokenizer, prompts, self.rollout, greedy=True)
        right = [self._is_right(ids, expected) for ids, expected in zip(greedy, self.expected, strict=True)]
        self.completions = [
            {
                "prompt": example.prompt,
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "expected": expected,
                "correct": str(ok).lower(),
            }
            for example, ids, expected, ok in list(zip(self.examples, greedy, self.expected, right, strict=True))[:20]
        ]
        metrics = {"accuracy_greedy": sum(right) / len(right)}
        if not self.samples:
            return metrics
        groups = [Group(e.prompt, e.prompt_ids, []) for e in self.examples for _ in range(self.samples)]
        expected = [answer for answer in self.expected for _ in range(self.samples)]
        for group, ids in zip(
            groups, generate(model, self.tokenizer, [g.prompt_ids for g in groups], self.rollout), strict=True
        ):
            group.members = [Member("candidate", ids)]
        score_groups(groups, self.tokenizer, model, None, self.score)
        sampled = [group.members[0] for group in groups]
        correct = [self._is_right(m.ids, answer) for m, answer in zip(sampled, expected, strict=True)]
        scored = [i for i, m in enumerate(sampled) if math.isfinite(m.score)]
        return {
            **metrics,
            "accuracy_sampled": sum(correct) / len(correct),
            "auroc": auroc([sampled[i].score for i in scored], [correct[i] for i in scored]),
            "truncated": sum(m.truncated for m in sampled) / len(sampled),
            "length": sum(len(m.ids) for m in sampled) / len(sampled),
            "final_entropy": _mean([m.final_entropy for m in sampled]),
            "branch_entropy": _mean([m.branch_entropy for m in sampled]),
        }

    def _answer(self, ids: Sequence[int]) -> str:
        span = find_spans(ids, self.tokenizer, markers=self.score.markers, last_tokens=len(ids)).answer
        return normalise(self.tokenizer.decode(list(ids[slice(*span)]), skip_special_tokens=True))

    def _is_right(self, ids: Sequence[int], expected: str) -> bool:
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        return ended and bool(expected) and self._answer(ids) == expected


def preference_accuracy(reward: Tensor) -> float:
    """(P, 2) rewards of chosen and rejected -> share of pairs with the chosen above, ties half; NaN without pairs."""
    above, below = reward.unbind(1)
    return float((above > below).float().add((above == below).float(), alpha=0.5).mean())


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney); NaN when one of the two is missing."""
    s, y = torch.tensor(scores, dtype=torch.float64), torch.tensor(positive, dtype=torch.bool)
    if not y.any() or y.all():
        return math.nan
    # The mean rank of equal scores, counted from how many lie below and at each.
    ordered = s.sort().values
    rank = (torch.searchsorted(ordered, s) + torch.searchsorted(ordered, s, right=True) + 1).double() / 2
    n = int(y.sum())
    return float((rank[y].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


def pair_auroc(groups: Sequence[Group]) -> float:
    """Share of human pairs that S orders rightly, ties half; NaN when no pair has two scores."""
    pairs = []
    for group in groups:
        chosen, rejected = group.role("chosen"), group.role("rejected")
        if chosen is not None and rejected is not None:
            pairs.append([group.members[chosen].score, group.members[rejected].score])
    scores = torch.tensor(pairs).view(-1, 2)
    return preference_accuracy(scores[scores.isfinite().all(1)])


def normalise(answer: str) -> str:
    """What is compared of a final answer: its last number, without separators and trailing zeros, else its words."""
    numbers = NUMBER.findall(answer)
    if numbers:
        number = f"{Decimal(numbers[-1].replace(',', '')):f}"  # every digit counts: two floats may print alike
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return "0" if number == "-0" else number
    return " ".join(answer.lower().split()).strip(" .")


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
