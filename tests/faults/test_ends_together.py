"""Two ranks, of which one fails or waits for ever: both end within a minute, by the first one's error."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ranks
from plants import STEP, At
from world import MODES, nothing_half_written, whole_checkpoints

from gem.stops import Diverged

NAME = "train online, two ranks"


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def diverge(*_: Any) -> None:
    raise Diverged("step 6: the loss of pair 3 is nan")


def hang(*_: Any) -> None:
    time.sleep(600)


@pytest.mark.fault("ranks: one of two is out of memory")
def test_an_error_on_one_rank(folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES[NAME]
    ends = [rank.end(60) for rank in ranks(*of.argv, folder=folder, plants={1: [At(STEP, fail, call=6)]})]
    lines = [end.line(2) for end in ends]
    assert lines[1].startswith("gem-kernels train: out of memory (CUDA out of memory")
    assert lines[0] == lines[1].replace("train: ", "train: rank 1: ", 1)
    kept = whole_checkpoints(folder / of.output)
    assert kept[-1] in lines[0]
    nothing_half_written(folder / of.folder)
    row(lines[0], f"{kept[-1]}, the last whole one")


@pytest.mark.fault("ranks: one of two diverges")
@pytest.mark.parametrize("other", ["is in a collective", "hangs"])
def test_one_rank_diverges(other: str, folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES[NAME]
    plants = {0: [At(STEP, hang, call=6)] if other == "hangs" else [], 1: [At(STEP, diverge, call=6)]}
    zero, one = [rank.end(60) for rank in ranks(*of.argv, folder=folder, plants=plants)]
    assert "step 6: the loss of pair 3 is nan" in one.line(3)
    assert zero.status == 3 and "rank 1: step 6: the loss of pair 3 is nan" in zero.lines[-1]
    assert "rank 1: step 6" in (folder / of.output / "rails.json").read_text()
    nothing_half_written(folder / of.folder)
    kept = whole_checkpoints(folder / of.output)
    row(zero.lines[-1], f"{kept[-1]}, the last whole one, and the verdicts")
