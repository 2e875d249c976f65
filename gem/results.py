"""Results of finished runs, read from their folders for reports. Needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gem.files import read_text
from gem.run_files import (
    COMPLETIONS_FILE,
    METRICS_FILE,
    RAILS_FILE,
    RUN_FILE,
    STATE_FILE,
    numbered_checkpoints,
    parse_object,
    read_object,
)


@dataclass(frozen=True)
class Run:
    """One seed of one method: its log, its final metrics, and some of its completions."""

    name: str
    history: list[dict[str, float]]  # one dict per logged step, with "step"
    metrics: dict[str, float]
    completions: list[dict[str, str]]  # prompt, completion, expected; perhaps correct, score
    seed: int = 0
    rails: list[dict[str, str]] = field(default_factory=list)  # rail, verdict, said; none of a run of an older release


def load_run(folder: Path) -> Run:
    """Read a training output folder.

    `trainer_state.json`, else that of the newest `checkpoint-N`, gives the history, `metrics.json` the final numbers,
    `completions.jsonl` the examples, `rails.json` the verdicts of the guard rails, and `run.json` the name and the seed. Each
    may be absent.

    Raises:
        ValueError: both of the first two are absent, or a file's content is not of the expected form.
    """
    folder = Path(folder)
    metrics = folder / METRICS_FILE
    states = [holder / STATE_FILE for holder in (folder, *numbered_checkpoints(folder))]
    state = next((path for path in states if path.exists()), states[0])
    if not state.exists() and not metrics.exists():
        expected = f"{STATE_FILE} (there or in a checkpoint-N) or {METRICS_FILE}"
        raise ValueError(f"folder: expected {expected} in {folder}, found neither")
    about = read_object(folder / RUN_FILE)
    seed = about.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f'{folder / RUN_FILE}: expected "seed" to be an integer, got {seed!r}')
    completions = _completions(folder / COMPLETIONS_FILE)
    name = str(about.get("name", folder.resolve().name))
    rails = _rails(folder / RAILS_FILE)
    return Run(name, _history(state), _numbers(read_object(metrics)), completions, seed, rails)


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs under their names, in order of appearance.

    Raises:
        ValueError: there are no runs, or two of one name and seed: counted twice, a result would narrow its interval.
    """
    if not runs:
        raise ValueError("runs: expected at least one Run, got none")
    methods: dict[str, list[Run]] = {}
    for run in runs:
        seeds = methods.setdefault(run.name, [])
        if any(run.seed == other.seed for other in seeds):
            raise ValueError(f"runs: expected one of each name and seed, got two of {run.name!r} with seed {run.seed}")
        seeds.append(run)
    return methods


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _rails(path: Path) -> list[dict[str, str]]:
    """Return the verdicts in a rails.json, their texts alone."""
    found, needed = read_object(path).get("rails", []), ("rail", "verdict", "said")
    if not isinstance(found, list) or not all(isinstance(v, dict) and {*needed} <= v.keys() for v in found):
        expected = f'"rails" to be a list of objects with {", ".join(needed)}'
        raise ValueError(f"{path}: expected {expected}, got {str(found)[:60]}")
    return [{name: str(verdict[name]) for name in needed} for verdict in found]


def _history(path: Path) -> list[dict[str, float]]:
    """Return the logged numbers of each step in a trainer_state.json, by rising step."""
    steps: dict[float, dict[str, float]] = {}
    entries = read_object(path).get("log_history", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected log_history to be a list of objects, got {str(entries)[:60]}")
    for entry in entries:
        if not isinstance(entry.get("step"), int | float):
            raise ValueError(f'{path}: expected "step" in every entry of log_history, got {sorted(entry)}')
        # Trainer logs the training and the evaluation of one step as two entries.
        steps.setdefault(entry["step"], {}).update(_numbers(entry))
    return [steps[step] for step in sorted(steps)]


def _completions(path: Path) -> list[dict[str, str]]:
    """Return the objects of a completions file, with every value as text."""
    # Split at "\n" only: JSON leaves U+2028 in a string as it is, and splitlines() would cut there.
    lines = read_text(path).split("\n") if path.exists() else []
    completions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            values = parse_object(line, f"{path}, line {number}")
            if not {"prompt", "completion"} <= values.keys():
                raise ValueError(f'{path}, line {number}: expected "prompt" and "completion", got {sorted(values)}')
            completions.append({key: str(value) for key, value in values.items() if value is not None})
    return completions
