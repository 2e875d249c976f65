"""SIGTERM and SIGINT in every phase: the step is finished and saved, the process ends by the signal, and the run goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Result, Running, at_once, command, ranks
from plants import EVALUATION, GROUPS, LOAD, OPTIMIZER, SAVE, STEP, At, Put, Send, Touch
from world import MODES, nothing_half_written, same, uninterrupted, whole_checkpoints

GRACE = 30  # seconds from a signal to the end, at most
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PHASES = {
    "while the model loads": LOAD,
    "in a forward and backward pass": STEP,
    "in the optimizer": OPTIMIZER,
    "while candidates are sampled": GROUPS,
    "in an evaluation": EVALUATION,
    "while a checkpoint is written": SAVE,
}
CASES = [
    ("sft", "while the model loads"),
    ("sft", "in a forward and backward pass"),
    ("sft", "while a checkpoint is written"),
    ("score", "while the model loads"),
    ("score", "while candidates are sampled"),
    ("train --groups", "in the optimizer"),
    ("train --groups", "in an evaluation"),
    ("train online", "in a forward and backward pass"),
    ("train online", "while candidates are sampled"),
    ("train online", "in an evaluation"),
    ("train online", "while a checkpoint is written"),
]


def until(path: Path, running: Running | subprocess.Popen[bytes]) -> None:
    """Wait until a command has made a file."""
    while not path.exists():
        ended = running.poll() if isinstance(running, subprocess.Popen) else running.status
        assert ended is None, f"it ended with {ended} before it made {path.name}"
        time.sleep(0.01)


@pytest.mark.fault("signal: SIGTERM or SIGINT {phase}")
@pytest.mark.parametrize(("mode", "phase"), CASES)
def test_a_signal(mode: str, phase: str, folder: Path, tmp_path: Path, row: Callable[[str, str], None]) -> None:
    of = MODES[mode]
    uninterrupted(mode)

    def one(signum: int) -> str:
        call = 1 if phase == "while the model loads" else 2
        here = folder if signum == signal.SIGTERM else tmp_path / "other"
        plants = [At(PHASES[phase], Send(signum), call=call)]
        result = of.start(here, plants=plants).end(GRACE + 10)
        line = result.line(-signum)
        nothing_half_written(here / of.folder)
        if of.trains and phase != "while the model loads" and whole_checkpoints(here / of.output):
            assert whole_checkpoints(here / of.output)[-1] in line
        same(of.finish(here), mode)
        return line

    shutil.copytree(folder, tmp_path / "other")
    lines = at_once(*(partial(one, signum) for signum in SIGNALS))
    kept = "the step in hand, in a checkpoint" if of.trains else "every whole batch of groups"
    row(lines[0], "everything: no folder is claimed yet" if phase == "while the model loads" else kept)


@pytest.mark.fault("signal: SIGTERM to one of two ranks")
def test_a_signal_to_one_rank(folder: Path, row: Callable[[str, str], None]) -> None:
    name = "train online, two ranks"
    of = MODES[name]
    uninterrupted(name)
    both = ranks(*of.argv, folder=folder, plants={1: [At(STEP, Send(signal.SIGTERM), call=5)]})
    lines = [rank.end(GRACE + 10).line(-signal.SIGTERM) for rank in both]
    kept = whole_checkpoints(folder / of.output)
    assert kept[-1] in lines[0]
    row(lines[0], "the step in hand, in a checkpoint of both ranks")
    same(of.finish(folder), name)


@pytest.mark.fault("signal: a second one while the step is finished")
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal(signum: int, folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES["sft"]
    running = of.start(folder, plants=[At(STEP, Touch("reached", 60), call=4)])
    until(folder / "reached", running)
    running.signal(signum)
    time.sleep(0.5)
    assert running.status is None
    began = time.monotonic()
    running.signal(signum)
    result = running.end(10).quiet()
    assert result.status == -signum and time.monotonic() - began < 5
    row(result.lines[-1], "the last whole checkpoint")
    assert whole_checkpoints(folder / of.output)
    same(of.finish(folder), "sft")


@pytest.mark.fault("signal: the step in hand does not end")
def test_a_step_that_hangs(folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES["sft"]
    running = of.start(folder, plants=[Put("gem.signals:GRACE", 2.0), At(STEP, Touch("reached", 60), call=4)])
    until(folder / "reached", running)
    running.signal(signal.SIGTERM)
    result = running.end(15).quiet()
    assert result.status == -signal.SIGKILL
    row(result.lines[-1].replace("2 seconds", f"{GRACE} seconds"), "the last whole checkpoint")
    assert whole_checkpoints(folder / of.output)
    same(of.finish(folder), "sft")


@pytest.mark.fault("signal: SIGTERM or SIGINT in eval")
def test_a_signal_to_a_short_command(folder: Path, row: Callable[[str, str], None]) -> None:
    def one(signum: int) -> Result:
        plants = [At(EVALUATION, Send(signum))]
        return command("eval", "--config", "eval.yaml", folder=folder, plants=plants).end(GRACE)

    lines = [one(signum).line(-signum) for signum in SIGNALS]
    row(lines[0], "nothing was made")
    assert not (folder / "scored" / "eval.json").exists()


@pytest.mark.fault("signal: Ctrl-C in a terminal, which also reaches the workers that load data")
def test_ctrl_c_of_the_console_script(folder: Path, row: Callable[[str, str], None]) -> None:
    """A process of its own with all its imports, as the user starts it."""
    of = MODES["sft"]
    begin = [sys.executable, "-m", "gem", *of.argv, "--dataloader_num_workers", "1", "--max_steps", "9999"]
    with (folder / "err").open("w") as err:
        process = subprocess.Popen(begin, cwd=folder, stdout=err, stderr=err, start_new_session=True)
        until(folder / of.output / "checkpoint-4" / "manifest.json", process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(GRACE) == -signal.SIGINT
    text = (folder / "err").read_text()
    assert "Traceback" not in text
    kept = whole_checkpoints(folder / of.output)[-1]
    last = text.splitlines()[-1]
    assert kept in last
    row(re.sub(r"(step |checkpoint-)\d+", r"\1N", last), "the step in hand, in a checkpoint")
