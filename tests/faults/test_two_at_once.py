"""Two commands in one place: the second is refused at once, and the first does not notice."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from plants import GROUPS, STEP, At, Touch
from test_stopped_by_signal import until
from world import MODES, listing, same, uninterrupted

ONE = [name for name, mode in MODES.items() if mode.ranks == 1]


@pytest.mark.fault("two at once: sft, score or train, twice in one place")
@pytest.mark.parametrize("mode", ONE)
def test_the_second_is_refused(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES[mode]
    uninterrupted(mode)
    first = of.start(folder, plants=[At(STEP if of.trains else GROUPS, Touch("reached", 3), call=3)])
    until(folder / "reached", first)
    before = listing(folder)
    line = of.start(folder).end().line(2)
    assert f"is in use by process {first.process.pid} on " in line
    assert listing(folder) == before, "the second one changed something"
    row(line, "the first run, which does not notice")
    first.end().ended()
    same(of.finish(folder), mode)


@pytest.mark.fault("two at once: the lock of a run that was killed with -9")
@pytest.mark.parametrize("mode", ONE)
def test_a_stale_lock(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    """The lock file stays, and its process is gone; also when its number belongs to another process by now."""
    of = MODES[mode]
    uninterrupted(mode)
    first = of.start(folder, plants=[At(STEP if of.trains else GROUPS, Touch("reached", 60), call=3)])
    until(folder / "reached", first)
    first.signal(signal.SIGKILL)
    first.end()
    locks = list((folder / of.folder).rglob("*.lock"))
    assert len(locks) == 1
    again = Path(shutil.copytree(folder, folder.parent / "again"))
    lock = again / locks[0].relative_to(folder)
    lock.write_text(lock.read_text().replace(str(first.process.pid), "1"))
    for here in (folder, again):
        same(of.finish(here), mode)
        assert not list(here.rglob("*.lock"))
    row("nothing: the same command takes the lock over", "everything")
