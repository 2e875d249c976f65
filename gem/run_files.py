"""Names and contents of the files in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gem.files import read_text

RUN_FILE = "run.json"  # name, seed and settings: whose folder this is
STATE_FILE = "trainer_state.json"  # Trainer's log; in every checkpoint too
METRICS_FILE = "metrics.json"  # written last: a folder with it holds a finished run
COMPLETIONS_FILE = "completions.jsonl"


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N in the folder of a run, newest first."""
    numbers = {p: p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*")}
    return sorted((p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]), reverse=True)


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
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got text that does not parse: {error}") from error
    if type(value) is not dict:
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
