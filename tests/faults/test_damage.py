"""Every file of a run truncated, emptied or deleted: the damage is named and set aside, and the run ends with the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from commands import at_once, scratch
from plants import STEP, At, Send
from world import MODES, STEPS, listing, results, same, uninterrupted, whole_checkpoints, world

MODE = MODES["sft"]
NEWEST, BEFORE = "checkpoint-6", "checkpoint-4"
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "with one bit flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
}


def _flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@cache
def killed() -> Path:
    """Return a folder with a run that was killed after its third checkpoint."""
    folder = Path(shutil.copytree(world(), scratch("killed")))
    MODE.start(folder, plants=[At(STEP, Send(9), call=8)]).end()
    assert whole_checkpoints(folder / MODE.output)[-2:] == [BEFORE, NEWEST]
    return folder


@cache
def finished() -> Path:
    """Return a folder with a run that has ended."""
    folder = Path(shutil.copytree(world(), scratch("finished")))
    MODE.finish(folder)
    return folder


def go_on(start: Path, here: Path, damage: Callable[[Path], object], *names: str) -> list[str]:
    """Damage files of a run, give its command again, check its end, and return its warnings."""
    shutil.copytree(start, here)
    for name in names:
        damage(here / MODE.output / name)
    result = MODE.start(here).end().ended()
    assert f'"train_steps": {STEPS}' in result.out
    same(results(here / MODE.output), "sft")
    return [line.removeprefix("WARNING: ") for line in result.lines if line.startswith("WARNING: ")]


@pytest.mark.fault("damage: a file of the newest checkpoint is truncated, emptied, deleted or has a bit flipped")
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint(file: str, tmp_path: Path, row: Callable[[str, str], None]) -> None:
    uninterrupted("sft")
    start = killed()
    calls = [partial(go_on, start, tmp_path / kind, damage, f"{NEWEST}/{file}") for kind, damage in DAMAGE.items()]
    said = at_once(*calls)
    for kind, (damaged, goes_on) in zip(DAMAGE, said, strict=True):
        assert f"{NEWEST}/{file}" in damaged or f"{NEWEST} is not whole (it has no {file})" in damaged, damaged
        assert goes_on == f"going on from {MODE.output}/{BEFORE}"
        assert (tmp_path / kind / MODE.output / f"{NEWEST}.damaged").is_dir()
    row(said[0][0], f"{BEFORE}, which the run goes on from; the damaged one as {NEWEST}.damaged")


@pytest.mark.fault("damage: the manifest of the newest checkpoint is truncated, emptied, deleted or has a bit flipped")
def test_a_damaged_manifest(tmp_path: Path, row: Callable[[str, str], None]) -> None:
    """Without one, the checkpoint was cut off by a kill; one that cannot be read vouches for nothing."""
    uninterrupted("sft")
    start = killed()
    calls = [
        partial(go_on, start, tmp_path / kind, damage, f"{NEWEST}/manifest.json") for kind, damage in DAMAGE.items()
    ]
    said = at_once(*calls)
    assert all(NEWEST in first for first, *_ in said), said
    row(said[0][0], f"{BEFORE}, which the run goes on from")


@pytest.mark.fault("damage: every checkpoint has a file that is cut off")
def test_no_checkpoint_is_whole(tmp_path: Path, row: Callable[[str, str], None]) -> None:
    here = Path(shutil.copytree(killed(), tmp_path / "here"))
    for path in (here / MODE.output).glob("checkpoint-*"):
        DAMAGE["truncated"](path / "optimizer.pt")
    names = {name for name in listing(here) if name.endswith(".pt")}
    line = MODE.start(here).end().line(2)
    assert NEWEST in line and "optimizer.pt" in line
    row(line, "everything, the damaged checkpoints too")
    assert len({name for name in listing(here) if name.endswith(".pt")}) == len(names)


@pytest.mark.fault("damage: resume_from_checkpoint names a checkpoint that is cut off")
def test_a_damaged_one_that_was_asked_for(tmp_path: Path, row: Callable[[str, str], None]) -> None:
    here = Path(shutil.copytree(killed(), tmp_path / "here"))
    DAMAGE["truncated"](here / MODE.output / NEWEST / "optimizer.pt")
    before = listing(here)
    line = MODE.start(here, "--resume_from_checkpoint", f"{MODE.output}/{NEWEST}").end().line(2)
    row(line, "everything, under its name")
    assert "optimizer.pt" in line and listing(here) == before


@pytest.mark.fault("damage: a result of a finished run is truncated, emptied, deleted or has a bit flipped")
@pytest.mark.parametrize("file", ["metrics.json", "model.safetensors", "trainer_state.json"])
def test_damaged_results(file: str, tmp_path: Path, row: Callable[[str, str], None]) -> None:
    uninterrupted("sft")
    start = finished()
    said = at_once(*[partial(go_on, start, tmp_path / kind, damage, file) for kind, damage in DAMAGE.items()])
    assert all(file in line for lines in said for line in lines), said
    assert all(said) or file == "metrics.json"  # without them the run has not ended: nothing is damaged
    row(said[0][0], "the last checkpoint before the end, from which they are made again")


@pytest.mark.fault("damage: metrics.json of a finished run holds NaN")
def test_metrics_of_no_number(tmp_path: Path, row: Callable[[str, str], None]) -> None:
    def spoil(path: Path) -> None:
        path.write_text('{"train_steps": NaN}')

    uninterrupted("sft")
    (line,) = go_on(finished(), tmp_path / "here", spoil, "metrics.json")
    assert "metrics.json" in line
    row(line, "the last checkpoint before the end, from which they are made again")
