"""A run's folder: claim it, find the checkpoint to go on from, and read what a run has left there."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem.files import read_text, write_lines

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
STATE_FILE = "trainer_state.json"
# Not part of what a run computes: where it lies, where it goes on from, and a secret.
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "hub_token")
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def check_writable(path: Path, name: str) -> None:
    """Whether a file or folder can be made at `path`, by looking only.

    Raises:
        ValueError: what is there above it is a file, or cannot be written; under the name of the argument.
    """
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if above != path and not above.is_dir():
        raise ValueError(f"{name} must be in a folder, got {path}: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{name} must be where one may write, got {path}: {above} cannot be written")


def check_file(path: Path, name: str) -> None:
    """Whether a file can be written at `path`, before the work whose result it is to hold. Raises ValueError if not."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got {path}, which is a folder")
    check_writable(path, name)


def check_output(folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run may write there; nothing is written yet.

    Args:
        folder: its output_dir.
        command: sft or train.
        settings: of the run; it goes on in a folder of the same settings.

    Returns:
        Whether the folder holds this very run, begun earlier.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got {folder}, which is a file")
    check_writable(folder, "output_dir")
    if (folder / RUN_FILE).is_file():
        mine, theirs = _settings(command, settings), _read_object(folder / RUN_FILE).get("settings")
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


def _settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"command": command, **{k: v for k, v in settings.items() if k not in NOT_COMPARED}}
    return dict(json.loads(json.dumps(kept, default=str)))


def prepare_output(folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Claim an output folder by a run.json in it. Returns whether it was new; raises what check_output does."""
    if check_output(folder, command, settings):
        return False
    run = {"name": folder.name, "seed": settings.get("seed", 0), "settings": _settings(command, settings)}
    write_lines(folder / RUN_FILE, [json.dumps(run, indent=1)])
    return True


@contextmanager
def claimed(training: Any, command: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the output_dir of these TrainingArguments is this run's. One that fails before its first checkpoint leaves no
    claim, so that it can be tried again with other settings."""
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


def find_checkpoint(folder: Path, asked: str | None) -> str | None:
    """The checkpoint to go on from, None to start from the beginning.

    Args:
        folder: output_dir of the run.
        asked: resume_from_checkpoint: a folder; true: the newest of `folder`; false: none; None: the newest if there is one.

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
    """The newest checkpoint to go on from: whole, and not of the last step, from which Trainer would take one step more; the
    one before it ends the same. Trainer writes trainer_state.json last: without it a kill came before.

    Raises:
        ValueError: there is none, but one that lacks something or is damaged: to start over would take that away too.
    """
    damaged = ""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            state = steps_of(checkpoint)
        except (OSError, ValueError):
            continue
        if state[0] >= state[1]:
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
    """(steps taken, steps of the whole run) of a checkpoint. Raises ValueError where its trainer_state.json does not say."""
    state = _read_object(checkpoint / STATE_FILE)
    taken, of = state.get("global_step"), state.get("max_steps")
    if not isinstance(taken, int) or not isinstance(of, int):
        raise ValueError(f'{checkpoint / STATE_FILE}: expected "global_step" and "max_steps", got {sorted(state)[:8]}')
    return taken, of


def _flaw(checkpoint: Path) -> str:
    """What keeps a training from going on from a checkpoint; "": nothing."""
    from gem.loading import no_tensors  # which needs safetensors; reports do not

    if not checkpoint.is_dir():
        return "no such folder"
    missing = [name for name in (STATE_FILE, "optimizer.pt", "scheduler.pt") if not (checkpoint / name).is_file()]
    weights = [path for pattern in WEIGHTS for path in sorted(checkpoint.glob(pattern))]
    if missing or not weights:
        which = missing[0] if missing else "file of weights"
        return f"it has no {which}" + (", as save_only_model leaves it" if which == "optimizer.pt" else "")
    try:
        steps_of(checkpoint)
        shards = {n for i in checkpoint.glob("*.index.json") for n in _read_object(i).get("weight_map", {}).values()}
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


@dataclass(frozen=True)
class Run:
    """One seed of one method: what it logged on the way, where it ended, and some of what it wrote."""

    name: str
    history: list[dict[str, float]]  # one dict per logged step, with "step"
    metrics: dict[str, float]
    completions: list[dict[str, str]]  # prompt, completion, expected; perhaps correct, score
    seed: int = 0


def load_run(folder: Path) -> Run:
    """Read a training output folder.

    `trainer_state.json` (else the newest `checkpoint-N`'s) gives the history, `metrics.json` the final numbers,
    `completions.jsonl` the examples and `run.json` the name and seed; each may be absent.

    Raises:
        ValueError: both of the first two are absent, or a file does not hold what it should.
    """
    folder = Path(folder)
    numbered = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    state, metrics = folder / STATE_FILE, folder / METRICS_FILE
    if not state.exists():
        state = max(numbered, key=lambda path: int(path.parent.name[11:]), default=state)
    if not state.exists() and not metrics.exists():
        expected = "trainer_state.json (there or in a checkpoint-N) or metrics.json"
        raise ValueError(f"folder: expected {expected} in {folder}, found neither")
    about = _read_object(folder / RUN_FILE)
    seed = about.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f'{folder / RUN_FILE}: expected "seed" to be an integer, got {seed!r}')
    completions = _completions(folder / "completions.jsonl")
    name = str(about.get("name", folder.resolve().name))
    return Run(name, _history(state), _numbers(_read_object(metrics)), completions, seed)


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(read_text(path), str(path)) if path.exists() else {}


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got text that does not parse: {error}") from error
    if type(value) is not dict:
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _history(path: Path) -> list[dict[str, float]]:
    steps: dict[float, dict[str, float]] = {}
    entries = _read_object(path).get("log_history", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected log_history to be a list of objects, got {str(entries)[:60]}")
    for entry in entries:
        if not isinstance(entry.get("step"), int | float):
            raise ValueError(f'{path}: expected "step" in every entry of log_history, got {sorted(entry)}')
        # the Trainer logs the training and the evaluation of one step apart
        steps.setdefault(entry["step"], {}).update(_numbers(entry))
    return [steps[step] for step in sorted(steps)]


def _completions(path: Path) -> list[dict[str, str]]:
    # split at "\n" only: JSON leaves U+2028 in a string as it is, and splitlines() would cut there
    lines = read_text(path).split("\n") if path.exists() else []
    completions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            values = _parse_object(line, f"{path}, line {number}")
            if not {"prompt", "completion"} <= values.keys():
                raise ValueError(f'{path}, line {number}: expected "prompt" and "completion", got {sorted(values)}')
            completions.append({key: str(value) for key, value in values.items() if value is not None})
    return completions


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs under their name, in order of appearance."""
    if not runs:
        raise ValueError("runs: expected at least one Run, got none")
    methods: dict[str, list[Run]] = {}
    for run in runs:
        seeds = methods.setdefault(run.name, [])
        if any(run.seed == other.seed for other in seeds):
            # one result counted twice would make its interval too narrow
            raise ValueError(f"runs: expected one of each name and seed, got two of {run.name!r} with seed {run.seed}")
        seeds.append(run)
    return methods
