"""The same SEGA step where the head is frozen, as with LoRA elsewhere: no gradient of the weight is computed or allocated."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench_group_loss import exact, sega
from benchmarks.contest import Exact, Step, Task
from benchmarks.gold import Gold
from benchmarks.peers import EAGER, ENTROPY_FIRST, OURS
from benchmarks.peers import LIBRARIES as EVERYBODY
from benchmarks.shapes import DEVICE, MAIN

# On a CPU, to keep the run short, those that the full step (bench_group_loss) does not rule out.
LIBRARIES = [*EVERYBODY, ENTROPY_FIRST] if DEVICE.type == "cuda" else [OURS, EAGER, "TRL"]
SHAPES = MAIN


def _frozen(gold: Gold, library: str) -> Step:
    return sega(gold, library, train_head=False)


def _exact(gold: Gold) -> Exact:
    return exact(gold)._replace(dweight=None)


def test_frozen_head(bench: Callable[[Task], None]) -> None:
    bench(Task("SEGA, frozen head", _frozen, _exact, gemms=2))
