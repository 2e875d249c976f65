"""Every test: fixed seed, one thread, uninitialised memory full of NaN. Every session: which implementations really ran.

GEM_TEST_SEED and GEM_TEST_THREADS ask for another seed and more threads (instruction_sets.py does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from numerics import SEED, THREADS

from gem_kernels.compat import INTERPRETED
from gem_kernels.tiles import ChunkTile
from gem_kernels.types import Impl

_EXERCISED = "gem_kernels_exercised"
_IMPLS = tuple(name for name in get_args(Impl) if name != "auto")
_REQUIRED = ("chunked", "triton") if INTERPRETED else ("chunked",)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "op(name): the public function of gem_kernels that the test exercises")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """A kernel that reads what nobody wrote reads NaN; two runs of a test see the same numbers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)  # the tensors are tiny; two on a busy machine wait for each other (measured: 50 x)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> ChunkTile:
    """Odd tiles, smaller than the test shapes, so that every loop runs several times and ends on a ragged step."""
    tile = ChunkTile(rows=37, cols=48, block=523)
    users = ("gem_kernels.tiles", "gem_kernels.streaming", "gem_kernels.logprob.chunked", "gem_kernels.scoring.chunked")
    for module in users:
        monkeypatch.setattr(f"{module}.CHUNKED", tile)
    return tile


# --- "all skipped" must not look green: what passed, by op and implementation -----------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("op")
        if marker is not None:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            item.user_properties.append((_EXERCISED, (marker.args[0], str(params.get("impl")))))


def _exercised(config: pytest.Config) -> tuple[set[str], Counter[tuple[str, str]]]:
    """(ops that had a test in this session, passed tests by (op, impl))."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    ops: set[str] = set()
    passed: Counter[tuple[str, str]] = Counter()
    for category, reports in (reporter.stats if reporter is not None else {}).items():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == _EXERCISED:
                    op, impl = value
                    ops.add(op)
                    passed[op, impl] += category == "passed"
    return ops, passed


def _not_exercised(config: pytest.Config) -> list[tuple[str, str]]:
    """(op, impl) whose tests ran without one pass; a session narrowed by hand is not asked."""
    narrowed = config.option.keyword or config.option.markexpr or any("::" in arg for arg in config.args)
    ops, passed = _exercised(config)
    return [] if narrowed else [(op, impl) for op in sorted(ops) for impl in _REQUIRED if not passed[op, impl]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ops, passed = _exercised(config)
    if not ops:
        return
    counts = [
        f"{op} " + ", ".join(f"{impl} {passed[op, impl]}" for impl in _IMPLS if passed[op, impl]) for op in sorted(ops)
    ]
    used = {impl for (_, impl), count in passed.items() if count}
    idle = [f"{impl}: none" for impl in _IMPLS if impl not in used]
    terminalreporter.write_line("implementations exercised: " + "; ".join(counts + idle))
    for op, impl in _not_exercised(config):
        terminalreporter.write_line(f"ERROR: {op} had tests, and none passed with impl={impl!r}", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and not session.config.option.collectonly and _not_exercised(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
