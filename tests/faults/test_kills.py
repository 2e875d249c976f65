"""kill -9 at seeded moments, again and again: the same command goes on, and ends with the bits of an uninterrupted run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Plant, command, ranks
from plants import GROUPS, STEP, At, AtWrite, Now, Send
from world import KILLS, MODES, Mode, nothing_half_written, results, same, whole_checkpoints


def moment(mode: Mode, rng: random.Random, rank: int = 0) -> Plant:
    """Return a kill at a random moment: of the start, of a step, or before a change of one of the command's files.

    Where there are two ranks, torchrun ends one that waits for the other to start; and the first rank alone writes.
    """
    kind = rng.choices(("start", "step", "write"), (mode.ranks == 1, 5, 5 * (rank == 0)))[0]
    if kind == "start":
        return Now(Send(signal.SIGKILL, rng.uniform(0.01, 0.5 if mode.trains else 0.2)))
    if kind == "step":
        work = STEP if mode.trains else GROUPS
        return At(work, Send(signal.SIGKILL, rng.uniform(0.0001, 0.03)), call=rng.randint(1, 3))
    return AtWrite(mode.folder, rng.randint(1, 60 if mode.trains else 4))


@pytest.mark.fault("kill -9 at a random moment: {mode}")
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_command_goes_on(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    rng, of = random.Random(f"{mode} {KILLS}"), MODES[mode]
    for _ in range(KILLS):
        victim = rng.randrange(of.ranks)
        plant = moment(of, rng, victim)
        if of.ranks == 1:
            status = of.start(folder, plants=[plant]).end().quiet().status
            assert status == -signal.SIGKILL, f"it ended before it could be killed: {plant}"
            continue
        both = ranks(*of.argv, folder=folder, plants={victim: [plant]}, environment=of.launch)
        ends = [rank.end().quiet() for rank in both]
        assert ends[victim].status == -signal.SIGKILL, f"it ended before it could be killed: {plant}"
        ends[1 - victim].line(2)  # the other one does not wait for ever
    same(of.finish(folder), mode.removesuffix(", two ranks") if not of.trains else mode)  # ranks share what one makes
    nothing_half_written(folder / of.folder)
    if of.trains:
        assert whole_checkpoints(folder / of.output)
    what = "the last whole checkpoint" if of.trains else "every whole batch of groups"
    row("Killed (by the shell); the same command goes on", f"{what}; in the end the bits of an uninterrupted run")


@pytest.mark.fault("kill -9 of both shards of score, then merge")
def test_killed_shards_merge(folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES["score"]
    for shard in range(2):
        flags = ("--shard", f"{shard}/2", "--output", f"scored/{shard}.jsonl")
        plants = [At(GROUPS, Send(signal.SIGKILL), call=3)]
        assert of.start(folder, *flags, plants=plants).end().status == -signal.SIGKILL
        refused = command("merge", "scored/0.jsonl", "--output", of.output, folder=folder).end().line(2)
        of.start(folder, *flags).end().ended()
    shards = [f"scored/{shard}.jsonl" for shard in (1, 0)]
    command("merge", *shards, "--output", of.output, folder=folder).end().ended()
    same(results(folder / of.output), "score")
    row(refused, "every whole batch of groups; in the end the bytes of one run")
