"""Names and contents of the files in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gem.files import read_text

RUN_FILE = "run.json"  # name, seed, settings and hashes of the inputs: whose folder this is
STATE_FILE = "trainer_state.json"  # Trainer's log; in every checkpoint too
METRICS_FILE = "metrics.json"  # written last: a folder with it holds a finished run
COMPLETIONS_FILE = "completions.jsonl"
RAILS_FILE = "rails.json"  # what each guard rail found; the only result of a run that stopped itself
AVERAGE_FILE = "weight_average.safetensors"  # in a checkpoint of `score_with: ema`: the average of the weights so far
CALIBRATION_FILE = (
    "calibration.json"  # in a checkpoint: how the ranking's signals ordered answers to the pairs' prompts
)
MANIFEST_FILE = "manifest.json"  # sizes and hashes of the files, written last: the checkpoint or the result is whole
LOCK_FILE = "run.lock"  # who trains there now
BEST_FOLDER = "checkpoint-best"  # weights of the best evaluation, which the guard restores


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N in the folder of a run, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_number, reverse=True)


def step_number(checkpoint: Path) -> int:
    """Return N of a folder checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def has_manifest(folder: Path) -> bool:
    """Return True if a checkpoint was written to its end: its manifest is written last."""
    return (folder / MANIFEST_FILE).is_file()


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, {} if there is no such file.

    Raises:
        ValueError: the file does not hold a JSON object; the message names the file.
    """
    return parse_object(read_text(path), str(path)) if path.exists() else {}


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text. Raise ValueError, beginning with `where`, if there is none."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got text that does not parse: {error}") from error
    if type(value) is not dict:
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
