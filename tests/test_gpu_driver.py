"""`make gpu` on a machine without a GPU: its driver and its sweep write nothing, and keep results across crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
