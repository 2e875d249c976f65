"""The claims: ours beside the other libraries at the reference shape. The headline rows come first, torch.compile late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.bench_from_logits import FROM_LOGITS
from benchmarks.bench_group_loss import FROZEN, SEGA
from benchmarks.bench_known_weights import KNOWN, LIGER_GRPO
from benchmarks.bench_lowrank import LOWRANK
from benchmarks.bench_score import SCORE, SCORE_BACKWARD
from benchmarks.contest import Task, compete, describe, result_of
from benchmarks.gpu_stages.sentences import TIES, Rows, decision, times_as_fast
from benchmarks.peers import HEADLINE
from benchmarks.results import OURS, seconds
from benchmarks.shapes import DRY, REFERENCE, Shape
from tools.files import Json

COMPILED = ("torch.compile", LIGER_GRPO)
"""libraries that compile for half a minute"""
CLAIMS = (SEGA, SCORE, KNOWN)
OTHERS = (FROZEN, SCORE_BACKWARD, LOWRANK, FROM_LOGITS)


def order() -> list[tuple[Task, str]]:
    """Return tasks and libraries in the order of what would be missed most."""
    claims = [(task, library) for task in CLAIMS for library in task.libraries]
    others = [(task, library) for task in OTHERS for library in task.libraries if library not in COMPILED]
    first = [(task, library) for task in CLAIMS for library in HEADLINE]
    then = [pair for pair in [*claims, *others] if pair not in first]
    return [*first, *sorted(then, key=lambda pair: pair[1] in COMPILED)]


def time_one(task: Task, shape: Shape, library: str) -> Json:
    row = compete(task, shape, [library], timed=True)[library]
    if row.reason is not None and library.startswith(OURS):
        raise ArithmeticError(row.reason)  # a failure, where a rival's is a reason for having no time
    return result_of({"task": task.name, **describe(shape), "library": library}, row)


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    compiled = 0
    for task, library in order():
        compiled += library == "torch.compile"
        if not (dry and compiled > 1 and library == "torch.compile"):  # one is enough to check the code
            yield f"{task.name}: {library}", partial(time_one, task, DRY if dry else REFERENCE, library)


def _claim(task: Task) -> Callable[[Rows], str]:
    def sentence(rows: Rows) -> str:
        timed = {row["extra_info"]["library"]: row for row in rows.values() if _is_timed(row, task)}
        ours = timed[OURS]["stats"]["median"]
        memory = timed[OURS]["extra_info"].get("peak extra MiB")
        others = {name: row["stats"]["median"] for name, row in timed.items() if not name.startswith(OURS)}
        said = f"{task.name}: {seconds(ours)}, {memory} MiB"
        if not others:
            return f"{said}, and no other library was timed."
        best = min(others, key=others.__getitem__)
        if ours <= (1 + TIES) * others[best]:
            missing = [name for name in task.libraries if name not in timed and not _has_a_reason(rows, task, name)]
            without = f" (not timed: {', '.join(missing)})" if missing else ""
            return f"{said}, {times_as_fast(others[best], ours)} as the next, {best}: the claim holds{without}."
        return f"{said}, and {best} is {times_as_fast(ours, others[best])}: CLAIM FAILS, read the profile first."

    sentence.__name__ = task.name
    return sentence


def _is_timed(row: Json, task: Task) -> bool:
    return "stats" in row and row["extra_info"]["task"] == task.name


def _has_a_reason(rows: Rows, task: Task, library: str) -> bool:
    return any("reason" in row and (row["task"], row["library"]) == (task.name, library) for row in rows.values())


def _without_a_time(rows: Rows) -> str:
    """Name the libraries that ran none of the tasks, with their first reason."""
    timed = {row["extra_info"]["library"] for row in rows.values() if "stats" in row}
    reasons: dict[str, str] = {}
    for row in rows.values():
        if "reason" in row and row["library"] not in timed:
            reasons.setdefault(row["library"], row["reason"])
    return "Without a time: " + "; ".join(f"{name} {reason}" for name, reason in reasons.items()) + "."


def decide(stage: Json) -> str:
    return decision(stage, *map(_claim, CLAIMS), _without_a_time)
