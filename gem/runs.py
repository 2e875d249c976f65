"""A finished run as it lies in its folder: what it logged on the way, where it ended, some of what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    state, metrics = folder / "trainer_state.json", folder / "metrics.json"
    if not state.exists():
        state = max(numbered, key=lambda path: int(path.parent.name[11:]), default=state)
    if not state.exists() and not metrics.exists():
        expected = "trainer_state.json (there or in a checkpoint-N) or metrics.json"
        raise ValueError(f"folder: expected {expected} in {folder}, found neither")
    about = _read_object(folder / "run.json")
    seed = about.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f'{folder / "run.json"}: expected "seed" to be an integer, got {seed!r}')
    completions = _completions(folder / "completions.jsonl")
    name = str(about.get("name", folder.resolve().name))
    return Run(name, _history(state), _numbers(_read_object(metrics)), completions, seed)


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


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
    for entry in _read_object(path).get("log_history", []):
        if "step" not in entry:
            raise ValueError(f'{path}: expected "step" in every entry of log_history, got {sorted(entry)}')
        # the Trainer logs the training and the evaluation of one step apart
        steps.setdefault(entry["step"], {}).update(_numbers(entry))
    return [steps[step] for step in sorted(steps)]


def _completions(path: Path) -> list[dict[str, str]]:
    # split at "\n" only: JSON leaves U+2028 in a string as it is, and splitlines() would cut there
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
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
