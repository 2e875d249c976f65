"""`make gpu`: all that needs a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu [--out benchmarks/results] [--seconds 560] [--stages tests sweep bench]

Three stages, each with its own processes and its own time, none stopped by another's failure: the GPU tests, the tile sweep
(sweep.py), the benchmarks. OUT/gpu-<device>-<date>.log holds everything that was said, OUT/gpu-<device>-<date>.json the
results, replaced by rename while they come in, and OUT/<device>-<date>.json those of the benchmarks, as `make bench` writes
them. Exit status: 0, or the sum of 2 (tests), 4 (sweep) and 8 (bench) for the stages that failed; 1 without a CUDA device, and
then nothing is written.

This file is also the pytest plugin (`-p benchmarks.gpu`) by which a stage learns what its tests did, whatever became of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent
LOST = 77
"""Exit status of a stage's process whose CUDA context is lost (an illegal address): only a new process can go on."""

SILENCE = 100.0  # seconds without a word or a finished test, after which a process counts as hung
EVENTS = "GEM_KERNELS_EVENTS"

Json = dict[str, Any]


def write_json(path: Path, document: Any) -> None:
    """By rename: a reader, and whoever comes after a kill, finds a whole file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Rows:
    """Results that a stage adds one by one. A row is claimed before its work starts, so that a process which dies over it
    leaves that on record, and the next process does not die over it again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.document: Json = (read_json(path) if path else None) or {"rows": []}

    def claim(self, **key: Any) -> Json | None:
        """A new row, on record as one that did not return; None: it was claimed before."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.document["rows"]):
            return None
        row = {**key, "error": "did not return: the process hung or died"}
        self.document["rows"].append(row)
        self.save()
        return row

    def put(self, row: Json, **results: Any) -> None:
        row.pop("error", None)
        row.update(results)
        self.save()

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.document)


def milliseconds(fn: Callable[[], object], seconds: float = 0.5, least: int = 3, most: int = 25) -> list[float]:
    """Times of some runs of fn on the device, by events; about as many as fit into `seconds`. fn has run before.

    Between two runs the level-2 cache is overwritten, so that small inputs are read from memory, as they would be in a model.
    """
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < 1e3 * seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


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


def read_events(path: Path) -> list[Json]:
    """What the plugin wrote; its last line may be half there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# --- processes --------------------------------------------------------------------------------------------------------


class Log:
    """What is printed is also in the file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.lock = threading.Lock()

    def __call__(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            self.file.write(text + "\n")


def run(
    command: Sequence[str],
    log: Log,
    name: str,
    seconds: float,
    env: dict[str, str],
    alive: Callable[[], float] = lambda: 0.0,
) -> int | None:
    """Exit status of a command, its output in the log; None: killed, after `seconds` or SILENCE.

    alive: time.monotonic() of a sign of life other than output.
    """
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": search, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own children die with it
    )
    lines: queue.Queue[str] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    start = heard = time.monotonic()
    try:
        while process.poll() is None or not lines.empty():
            try:
                log(f"[{name}] {lines.get(timeout=0.5).rstrip()}")
                heard = time.monotonic()
            except queue.Empty:
                heard = max(heard, alive())
            now = time.monotonic()
            if now - start > seconds or now - heard > SILENCE:
                log(f"[{name}] killed after {now - start:.0f} s, {now - heard:.0f} s of silence")
                return None
        reader.join(2)  # what it printed last; its children may still hold the pipe
        while not lines.empty():
            log(f"[{name}] {lines.get().rstrip()}")
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            log(f"[{name}] process {process.pid} does not die: the device may be hung")


# --- stages -----------------------------------------------------------------------------------------------------------


class Tests:
    """Tests of a file or folder in some processes at once, each started anew behind a test that cost it its device."""

    def __init__(
        self, name: str, file: str, log: Log, scratch: Path, env: dict[str, str], workers: int, *selected: str
    ) -> None:
        self.name, self.file, self.log, self.scratch, self.env = name, file, log, scratch, env
        self.workers, self.selected = workers, selected
        self.collected: list[str] = []
        self.outcomes: dict[str, Json] = {}
        self.lock = threading.Lock()

    def pytest(self, events: Path, seconds: float, *arguments: str) -> int | None:
        flags = ["-v", "--tb=no", "--color=no", "--durations=8", "-p", "benchmarks.gpu", "-p", "no:cacheprovider"]
        flags += ["-o", "addopts=--strict-markers", "-o", f"faulthandler_timeout={int(SILENCE) - 10}"]

        def alive() -> float:
            age = time.time() - events.stat().st_mtime if events.exists() else SILENCE
            return time.monotonic() - age

        environment = {EVENTS: str(events), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **self.env}
        command = [sys.executable, "-m", "pytest", *flags, *arguments]
        return run(command, self.log, events.stem, seconds, environment, alive)

    def collect(self, seconds: float) -> None:
        events = self.scratch / f"{self.name}.events"
        self.pytest(events, seconds, "--collect-only", "-qqq", *self.selected, self.file)
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
        """Take in what a process said about its tests; False: it did not get as far as a test."""
        last = None
        for event in read_events(events):
            if "test" in event:
                last = event.pop("test")
                if trace := event.pop("trace", ""):  # pytest shows them at its end, which it may not have reached
                    self.log(f"[{events.stem}] {last} failed:\n{trace}")
                with self.lock:
                    known = self.outcomes.setdefault(last, {})
                    if known.get("outcome") != "failed":  # its teardown may have more to say, but nothing better
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


def run_sweep(log: Log, scratch: Path, seconds: float) -> Json:
    """sweep.py, started again behind a candidate that it died over."""
    deadline = time.monotonic() + seconds
    out, status = scratch / "sweep.json", None
    for _ in range(6):
        left = deadline - time.monotonic()
        if left < 20:
            break
        command = [sys.executable, "-m", "benchmarks.sweep", "--json", str(out), "--seconds", str(int(left - 10))]
        status = run(command, log, "sweep", left, {})
        if status == 0:
            break
    found: Json = read_json(out) or {"rows": []}
    return {**found, "ok": status == 0 and any(row.get("best") for row in found["rows"])}


def run_stage(name: str, log: Log, scratch: Path, seconds: float) -> Json:
    if name == "tests":
        # Compiling is most of the work, and one process compiles on one core.
        workers = max(1, min(4, (os.cpu_count() or 1) // 3))
        return Tests(name, "tests/test_gpu.py", log, scratch, {}, workers, "-m", "gpu").run(seconds)
    if name == "sweep":
        return run_sweep(log, scratch, seconds)
    out = scratch / "benchmarks.jsonl"
    env = {results.ROWS: str(out), results.DEADLINE: str(time.time() + seconds - 10)}
    found = Tests(name, "benchmarks", log, scratch, env, 1).run(seconds)
    return {**found, **results.from_rows(out)}


STAGES = {"tests": (2, 235), "sweep": (4, 145), "bench": (8, 165)}  # exit status, seconds


def describe() -> Json:
    """Device, driver, versions, date, commit."""
    changed = results.said("git", "status", "--porcelain")
    return {
        **results.describe_machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": results.said("git", "rev-parse", "HEAD"),
        "changed files": changed.splitlines() if changed else [],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GPU tests, tile sweep, times beside the peers.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args(argv)
    start = time.monotonic()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    header = describe()
    args.out.mkdir(parents=True, exist_ok=True)
    date = re.sub(r"\D", "", header["date"][:16])
    name = f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', header['device']).strip('-')}-{date}"
    path, log = args.out / f"{name}.json", Log(args.out / f"{name}.log")
    document: Json = {"header": header, "stages": {}}
    log(json.dumps(header, indent=1))
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stop = threading.Event()

        def keep_up() -> None:
            """What the running stage has so far, every few seconds."""
            while not stop.wait(3):
                so_far = {file.stem: read_json(file) for file in scratch.glob("*.json")}
                events = [e for file in scratch.glob("*.events") for e in read_events(file) if "outcome" in e]
                so_far["tests"] = {
                    "counts": Counter(e["outcome"] for e in events),
                    "failed": {e["test"]: e["said"] for e in events if e["outcome"] == "failed"},
                }
                write_json(path, {**document, "so far": so_far})

        keeper = threading.Thread(target=keep_up, daemon=True)
        keeper.start()
        for i, stage in enumerate(args.stages):
            bit, _ = STAGES[stage]
            # What a stage leaves over goes to the next; what the later ones need is kept for them.
            later = sum(STAGES[name][1] for name in args.stages[i + 1 :])
            seconds = max(60.0, args.seconds - (time.monotonic() - start) - later)
            log(f"=== {stage}: {seconds:.0f} s at most")
            began = time.monotonic()
            try:
                outcome = run_stage(stage, log, scratch, seconds)
            except Exception as error:  # the next stage must have its turn
                outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            outcome["seconds"] = round(time.monotonic() - began, 1)
            document["stages"][stage] = outcome
            status += 0 if outcome["ok"] else bit
            log(f"=== {stage}: {'ok' if outcome['ok'] else 'FAILED'}, {outcome['seconds']:.0f} s")
        stop.set()
        keeper.join()
    failed = [stage for stage in args.stages if not document["stages"][stage]["ok"]]
    document["failed"], document["seconds"] = failed, round(time.monotonic() - start, 1)
    if bench := document["stages"].get("bench", {}).get("benchmarks"):
        commit = {"id": header["commit"], "dirty": bool(header["changed files"])}
        about = {"machine_info": header, "commit_info": commit, "datetime": header["date"]}
        does_not = document["stages"]["bench"]["does_not"]
        write_json(args.out / results.path_of_today().name, {**about, "benchmarks": bench, "does_not": does_not})
    write_json(path, document)
    log(f"{path}\n{'failed: ' + ', '.join(failed) if failed else 'all stages ok'}, {document['seconds']:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
