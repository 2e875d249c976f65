"""Every fault: a copy of the tiny world as its folder, and a row of the table in docs/reliability.md.

A test names its fault with `@pytest.mark.fault("kill -9 of {mode}")`, where {mode} is one of its parameters, and gives the rest
of the row to the fixture `row`. Tests of one fault share a row, which shows what the first of them gives. FAULTS=20 kills each
mode 20 times; FAULTS_TABLE=1 writes the table.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands; two cores run two of them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import table
from world import world

ROWS: dict[str, table.Row] = {}  # node id -> row


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(text): what goes wrong, as the table says it; {name} is a parameter")


def fault_of(item: pytest.Item) -> str:
    """Return the fault that a test is about."""
    marker = item.get_closest_marker("fault")
    assert marker is not None, f"{item.nodeid} names no fault"
    return str(marker.args[0]).format(**(item.callspec.params if hasattr(item, "callspec") else {}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of the world, of this test alone."""
    return Path(shutil.copytree(world(), tmp_path / "here"))


@pytest.fixture
def row(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], None]:
    """Return a function that takes what the user sees and what is kept."""

    def add(sees: str, kept: str) -> None:
        sees, kept = (table.shortened(re.sub(rf"{tmp_path}/(here/)?", "", text)) for text in (sees, kept))
        ROWS.setdefault(request.node.nodeid, table.Row(fault_of(request.node), sees, kept))

    return add


def pytest_collection_finish(session: pytest.Session) -> None:
    """List the faults under --collect-only, for tests/test_reliability.py."""
    if session.config.option.collectonly:
        for item in session.items:
            print(f"fault: {fault_of(item)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    """Fail a test that passes without a row."""
    report = yield
    if report.when == "call" and report.passed and item.nodeid not in ROWS:
        report.outcome, report.longrepr = "failed", f"{item.nodeid} gives no row to the table"
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("FAULTS_TABLE") and exitstatus == pytest.ExitCode.OK:
        page = table.PAGE.read_text(encoding="utf-8")
        order = [ROWS[item.nodeid] for item in session.items if item.nodeid in ROWS]
        table.PAGE.write_text(table.written(page, order), encoding="utf-8")
