"""The runs that follow from a config of `gem-kernels evidence`, and their records: the JSON of what is done.

    plan = Plan(config, only=["chain/*"])
    records = read_records(config.output_dir)
    for job in plan.ready(records): ...          # starts, then the sweep of the rates, then the studies at the best rate

Neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from gem.evidence.config import Config, Study
from gem.run_files import read_object

Record = dict[str, Any]


def slug(method: str) -> str:
    """Return the name of a method as it is in paths and patterns: "DPO + SFT" -> "dpo-sft"."""
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")


@dataclass(frozen=True)
class Job:
    """One run: a start (method ""; it is evaluated alone), or a training from it."""

    task: str
    seed: int
    method: str = ""
    pairs: int = 0
    rate: float = 0.0

    @property
    def path(self) -> Path:
        """Path of the record in the output folder."""
        if not self.method:
            return Path("starts", self.task, f"seed{self.seed}.json")
        name = f"pairs{self.pairs}-seed{self.seed}-rate{self.rate!r}.json"
        return Path("runs", self.task, slug(self.method), name)

    def __str__(self) -> str:
        return self.path.with_suffix("").relative_to("runs" if self.method else ".").as_posix()


@dataclass(frozen=True)
class Cell:
    """What a study asks for: a run at the rate that the sweep of its task and method chooses."""

    task: str
    method: str
    pairs: int
    seed: int

    def matches(self, patterns: Collection[str]) -> bool:
        """Return True without patterns, or if one matches task/method/pairs/seed, the method as in paths."""
        name = f"{self.task}/{slug(self.method)}/{self.pairs}/{self.seed}"
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def read_records(output_dir: Path) -> dict[Job, Record]:
    """Return the record of every run in an output folder.

    Raises:
        ValueError: a file there is no record of the run that its path names.
    """
    records = {}
    for path in sorted([*output_dir.glob("starts/*/seed*.json"), *output_dir.glob("runs/*/*/*.json")]):
        record = read_object(path)
        try:
            job = Job(**{f.name: record[f.name] for f in fields(Job)})
        except KeyError as missing:
            raise ValueError(f"{path}: expected the record of a run, got one without {missing}") from None
        if output_dir / job.path != path:
            raise ValueError(f"{path}: expected the record of this run, got that of {job}")
        records[job] = record
    return records


def validation_accuracy(record: Record) -> float:
    """Return the sampled accuracy on the validation questions, by which rates are compared; 0 for a run that diverged."""
    return float(record.get("validation", {}).get("accuracy_sampled", 0.0))


class Plan:
    """The runs of a config, and which of them can be made now.

    Args:
        config: from read_config.
        only: patterns of task/method/pairs/seed (`Cell.matches`); the cells that match, and what they need, are run.

    Raises:
        ValueError: a pattern matches nothing.
    """

    def __init__(self, config: Config, only: Sequence[str] = ()) -> None:
        self.config = config
        cells = [cell for study in config.studies for cell in _cells(study, config.seeds)]
        for pattern in only:
            if not any(cell.matches([pattern]) for cell in cells):
                raise ValueError(
                    f"only must match task/method/pairs/seed of a run, such as {_name(cells[0])}, got {pattern!r}"
                )
        self.cells = list(dict.fromkeys(cell for cell in cells if cell.matches(only)))
        self.compared = list(dict.fromkeys((cell.task, cell.method) for cell in self.cells))
        self.sweeps = [job for task, method in self.compared for job in self.sweep(task, method)]
        needed: list[Job | Cell] = [*self.sweeps, *self.cells]
        self.starts = list(dict.fromkeys(self.start(item.task, item.seed) for item in needed))

    def start(self, task: str, seed: int) -> Job:
        """Return the job of the start of a run."""
        return Job(*self.config.start_of(task, seed))

    def sweep(self, task: str, method: str) -> list[Job]:
        """Return the runs that choose the rate of a method on a task, none if there is one rate."""
        config = self.config
        rates = config.rates if len(config.rates) > 1 else ()
        return [Job(task, seed, method, config.sweep_pairs, rate) for seed in config.sweep_seeds for rate in rates]

    def rate(self, task: str, method: str, records: Mapping[Job, Record]) -> float | None:
        """Return the chosen rate: the best mean of validation_accuracy, of equal ones the lowest; None: not swept yet."""
        jobs = self.sweep(task, method)
        if not all(job in records for job in jobs):
            return None
        reached = {
            rate: sum(validation_accuracy(records[j]) for j in jobs if j.rate == rate) for rate in self.config.rates
        }
        return max(reached, key=lambda rate: reached[rate]) if jobs else self.config.rates[0]

    def job(self, cell: Cell, records: Mapping[Job, Record]) -> Job | None:
        """Return the run of a cell, None if its rate is not chosen yet."""
        rate = self.rate(cell.task, cell.method, records)
        return None if rate is None else Job(cell.task, cell.seed, cell.method, cell.pairs, rate)

    def ready(self, records: Mapping[Job, Record]) -> list[Job]:
        """Return the runs without a record that can be made now, in the order in which to make them."""
        studied = [self.job(cell, records) for cell in self.cells]
        jobs = [*self.starts, *self.sweeps, *(job for job in studied if job)]
        started = [job for job in jobs if not job.method or self.start(job.task, job.seed) in records]
        return [job for job in dict.fromkeys(started) if job not in records]

    def missing(self, records: Mapping[Job, Record]) -> list[Job | Cell]:
        """Return what has no record yet: starts, runs of the sweep, and cells that are not one of these."""
        jobs: list[Job | Cell] = [job for job in (*self.starts, *self.sweeps) if job not in records]
        own = (cell for cell in self.cells if not self._swept(cell))
        return jobs + [cell for cell in own if self.job(cell, records) not in records]

    @property
    def total(self) -> int:
        """The number of runs, each counted once."""
        return len(self.missing({}))

    def done(self, records: Mapping[Job, Record]) -> int:
        """Return the number of runs that have a record, of `total`."""
        return self.total - len(self.missing(records))

    def _swept(self, cell: Cell) -> bool:
        """Return True if the run of a cell is one of the sweep, whichever rate is chosen."""
        config = self.config
        return len(config.rates) > 1 and cell.pairs == config.sweep_pairs and cell.seed in config.sweep_seeds

    def seconds_left(self, records: Mapping[Job, Record]) -> float:
        """Estimate the seconds of what is missing, on one worker; NaN before the first run has ended.

        A run takes the mean of its method on its task, else of all methods on the task, else of all runs.
        """
        spent: dict[tuple[str, str], list[float]] = {}
        for job, record in records.items():
            kind = job.method and "run"
            for key in {(job.task, job.method), (job.task, kind), ("", kind)}:
                spent.setdefault(key, []).append(record["seconds"])
        total = 0.0
        for item in self.missing(records):
            kind = item.method and "run"
            keys = ((item.task, item.method), (item.task, kind), ("", kind))
            seen = next((spent[key] for key in keys if key in spent), None) or [math.nan]
            total += sum(seen) / len(seen)
        return total


def _cells(study: Study, seeds: Iterable[int]) -> list[Cell]:
    """Return the cells of a study, seed by seed: what is there after an hour is a comparison, on fewer seeds."""
    order = product(seeds, study.tasks, study.pairs, study.methods)
    return [Cell(task, method, pairs, seed) for seed, task, pairs, method in order]


def _name(cell: Cell) -> str:
    return f"{cell.task}/{slug(cell.method)}/{cell.pairs}/{cell.seed}"
