"""`make gpu` on a machine without a GPU: a dry run of its stages, results that survive crashes, decisions from numbers."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("triton")

from benchmarks import gpu, plot, results
from benchmarks.gpu_stages import suites
from benchmarks.gpu_stages.__main__ import attempt
from benchmarks.gpu_stages.suites import STAGES
from benchmarks.peers import HEADLINE
from benchmarks.record import UNFINISHED, Record
from benchmarks.results import OURS
from benchmarks.shapes import TINY, make_inputs

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["benchmarks.gpu", "tools.sweep"])
def test_nothing_is_written_without_a_gpu(script: str, tmp_path: Path) -> None:
    out = {
        "benchmarks.gpu": ["--out", str(tmp_path / "results")],
        "tools.sweep": ["--json", str(tmp_path / "sweep.json")],
    }[script]
    done = subprocess.run(
        [sys.executable, "-m", script, *out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == "no CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_a_row_is_claimed_once_and_survives_its_process(tmp_path: Path) -> None:
    from tools.sweep import Rows

    path = tmp_path / "rows.json"
    row = Rows(path).claim(table="ROWS", candidate=1)
    assert row is not None
    assert "did not return" in json.loads(path.read_text())["rows"][0]["error"]
    after_a_crash = Rows(path)
    assert after_a_crash.claim(table="ROWS", candidate=1) is None
    other = after_a_crash.claim(table="ROWS", candidate=2)
    assert other is not None
    after_a_crash.put(other, ms=1.5)
    assert json.loads(path.read_text())["rows"][1] == {"table": "ROWS", "candidate": 2, "ms": 1.5}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_sweep_knows_every_table_and_its_present_entry(arch: int) -> None:
    from gem_kernels import tiles
    from tools import sweep_tables

    names = {name for name, value in vars(tiles).items() if isinstance(value, dict) and not name.startswith("__")}
    found = sweep_tables.tables(sweep_tables.REFERENCE, arch)
    assert {table.name for table in found} == names
    for table in found:
        assert table.present() in table.entries.values()


def test_the_suggestion_is_the_fastest() -> None:
    from tools import sweep

    rows = sweep.Rows(None)
    for block, ms in ((1024, 3.0), (2048, 2.0)):
        row = rows.claim(
            table="SPANS", key=[90, 4], candidate={"rows": 1, "block": block, "warps": 4}, present=block == 1024
        )
        assert row is not None
        rows.put(row, ms=ms)
    assert "RowTile(rows=1, block=2048, warps=4),  # measured: 2.0 ms, the present entry 3.0" in sweep.suggestion(rows)


def test_a_lost_device_has_one_status_in_tests_and_driver() -> None:
    """The tests cannot import it: plain `pytest` does not see tools/."""
    import devices

    from tools.device import LOST

    assert devices.LOST == LOST


# --- the run: a JSON with every row so far, a decision for every stage -------------------------------------------------


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def on_file(folder: Path) -> dict[str, Any]:
    (path,) = (path for path in folder.glob("gpu-dry-run-*.json") if "benchmarks" not in path.name)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_dry_run_decides_in_every_stage(tmp_path: Path) -> None:
    stages = ["smoke", "rows", "fused"]
    out, _ = start("--out", str(tmp_path), "--stages", *stages).communicate(timeout=300)
    document = on_file(tmp_path)
    assert document["failed"] == document["not run"] == [], out
    assert list(document["stages"]) == stages
    assert {"device", "torch", "triton", "date", "commit", "dry run"} <= document["header"].keys()
    for name, stage in document["stages"].items():
        assert stage["ok"] and stage["rows"] and stage["decision"] and "undecided" not in stage["decision"]
        assert f"DECISION {name} (dry run: no number here means anything): {stage['decision']}" in out
    assert document["stages"]["smoke"]["decision"].startswith("Nothing to fix first: 18 checks agree with fp64")


PLANTED = """
import os, sys
if "gemm" in sys.orig_argv:
    import torch
    right = torch.mm
    def mm(a, b, **options):
        if options["out"].dtype == torch.bfloat16:
            os._exit(9)
        return right(a, b, **options)
    torch.mm = mm
"""


def test_a_stage_whose_process_dies_keeps_its_other_rows_and_the_next_stage(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    run = start("--out", str(tmp_path / "out"), "--stages", "gemm", "profile", PYTHONPATH=str(tmp_path))
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 2, out
    document = on_file(tmp_path / "out")
    assert document["failed"] == ["gemm"]
    gemm, profile = document["stages"]["gemm"], document["stages"]["profile"]
    assert [row["name"] for row in gemm["rows"] if "error" in row] == ["4096x4096 logits, bf16"]
    assert "gradients of 2 slabs" in {row["name"] for row in gemm["rows"]}  # measured by a second process
    assert not gemm["ok"] and ("One slab is" in gemm["decision"] or "Two slabs are" in gemm["decision"])
    assert "Result dtype: undecided, '4096x4096 logits, bf16' is missing." in gemm["decision"]
    assert f"FAILED: 4096x4096 logits, bf16: {UNFINISHED}." in gemm["decision"]
    assert profile["ok"] and {row["name"] for row in profile["rows"]} == {"a SEGA step", "a score of a narrow head"}


def test_a_run_that_goes_on_repeats_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"device": "a CPU", "date": "2026-01-01T00:00:00", "commit": "x", "changes": "", "changed files": []}
    monkeypatch.setattr(gpu, "describe", lambda: dict(header))  # the code may change while a test runs
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dry = ["--dry-run", "--stages", "profile"]
    assert gpu.main([*dry, "tests", "--out", str(tmp_path), "--seconds", "60"]) == 0
    first = on_file(tmp_path)
    assert first["not run"] == ["tests"]  # less than 60 s are too little for it
    path = str(tmp_path / "gpu-dry-run-a-CPU-20260101000000.json")
    hint = f"no time left; go on with: python -m benchmarks.gpu --dry-run --go-on {path} --stages tests\n"
    assert hint in capsys.readouterr().out
    assert gpu.main([*dry, "--go-on", path]) == 0
    document = on_file(tmp_path)
    assert document["not run"] == [] and document["header"] == first["header"]
    assert document["stages"]["profile"]["rows"] == first["stages"]["profile"]["rows"]
    assert document["stages"]["profile"]["ok"]
    header["changes"] = "another hash"
    capsys.readouterr()
    assert gpu.main([*dry, "--go-on", path]) == 1
    assert capsys.readouterr().out == f"{path} is a run with another changes\n"


def test_what_was_in_progress_when_the_run_was_killed_is_done_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.json", "stage")
    for name in ("its process died", "done", "in progress"):
        record.claim(name)
    record.finish("done", {"ms": 1.0})
    record.put(ok=False, decision="undecided")
    record.begin()
    assert record.read() == {"rows": [{"name": "its process died", "error": UNFINISHED}, {"name": "done", "ms": 1.0}]}
    assert record.release() == [] and record.claim("in progress") and not record.claim("its process died")


def test_a_wrong_result_of_ours_is_a_failure_and_that_of_a_rival_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.contest import Row
    from benchmarks.gpu_stages import claims

    wrong = Row("disagrees with fp64: logprob by 2", {}, [])
    monkeypatch.setattr(claims, "compete", lambda task, shape, libraries, timed: dict.fromkeys(libraries, wrong))
    assert claims.time_one(claims.CLAIMS[0], TINY, "TRL")["reason"] == wrong.reason
    with pytest.raises(ArithmeticError, match="disagrees with fp64"):
        claims.time_one(claims.CLAIMS[0], TINY, OURS)


def test_smoke_puts_failures_first() -> None:
    from benchmarks.gpu_stages import smoke

    failed = {"name": "addmm_", "error": "ArithmeticError: its relative error is 4e-03"}
    assert smoke.decide({"rows": [failed]}).startswith("FIX FIRST what failed. FAILED: addmm_: ArithmeticError")
    copies = {"name": "addmm_", "copies the accumulator": True}
    assert smoke.decide({"rows": [copies]}) == "FIX FIRST: addmm_ copies its accumulator."
    late = {"rows": [copies | {"copies the accumulator": False}], "no time left for": ["SEGA"]}
    assert smoke.decide(late).startswith("Nothing to fix first: 1 checks") and "No time was left" in smoke.decide(late)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_killed_run_leaves_every_row_so_far_and_no_process(tmp_path: Path) -> None:
    run = start("--out", str(tmp_path), "--stages", "rows")
    deadline, seen = time.monotonic() + 120, 0
    while seen < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        document = on_file(tmp_path) if list(tmp_path.glob("*.json")) else {"stages": {}}
        seen = sum("ms" in row for row in document["stages"].get("rows", {}).get("rows", ()))
    run.kill()
    run.wait()
    rows = on_file(tmp_path)["stages"]["rows"]["rows"]
    assert sum("ms" in row for row in rows) >= seen
    deadline = time.monotonic() + 10
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, left


def processes_of(folder: Path) -> list[str]:
    """Return the processes that write to a record in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if f"GEM_KERNELS_RECORD={folder}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_processes_and_threads_write_one_record(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.json", "stage")

    def write(number: int) -> None:
        for i in range(20):
            Record(record.path, "stage").append({"name": f"{number}.{i}"})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({row["name"] for row in record.read()["rows"]}) == 80
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_measurement_is_done_once_and_its_failure_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, calls = Record(tmp_path / "run.json", "stage"), []

    def work() -> dict[str, Any]:
        calls.append(record.read()["rows"][-1]["error"])
        return {"ms": 1.5}

    def broken() -> dict[str, Any]:
        raise ValueError("no such tile")

    for _ in range(2):
        attempt(record, "good", work)
        attempt(record, "bad", broken)
    assert calls == [UNFINISHED]  # what the file says while it runs
    assert record.read()["rows"] == [{"name": "good", "ms": 1.5}, {"name": "bad", "error": "ValueError: no such tile"}]
    assert "good: ms 1.5; 0.0 s" in capsys.readouterr().out


def test_a_failed_test_is_on_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_tests

    record = Record(tmp_path / "run.json", "tests")
    for name, value in record.environment().items():
        monkeypatch.setenv(name, value)
    for i in range(3):
        gpu_tests._record(f"test {i}", "passed", "")
    gpu_tests._record("test 3", "failed", "out of luck")
    assert record.read()["so far"] == {"counts": {"passed": 3, "failed": 1}, "failed": {"test 3": "out of luck"}}
    for i in range(4, 24):
        gpu_tests._record(f"test {i}", "passed", "")
    assert record.read()["so far"]["counts"] == {"passed": 23, "failed": 1}


def test_a_stage_takes_what_is_left_over_and_nothing_of_the_next() -> None:
    own = {name: stage.seconds for name, stage in STAGES.items()}
    run = object.__new__(gpu.Run)
    run.stages, run.start = ["gemm", "rows"], time.monotonic()
    for seconds, first, second in (
        (200, 200 - own["rows"], 200),
        (own["gemm"] + own["rows"], own["gemm"], 100),
        (50, 40, 50),
    ):
        run.seconds = seconds
        assert run.limit(0) == pytest.approx(first, abs=1)
        assert run.limit(1) == pytest.approx(second, abs=1)


def benchmark_row(library: str, seconds: float, task: str = "a task") -> dict[str, Any]:
    key = {"task": task, "shape": "a shape", "N": 8, "D": 4, "V": 16, "dtype": "bfloat16", "library": library}
    return {"name": library, "extra_info": key, "stats": {"median": seconds, "min": seconds, "rounds": 3}}


def test_benchmarks_of_several_runs_become_one_file(tmp_path: Path) -> None:
    """Later rows win, those of another commit go, and `benchmarks.plot` reads the file."""
    missing = {"task": "a task", "shape": "a shape", "library": "TRL", "reason": "out of luck"}

    def run(commit: str, *rows: dict[str, Any]) -> dict[str, Any]:
        header = {
            "device": "a GPU",
            "capability": "9.0",
            "date": "2026-01-01T00:00:00",
            "commit": commit,
            "changed files": [],
        }
        return {"header": header, "stages": {"claims": {"rows": [*rows, {"name": "broken", "error": "x"}]}}}

    path = tmp_path / "a-gpu-2026-01-01.json"
    gpu.collect([run("new", benchmark_row("eager", 2.0), missing), run("new", benchmark_row("eager", 3.0))], path)
    gpu.collect([run("new", benchmark_row("TRL", 4.0))], path)
    found = results.read(path)
    assert [(row["library"], row["median s"]) for row in results.rows(found)] == [("eager", 3.0), ("TRL", 4.0)]
    assert "| eager | 3.00 s | 1.00 |" in plot.page({"a GPU": found}) and "not measured yet" not in plot.page(
        {"a GPU": found}
    )
    gpu.collect([run("newer", benchmark_row("TRL", 5.0), missing)], path)
    assert [row["library"] for row in results.rows(results.read(path))] == ["TRL"]
    edited = run("newer", benchmark_row("eager", 5.0))
    edited["header"]["changes"] = "another hash"
    unknown = run("newer", benchmark_row("eager", 6.0))
    unknown["header"]["commit"] = None
    for other in (edited, unknown, unknown):
        gpu.collect([run("newer", benchmark_row("TRL", 5.0))], path)
        gpu.collect([other], path)
        assert [row["library"] for row in results.rows(results.read(path))] == ["eager"]
    dry = run("new", benchmark_row("eager", 2.0)) | {"header": {"device": "a GPU", "dry run": ""}}
    (tmp_path / "run.json").write_text(json.dumps(dry))
    assert gpu.main(["--collect", str(path), "--out", str(tmp_path)]) == 1  # benchmarks, and no run
    assert gpu.main(["--collect", str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 1


# --- decisions from numbers -------------------------------------------------------------------------------------------


def stage_of(module: Any, numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"rows": [{"name": name, **row} for name, row in numbers.items()]}


def test_the_gemm_stage_decides_by_its_numbers() -> None:
    from benchmarks.gpu_stages import gemm

    numbers = {name: {"ms": 1.0, "TFLOP/s": 600.0, "present": False} for name, _ in gemm.measurements(dry=True)}
    numbers["4096x4096 logits, D=4096"]["present"] = numbers["8192x2048 logits, D=896"]["present"] = True
    numbers["8192x8192 logits, D=896"]["TFLOP/s"] = 660.0
    numbers["88x4096 logits, fp32"]["ms"] = 0.35
    numbers["gradients of 2 slabs"]["ms"] = 1.3
    numbers["all of dweight in one, K=8192"]["ms"] = 1.5
    said = gemm.decide(stage_of(gemm, numbers))
    for sentence in (
        "D=4096 keep 4096x4096 (600.0 TFLOP/s, the best 600.0); D=896 use 8192x8192 (660.0 TFLOP/s, 8192x2048 has 600.0).",
        "A tile of 88 rows takes 35 % of the time of one of 4096, for 2 % of the work: keep even splits.",
        "One slab is 1.30x as fast as two (1.0 and 1.3 ms): keep the rule.",
        "fp32 dweight in tiles is 1.50x as fast as in one GEMM (1.0 and 1.5 ms): use tiles.",
    ):
        assert sentence in said
    numbers["gradients of 1 slab"]["ms"] = 1.31  # of 1.3: no reason for a change
    assert "keep the rule" in gemm.decide(stage_of(gemm, numbers))
    numbers["gradients of 1 slab"] = {"error": "OutOfMemoryError: 80 GiB\nmore"}
    said = gemm.decide(stage_of(gemm, numbers))
    assert "One slab: undecided, 'gradients of 1 slab' is missing." in said
    assert said.endswith("FAILED: gradients of 1 slab: OutOfMemoryError: 80 GiB.")
    said = gemm.decide(stage_of(gemm, numbers) | {"no time left for": ["a", "b"]})
    assert said.endswith("No time was left for 2 more, from a on.")


def test_the_present_tile_is_the_largest_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_stages import gemm
    from gem_kernels import plan

    parts = plan.Tiling(plan.even(8192 + 128, 2, 128), plan.even(128256, 32, 256))
    monkeypatch.setattr(gemm.tiles, "tiling", lambda hidden, columns: parts)
    assert parts.rows[0].stop == 4096 and parts.columns[0].stop == 3840  # `even` begins with the smaller parts
    assert gemm.present_tile(4096) == (4224, 4096)


def test_the_rows_stage_decides_by_its_numbers() -> None:
    from benchmarks.gpu_stages import rows

    numbers: dict[str, dict[str, Any]] = {rows.COPY: {"ms": 1.0, "GB/s": 4000.0}}
    for name in rows.KERNELS:
        numbers[f"{name}, the present tile"] = {"ms": 1.12, "least": 1.12, "GB/s": 2000.0, "tile": "(64, 1)"}
        for tile in rows.TILES:
            found = {"ms": 1.09, "least": 1.1, "GB/s": 2055.0, "tile": rows.of_tile("", tile).strip()}
            numbers[rows.of_tile(name, tile)] = found
    best = rows.TILES[2]
    numbers[rows.of_tile("statistics", best)] = {"ms": 1.0, "least": 1.0, "GB/s": 2240.0, "tile": "(4096, 4)"}
    said = rows.decide(stage_of(rows, numbers))
    assert "statistics: use (4096, 4) of 6 tiles: 2240.0 GB/s, 56 % of a copy's rate, 12 % faster than (64, 1)." in said
    assert "exponentials: keep (64, 1) of 6 tiles: 2000.0 GB/s, 50 % of a copy's rate." in said
    assert f"use {rows.of_tile('', best).strip()}, 3.18 ms for the three kernels, not 3.36." in said


def test_the_fused_stage_decides_by_its_numbers() -> None:
    from benchmarks.gpu_stages import fused

    numbers: dict[str, dict[str, Any]] = {}
    for d in fused.HIDDEN:
        for n in fused.TOKENS:
            rate = 500.0 if n == 8192 else 300.0
            numbers[fused.name_of("old", n, d)] = {"ms": 11.0, "TFLOP/s": 0.9 * rate, "tile": "old", "present": True}
            numbers[fused.name_of("new", n, d)] = {"ms": 10.0, "TFLOP/s": rate, "tile": "new", "present": False}
            numbers[fused.name_of("triton", n, d)] = {"ms": 12.0, "TFLOP/s": 1.0}
            numbers[fused.name_of("chunked", n, d)] = {"ms": 8.0 if d == 4096 else 12.1, "TFLOP/s": 1.0}
    said = fused.decide(stage_of(fused, numbers))
    assert "Tile: use new, 10 % faster than the present old." in said
    assert "Rate at N=2100 relative to N=8192: D=4096 60 %, D=896 60 %" in said
    assert "auto for scoring: D=4096 chunked (chunked 1.50x as fast), D=896 either (triton 1.01x as fast)." in said


def test_the_claims_stage_decides_by_its_numbers() -> None:
    from benchmarks.gpu_stages import claims

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"name": f"{row['extra_info']['task']}: {row['name']}"}

    sega, score, _ = (task.name for task in claims.CLAIMS)
    rows = [named(benchmark_row(*of)) for of in ((OURS, 0.040, sega), ("eager", 0.1, sega), ("TRL", 0.072, sega))]
    rows += [named(benchmark_row(*of)) for of in ((OURS, 0.015, score), ("eager", 0.012, score))]
    needs = "needs nvidia-cutlass-dsl>=4.6.0, which is not installed"
    rows.append({"name": "x", "task": sega, "shape": "a shape", "library": "Liger scaled CE", "reason": needs})
    said = claims.decide({"rows": rows})
    assert f"{sega}: 40 ms, None MiB, 1.80x as fast as the next, TRL: the claim holds (not timed:" in said
    assert f"{score}: 15 ms, None MiB, and eager is 1.25x as fast: CLAIM FAILS" in said
    assert "SEGA, weights known: undecided" in said and f"Liger scaled CE {needs}." in said


def test_headline_rows_are_first_and_what_compiles_is_after_the_claims() -> None:
    from benchmarks.gpu_stages import claims

    order = [(task.name, library) for task, library in claims.order()]
    headline = len(claims.CLAIMS) * len(HEADLINE)
    assert order[: len(HEADLINE)] == [("SEGA, weights from the pass", library) for library in HEADLINE]
    assert {library for _, library in order[:headline]} == set(HEADLINE) and len(set(order)) == len(order)
    of_claims = [library for task, library in order if task in {t.name for t in claims.CLAIMS}]
    assert set(of_claims[-4:]) == set(claims.COMPILED) and not set(of_claims[:-4]) & set(claims.COMPILED)


def test_the_profile_counts_gaps_and_overlaps() -> None:
    from benchmarks.gpu_stages import profile

    row = profile.summary([(40.0, 60.0, "b"), (0.0, 10.0, "a"), (5.0, 20.0, "a"), (70.0, 80.0, "a"), (72.0, 75.0, "c")])
    assert row["busy"] == 0.625 and row["ms"] == 0.08 and row["kernels"] == 5  # 20 + 20 + 10 of 80 us
    assert row["largest gaps in us"] == [20.0, 10.0] and list(row["longest"]) == ["a", "b", "c"]
    said = profile.decide({"rows": [{"name": name, **row} for name in profile.PROFILED]})
    assert "a SEGA step: busy 62 % of 0.08 ms, 5 kernels, largest gap 20.0 us: HOST-BOUND" in said


def test_the_profile_takes_the_busiest_step_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_stages import profile

    busy = iter([0.99, 0.5, 0.7])
    monkeypatch.setattr(profile, "_profiled_once", lambda step: {"busy": next(busy), "collects": gc.isenabled()})
    assert profile.profiled(profile.SEGA, TINY) == {"busy": 0.7, "collects": False}
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        profile._profiled_once(lambda: None)


def test_the_suites_decide_by_their_outcomes() -> None:
    lost = {"a": {"outcome": "failed", "lost": "hung"}, "b": {"outcome": "skipped"}}
    assert "FIX FIRST: a." in suites.decide_tests(
        {"counts": {"passed": 3, "lost": 1, "skipped": 1}, "not passed": lost}
    )
    assert "can be trusted" in suites.decide_tests({"counts": {"passed": 3}, "not passed": {"b": lost["b"]}})
    late = suites.decide_tests({"counts": {"passed": 3, "not run": 2}, "not passed": {"d": {"outcome": "not run"}}})
    assert late == "GPU tests: 3 passed, 2 not run. Nothing failed, and not all ran: give this stage more --seconds."
    assert "not all ran" in suites.decide_tests({"rows": []})
    killed = {"so far": {"counts": {"passed": 3, "failed": 1}, "failed": {"c": "out of luck"}}}
    assert suites.decide_tests(killed) == "GPU tests: 3 passed, 1 failed. FIX FIRST: c."
    rows = [
        {
            "table": "ROWS",
            "key": [90, 4],
            "candidate": {"rows": 1, "block": 2048},
            "present": True,
            "ms": 3.0,
            "least": 2.8,
        },
        {
            "table": "ROWS",
            "key": [90, 4],
            "candidate": {"rows": 1, "block": 1024},
            "ms": 2.0,
            "least": 2.0,
            "best": True,
        },
        {"table": "ROWS", "key": [90, 4], "candidate": {"rows": 1, "block": 512}, "error": "out of luck"},
    ]
    said = "2 candidates timed, 1 failed. Change in tiles.py: ROWS[90, 4] 1x1024 (40 % faster)."
    assert suites.decide_sweep({"rows": rows}) == said
    assert "nothing is known" in suites.decide_sanitizer({"counts": {"skipped": 3}})


# --- the same work for every library ----------------------------------------------------------------------------------


def test_the_host_work_of_every_library_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the entropies, and losses with known weights: no number of a tensor becomes one of Python."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks import sega
    from benchmarks.peers import PEERS, weighted

    calls: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    def score(entropy: torch.Tensor, branch: torch.Tensor, answer: torch.Tensor) -> Any:
        return SimpleNamespace(
            score=entropy.new_ones(branch.shape[0]).cumsum(0)
        )  # the op itself checks values on a CPU

    monkeypatch.setattr(sega, "gem_score", score)
    total = PEERS["eager"]._replace(per_token=False, load=lambda: lambda h, w, y: (h @ w.T).log_softmax(-1)[:, 0].sum())
    monkeypatch.setitem(PEERS, "sums alone", total)
    x = make_inputs(TINY)
    losses = weighted("eager"), weighted("sums alone")
    with Calls():
        sega.batch_weights(x.b.abs(), x.groups)
        for loss in losses:
            loss(x, x.hidden, x.weight, x.token_weight)
    assert len(calls) > 30
    assert not [name for name in calls if "_local_scalar_dense" in name or "nonzero" in name or "aten.index." in name]


def test_the_collector_is_off_while_a_run_is_timed() -> None:
    from tools.device import milliseconds

    seen: list[bool] = []
    assert gc.isenabled()
    milliseconds(lambda: seen.append(gc.isenabled()))
    with pytest.raises(ZeroDivisionError):
        milliseconds(lambda: 1 / 0)
    assert seen == [False] and gc.isenabled()


def test_a_library_without_its_kernels_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import peers
    from benchmarks.measure import DoesNotError

    stated = [
        "torch>=2.1.2",
        'nvidia-cutlass-dsl>=4.6.0; extra == "cutedsl"',
        'nvidia-cutlass-dsl-libs>=1; extra == "x"',
    ]
    present = {"liger-kernel": "0.8.5"}
    monkeypatch.setattr(peers, "requires", lambda package: stated)
    monkeypatch.setattr(peers, "installed", present.get)
    monkeypatch.setattr(peers, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(DoesNotError, match="^needs nvidia-cutlass-dsl>=4.6.0, which is not installed$"):
        peers.load("Liger scaled CE")
    present["nvidia-cutlass-dsl"] = "4.3.1"
    with pytest.raises(DoesNotError, match="^needs nvidia-cutlass-dsl>=4.6.0, and 4.3.1 is installed$"):
        peers.load("Liger scaled CE")
    present["quack-kernels"], present["nvidia-cutlass-dsl"] = "0.2", "4.6.1"
    missing = ModuleNotFoundError("No module named 'tvm_ffi'", name="tvm_ffi")
    assert peers.lacking(missing, "quack") == "needs apache-tvm-ffi, which is not installed"
    assert peers.lacking(ImportError("no symbol f"), "quack") == "cannot be imported: no symbol f"


def test_trl_needs_no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import peers

    usual = peers._trl_chunk()
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    assert peers._trl_chunk() == usual == 32_768
