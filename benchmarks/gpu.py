"""`make gpu`: everything that needs a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu [--out benchmarks/results] [--seconds 560] [--stages tests sweep bench]

Three stages, each with its own processes and time limit: the GPU tests, the tile sweep (tools/sweep.py), the benchmarks. A
failed stage does not stop the next. OUT/gpu-<device>-<date>.log holds all output. OUT/gpu-<device>-<date>.json holds the
results and is replaced by rename as they come in. OUT/<device>-<date>.json holds the benchmarks in the format of `make bench`.
Exit status: 0, or the sum of 2 (tests), 4 (sweep) and 8 (bench) for the stages that failed. Without a CUDA device it is 1, and
nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import results
from benchmarks.gpu_tests import Tests, read_events
from benchmarks.processes import Log, run
from benchmarks.results import ROOT
from tools.files import Json, read_json, write_json


def run_sweep(log: Log, scratch: Path, seconds: float) -> Json:
    """Run the tile sweep, and start it again after a candidate that killed its process."""
    deadline = time.monotonic() + seconds
    out, status = scratch / "sweep.json", None
    for _ in range(6):
        left = deadline - time.monotonic()
        if left < 20:
            break
        command = [sys.executable, "-m", "tools.sweep", "--json", str(out), "--seconds", str(int(left - 10))]
        status = run(command, log, "sweep", left, {})
        if status == 0:
            break
    found: Json = read_json(out) or {"rows": []}
    return {**found, "ok": status == 0 and any(row.get("best") for row in found["rows"])}


GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("linear_logprob", "linear_logprob_oracles", "linear_logprob_calls", "logprob", "group_loss", "sega_loss"),
        *("scoring", "gpu", "gpu_runtime"),
    )
]
"""files with cases marked `gpu`"""


def run_stage(name: str, log: Log, scratch: Path, seconds: float) -> Json:
    if name == "tests":
        # Most of the time is compilation, and one process compiles on one core.
        workers = max(1, min(4, (os.cpu_count() or 1) // 3))
        *files, last = GPU_TESTS
        return Tests(name, last, log, scratch, {}, workers, "-m", "gpu", *files).run(seconds)
    if name == "sweep":
        return run_sweep(log, scratch, seconds)
    out = scratch / "benchmarks.jsonl"
    env = {results.ROWS: str(out), results.DEADLINE: str(time.time() + seconds - 10)}
    found = Tests(name, "benchmarks", log, scratch, env, 1).run(seconds)
    return {**found, **results.from_rows(out)}


STAGES = {"tests": (2, 235), "sweep": (4, 145), "bench": (8, 165)}  # exit status, seconds


def describe() -> Json:
    """Return device, driver, versions, date and commit."""
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
            """Write the results of the running stage every few seconds."""
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
            # A stage may use the time that earlier ones left over, but not the time reserved for later ones.
            later = sum(STAGES[name][1] for name in args.stages[i + 1 :])
            seconds = max(60.0, args.seconds - (time.monotonic() - start) - later)
            log(f"=== {stage}: {seconds:.0f} s at most")
            began = time.monotonic()
            try:
                outcome = run_stage(stage, log, scratch, seconds)
            except Exception as error:  # the next stage still runs
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
