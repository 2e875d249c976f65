"""Disks that are full, read-only or no disks at all: one line, status 2, nothing half-written, and the same command goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Disk, Result, at_once, can_mount, command
from plants import EVALUATION, At, Fill
from world import KILLS, MODES, Mode, listing, nothing_half_written, same, uninterrupted, whole_checkpoints

SIZES = {  # KiB: all of these are too small, but the last ones
    "sft": range(4, 330, 28),
    "score": range(4, 44, 8),
    "train --groups": range(4, 330, 56),
    "train online": range(32, 330, 56),
}
PAGE = 4  # KiB: the long form tries every size in pages
FULL = ("No space left on device", "File too large", "as on a full disk")
OUTPUTS = {
    "sft": ("--config", "sft.yaml", "--output_dir"),
    "score": ("--config", "score.yaml", "--output"),
    "train": ("--config", "groups.yaml", "--output_dir"),
    "eval": ("--config", "eval.yaml", "--output"),
    "demo": ("--output_dir",),
}


def on_a_full_disk(mode: Mode, name: str, folder: Path, kib: int) -> Result:
    """Run a mode on a disk of a size, check what is left there, and go on where there is room."""
    here = Path(shutil.copytree(folder, folder.parent / f"{kib} KiB"))
    top = Path(mode.folder).parts[0]
    result = mode.start(here, disk=Disk(top, kib)).end()
    if (here / f"{top}.kept").exists():
        shutil.rmtree(here / top)
        (here / f"{top}.kept").rename(here / top)
    if result.status == 0:
        return result
    assert any(text in result.line(2) for text in FULL), result.err
    nothing_half_written(here / top)
    kept = whole_checkpoints(here / mode.output) if mode.trains else []
    assert not kept or kept[-1] in result.line(2), "the last whole checkpoint is not named"
    same(mode.finish(here), name)
    return result


@pytest.mark.fault("output: the disk is full at any write of {mode}")
@pytest.mark.parametrize("mode", SIZES)
def test_a_full_disk(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    uninterrupted(mode)
    sizes = SIZES[mode] if KILLS <= 3 else range(PAGE, SIZES[mode].stop, PAGE)
    calls = [partial(on_a_full_disk, MODES[mode], mode, folder, kib) for kib in sizes]
    full = [result.line(2) for result in at_once(*calls) if result.status]
    assert len(full) > len(calls) / 2
    row(full[-1], "what was whole; with room, the same command ends with the bits of an uninterrupted run")


@pytest.mark.fault("output: the disk is full, eval")
def test_a_full_disk_for_metrics(folder: Path, row: Callable[[str, str], None]) -> None:
    """The disk fills up while the command works: before it, a try has passed."""
    plants = [At(EVALUATION, Fill("scored/other"))]
    result = command("eval", "--config", "eval.yaml", folder=folder, disk=Disk("scored", 16), plants=plants).end()
    row(result.line(2), "the metrics, which are printed before; no file")
    assert any(text in result.line(2) for text in FULL) and '"accuracy_greedy"' in result.out
    assert not {path.name for path in folder.rglob("eval.json*")}


@pytest.mark.skipif(not can_mount(), reason="no mount namespaces here")
@pytest.mark.fault("output: on a read-only disk")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_read_only_disk(name: str, folder: Path, row: Callable[[str, str], None]) -> None:
    result = command(name, *OUTPUTS[name], "disk/new", folder=folder, disk=Disk("disk", read_only=True)).end()
    row(result.line(2), "everything; it is refused before any work")
    assert not listing(folder / "disk.kept") and result.seconds < 20


@pytest.mark.fault("output: below a file")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_path_below_a_file(name: str, folder: Path, row: Callable[[str, str], None]) -> None:
    before = listing(folder)
    result = command(name, *OUTPUTS[name], "pairs.jsonl/new", folder=folder).end()
    row(result.line(2), "everything; it is refused before any work")
    assert "pairs.jsonl" in result.line(2) and listing(folder) == before


@pytest.mark.fault("output: a link to nothing")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_dangling_link(name: str, folder: Path, row: Callable[[str, str], None]) -> None:
    (folder / "link").symlink_to("gone/away")
    before = listing(folder)
    result = command(name, *OUTPUTS[name], "link", folder=folder).end()
    row(result.line(2), "everything; it is refused before any work")
    assert "link" in result.line(2) and listing(folder) == before and (folder / "link").is_symlink()
