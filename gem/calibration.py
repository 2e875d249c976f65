"""How far the human pairs bear out what ranks the candidates: the two terms of S, and agreement.

    calibration = Calibration(groups)     # pairs, scored under the model before training
    calibration.follow(orders(groups))    # after a step: the policy's own candidates for their prompts
    calibration.trust                     # a factor in (-1, 1] of each signal

A prompt with a human pair is a small test of a signal: does it order right and wrong answers rightly? Before training the
answers are the two of the pair. In online training they are the candidates that the policy just gave, right if their answer is
that of the chosen one: those are the answers that the signal ranks, and a policy that games a signal is found out while some of
its answers are still right.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.files import write_lines
from gem.group import Group, Member
from gem.rank import log_votes
from gem.run_files import CALIBRATION_FILE, read_object

logger = logging.getLogger(__name__)
WINDOW = 256  # prompts that count, the latest ones: more would move a trust by less than 0.1


class Signals(NamedTuple):
    """A number of each signal; a higher value of a signal claims a better answer."""

    final: float  # minus the entropy of the answer
    branch: float  # the branch entropy of the reasoning
    agreement: float  # the number of candidates that give the answer


UNKNOWN = Signals(math.nan, math.nan, math.nan)


def trust_in(orders: Sequence[float]) -> float:
    """Return how far orders of answers bear out a signal: 2q - 1 in (-1, 1], with q = (h + 1) / (n + 1).

    h of n prompts are ordered rightly. The claim of the signal counts as one more prompt: it is trusted until prompts
    contradict it. A signal that orders answers at random comes to count as nothing, one that orders them wrongly the other way.

    Args:
        orders: of each prompt, 1: right above wrong, -1: wrong above right, between them: in part; NaN: it tells nothing.
    """
    known = [order for order in orders if not math.isnan(order)]
    right = sum((1 + order) / 2 for order in known)
    return 2 * (right + 1) / (len(known) + 1) - 1


def order_of_pair(group: Group) -> Signals:
    """Return how the signals order the human pair of a group; candidates alone have votes."""
    chosen, rejected = (_human(group, role) for role in ("chosen", "rejected"))
    if math.isnan(chosen.score) or math.isnan(rejected.score):
        return UNKNOWN
    final, branch = map(_sign, _gaps(chosen, rejected))
    return Signals(final, branch, math.nan)


def order_of_candidates(group: Group) -> Signals | None:
    """Return how the signals order the candidates of a group with a human pair, on average over each right and each wrong one.

    Right is a candidate whose answer is that of the human's chosen one. A candidate that does not vote, or has no score, does
    not count. Agreement tells nothing where no two candidates share an answer, as in the ranking (gem.rank.log_votes).
    None: the others are all right, or all wrong; or the chosen answer is no answer to compare with, as it was found without a
    marker, was cut off, or is that of a later turn.
    """
    chosen = _human(group, "chosen")
    if chosen.span_rule != "marker" or chosen.truncated or chosen.given:
        return None
    judged = [
        (member, vote, shared)
        for member, vote, shared in zip(group.members, group.votes, log_votes(group.votes), strict=True)
        if vote and not math.isnan(member.score)
    ]
    right = [(member, shared) for member, vote, shared in judged if vote == chosen.answer]
    wrong = [(member, shared) for member, vote, shared in judged if vote != chosen.answer]
    gaps = [(*_gaps(a, b), of_a - of_b) for a, of_a in right for b, of_b in wrong]
    return Signals(*(sum(map(_sign, gap)) / len(gaps) for gap in zip(*gaps, strict=True))) if gaps else None


def orders(groups: Sequence[Group]) -> list[tuple[str, Signals]]:
    """Return the prompt and `order_of_candidates` of the groups that have one."""
    found = [(group.prompt, order_of_candidates(group)) for group in groups if group.has_pair]
    return [(prompt, order) for prompt, order in found if order is not None]


def _human(group: Group, role: str) -> Member:
    return next(member for member in group.members if member.role == role)


def _gaps(better: Member, worse: Member) -> tuple[float, float]:
    """Return by how much the signals final and branch are higher for one member than for another, in nats."""
    return worse.final_entropy - better.final_entropy, better.branch_entropy - worse.branch_entropy


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _sign(gap: float) -> float:
    return math.nan if math.isnan(gap) else float((gap > 0) - (gap < 0))


class Calibration(TrainerCallback):
    """Trust in the signals, from the last WINDOW prompts with a human pair.

    Its orders are saved with every checkpoint that a run can go on from, so it must come before KeepWhole among the callbacks,
    which writes the manifest.

    Args:
        groups: with a human pair each, scored under the model before training; the first WINDOW count.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._orders: dict[str, Signals] = {}
        self.follow((group.prompt, order_of_pair(group)) for group in groups[:WINDOW])
        self._begun = self._orders

    def follow(self, found: Iterable[tuple[str, Signals]]) -> None:
        """Let prompts count with new orders, from now on, in place of their old ones and, beyond WINDOW, of the oldest.

        Several orders of one prompt count as their mean.
        """
        new: dict[str, list[Signals]] = {}
        for prompt, order in found:
            new.setdefault(prompt, []).append(order)
        kept = {prompt: order for prompt, order in self._orders.items() if prompt not in new}
        latest = {**kept, **{prompt: Signals(*map(_mean, zip(*these, strict=True))) for prompt, these in new.items()}}
        self._orders = dict(list(latest.items())[-WINDOW:])
        self.trust = Signals(*map(trust_in, zip(UNKNOWN, *self._orders.values(), strict=True)))  # 1 without a prompt

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and not args.save_only_model:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = {prompt: [None if math.isnan(x) else x for x in order] for prompt, order in self._orders.items()}
            write_lines(folder / CALIBRATION_FILE, [json.dumps(saved)])

    def restart(self, checkpoint: Path | None) -> None:
        """Go on from the orders of a checkpoint; without one, from the human pairs under the model before training."""
        self._orders = {}
        self.follow(self._begun.items())
        if checkpoint is not None:
            saved = read_object(checkpoint / CALIBRATION_FILE)
            if not saved:
                logger.warning("%s has no %s: the trust in S begins anew", checkpoint, CALIBRATION_FILE)
            self.follow((p, Signals(*(math.nan if x is None else x for x in order))) for p, order in saved.items())
