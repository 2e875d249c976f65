"""The stages that run pytest or the tile sweep: GPU tests, sweep, the other benchmarks, compute-sanitizer."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.gpu_stages.sentences import TIES_OF_MANY, gain, percent
from benchmarks.gpu_tests import Tests
from benchmarks.processes import Log, run
from benchmarks.record import Record
from tools.files import Json

GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("linear_logprob", "linear_logprob_oracles", "linear_logprob_calls", "logprob", "group_loss", "sega_loss"),
        *("scoring", "gpu", "gpu_runtime"),
    )
]
"""files with cases marked `gpu`"""
SANITIZER = "compute_sanitizer"
DRY_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "GEM_KERNELS_TEST_DEVICE": "cpu"}
DRY_TESTS = "test_the_rule_sees_a_bf16_result or (test_the_calls_of_the_next_tests and not chunked)"
"""the GPU tests of a dry run: a few that are quick when interpreted"""
DRY_BENCHMARKS = "train_step or topm_mean or frozen_head"


class Call(NamedTuple):
    """What a stage is given."""

    name: str
    log: Log
    record: Record
    scratch: Path
    seconds: float
    dry: bool

    @property
    def environment(self) -> dict[str, str]:
        return self.record.environment() | (DRY_ENVIRONMENT if self.dry else {})


def measure(call: Call) -> bool:
    """Run a measuring stage, and start its process again after a measurement that killed it; True if all of it worked."""
    deadline, status = time.monotonic() + call.seconds, None
    while (left := deadline - time.monotonic()) > 3:
        before = len(call.record.read()["rows"])
        # No measurement begins in the last tenth, so that seldom one is killed.
        command = [sys.executable, "-m", "benchmarks.gpu_stages", call.name, "--seconds", f"{0.9 * left:.0f}"]
        command += ["--dry-run"] if call.dry else []
        status = run(command, call.log, call.name, left, call.environment)
        if status is None and time.monotonic() >= deadline:
            call.record.put(**{"no time left for": call.record.release()})
        if status == 0 or len(call.record.read()["rows"]) == before:
            break
    rows = call.record.read()["rows"]
    return status == 0 and bool(rows) and not any("error" in row for row in rows)


def sweep(call: Call) -> bool:
    """Run the tile sweep, and start it again after a candidate that killed its process."""
    deadline, status = time.monotonic() + call.seconds, None
    for _ in range(6):
        left = deadline - time.monotonic()
        if left < 20:
            break
        command = [sys.executable, "-m", "tools.sweep", "--json", str(call.record.path), "--stage", call.name]
        command += ["--seconds", str(int(left - 10)), *(["--dry-run"] if call.dry else [])]
        status = run(command, call.log, call.name, left, call.environment)
        if status == 0:
            break
    return status == 0 and any(row.get("best") for row in call.record.read()["rows"])


def _tests(call: Call, workers: int, *selected: str, options: Sequence[str] = (), **environment: str) -> bool:
    environment = call.environment | environment
    found = Tests(call.name, call.log, call.scratch, environment, workers, selected, options).run(call.seconds)
    call.record.put(**{"counts": found["counts"], "not passed": found["not passed"]})
    return bool(found["ok"])


def tests(call: Call) -> bool:
    # Most of the time is compilation, and one process compiles on one core.
    workers = max(1, min(4, (os.cpu_count() or 1) // 3))
    chosen = DRY_TESTS if call.dry else f"not {SANITIZER}"
    return _tests(call, workers, *GPU_TESTS, "-m", "gpu", "-k", chosen)


def bench(call: Call) -> bool:
    if call.dry:  # not interpreted, as nothing of it is new to Triton
        return _tests(call, 1, "benchmarks", "-k", DRY_BENCHMARKS, options=["--tiny"], TRITON_INTERPRET="0")
    return _tests(call, 1, "benchmarks", **{results.DEADLINE: str(time.time() + call.seconds - 10)})


def sanitizer(call: Call) -> bool:
    passed = _tests(call, 1, GPU_TESTS[-1], "-m", "gpu", "-k", SANITIZER)
    # Without a GPU the three are collected and skipped: a dry run can check no more of this stage.
    return passed or (call.dry and call.record.read()["counts"] == {"skipped": 3})


# --- the decisions ----------------------------------------------------------------------------------------------------


def _outcomes(stage: Json) -> str:
    counts = stage.get("counts") or stage.get("so far", {}).get("counts", {})
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "none ran"


def _failed(stage: Json) -> str:
    """Name the first tests that failed or lost their process; "" if there is none."""
    others = stage.get("not passed", {})
    failed = [test for test, found in others.items() if found["outcome"] == "failed" or "lost" in found]
    failed = failed or list(stage.get("so far", {}).get("failed", ()))
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"{', '.join(failed[:3])}{more}"


def decide_tests(stage: Json) -> str:
    counts, said = stage.get("counts", {}), f"GPU tests: {_outcomes(stage)}"
    if failed := _failed(stage):
        return f"{said}. FIX FIRST: {failed}."
    if "not run" in counts or not counts.get("passed"):
        return f"{said}. Nothing failed, and not all ran: give this stage more --seconds."
    return f"{said}: the numbers of the other stages can be trusted."


def decide_sweep(stage: Json) -> str:
    rows = [row for row in stage["rows"] if "ms" in row]
    present = {(row["table"], *row["key"]): row for row in rows if row.get("present")}
    faster = []
    for row in rows:
        was = present.get((row["table"], *row["key"]))
        if row.get("best") and was and (share := gain(was, row)) >= TIES_OF_MANY:
            tile = "x".join(str(value) for value in row["candidate"].values())
            faster.append(f"{row['table']}{row['key']} {tile} ({percent(share)} faster)")
    failed = sum("error" in row for row in stage["rows"])
    said = f"{len(rows)} candidates timed, {failed} failed. "
    return said + (f"Change in tiles.py: {'; '.join(faster)}." if faster else "Every entry of tiles.py stays.")


def decide_bench(stage: Json) -> str:
    timed = [row for row in stage["rows"] if "stats" in row]
    shapes = {row["extra_info"]["shape"] for row in timed}
    said = f"{len(timed)} rows at {len(shapes)} other shapes: python -m benchmarks.plot writes them to the pages."
    return said + (f" FAILED: {failed}." if (failed := _failed(stage)) else "")


def decide_sanitizer(stage: Json) -> str:
    if failed := _failed(stage):
        return f"compute-sanitizer: FIX FIRST: {failed}."
    if not stage.get("counts", {}).get("passed"):
        return f"compute-sanitizer: nothing is known ({_outcomes(stage)})."
    return f"compute-sanitizer: no kernel of ours reads or writes outside, or races ({_outcomes(stage)})."


# --- all stages, in their order ---------------------------------------------------------------------------------------


class Stage(NamedTuple):
    seconds: float
    """its own time; it may take what earlier stages left over"""
    decides: str
    run: Callable[[Call], bool]
    decide: Callable[[Json], str]


def _measuring(name: str, seconds: float, decides: str) -> Stage:
    def decide(stage: Json) -> str:
        from importlib import import_module  # torch and all libraries: not before a decision is due

        said: str = import_module(f"benchmarks.gpu_stages.{name}").decide(stage)
        return said

    return Stage(seconds, decides, measure, decide)


STAGES = {
    "smoke": _measuring(
        "smoke", 75, "fix anything first? `addmm_`, and every op in every implementation, against fp64"
    ),
    "claims": _measuring(
        "claims", 150, "do the claims hold? the libraries at the reference shape, the headline rows first"
    ),
    "gemm": _measuring("gemm", 40, "tiles of logits, slabs, one GEMM for dweight, fp32 results"),
    "rows": _measuring("rows", 60, "tiles of the row kernels, by their share of a copy's rate"),
    "fused": _measuring("fused", 60, "the fused forward's tile, its waves, and `auto` by D"),
    "profile": _measuring("profile", 40, "does the device wait for the host?"),
    "tests": Stage(180, "can the numbers be trusted? all GPU tests but the sanitizer's", tests, decide_tests),
    "sweep": Stage(150, "every entry of `gem_kernels/tiles.py`", sweep, decide_sweep),
    "bench": Stage(170, "the other benchmarks and shapes, for this page", bench, decide_bench),
    "sanitizer": Stage(
        90, "does a kernel read or write outside, or race? compute-sanitizer", sanitizer, decide_sanitizer
    ),
}
