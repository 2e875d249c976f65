"""What the log of a training shows of its groups, as means over steps and processes; and its progress bar."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import ProgressCallback, TrainerState

from gem.group import Group, Member

Part = tuple[float, int]
"""The sum and the number of the values that a process has of a mean."""


class Health:
    """Values recorded in the course of steps, by name.

    mixed: True if the training has groups with and without a human pair.
    """

    def __init__(self, mixed: bool = False) -> None:
        self.mixed = mixed
        self._values: dict[str, list[float]] = {}
        self._largest: dict[str, float] = {}
        self._steps: list[dict[str, Part]] = []  # of `group_health`, this process's part of each step

    def record(self, name: str, value: Tensor | float) -> float:
        """Keep a value for the mean that the next log shows, and return it."""
        self._values.setdefault(name, []).append(float(value))
        return self._values[name][-1]

    def record_gap(self, gap: float) -> None:
        """Record how far the sampler is from the policy: the log shows the mean and the largest. NaN is passed over."""
        self.record("sampler_gap", gap)
        if not math.isnan(gap):
            self._largest["sampler_gap_max"] = max(gap, self._largest.get("sampler_gap_max", 0.0))

    def record_groups(self, groups: Sequence[Group]) -> None:
        """Record `group_health` of this process's groups of a step: the log shows the mean over steps of its mean."""
        self._steps.append({name: _part(values) for name, values in group_health(groups, self.mixed).items()})

    def means(self) -> dict[str, float]:
        """Return the mean over all processes of each value recorded since the last call, and the largest gap.

        A value that no process has recorded is absent.
        """
        own = {name: _part(values) for name, values in self._values.items()}
        everyone: list[tuple[dict[str, Part], list[dict[str, Part]], dict[str, float]]] = gather_object(
            [(own, self._steps, self._largest)]
        )
        gaps = [largest["sampler_gap_max"] for _, _, largest in everyone if largest]
        of_steps = [_means(parts) for parts in zip(*(steps for _, steps, _ in everyone), strict=True)]
        names = dict.fromkeys(name for step in of_steps for name in step)
        over_steps = {name: _part([step[name] for step in of_steps if name in step]) for name in names}
        found = {**_means([values for values, _, _ in everyone]), **_means([over_steps])}
        self._values, self._largest, self._steps = {}, {}, []
        return {**found, **({"sampler_gap_max": max(gaps)} if gaps else {})}


def _part(values: Sequence[float]) -> Part:
    """Return the sum and the number of the finite values."""
    finite = [x for x in values if math.isfinite(x)]
    return math.fsum(finite), len(finite)


def _means(parts: Iterable[dict[str, Part]]) -> dict[str, float]:
    """Return the mean of each name over the parts that have values of it."""
    sums: dict[str, list[Part]] = {}
    for name, part in (item for own in parts for item in own.items()):
        sums.setdefault(name, []).append(part)
    counts = {name: sum(n for _, n in own) for name, own in sums.items()}
    return {name: sum(total for total, _ in sums[name]) / n for name, n in counts.items() if n}


def group_health(groups: Sequence[Group], mixed: bool = False) -> dict[str, list[float]]:
    """Return the values behind the report's curves for the candidates of a batch; {} if there are none (sft, dpo).

    Args:
        groups: of a batch.
        mixed: True adds the values of the groups without a human pair alone, and the share of these groups. A batch without
            one has a share, 0, and none of the other values.
    """
    candidates = [member for group in groups for member in group.members if member.role == "candidate"]
    if not candidates:
        return {}
    values = _values(groups)
    if mixed:
        alone = _values([group for group in groups if not group.has_pair])
        values["unlabeled"] = [float(not group.has_pair) for group in groups]
        values |= {f"unlabeled_{name}": alone[name] for name in ("kept", "score", "distinct")}
    return values


def _values(groups: Sequence[Group]) -> dict[str, list[float]]:
    candidates = [member for group in groups for member in group.members if member.role == "candidate"]
    answers = [[_answer(m) for m in group.members if m.role == "candidate"] for group in groups]
    return {
        "score": [m.score for m in candidates],
        "final_entropy": [m.final_entropy for m in candidates],
        "branch_entropy": [m.branch_entropy for m in candidates],
        "length": [float(len(m.ids)) for m in candidates],
        "truncated": [float(m.truncated) for m in candidates],
        "flawed": [float(bool(m.flaw)) for m in candidates],
        "span_fallback": [float(m.span_rule != "marker") for m in candidates],
        "distinct": [float(len(set(given))) for given in answers],
        "agreement": [_agreement(given) for given in answers if given],
        "kept": [float(group.kept) for group in groups],
    }


def _answer(member: Member) -> tuple[int, ...]:
    """Return the tokens of the final answer; () if there is none."""
    return tuple(member.ids[slice(*member.answer_span)])


def _agreement(answers: Sequence[tuple[int, ...]]) -> float:
    """Return the share of the candidates that give the answer which most of them give; no answer agrees with none."""
    return max([n for answer, n in Counter(answers).items() if answer], default=0) / len(answers)


class Progress(ProgressCallback):
    """Trainer's progress bar with a few numbers behind it, instead of a printed dictionary per step."""

    SHOWN = ("loss", "score", "eval_accuracy_sampled", "eval_preference_sum")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            self.shown = {**getattr(self, "shown", {}), **{k: f"{logs[k]:.3g}" for k in self.SHOWN if k in logs}}
            self.training_bar.set_postfix(self.shown)
