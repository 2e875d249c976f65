"""`gem-kernels evidence`: make the runs of a comparison on all cores, one JSON record each, and go on where it was ended.

    config = read_config(Path("evidence.yaml"), METHODS, TASKS)
    make_runs(Plan(config), "gem-kernels evidence --config evidence.yaml")

What has a record is done. A run that fails is told and leaves none, so that the same command tries it again; one that diverges
has a record that says so. A kill loses the runs in progress alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from importlib.util import find_spec

import torch

from gem.evidence.plan import Cell, Job, Plan, Record, read_records, slug
from gem.evidence.run import Runner, budget_of, changed, plain, settings_of
from gem.evidence.workers import VISIBLE, Pool, cores, processes
from gem.files import check_writable, write_lines
from gem.lock import locked
from gem.methods import METHODS
from gem.models import pick_device
from gem.report import Table

LOCK_FILE = "evidence.lock"
CUT_OFF = 0.1  # share of a start's sampled answers that may be cut off, and count as wrong, without a word


def checked_records(plan: Plan) -> dict[Job, Record]:
    """Return the records in the plan's output folder.

    Raises:
        ValueError: one of a run of the plan was made with other settings, or from another start.
    """
    folder, records = plan.config.output_dir, read_records(plan.config.output_dir)
    compared = set(plan.compared)
    for job, record in records.items():
        if job not in plan.starts and (job.task, job.method) not in compared:
            continue
        differing = changed(record["settings"], settings_of(plan.config, job))
        start = records.get(plan.start(job.task, job.seed), record)
        # A built-in start is trained anew on every machine, whose processor may round otherwise.
        hashed = ("data", "model") if job.task in plan.config.tasks else ("data",)
        if any(start["start"][name] != record["start"][name] for name in hashed):
            differing.append("the start")
        if differing:
            raise ValueError(
                f"output_dir must hold records of the same settings, got {folder / job.path} with another "
                f"{', '.join(differing)}: remove what is out of date, as a rule {folder / job.path.parent}, or take "
                "another folder"
            )
    return records


def make_runs(plan: Plan, command: str, pool: Callable[[], AbstractContextManager[Pool]] | None = None) -> None:
    """Make every run of the plan that has no record, with a line for each on stdout.

    Args:
        plan: the runs.
        command: the command line, for the records.
        pool: gives what makes the runs; None: worker_count processes.

    Raises:
        ValueError: another process makes runs there, a record is of other settings, or runs failed.
    """
    folder = plan.config.output_dir
    check_writable(folder, "output_dir")
    with locked(folder / LOCK_FILE, "output_dir", folder):
        records = checked_records(plan)
        failed: dict[Job, str] = {}
        shutil.rmtree(folder / "scratch", ignore_errors=True)  # of runs that a kill has ended
        try:
            if plan.missing(records):
                gpus = gpus_of(plan.config.device)
                if not gpus:
                    pick_device(plan.config.device)  # which a machine without it refuses
                for task in plan.config.tasks:
                    budget_of(plan.config, task)
                _check_trl(plan)
                count = worker_count(plan)
                print(f"{_done(plan, records)}; {count} at a time, whose output is in {folder}/worker*.log", flush=True)
                with pool() if pool else processes(plan.config, Runner, count, folder, gpus) as workers:
                    _make(plan, records, failed, workers, command)
        finally:
            shutil.rmtree(folder / "scratch", ignore_errors=True)
    print(f"{plan.done(records)} of {plan.total} runs are in {folder}")
    if failed:
        first, why = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} runs failed, and the same command tries them again: {first}: {why}"
            + (f"; and {', '.join(map(str, [*failed][1:]))}" if len(failed) > 1 else "")
        )


def _make(plan: Plan, records: dict[Job, Record], failed: dict[Job, str], workers: Pool, command: str) -> None:
    """Keep the workers busy until nothing is left that can be made; fill in the records and the failures."""
    running: set[Job] = set()
    while True:
        waiting = [job for job in plan.ready(records) if job not in running and job not in failed]
        for job in waiting[: workers.free]:
            workers.begin(job)
            running.add(job)
        if not running:
            return
        for job, result, error in workers.ended():
            running.remove(job)
            if result is None:
                failed[job] = error
                print(f"failed: {job}: {error}", flush=True)
                continue
            about = {**asdict(job), "settings": plain(settings_of(plan.config, job))}
            date = datetime.now().astimezone().isoformat(timespec="seconds")
            records[job] = {**about, **result, "date": date, "command": command}
            lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in records[job].items()]
            write_lines(plan.config.output_dir / job.path, ["{", ",\n".join(lines), "}"])
            print(_progress(plan, records, job), flush=True)


def _progress(plan: Plan, records: Mapping[Job, Record], job: Job) -> str:
    """Return the line of a run that has just ended: its number, what it reached, and the time that is left."""
    record = records[job]
    test = record.get("test", {})
    names = {"accuracy_greedy": "greedy", "accuracy_sampled": "sampled", "accuracy_majority": "majority"}
    reached = [f"{name} {test[key]:.3f}" for key, name in names.items() if key in test]
    said = ", ".join(reached) or record.get("message", record["outcome"])
    cut = test.get("truncated", 0.0)
    short = f"; {cut:.0%} of its answers are cut off: raise max_new_tokens" if not job.method and cut > CUT_OFF else ""
    return f"{plan.done(records)} of {plan.total}  {job}: {said}; {duration(record['seconds'])}{_left(plan, records)}{short}"


def _left(plan: Plan, records: Mapping[Job, Record]) -> str:
    """Return the words for the time that is left; "" if nothing is missing, or nothing is known yet."""
    seconds = plan.seconds_left(records) / worker_count(plan)
    return f"; about {duration(seconds)} left" if seconds > 0 else ""


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def status_table(plan: Plan, records: Mapping[Job, Record]) -> tuple[Table, str]:
    """Return what is done and what is missing, a row per task and method, and one line with the time that is left."""
    missing = plan.missing(records)
    everything: Sequence[Job | Cell] = plan.missing({})
    rows = []
    for task, method in dict.fromkeys((item.task, item.method) for item in everything):
        gone, all_of = ([i for i in items if (i.task, i.method) == (task, method)] for items in (missing, everything))
        rate = plan.rate(task, method, records) if method else None
        lacks = ", ".join(_wanted(item) for item in gone)
        chosen = "—" if rate is None else f"{rate:g}"
        rows.append([f"{task}/{slug(method) or 'start'}", f"{len(all_of) - len(gone)} of {len(all_of)}", chosen, lacks])
    return Table(["task/method", "runs", "rate", "missing: pairs/seed"], rows), _done(plan, records)


def _done(plan: Plan, records: Mapping[Job, Record]) -> str:
    """Return the words for what is done, and the time that is left."""
    return f"{plan.done(records)} of {plan.total} runs are done{_left(plan, records)}"


def _wanted(item: Job | Cell) -> str:
    if not item.method:
        return f"seed {item.seed}"
    return f"{item.pairs}/{item.seed}" + (f" at {item.rate:g}" if isinstance(item, Job) else "")


def worker_count(plan: Plan) -> int:
    """Return the number of processes: the config's, else one per GPU, without a GPU one per core."""
    one_for_all = plan.config.device not in (None, "cpu")  # such as mps
    return plan.config.workers or len(gpus_of(plan.config.device)) or (1 if one_for_all else cores())


def gpus_of(device: str | None) -> list[str]:
    """Return the GPUs that runs on a device are made on, as in CUDA_VISIBLE_DEVICES: of "cuda:1" one, of "cuda" all.

    [] without one. The GPUs are not used: a context would take memory of the first for as long as this process lives.

    Args:
        device: as for pick_device.
    """
    kind, _, index = ("cuda" if device is None else device).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    listed = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = listed[:count] or [str(i) for i in range(count)]
    return [name for i, name in enumerate(names) if index in ("", str(i))]


def _check_trl(plan: Plan) -> None:
    """Raise ValueError if a method of the plan needs TRL, which is an extra, and it is not there."""
    needing = sorted({cell.method for cell in plan.cells if METHODS[cell.method].kind == "rloo"})
    if needing and find_spec("trl") is None:
        raise ValueError(f"{', '.join(needing)} need TRL: pip install 'gem-kernels[trl]', or leave them out")
