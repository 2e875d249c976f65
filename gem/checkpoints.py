"""Checkpoints in a run's folder: which one a run goes on from, and whether it is whole.

A checkpoint is whole if its manifest.json, which is written last, gives the size and the SHA-256 of every file in it, and
everything that an exact resume needs is there.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

from gem.files import write_lines
from gem.fingerprint import file_hash
from gem.launch import state_form
from gem.run_files import MANIFEST_FILE, STATE_FILE, has_manifest, numbered_checkpoints, read_object

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
OPTIMIZER = {"": "optimizer.pt", "FULL_STATE_DICT": "optimizer.bin", "SHARDED_STATE_DICT": "optimizer_0/.metadata"}
"""The file of the optimizer's state, by the form in which FSDP2 saves it; "": without FSDP2."""
SHARDS = "pytorch_model_fsdp_0/*"


def find_checkpoint(folder: Path, asked: str | None, world_size: int = 1) -> str | None:
    """Return the checkpoint to resume from, None to start from the beginning.

    A damaged checkpoint of `folder` that is newer than the one returned is renamed to checkpoint-N.damaged.

    Args:
        folder: output_dir of the run.
        asked: resume_from_checkpoint. A folder; true: the newest checkpoint of `folder`; false: none; None: the newest
            checkpoint if there is one.
        world_size: number of processes, which must be that of the checkpoint: each has its own random state.

    Raises:
        ValueError: there is no such checkpoint, it is not whole, or it is of another number of processes.
    """
    if asked is not None and asked.lower() == "false":
        return None
    if asked is None or asked.lower() in ("", "true"):
        found, damaged = _newest(folder)
        if asked and found is None:
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint, got true, and {folder} holds none to go on from"
            )
        for checkpoint, flaw in damaged.items():
            logger.warning("%s is not whole (%s): renamed to %s", checkpoint, flaw, _set_aside(checkpoint).name)
        if damaged:
            logger.warning("going on from %s", found)
    elif flaw := _flaw(Path(asked)):
        raise ValueError(f"resume_from_checkpoint must be a whole checkpoint, got {asked!r}: {flaw}")
    else:
        found = asked
    if found is not None:
        _check_launch(Path(found), world_size)
    return found


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that a run can resume from, None if there is none.

    It is whole, and not of the last step: from there Trainer would take one step too many, while the checkpoint before
    leads to the same end. A checkpoint without manifest.json was cut off by a kill and is passed over.

    Raises:
        ValueError: there are such checkpoints, but none is whole. Starting over would cost what is left of them.
    """
    return _newest(folder)[0]


def _newest(folder: Path) -> tuple[str | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and what is wrong with each damaged one that is newer."""
    damaged: dict[Path, str] = {}
    for checkpoint in numbered_checkpoints(folder):
        if not has_manifest(checkpoint):
            logger.warning("passing over %s, which was cut off: it has no %s", checkpoint, MANIFEST_FILE)
            continue
        with suppress(OSError, ValueError):  # _flaw says it better
            taken, of = steps_of(checkpoint)
            if taken >= of:
                continue
        flaw = _flaw(checkpoint)
        if not flaw:
            return str(checkpoint), damaged
        damaged[checkpoint] = flaw
    if damaged:
        checkpoint, flaw = next(iter(damaged.items()))
        raise ValueError(
            f"output_dir must hold a whole checkpoint to go on from, got {checkpoint}, which is not whole: {flaw} "
            "(resume_from_checkpoint=false starts over)"
        )
    return None, {}


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that no run finds it, and return its new path."""
    names = (f"{checkpoint.name}.damaged{f'-{n}' if n else ''}" for n in count())
    return checkpoint.rename(next(path for path in map(checkpoint.with_name, names) if not path.exists()))


def _check_launch(checkpoint: Path, world_size: int) -> None:
    """Raise ValueError if a checkpoint is of another number of processes, or saved in another form, than this launch's."""
    manifest = read_object(checkpoint / MANIFEST_FILE)
    if (began := manifest.get("world_size")) != world_size:
        raise ValueError(f"the number of processes must be that of {checkpoint}, {began}, got {world_size}")
    then, now = _form(manifest["files"]), state_form()
    if then != now:
        names = [f"FSDP2 with {form}" if form else "no FSDP" for form in (then, now)]
        raise ValueError(f"the launch must be that of {checkpoint}, {names[0]}, got one of {names[1]}")


def _form(files: Iterable[str]) -> str:
    """Return the form of a checkpoint's state by its files; "" if FSDP2 did not save it."""
    return next((form for form, name in OPTIMIZER.items() if form and name in files), "")


def steps_of(checkpoint: Path) -> tuple[int, int]:
    """Return (steps taken, steps of the whole run). Raise ValueError if trainer_state.json does not give them."""
    state = read_object(checkpoint / STATE_FILE)
    taken, of = state.get("global_step"), state.get("max_steps")
    if not isinstance(taken, int) or not isinstance(of, int):
        raise ValueError(f'{checkpoint / STATE_FILE}: expected "global_step" and "max_steps", got {sorted(state)[:8]}')
    return taken, of


def check_steps_left(trainer: Any, checkpoint: str) -> None:
    """Raise ValueError if the checkpoint leaves a trainer no step to take.

    From a checkpoint of the last step, transformers would take one step too many, and from a later one none.
    """
    args, steps = trainer.args, trainer.args.max_steps
    if steps <= 0:
        batches = len(trainer.train_dataset) / (args.train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        steps = math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
    taken, _ = steps_of(Path(checkpoint))
    if taken >= steps:
        raise ValueError(
            f"resume_from_checkpoint must be of a step before the last, {steps}, got {checkpoint} of step {taken}"
        )


def _flaw(checkpoint: Path) -> str:
    """Return why a training cannot resume from a checkpoint exactly; "" if it can."""
    if not checkpoint.is_dir():
        return "no such folder"
    if not has_manifest(checkpoint):
        return f"it has no {MANIFEST_FILE}, which is written last"
    if flaw := manifest_flaw(checkpoint):
        return flaw
    manifest = read_object(checkpoint / MANIFEST_FILE)
    files, processes = manifest["files"], manifest.get("world_size")
    if type(processes) is not int:
        return f'{checkpoint / MANIFEST_FILE}: expected "world_size" to be an integer, got {processes!r}'
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    optimizer = OPTIMIZER[_form(files)]
    missing = [name for name in (STATE_FILE, optimizer, "scheduler.pt", *states) if name not in files]
    if missing:
        return f"it has no {missing[0]}" + (", as save_only_model leaves it" if missing[0] == optimizer else "")
    if not any(fnmatch(name, pattern) for name in files for pattern in (*WEIGHTS, SHARDS)):
        return "it has no file of weights"
    try:
        steps_of(checkpoint)
    except ValueError as error:
        return str(error)
    return ""


# --- manifests --------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, *, world_size: int, files: Iterable[Path] | None = None) -> None:
    """Write manifest.json, which makes a folder whole: the size and the SHA-256 of each file, all of them safe on disk.

    Args:
        folder: where it goes.
        world_size: number of processes of the run.
        files: files of the folder; default: all.
    """
    found = files if files is not None else (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    paths = sorted(found)
    with ThreadPoolExecutor() as pool:  # hashlib and fsync let other threads run
        entries = dict(zip((p.relative_to(folder).as_posix() for p in paths), pool.map(_entry, paths), strict=True))
    manifest = {"files": entries, "world_size": world_size}
    write_lines(folder / MANIFEST_FILE, [json.dumps(manifest, indent=1)])


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("r+b") as file:  # Windows syncs no file that is open for reading alone
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def manifest_flaw(folder: Path) -> str:
    """Return which file of a folder is not as its manifest.json says; "" if all are."""
    manifest = folder / MANIFEST_FILE
    try:
        files = read_object(manifest).get("files")
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            return f'{manifest}: expected "files" with the size and hash of each, got {str(files)[:60]}'
        paths = {folder / name: entry for name, entry in files.items()}
        for path, entry in paths.items():  # before hashes, which take long
            if not path.is_file():
                return f"it has no {path.relative_to(folder)}"
            if path.stat().st_size != entry.get("size"):
                return f"{path} is damaged or cut off: {path.stat().st_size} bytes, {entry.get('size')} when written"
        with ThreadPoolExecutor() as pool:
            for (path, entry), now in zip(paths.items(), pool.map(file_hash, paths), strict=True):
                if now != entry.get("sha256"):
                    return f"{path} is damaged: its content is not what was written"
    except (OSError, ValueError) as error:  # of a disk that fails, or of a damaged manifest
        return str(error)
    return ""
