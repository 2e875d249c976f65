"""Checkpoints in a run's folder: which one a run resumes from, and whether it is whole."""

from __future__ import annotations

import logging
import math
import zipfile
from pathlib import Path
from typing import Any

from gem.run_files import STATE_FILE, numbered_checkpoints, read_object

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def find_checkpoint(folder: Path, asked: str | None) -> str | None:
    """Return the checkpoint to resume from, None to start from the beginning.

    Args:
        folder: output_dir of the run.
        asked: resume_from_checkpoint. A folder; true: the newest checkpoint of `folder`; false: none; None: the newest
            checkpoint if there is one.

    Raises:
        ValueError: there is no such checkpoint, or it is not whole.
    """
    if asked is None or asked.lower() in ("", "true"):
        newest = newest_checkpoint(folder)
        if asked and newest is None:
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint, got true, and {folder} holds none to go on from"
            )
        return newest
    if asked.lower() == "false":
        return None
    flaw = _flaw(Path(asked))
    if flaw:
        raise ValueError(f"resume_from_checkpoint must be a whole checkpoint, got {asked!r}: {flaw}")
    return asked


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that a run can resume from, None if there is none.

    It is whole, and not of the last step: from there Trainer would take one step too many, while the checkpoint before
    leads to the same end. A checkpoint without trainer_state.json, which Trainer writes last, was cut off by a kill and is
    passed over.

    Raises:
        ValueError: there are such checkpoints, but none is whole. Starting over would cost what is left of them.
    """
    damaged = ""
    for checkpoint in numbered_checkpoints(folder):
        try:
            taken, of = steps_of(checkpoint)
        except (OSError, ValueError):
            continue
        if taken >= of:
            continue
        flaw = _flaw(checkpoint)
        if not flaw:
            if damaged:
                logger.warning("going on from %s, as %s", checkpoint, damaged)
            return str(checkpoint)
        damaged = damaged or f"{checkpoint} is not whole: {flaw}"
    if damaged:
        raise ValueError(
            f"output_dir must hold a whole checkpoint to go on from, got {damaged} (resume_from_checkpoint=false starts over)"
        )
    return None


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
    """Return why a training cannot resume from a checkpoint; "" if it can."""
    from gem.loading import no_tensors  # needs safetensors, which a report does without

    if not checkpoint.is_dir():
        return "no such folder"
    missing = [name for name in (STATE_FILE, "optimizer.pt", "scheduler.pt") if not (checkpoint / name).is_file()]
    weights = [path for pattern in WEIGHTS for path in sorted(checkpoint.glob(pattern))]
    if missing or not weights:
        which = missing[0] if missing else "file of weights"
        return f"it has no {which}" + (", as save_only_model leaves it" if which == "optimizer.pt" else "")
    try:
        steps_of(checkpoint)
        shards = {n for i in checkpoint.glob("*.index.json") for n in read_object(i).get("weight_map", {}).values()}
    except (ValueError, AttributeError) as error:
        return str(error)
    for name in sorted(shards):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    for path in (*weights, *sorted(checkpoint.glob("*.pt")), *sorted(checkpoint.glob("*.pth"))):
        whole = no_tensors(path) is None if path.suffix == ".safetensors" else zipfile.is_zipfile(path)
        if not whole:
            return f"{path} is damaged or cut off"
    return ""
