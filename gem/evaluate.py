"""Held-out numbers: preference accuracy three ways beside length alone, AUROC of the score, task accuracy."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from gem.answers import final_answer
from gem.config import EvalArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.distributed import awaits_shards, gathered, processes, whole_weights
from gem.ends import Ends, model_ends
from gem.fingerprint import state_hash
from gem.generators import (
    Completion,
    Generator,
    TransformersGenerator,
    check_room,
    draw_completions,
    prompt_batches,
    seeded,
)
from gem.group import Group, Member
from gem.head import ensure_fused
from gem.score import score_groups, token_stats

logger = logging.getLogger(__name__)

MAJORITY_SAMPLES = 3  # the least that can outvote one another


class Evaluation:
    """Callable that turns a model into metrics on held-out examples. Its reference is the model that it is built on.

    Metrics are shares unless noted; one that is undefined, such as an AUROC when all answers are right, is absent:
        preference_sum, _token, _reference: pairs with r(chosen) > r(rejected); r = log pi, log pi per token, or log pi minus
            the reference's; a tie counts half. preference_length: the share that length alone reaches, in its better
            direction.
        accuracy_greedy, accuracy_sampled: completions with the final answer of the chosen completion, over the examples
            whose chosen completion is one turn.
        accuracy_majority: questions whose most frequent answer among the samples that ended with one is right, a tie of n
            answers counting 1/n; with 3 samples or more.
        auroc: how well S separates right from wrong sampled completions.
        truncated: sampled completions that were cut off. Means over them: final_entropy, branch_entropy (nats), length
            (tokens).

    After a call, `completions` holds the first greedy completions. With several processes each makes a part of the work, so
    that all of them must build it and call it.

    Args:
        model: the reference, as a rule the model before training.
        tokenizer: the model's tokenizer.
        examples: held-out examples; eval_limit takes the first of them.
        rollout: how answers are sampled.
        score: settings of Eq. 1.
        arguments: eval_limit and eval_samples.
        generator: where the answers come from; None: transformers' generate on the model of each call.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Sequence[Example],
        rollout: RolloutArguments,
        score: ScoreArguments,
        arguments: EvalArguments,
        generator: Generator | None = None,
    ) -> None:
        self.tokenizer, self.rollout, self.score, self.generator = tokenizer, rollout, score, generator
        self.samples = arguments.eval_samples
        self.examples = held_out(examples, arguments)
        self.pairs = [e for e in self.examples if e.rejected_ids]
        self.answered = answered(self.examples)
        if len(self.answered) < len(self.examples):
            several = len(self.examples) - len(self.answered)
            logger.warning(
                "%d of %d held-out records have several turns: nothing is sampled for them", several, len(self.examples)
            )
        ends = model_ends(model, tokenizer, rollout.stop)
        self.expected = [self._answer(e.chosen_ids, ends) for e in self.answered]
        self.completions: list[dict[str, str]] = []
        if generator is None:  # found out now, not after the training
            check_room(model, [e.sampled_from for e in self.answered], rollout)
        self.reference: Tensor | None = None
        self._start: str | None = None  # hash of the reference, until a call meets other weights
        if not awaits_shards(model):
            self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Take a model for the reference: GEMTrainer does so with one that FSDP2 has sharded by then. Collective."""
        ensure_fused(model)
        self.reference = self._pair_logprobs(model)
        self._start = state_hash(model) if self.pairs else None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of the model, those with a finite value: the same on every process. Collective."""
        if self.reference is None:
            self.attach(model)
        ensure_fused(model)
        metrics = {**self._preference(model), **self._task(model)}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _pair_logprobs(self, model: nn.Module) -> Tensor:
        """Return the summed log-probs (P, 2) of the chosen and the rejected answers."""
        sequences = [
            (e.prompt_ids, ids, given)
            for e in self.pairs
            for ids, given in ((e.chosen_ids, e.chosen_given), (e.rejected_ids, e.rejected_given))
        ]
        stats = token_stats(model, sequences, batch_tokens=self.score.score_tokens, shared=True)
        return torch.tensor([float(s.logprob.sum()) for s in stats]).view(-1, 2)

    def _preference(self, model: nn.Module) -> dict[str, float]:
        """Return the preference metrics, none without pairs."""
        if not self.pairs:
            return {}
        # The first evaluation is often that of the reference itself: before the first step, or by `gem-kernels eval`.
        if self._start is not None and any(gathered(self._start != state_hash(model))):
            self._start = None
        reference = cast(Tensor, self.reference)
        logprob = reference if self._start is not None else self._pair_logprobs(model)
        length = torch.tensor([[len(e.chosen_ids), len(e.rejected_ids)] for e in self.pairs])
        longer = preference_accuracy(length.float())
        return {
            "preference_sum": preference_accuracy(logprob),
            "preference_token": preference_accuracy(logprob / length),
            "preference_reference": preference_accuracy(logprob - reference),
            "preference_length": max(longer, 1 - longer),
        }

    def _task(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of generated answers, none without examples of one turn."""
        if not self.answered:
            return {}
        ends = model_ends(model, self.tokenizer, self.rollout.stop)
        generator = self.generator or TransformersGenerator(model, self.tokenizer, self.rollout)
        prompts = [e.sampled_from for e in self.answered]
        drawn = self._draw(generator, prompts, 1, ends, greedy=True)
        greedy = [completion.ids for (completion,) in drawn]
        right = [self._is_right(ids, expected, ends) for ids, expected in zip(greedy, self.expected, strict=True)]
        self.completions = [
            {
                "prompt": example.prompt,
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "expected": expected,
                "correct": str(ok).lower(),
            }
            for example, ids, expected, ok in list(zip(self.answered, greedy, self.expected, right, strict=True))[:20]
        ]
        metrics = {"accuracy_greedy": sum(right) / len(right)}
        return {**metrics, **self._sampled(model, generator, prompts, ends)} if self.samples else metrics

    def _sampled(
        self, model: nn.Module, generator: Generator, prompts: Sequence[list[int]], ends: Ends
    ) -> dict[str, float]:
        """Return the metrics of `samples` completions per prompt: their accuracy, and how S orders them."""
        drawn = self._draw(generator, prompts, self.samples, ends)
        groups = [
            Group(
                e.prompt,
                e.prompt_ids,
                [Member("candidate", completion.ids, sampled=True)],
                question=e.question,
                sampling_prompt_ids=prompt,
            )
            for e, prompt, completions in zip(self.answered, prompts, drawn, strict=True)
            for completion in completions
        ]
        expected = [answer for answer in self.expected for _ in range(self.samples)]
        score_groups(groups, self.tokenizer, model, None, self.score, ends=ends, shared=True)
        sampled = [group.members[0] for group in groups]
        given = ["" if m.truncated else m.answer for m in sampled]
        correct = [bool(answer) and own == answer for own, answer in zip(given, expected, strict=True)]
        votes = [given[at : at + self.samples] for at in range(0, len(given), self.samples)]
        voted = [majority(own, answer) for own, answer in zip(votes, self.expected, strict=True)]
        scored = [i for i, m in enumerate(sampled) if math.isfinite(m.score)]
        return {
            "accuracy_sampled": sum(correct) / len(correct),
            "accuracy_majority": _mean(voted) if self.samples >= MAJORITY_SAMPLES else math.nan,
            "auroc": auroc([sampled[i].score for i in scored], [correct[i] for i in scored]),
            "truncated": sum(m.truncated for m in sampled) / len(sampled),
            "length": sum(len(m.ids) for m in sampled) / len(sampled),
            "final_entropy": _mean([m.final_entropy for m in sampled]),
            "branch_entropy": _mean([m.branch_entropy for m in sampled]),
        }

    def _draw(
        self, generator: Generator, prompts: Sequence[list[int]], n: int, ends: Ends, *, greedy: bool = False
    ) -> list[list[Completion]]:
        """Return n completions of each prompt, of which every process draws a part: whole batches of one process.

        The random numbers of a batch depend on torch's global generator and the batch alone, so any number of processes that
        were seeded alike draws the same.
        """
        rank, count = processes()
        whole: AbstractContextManager[None] = nullcontext()
        if isinstance(generator, TransformersGenerator):
            batches, whole = prompt_batches(prompts, n, self.rollout.rollout_batch_size), whole_weights(generator.model)
        else:  # a server has its own
            batches = [list(range(first, len(prompts), count)) for first in range(min(count, len(prompts)))]
        key = int(torch.randint(1 << 62, ()))
        drawn: dict[int, list[Completion]] = {}
        with whole:
            for first in range(0, len(batches), count):
                own = batches[first + rank] if first + rank < len(batches) else []
                with seeded(key, first + rank):
                    asked = [prompts[i] for i in own]
                    found = draw_completions(generator, asked, n, ends, self.tokenizer, greedy=greedy)
                drawn |= dict(zip(own, found, strict=True))
        every = {i: completions for part in gathered(drawn) for i, completions in part.items()}
        return [every[i] for i in range(len(prompts))]

    def _answer(self, ids: Sequence[int], ends: Ends) -> str:
        """Return the final answer of a completion, normalised."""
        return final_answer(ids, self.tokenizer, ends, self.score.markers)

    def _is_right(self, ids: Sequence[int], expected: str, ends: Ends) -> bool:
        return ends.has_ended(ids, self.tokenizer) and bool(expected) and self._answer(ids, ends) == expected


def held_out(examples: Sequence[Example], arguments: EvalArguments) -> list[Example]:
    """Return the examples of an evaluation: the first eval_limit of them, or all."""
    return list(examples[: arguments.eval_limit] if arguments.eval_limit else examples)


def answered(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that are answered: a completion is one turn, and compares with no record of several."""
    return [e for e in examples if not e.chosen_given]


def preference_accuracy(reward: Tensor) -> float:
    """Return the share of pairs whose chosen reward is the higher one, a tie counting half; NaN without pairs.

    Args:
        reward: (P, 2) rewards of the chosen and the rejected answers.
    """
    above, below = reward.unbind(1)
    return float((above > below).float().add((above == below).float(), alpha=0.5).mean())


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return P(score of a positive > score of a negative), a tie counting half (Mann-Whitney); NaN if either is missing."""
    s, y = torch.tensor(scores, dtype=torch.float64), torch.tensor(positive, dtype=torch.bool)
    if not y.any() or y.all():
        return math.nan
    # Equal scores share their mean rank: the average of the first and the last rank that they occupy.
    ordered = s.sort().values
    rank = (torch.searchsorted(ordered, s) + torch.searchsorted(ordered, s, right=True) + 1).double() / 2
    n = int(y.sum())
    return float((rank[y].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


def majority(answers: Sequence[str], expected: str) -> float:
    """Return 1 if the expected answer is the most frequent one, 1/n if n answers tie for that, else 0; "" is no answer."""
    counts = Counter(answer for answer in answers if answer)
    most = max(counts.values(), default=0)
    leading = [answer for answer, count in counts.items() if count == most]
    return 1 / len(leading) if expected in leading else 0.0


def pair_auroc(groups: Sequence[Group]) -> float:
    """Return the share of human pairs that S orders correctly, a tie counting half; NaN if no pair has two scores."""
    pairs = []
    for group in groups:
        chosen, rejected = group.role("chosen"), group.role("rejected")
        if chosen is not None and rejected is not None:
            pairs.append([group.members[chosen].score, group.members[rejected].score])
    scores = torch.tensor(pairs).view(-1, 2)
    return preference_accuracy(scores[scores.isfinite().all(1)])


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
