"""Checkpoints: which one a run goes on from, whether it is whole, and which are deleted."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerControl, TrainerState

from gem.checkpoints import find_checkpoint, manifest_flaw, newest_checkpoint, steps_of, write_manifest
from gem.saving import KeepWhole

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def checkpoint(folder: Path, step: int, of: int = 1000, processes: int = 1, manifest: bool = True) -> Path:
    """Write the files of a checkpoint of Trainer, as small as possible."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    linear = torch.nn.Linear(2, 2)
    transformers.modeling_utils.safe_save_file(linear.state_dict(), path / "model.safetensors", {"format": "pt"})
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *states):
        torch.save({"state": torch.ones(9)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": of}))
    if manifest:
        write_manifest(path, world_size=processes)
    return path


def cut(path: Path, keep: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def damage(path: Path, how: str) -> None:
    """Damage a file in one of the ways of HOW."""
    content = path.read_bytes()
    match how:
        case "cut":
            cut(path)
        case "text":
            path.write_text("garbage")
        case "empty":
            path.write_bytes(b"")
        case "deleted":
            path.unlink()
        case "one bit":
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


HOW = ("cut", "text", "empty", "deleted", "one bit")


def test_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 20):
        checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")  # 20 > 9 as numbers
    checkpoint(tmp_path, 300, of=300)  # finished
    (tmp_path / "checkpoint-tmp").mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20") and not caplog.text
    checkpoint(tmp_path, 200, manifest=False)  # a kill came before it was written
    assert find_checkpoint(tmp_path, None) == str(tmp_path / "checkpoint-20")
    passed = f"passing over {tmp_path}/checkpoint-200, which was cut off: it has no manifest.json"
    assert caplog.messages == [passed] and (tmp_path / "checkpoint-200").is_dir()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", HOW)
def test_a_damaged_one_is_set_aside(name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for step in (9, 20, 400):
        checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-400" / name, how)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert (tmp_path / "checkpoint-400").is_dir()
    caplog.clear()
    assert find_checkpoint(tmp_path, "true") == str(tmp_path / "checkpoint-20")
    if (name, how) == ("manifest.json", "deleted"):
        assert "passing over" in caplog.text and (tmp_path / "checkpoint-400").is_dir()
        return
    flaw = f"has no {name}" if how == "deleted" else name
    assert f"{tmp_path}/checkpoint-400 is not whole" in caplog.messages[0] and flaw in caplog.messages[0]
    assert caplog.messages[0].endswith("renamed to checkpoint-400.damaged")
    assert caplog.messages[1] == f"going on from {tmp_path}/checkpoint-20"
    assert (tmp_path / "checkpoint-400.damaged").is_dir() and not (tmp_path / "checkpoint-400").exists()
    damage(checkpoint(tmp_path, 400) / name, how)
    assert find_checkpoint(tmp_path, None) == str(tmp_path / "checkpoint-20")
    assert (tmp_path / "checkpoint-400.damaged-1").is_dir()


def test_all_are_damaged(tmp_path: Path) -> None:
    for step in (9, 20):
        cut(checkpoint(tmp_path, step) / "optimizer.pt")
    found = r"output_dir must hold a whole checkpoint .*checkpoint-20, .*optimizer\.pt is damaged .*=false starts over"
    for find in (newest_checkpoint, lambda folder: find_checkpoint(folder, None)):
        with pytest.raises(ValueError, match=found):
            find(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "false") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", HOW)
def test_one_that_was_asked_for(name: str, how: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    assert find_checkpoint(tmp_path, str(path)) == str(path) and steps_of(path) == (5, 1000)
    damage(path / name, how)
    with pytest.raises(ValueError) as raised:
        find_checkpoint(tmp_path, str(path))
    flaw = "it has no " if how == "deleted" else f"{path}/"
    assert str(raised.value).startswith(
        f"resume_from_checkpoint must be a whole checkpoint, got '{path}': {flaw}{name}"
    )
    assert path.is_dir()


@pytest.mark.parametrize("name", FILES)
def test_one_that_was_saved_without_a_file(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5, manifest=False)
    (path / name).unlink()
    with pytest.raises(ValueError, match=r"it has no manifest\.json, which is written last"):
        find_checkpoint(tmp_path, str(path))
    write_manifest(path, world_size=1)
    why = ", as save_only_model leaves it" if name == "optimizer.pt" else ""
    what = "file of weights" if "model" in name else name
    with pytest.raises(ValueError, match=f"got '{path}': it has no {what}{why}$"):
        find_checkpoint(tmp_path, str(path))


def test_one_in_parts(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5, manifest=False)
    parts = [path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shutil.copy(path / "model.safetensors", parts[0])
    (path / "model.safetensors").rename(parts[1])
    write_manifest(path, world_size=1)
    assert find_checkpoint(tmp_path, str(path)) == str(path)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"it has no model-00002-of-00002\.safetensors"):
        find_checkpoint(tmp_path, str(path))


def test_another_number_of_processes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5, processes=2)
    for asked in (str(path), "true", None):
        assert find_checkpoint(tmp_path, asked, 2) == str(path)
        with pytest.raises(ValueError, match=f"the number of processes must be that of {path}, 2, got 1$"):
            find_checkpoint(tmp_path, asked, 1)
    (path / "rng_state_1.pth").unlink()
    write_manifest(path, world_size=2)
    with pytest.raises(ValueError, match=r"it has no rng_state_1\.pth"):
        find_checkpoint(tmp_path, str(path), 2)


@pytest.mark.parametrize(
    "manifest", ["7", "{}", '{"files": [1]}', '{"files": {"model.safetensors": 7}}', '{"files": {}}']
)
def test_a_manifest_of_another_kind(manifest: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a whole checkpoint, got .*manifest"):
        find_checkpoint(tmp_path, str(path))
    files = json.loads(write(path)["manifest.json"])["files"]
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match='expected "world_size" to be an integer, got None'):
        find_checkpoint(tmp_path, str(path))


def write(path: Path) -> dict[str, str]:
    """Write a manifest anew and return the text of each JSON file."""
    write_manifest(path, world_size=1)
    return {file.name: file.read_text() for file in path.glob("*.json")}


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    path = checkpoint(tmp_path, 5)
    monkeypatch.setattr("gem.checkpoints.file_hash", fail)
    assert "Input/output error" in manifest_flaw(path)


# --- KeepWhole --------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, keep: KeepWhole, best: str | None = None, of: int = 1000) -> list[int]:
    """Save a checkpoint as Trainer does; return the steps of those that are there then."""
    args: Any = type("Args", (), {"output_dir": str(folder), "should_save": True, "world_size": 1})
    state = TrainerState(global_step=step, max_steps=of, best_model_checkpoint=best, epoch=step / 7)
    control = TrainerControl(should_save=True)
    keep.on_step_end(args, state, control)
    assert control.should_log
    shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    checkpoint(folder, step, of, manifest=False)
    keep.on_save(args, state, control)
    assert manifest_flaw(folder / f"checkpoint-{step}") == ""
    return sorted(int(p.name.removeprefix("checkpoint-")) for p in folder.iterdir())


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3, 10]), (0, [1, 2, 3, 10]), (1, [10]), (2, [3, 10])])
def test_old_ones_are_deleted(limit: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        steps = save(tmp_path, step, KeepWhole(limit))
    assert steps == left


def test_the_best_one_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        steps = save(tmp_path, step, KeepWhole(2), best=str(tmp_path / "checkpoint-1"))
    assert steps == [1, 3]
    for step in (1, 2, 3):
        steps = save(tmp_path / "one", step, KeepWhole(1), best=str(tmp_path / "one" / "checkpoint-1"))
    assert steps == [1, 3]


def test_one_to_go_on_from_is_kept(tmp_path: Path) -> None:
    """A checkpoint of the last step leaves no step to take."""
    for step in (1, 2, 3):
        steps = save(tmp_path, step, KeepWhole(1), of=3)
    assert steps == [2, 3]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_those_of_an_earlier_start_go_first(tmp_path: Path) -> None:
    for step in (20, 30):
        save(tmp_path, step, KeepWhole(2))
    assert save(tmp_path, 10, KeepWhole(2)) == [10, 30]
    assert save(tmp_path, 15, KeepWhole(2)) == [10, 15]


def test_those_without_a_manifest_do_not_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, manifest=False)
    assert save(tmp_path, 3, KeepWhole(2)) == [1, 2, 3]


def ends(step: bool | None, epoch: bool | None, at: float, stop: tuple[bool, bool] = (False, False)) -> list[bool]:
    """Return whether a checkpoint is saved at the end of a step and of the epoch there, and what else is due then.

    Args:
        step: should_save of the step's end.
        epoch: should_save of the epoch's end; None: the step does not end it.
        at: the epoch.
        stop: should_training_stop at the end of the step, and after it.
    """
    args: Any = type("Args", (), {"output_dir": "no/such/folder", "should_save": True})
    state, keep = TrainerState(global_step=5, max_steps=9, epoch=at), KeepWhole(2)
    control = TrainerControl(should_save=bool(step), should_training_stop=stop[0])
    keep.on_step_end(args, state, control)
    found = [control.should_save]
    assert control.should_log == control.should_save
    if epoch is not None:
        control = TrainerControl(should_save=epoch, should_training_stop=stop[1], should_evaluate=True)
        keep.on_epoch_end(args, state, control)
        found += [control.should_save, control.should_evaluate]
        assert control.should_log == control.should_save
    return found


def test_when_a_checkpoint_is_saved() -> None:
    assert ends(True, None, 1.5) == [True] and ends(False, None, 1.5) == [False]
    assert ends(True, False, 2.0) == [False, True, True]  # with what is evaluated at the end of the epoch
    assert ends(False, True, 2.0) == [False, True, True] and ends(False, False, 2.0) == [False, False, True]
    assert ends(True, True, 1.5, stop=(True, True)) == [True, False, False]  # by a signal, within an epoch
    assert ends(True, False, 2.0, stop=(True, True)) == [False, True, True]  # by a signal, at its end
    assert ends(True, False, 2.0, stop=(False, True)) == [False, False, True]  # by a guard, which saves nothing
