"""The same SEGA step where the head is frozen, as with LoRA elsewhere: no gradient of the weight is computed or allocated."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench_group_loss import ENTROPY_FIRST, exact, sega
from benchmarks.contest import Exact, Step, Task
from benchmarks.gold import Gold
from benchmarks.peers import LIBRARIES as EVERYBODY
from benchmarks.shapes import MAIN

LIBRARIES = [*EVERYBODY, ENTROPY_FIRST]
SHAPES = MAIN


def _frozen(gold: Gold, library: str) -> Step:
    return sega(gold, library, train_head=False)


def _exact(gold: Gold) -> Exact:
    return exact(gold)._replace(dweight=None)


def test_frozen_head(bench: Callable[[Task], None]) -> None:
    bench(Task("SEGA, frozen head", _frozen, _exact, gemms=2))
