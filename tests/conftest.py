"""Every test: fixed seed, one thread, uninitialised memory full of NaN. Every session: which implementations really ran.

GEM_TEST_SEED and GEM_TEST_THREADS set another seed and more threads (instruction_sets.py does); devices.py chooses the device.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import get_args

# cuBLAS reads this when it starts; the deterministic algorithms below need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import devices
import pytest
import torch
from numerics import SEED, THREADS

from gem_kernels.compat import INTERPRETED
from gem_kernels.types import Impl

_EXERCISED = "gem_kernels_exercised"
_IMPLS = tuple(name for name in get_args(Impl) if name != "auto")
_REQUIRED = ("chunked", "triton") if INTERPRETED else ("chunked",)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "op(name): the public function of gem_kernels that the test exercises")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Make two runs of a test see the same numbers, and a kernel that reads unwritten memory read NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)  # the tensors are tiny; two threads on a busy machine take 50 times as long
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set odd tiles, smaller than the test's shapes: every loop runs several times and ends on a ragged step.

    Cases of a GPU keep the tiles of the table, which its kernels are compiled for.
    """
    if request.node.get_closest_marker("gpu"):
        return
    devices.use_small_tiles(monkeypatch)


# --- the GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of this case: the GPU if it is marked `gpu`, else the CPU."""
    return devices.GPU if request.node.get_closest_marker("gpu") else devices.CPU


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU: multiply fp32 in fp32, as the bounds assume, and end the process at the test that loses the device."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = reduced
    torch.set_float32_matmul_precision(precision)
    if devices.ON_GPU:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # several processes share the device
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=devices.LOST)


# --- "all skipped" must not look green: what passed, by op and implementation -----------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = devices.no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason))
        marker = item.get_closest_marker("op")
        if marker is not None:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            item.user_properties.append((_EXERCISED, (marker.args[0], str(params.get("impl")))))


def _exercised(config: pytest.Config) -> tuple[set[str], Counter[tuple[str, str]]]:
    """Return the ops that had a test in this session, and their passed tests by (op, impl)."""
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
    """Return each (op, impl) whose tests ran without one pass; none for a session that was narrowed by hand."""
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
