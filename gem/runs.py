"""Folder of a run, from start to end: check it, claim it, find where to resume, train, and write the results.

Results are read back by gem/results.py.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gem.checkpoints import check_steps_left, find_checkpoint
from gem.files import read_text, write_lines
from gem.run_files import COMPLETIONS_FILE, METRICS_FILE, RUN_FILE, read_object

# Settings that do not change what a run computes: where it lies, where it resumes, and a secret.
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "hub_token")


def check_writable(path: Path, name: str) -> None:
    """Check that a file or folder can be made at `path`, without making anything.

    Args:
        path: where the result will go.
        name: the argument that gave the path; the message begins with it.

    Raises:
        ValueError: the nearest existing parent is a file, or is not writable.
    """
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if above != path and not above.is_dir():
        raise ValueError(f"{name} must be in a folder, got {path}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{name} must be where one may write, got {path}: {above} cannot be written")


def check_file(path: Path, name: str) -> None:
    """Raise ValueError unless a file can be written at `path`. Call it before the work whose result the file will hold."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got {path}, which is a folder")
    check_writable(path, name)


def check_output(folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Check that a run may use a folder, without writing to it.

    Args:
        folder: output_dir of the run.
        command: sft or train.
        settings: all settings of the run. A folder with the same settings is resumed.

    Returns:
        True if the folder holds this very run, begun earlier.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got {folder}, which is a file")
    check_writable(folder, "output_dir")
    if (folder / RUN_FILE).is_file():
        mine, theirs = _settings(command, settings), read_object(folder / RUN_FILE).get("settings")
        if isinstance(theirs, dict):
            changed = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k) and k not in NOT_COMPARED]
            if changed:
                shown = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} now" for k in sorted(changed)[:5])
                raise ValueError(
                    f"output_dir must be new or hold a run of the same settings, got {folder} with {shown}"
                )
            return True
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir must be empty or hold a run of this command, got {folder}, which is not empty")
    return False


def resume_from(folder: Path, command: str, settings: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Decide how a command starts in its output folder. Call it before a model is loaded: all errors surface here.

    Returns:
        (checkpoint to resume from or None, True if the run is already finished; its metrics are then printed).

    Raises:
        ValueError: from check_output and find_checkpoint; or a finished run is to resume from a given checkpoint.
    """
    asked = settings.get("resume_from_checkpoint")
    begun = check_output(folder, command, settings)
    metrics = folder / METRICS_FILE
    if begun and metrics.is_file():
        if asked and asked.lower() != "true":
            raise ValueError(
                f"output_dir must be another one with resume_from_checkpoint={asked}, got {folder}: this run is finished"
            )
        print(f"{folder} holds this run, finished:\n{read_text(metrics).rstrip()}")
        return None, True
    return find_checkpoint(folder, asked), False


def prepare_output(folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Claim an output folder by a run.json in it, unless it is claimed. Return True if it was new.

    Raises:
        ValueError: from check_output.
    """
    if check_output(folder, command, settings):
        return False
    write_about(folder, folder.name, settings.get("seed", 0), settings=_settings(command, settings))
    return True


@contextmanager
def claimed(training: Any, command: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Claim the output_dir of TrainingArguments for the block.

    A run that fails before its first checkpoint gives the claim up, so it can be tried again with other settings.
    """
    folder = Path(training.output_dir)
    with training.main_process_first(local=False):
        new = prepare_output(folder, command, settings)
    try:
        yield
    except BaseException:
        if new and [p.name for p in folder.iterdir()] == [RUN_FILE]:
            (folder / RUN_FILE).unlink()
            folder.rmdir()
        raise


def train_to_end(trainer: Any, evaluation: Any, resume: str | None) -> None:
    """Train, save the model and the trainer's state, and write and print the final metrics.

    Args:
        trainer: a GEMTrainer; its output_dir is claimed.
        evaluation: the gem.evaluate.Evaluation that the trainer calls, or None.
        resume: checkpoint to resume from; None: start from the beginning.
    """
    if resume is not None:
        check_steps_left(trainer, resume)
    terminated: list[int] = []
    if trainer.args.enable_jit_checkpoint:
        save = signal.getsignal(signal.SIGTERM)  # Trainer's: some seconds later it saves a checkpoint and stops
        signal.signal(signal.SIGTERM, lambda number, frame: (terminated.append(number), save(number, frame)))  # type: ignore
    trainer.train(resume_from_checkpoint=resume)
    if terminated and trainer.state.global_step < trainer.state.max_steps:
        print(f"terminated after step {trainer.state.global_step}; the same command goes on from there")
        return
    trainer.save_model()
    trainer.save_state()
    metrics = {"train_steps": float(trainer.state.global_step)}
    if evaluation is not None:
        metrics |= {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    if not trainer.is_world_process_zero():
        return
    if evaluation is not None:
        trainer.save_state()  # now with the final evaluation in its log
    completions = evaluation.completions if evaluation is not None else None
    write_results(Path(trainer.args.output_dir), metrics, completions)
    print(json.dumps(metrics, indent=1))


def write_about(folder: Path, name: str, seed: int, **more: Any) -> None:
    """Write run.json, which makes `folder` the folder of a run: its name and seed in reports, and more."""
    write_lines(folder / RUN_FILE, [json.dumps({"name": name, "seed": seed, **more}, indent=1)])


def write_results(
    folder: Path, metrics: Mapping[str, float], completions: Sequence[Mapping[str, str]] | None = None
) -> None:
    """Write a run's completions, if given, and then its metrics: a folder with metrics holds a finished run."""
    if completions is not None:
        lines = [json.dumps(completion, ensure_ascii=False) for completion in completions]
        write_lines(folder / COMPLETIONS_FILE, lines)
    write_lines(folder / METRICS_FILE, [json.dumps(metrics, indent=1)])


def _settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make a run this run, as JSON gives them back."""
    kept = {"command": command, **{k: v for k, v in settings.items() if k not in NOT_COMPARED}}
    return dict(json.loads(json.dumps(kept, default=str)))
