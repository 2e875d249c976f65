"""Make every checkpoint of a training whole, and delete an old one only once a newer one is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.checkpoints import write_manifest
from gem.run_files import MANIFEST_FILE, has_manifest, numbered_checkpoints


class KeepWhole(TrainerCallback):
    """Write the manifest of a checkpoint after all its files, then delete old checkpoints beyond a limit.

    A checkpoint holds the log of all its steps, and at the end of an epoch what is evaluated there, so that the log of a
    resumed run is that of an uninterrupted one.

    Trainer itself must not delete checkpoints (save_total_limit=None): it does before the new one is known to be whole.

    Args:
        limit: save_total_limit, None for no limit. The best checkpoint, the new one and the newest one that a run can go on
            from are kept even if they are more.
        doubtful: while it returns True nothing is deleted, as the new checkpoints may be of no use.
    """

    def __init__(self, limit: int | None, doubtful: Callable[[], bool] = lambda: False) -> None:
        self.limit, self.doubtful = limit, doubtful
        self._due = False  # a checkpoint at the end of the epoch
        self._stopping = False  # what the end of the step said of the end of the training

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save and _ends_epoch(state):
            self._due, self._stopping, control.should_save = True, control.should_training_stop, False
        elif control.should_save:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop and not _ends_epoch(state) and state.global_step < state.max_steps:
            # Cut short by a signal or a guard: the end of the epoch is still to come.
            control.should_log = control.should_evaluate = control.should_save = False
        if self._due and control.should_training_stop == self._stopping:  # else a guard has stopped the run meanwhile
            control.should_save = True
        self._due = False
        control.should_log |= control.should_save  # a resumed run does not know the losses since the last log

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process has written its random state
        if args.should_save:
            folder = Path(args.output_dir)
            new = folder / f"checkpoint-{state.global_step}"
            write_manifest(new, world_size=args.world_size)
            for checkpoint in () if self.doubtful() else superfluous(folder, self.limit, new, state):
                delete_checkpoint(checkpoint)
        PartialState().wait_for_everyone()  # the guard of each process looks for manifests


def load_weights(model: Any, folder: Path) -> None:
    """Load the tensors of a checkpoint that Trainer passes over: it does not know those that are stored under other names.

    transformers stores the experts of a mixture one by one, and joins them again in from_pretrained alone.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if hasattr(model, "peft_config") or not files:
        return
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored.update(tensors.keys())
    own = model.state_dict()
    there = {tensor.data_ptr() for name, tensor in own.items() if name in stored}  # tied tensors are stored once
    if all(tensor.data_ptr() in there for tensor in own.values()):
        return
    saved, found = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"{folder} must hold every weight of the model, got none of {sorted(found['missing_keys'])[0]}"
        )
    model.load_state_dict(saved.state_dict())


def _ends_epoch(state: TrainerState) -> bool:
    return float(state.epoch or 0).is_integer()


def superfluous(folder: Path, limit: int | None, new: Path, state: TrainerState) -> list[Path]:
    """Return the whole checkpoints beyond the limit, oldest first.

    Those of later steps than the new one are of an earlier start, and go first.
    """
    whole = [p for p in numbered_checkpoints(folder) if has_manifest(p)][::-1]
    if not limit or limit < 0:
        return []
    at = whole.index(new)
    by_age = whole[at + 1 :] + whole[: at + 1]
    before_end = [p for p in by_age if p.name != f"checkpoint-{state.max_steps}"]  # the last step leaves none to take
    kept = {new, *before_end[-1:], Path(state.best_model_checkpoint or new)}
    return [p for p in by_age if p not in kept][: max(0, len(by_age) - limit)]


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: a kill in between leaves one that is cut off, not damaged."""
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
