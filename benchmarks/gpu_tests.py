"""Run tests in processes that may lose their device, and know the outcome of each test whatever became of its process.

The module is also the pytest plugin (`-p benchmarks.gpu_tests`) by which a process reports its tests.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.processes import SILENCE, Log, run
from benchmarks.record import Record
from tools.files import Json

EVENTS = "GEM_KERNELS_EVENTS"
"""environment: a file to which the plugin appends one JSON object a line"""

# --- the pytest plugin ------------------------------------------------------------------------------------------------


def _event(**what: Any) -> None:
    with open(os.environ[EVENTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def pytest_collection_finish(session: Any) -> None:
    _event(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _event(test=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        longrepr = report.longrepr
        crash = getattr(longrepr, "reprcrash", None)
        said = crash.message if crash else longrepr[2] if isinstance(longrepr, tuple) else str(longrepr or "")
        trace = report.longreprtext[-8000:] if report.outcome == "failed" else ""
        seconds = round(report.duration, 2)
        _event(test=report.nodeid, outcome=report.outcome, seconds=seconds, said=said[:2000], trace=trace)
        _record(report.nodeid, report.outcome, said[:500])


_unrecorded: Counter[str] = Counter()


def _record(test: str, outcome: str, said: str) -> None:
    """Put a failure on file at once, and the number of other outcomes now and then."""
    record = Record.of_environment()
    if record is None:
        return
    _unrecorded[outcome] += 1
    if outcome == "failed" or _unrecorded.total() >= 20:
        record.change(partial(_add, failed={test: said} if outcome == "failed" else {}))
        _unrecorded.clear()


def _add(mine: Json, failed: dict[str, str]) -> None:
    so_far = mine.setdefault("so far", {"counts": {}, "failed": {}})
    so_far["counts"] = Counter(so_far["counts"]) + _unrecorded
    so_far["failed"] |= failed


def read_events(path: Path) -> list[Json]:
    """Return the events that the plugin wrote. The last line may be incomplete, and is left out then."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# --- the processes -----------------------------------------------------------------------------------------------------


class Tests:
    """The tests of some files, run by several processes. A process that loses its device is replaced by a new one."""

    def __init__(
        self,
        name: str,
        log: Log,
        scratch: Path,
        env: dict[str, str],
        workers: int,
        selected: Sequence[str],
        options: Sequence[str] = (),
    ) -> None:
        """selected: arguments of pytest that choose tests. options: arguments of every pytest."""
        self.name, self.log, self.scratch, self.env = name, log, scratch, env
        self.workers, self.selected, self.options = workers, selected, options
        self.collected: list[str] = []
        self.outcomes: dict[str, Json] = {}
        self.lock = threading.Lock()

    def pytest(self, events: Path, seconds: float, *arguments: str) -> int | None:
        flags = ["-v", "--tb=no", "--color=no", "--durations=8", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider"]
        flags += ["-o", "addopts=--strict-markers", "-o", f"faulthandler_timeout={int(SILENCE) - 10}"]

        def alive() -> float:
            age = time.time() - events.stat().st_mtime if events.exists() else SILENCE
            return time.monotonic() - age

        environment = {EVENTS: str(events), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **self.env}
        command = [sys.executable, "-m", "pytest", *flags, *self.options, *arguments]
        return run(command, self.log, events.stem, seconds, environment, alive)

    def collect(self, seconds: float) -> None:
        events = self.scratch / f"{self.name}.events"
        self.pytest(events, seconds, "--collect-only", "-qqq", *self.selected)
        self.collected = [test for e in read_events(events) for test in e.get("collected", [])]

    def work(self, number: int, deadline: float) -> None:
        mine = self.collected[number :: self.workers]
        for attempt in range(10):
            left = [test for test in mine if test not in self.outcomes]
            seconds = deadline - time.monotonic()
            if not left or seconds < 5:
                return
            events = self.scratch / f"{self.name}-{number}.{attempt}.events"
            status = self.pytest(events, seconds, *left)
            if not self.take(events, status):
                return

    def take(self, events: Path, status: int | None) -> bool:
        """Record the events of a process; return False if it did not start a test."""
        last = None
        for event in read_events(events):
            if "test" in event:
                last = event.pop("test")
                if trace := event.pop(
                    "trace", ""
                ):  # pytest prints traces at its end, which a killed process does not reach
                    self.log(f"[{events.stem}] {last} failed:\n{trace}")
                with self.lock:
                    known = self.outcomes.setdefault(last, {})
                    if known.get("outcome") != "failed":  # a passed teardown does not undo a failed test
                        known.update(event)
        if last is not None and status not in (0, 1):
            with self.lock:
                self.outcomes[last].setdefault("outcome", "failed")
                self.outcomes[last]["lost"] = "hung or out of time" if status is None else f"exit status {status}"
        return last is not None

    def results(self) -> Json:
        with self.lock:
            tests = {test: dict(self.outcomes.get(test, {})) for test in self.collected}
        for outcome in tests.values():
            outcome.setdefault("outcome", "not run")
        counts = Counter("lost" if "lost" in t else t["outcome"] for t in tests.values())
        others = {test: t for test, t in tests.items() if t["outcome"] != "passed" or "lost" in t}
        return {"counts": dict(counts), "not passed": others}

    def run(self, seconds: float) -> Json:
        deadline = time.monotonic() + seconds
        self.collect(seconds)
        threads = [threading.Thread(target=self.work, args=(i, deadline)) for i in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = self.results()
        counts = found["counts"]
        found["ok"] = bool(counts.get("passed")) and counts.keys() <= {"passed", "skipped"}
        self.log(f"[{self.name}] {', '.join(f'{n} {what}' for what, n in counts.items()) or 'no test was collected'}")
        for test, outcome in found["not passed"].items():
            if outcome["outcome"] != "skipped" or "lost" in outcome:
                said = str(outcome.get("lost") or outcome.get("said") or "").splitlines()
                self.log(f"[{self.name}] {outcome['outcome']}: {test}: {said[0] if said else ''}")
        return found
