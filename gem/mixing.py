"""Prompts without a human answer beside human pairs: read them, and give them their share of a training.

prompts = read_unlabeled(data, unlabeled, tokenizer, rollout, ends)
examples = mix(pairs, prompts, share=0.9)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, TypeVar

from gem.config import DataArguments, RolloutArguments, UnlabeledArguments
from gem.data import Example, read_examples
from gem.ends import Ends
from gem.group import Group

logger = logging.getLogger(__name__)
T = TypeVar("T")
Item = TypeVar("Item", Example, Group)


def mix(labeled: Sequence[T], unlabeled: Sequence[T], share: float) -> list[T]:
    """Return all items of both, the labeled ones first, which repeat until no more than `share` of the list is unlabeled.

    Args:
        labeled, unlabeled: the items of both kinds. If one is empty, the other is returned alone.
        share: most of the unlabeled items in the list, to within half an item; in (0, 1]. Labeled items that are too few come
            again, one after the other, in order; unlabeled ones do not. 1: none comes twice.

    Raises:
        ValueError: share is outside of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    wanted = round(len(unlabeled) * (1 - share) / share)
    return [*islice(cycle(labeled), max(len(labeled), wanted)), *unlabeled]


def mix_by_pair(items: Sequence[Item], share: float) -> list[Item]:
    """Mix the items with a human pair and those without; log how many there are of each, and how often they come."""
    labeled = [item for item in items if item.has_pair]
    unlabeled = [item for item in items if not item.has_pair]
    mixed = mix(labeled, unlabeled, share)
    if labeled and unlabeled:
        without = sum(not item.has_pair for item in mixed)
        logger.info(
            "training on %d groups: %d with a human pair (of %d), %d without (of %d)",
            *(len(mixed), len(mixed) - without, len(labeled), without, len(unlabeled)),
        )
    return mixed


def read_unlabeled(
    data: DataArguments, unlabeled: UnlabeledArguments, tokenizer: Any, rollout: RolloutArguments, ends: Ends
) -> list[Example]:
    """Return the prompts of --unlabeled, with the candidates that they bring and without human answers; [] if it is not given.

    The settings of the data hold for them too, but those that speak of its records: `limit`, and `data_format`, as the columns
    are others.

    Raises:
        ValueError: there is no data beside them, a prompt that brings no candidates gets fewer than two, or from read_examples.
    """
    source = unlabeled.unlabeled
    if not source:
        return []
    check_pairs_beside(data, unlabeled)
    split = unlabeled.unlabeled_split or (data.split if source == data.data else None)
    own = replace(data, data=source, split=split, limit=0, data_format="auto")
    try:
        examples = read_examples(own, tokenizer, need=(), rollout=rollout, ends=ends, answers=False)
    except ValueError as error:  # it calls what it reads data
        said = str(error)
        raise ValueError(f"unlabeled{said[4:]}" if said.startswith("data must") else said) from None
    if rollout.group_size < 2 and not all(example.candidate_ids for example in examples):
        raise ValueError(
            "group_size must be at least 2 for prompts without a human pair, whose candidates are compared with one another, "
            f"got {rollout.group_size}"
        )
    return examples


def check_pairs_beside(data: DataArguments, unlabeled: UnlabeledArguments) -> None:
    """Raise ValueError for unlabeled prompts without data beside them."""
    if unlabeled.unlabeled and not data.data:
        raise ValueError(
            f"data must be given beside unlabeled={unlabeled.unlabeled!r}, got nothing: without human pairs, give the prompts "
            "as data, with human_weight=0"
        )


def report_shared(unlabeled: Sequence[Example | Group], pairs: Sequence[Example | Group]) -> None:
    """Log how many of the prompts without a human pair are the prompt of a pair, too."""
    if shared := shared_prompts(unlabeled, pairs):
        logger.info("%d of %d unlabeled prompts are the prompt of a human pair, too", shared, len(unlabeled))


def warn_of_held_out(unlabeled: Sequence[Example | Group], held_out: Sequence[Example]) -> None:
    """Warn if prompts without a human pair are held-out ones, which the training then sees."""
    if shared := shared_prompts(unlabeled, held_out):
        logger.warning("%d of %d unlabeled prompts are in eval_data, and are trained on", shared, len(unlabeled))


def shared_prompts(these: Sequence[Example | Group], those: Sequence[Example | Group]) -> int:
    """Return how many of these have a prompt that one of those has, token for token."""
    known = {tuple(item.prompt_ids) for item in those}
    return sum(tuple(item.prompt_ids) in known for item in these)
