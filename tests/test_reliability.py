"""docs/reliability.md: its table has a row for each fault of tests/faults, and what it says is in the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gem.config import SAMPLER_GAP, GuardArguments
from gem.rails import verdicts

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
PROSE, _, TABLE = PAGE.partition("<!-- faults")


@pytest.fixture(scope="module")
def faults() -> list[str]:
    """Return the faults that the suite tries, without running it."""
    listing = [sys.executable, "-m", "pytest", "tests/faults", "--collect-only"]
    out = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^fault: (.+)$", out, flags=re.M)


def test_the_table_has_a_row_for_each_fault(faults: list[str]) -> None:
    """`FAULTS_TABLE=1 make test-faults` writes it."""
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", TABLE, flags=re.M)
    assert faults and rows == ["fault", *sorted(set(faults))]


def test_the_suite_runs_by_its_own_target_and_in_ci() -> None:
    assert "--ignore=tests/faults" in (ROOT / "pyproject.toml").read_text()
    assert "pytest tests/faults" in (ROOT / "Makefile").read_text()
    assert "make test-faults" in (ROOT / ".ci/run").read_text()


def test_the_page_names_every_setting_of_the_guard() -> None:
    assert all(f"`{name}`" in PROSE for name in vars(GuardArguments()))


def test_the_page_has_a_row_for_each_rail() -> None:
    rails = {verdict.rail for verdict in verdicts([], GuardArguments())}
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| .+ \|$", PROSE, flags=re.M)
    assert set(rows) == rails and len(rows) == len(rails)
    assert f"further than {SAMPLER_GAP:g} nats a token" in PROSE and "`ema_decay" in PROSE
