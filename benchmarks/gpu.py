"""`make gpu`: everything that needs a GPU, in the order of what it decides; the first stages fit ten minutes.

    python -m benchmarks.gpu [--out benchmarks/results] [--seconds 560] [--stages smoke claims ...]
    python -m benchmarks.gpu --go-on JSON --stages sweep ...     a run that had too little time, or was killed: no row twice
    python -m benchmarks.gpu --dry-run                every stage at a tiny shape on a CPU, in less than five minutes
    python -m benchmarks.gpu --collect JSON [JSON ...]      the benchmarks of several runs in one file, for benchmarks.plot

Nothing is installed and no `make` is needed: an interpreter with torch, triton and pytest is enough. Each stage has its own
processes and time limit, ends with a decision computed from its numbers, and may be run alone. A failed stage does not stop the
next. A stage for which too little time is left is not run, and named at the end.

OUT/gpu-<device>-<date>.log holds all output. OUT/gpu-<device>-<date>.json holds header, rows and decisions; a row is in it
before the next one is measured, so a killed run loses the row in progress. OUT/<device>-<date>.json holds the benchmarks in the
format of `make bench`; --collect writes them for a run that was killed. A dry run writes to a temporary folder unless --out is
given. Exit status: 0; 2 if a stage failed; 1 without a CUDA device, or if the run to go on with is one of another device or of
other code, and then nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import results
from benchmarks.gpu_stages.suites import STAGES, Call
from benchmarks.processes import Log
from benchmarks.record import Record, benchmarks_in, key_of
from tools.files import Json, read_json, update_json, write_json

DRY = "dry run: no number here means anything"
WORTHWHILE = 1 / 3
"""the share of its time without which a stage is not begun"""


def describe() -> Json:
    """Return device, driver, versions, date, commit, and a hash of what the code has changed since."""
    changed = results.said("git", "status", "--porcelain")
    since = results.said("git", "diff", "HEAD", "--", "*.py") or ""
    return {
        **results.describe_machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": results.said("git", "rev-parse", "HEAD"),
        "changed files": changed.splitlines() if changed else [],
        "changes": hashlib.sha256(since.encode()).hexdigest()[:12] if since else "",
    }


class Run:
    """The stages of one call, their files and their time. `go_on`: the JSON of an earlier call, whose rows are kept."""

    def __init__(self, out: Path, stages: Sequence[str], seconds: float, dry: bool, go_on: Path | None = None) -> None:
        self.start, self.seconds, self.stages, self.dry = time.monotonic(), seconds, stages, dry
        self.header = describe() | ({"dry run": DRY} if dry else {})
        self.path = go_on or out / f"{self.stem()}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.path.with_suffix(".log"))
        update_json(self.path, lambda whole: whole.update({"header": self.header, "stages": {}} | whole))
        self.log(json.dumps(self.header, indent=1))

    def stem(self) -> str:
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.header["device"]).strip("-")
        date = re.sub(r"\D", "", self.header["date"][:19])
        return f"gpu-{'dry-run-' if self.dry else ''}{device}-{date}"

    def limit(self, number: int) -> float:
        """Return the seconds of a stage: its own and what earlier ones left over, within the time of the call."""
        left = self.seconds - (time.monotonic() - self.start)
        later = sum(STAGES[name].seconds for name in self.stages[number + 1 :])
        return min(left, max(STAGES[self.stages[number]].seconds, left - later))

    def run(self) -> int:
        not_run, decisions, all_ok = [], [], True
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(self.stages):
                seconds = self.limit(number)
                if seconds < WORTHWHILE * STAGES[name].seconds:
                    not_run.append(name)
                    continue
                ok, decision = self.stage(
                    Call(name, self.log, Record(self.path, name), Path(folder), seconds, self.dry)
                )
                decisions.append(decision)
                all_ok &= ok
        document = update_json(self.path, lambda whole: whole.update({"failed": failed_in(whole), "not run": not_run}))
        self.benchmarks([document])
        self.log("\n".join(["", *decisions, "", str(self.path)]))
        if not_run:
            call = f"python -m benchmarks.gpu{' --dry-run' if self.dry else ''} --go-on {self.path}"
            self.log(f"no time left; go on with: {call} --stages {' '.join(not_run)}")
        outcome = f"FAILED: {', '.join(document['failed'])}" if document["failed"] else "no stage failed"
        self.log(f"{outcome}, {time.monotonic() - self.start:.0f} s")
        return 0 if all_ok else 2

    def stage(self, call: Call) -> tuple[bool, str]:
        """Run a stage, and put its outcome and its decision on file."""
        self.log(f"=== {call.name}: {call.seconds:.0f} s at most")
        began = time.monotonic()
        call.record.begin()
        try:
            ok = STAGES[call.name].run(call)
        except Exception as error:  # the next stage still runs
            call.record.put(crashed=f"{type(error).__name__}: {error}")
            ok = False
        took = round(time.monotonic() - began, 1)
        try:
            said = STAGES[call.name].decide(call.record.read())
        except Exception as error:  # rows that nobody foresaw
            ok, said = False, f"no decision: {type(error).__name__}: {error}"
        call.record.put(ok=ok, seconds=took, decision=said)
        decision = f"DECISION {call.name}{f' ({DRY})' if self.dry else ''}: {said}"
        self.log(f"{decision}\n=== {call.name}: {'ok' if ok else 'FAILED'}, {took:.0f} s")
        return ok, decision

    def benchmarks(self, documents: Sequence[Json]) -> None:
        name = f"{self.path.stem}-benchmarks.json" if self.dry else results.path_of_today().name
        collect(documents, self.path.with_name(name))


def failed_in(document: Json) -> list[str]:
    return [name for name, stage in document["stages"].items() if stage.get("ok") is False]


def differs(header: Json) -> list[str]:
    """Return in what a run differs from one that would begin now, so that its rows are no rows of this one."""
    now = describe()
    return [what for what in ("device", "commit", "changes") if header.get(what) != now[what]]


def collect(documents: Sequence[Json], path: Path) -> None:
    """Write the benchmarks of runs on one device as `make bench` would; nothing if there are none.

    A later row replaces an earlier one of the same task, shape and library. Rows that the file already has of this code stay.
    """
    header = documents[-1]["header"]
    code = {"id": header["commit"], "changes": header.get("changes")}
    commit = code | {"dirty": any(document["header"]["changed files"] for document in documents)}
    before = read_json(path) or {}
    known = before.get("commit_info", {})
    same = code["id"] is not None and all(known.get(what) == value for what, value in code.items())
    found = [before] if same else []
    found += [benchmarks_in(document) for document in documents]
    rows = {key_of(row): row for of_one in found for row in of_one["benchmarks"]}
    missing = {key_of(row): row for of_one in found for row in of_one["does_not"] if key_of(row) not in rows}
    if rows:
        about = {"machine_info": header, "commit_info": commit, "datetime": header["date"]}
        write_json(path, {**about, "benchmarks": list(rows.values()), "does_not": list(missing.values())})


def collect_files(paths: Sequence[Path], out: Path) -> int:
    # gpu-*.json also matches the benchmarks that a dry run wrote.
    documents = [document for document in map(read_json, paths) if "stages" in document]
    devices = {document["header"]["device"] for document in documents}
    if len(devices) != 1 or any("dry run" in document["header"] for document in documents):
        print(f"expected runs on one device, and no dry run; got {', '.join(sorted(devices))}")
        return 1
    header = documents[-1]["header"]
    name = re.sub(r"[^A-Za-z0-9]+", "-", header["device"]).strip("-").lower()
    path = out / f"{name}-{header['date'][:10]}.json"
    collect(documents, path)
    print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in the order of what it decides.")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results; a temporary folder for a dry run")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--go-on", type=Path, metavar="JSON", help="keep the rows of this run, and add what it lacks")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument(
        "--collect", nargs="+", type=Path, metavar="JSON", help="run nothing; join the benchmarks of runs"
    )
    args = parser.parse_args(argv)
    if args.go_on and not args.go_on.exists():
        parser.error(f"no such file: {args.go_on}")
    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if args.dry_run else results.FOLDER)
    if args.collect:
        return collect_files(args.collect, out)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    if args.go_on:
        header = read_json(args.go_on)["header"]
        if other := differs(header) + ["dry run"] * (("dry run" in header) != args.dry_run):
            print(f"{args.go_on} is a run with another {', '.join(other)}")
            return 1
    stages = [name for name in STAGES if name in args.stages]
    return Run(out, stages, args.seconds, args.dry_run, args.go_on).run()


if __name__ == "__main__":
    sys.exit(main())
