"""How `pytest benchmarks/` runs: shapes, libraries, order, printed table and JSON.

A benchmark takes `shape` and `library` from its marker `over(shapes=..., libraries=...)` and passes a Task to `bench`. With
`--benchmark-disable` the shape is tiny and nothing is timed, so that the run only checks the code. With `--tiny` the shape is
tiny too, and its times, which mean nothing, are recorded: a dry run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.contest import Row, Task, compete, describe, result_of
from benchmarks.measure import STOPWATCH
from benchmarks.peers import LIBRARIES
from benchmarks.record import Record, append, timed
from benchmarks.results import OURS
from benchmarks.shapes import DEVICE, MAIN, TINY, Shape
from tools.device import LOST
from tools.files import read_json

_rows: dict[tuple[str, str], dict[str, Row]] = {}
_does_not: list[dict[str, str]] = []
_timed: list[dict[str, Any]] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get(results.DEADLINE, "inf")):
        pytest.skip("no time left")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD.json", "NEW.json"),
        help="run nothing; compare two results by their ratios to eager, and fail where the new one is worse",
    )
    parser.addoption("--tiny", action="store_true", help="a tiny shape in place of every other: a dry run")


def tiny(config: pytest.Config) -> bool:
    """True if a tiny shape takes the place of every other."""
    return bool(config.getoption("benchmark_disable", False) or config.getoption("--tiny"))


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    files = config.getoption("--compare")
    if files is None:
        return None
    report, worse = results.compare(*(results.read(path) for path in files))
    print(report)
    return int(bool(worse))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our own table shows more


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("over")
    over = marker.kwargs if marker else {}
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", [TINY] if tiny(metafunc.config) else over["shapes"], ids=str)
    if "library" in metafunc.fixturenames:
        metafunc.parametrize("library", over.get("libraries", LIBRARIES))


def _compiles_too_long(item: pytest.Item) -> bool:
    """True for torch.compile on a CPU, except in one task: compiling takes half a minute, longer than all rounds together."""
    if DEVICE.type == "cuda" or _param(item, "library") != "torch.compile":
        return False
    return getattr(item, "originalname", None) != "test_group_loss" or _param(item, "shape") != MAIN[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort by shape: fp64 results are kept for one shape at a time. The main shape is first, in case time runs out.

    torch.compile, which takes half a minute to compile, is last on a GPU.
    """
    ours = [item for item in items if Path(item.path).parent == Path(__file__).parent]
    dropped = [item for item in ours if _compiles_too_long(item)]
    config.hook.pytest_deselected(items=dropped)
    ours = [item for item in ours if item not in dropped]
    order: dict[Any, int] = {}
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=STOPWATCH))
        order.setdefault(_param(item, "shape"), len(order))

    def rank(item: pytest.Item) -> tuple[bool, int]:
        return DEVICE.type == "cuda" and _param(item, "library") == "torch.compile", order[_param(item, "shape")]

    by_shape = iter(sorted(ours, key=rank))
    items[:] = [next(by_shape) if item in ours else item for item in items if item not in dropped]


def _param(item: pytest.Item, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


@lru_cache(maxsize=1)
def _timed_before() -> set[tuple[str, str, str]]:
    """Return what the run on a GPU that this process belongs to had timed when it started."""
    record = Record.of_environment()
    return timed(read_json(record.path) or {}) if record else set()


def _rivals(request: pytest.FixtureRequest) -> Iterable[str]:
    """Return the libraries to time in turns: all that were selected on a CPU, one on a GPU, where times are steady."""
    mine = request.node
    if DEVICE.type == "cuda":
        return [_param(mine, "library")]
    same = (
        item
        for item in request.session.items
        if getattr(item, "function", None) is mine.function and _param(item, "shape") == _param(mine, "shape")
    )
    return [_param(item, "library") for item in same]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """Release GPU memory after every row. A lost device ends the process, and `make gpu` starts another."""
    yield
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=LOST)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, shape: Shape, library: str) -> Callable[[Task], None]:
    """Check, time and record one library at one task."""

    def run(task: Task) -> None:
        if (task.name, shape.name, library) in _timed_before():
            pytest.skip("an earlier stage of this run has timed it")
        known = _rows.setdefault((task.name, shape.name), {})
        if library not in known:
            known.update(compete(task, shape, _rivals(request), timed=benchmark.enabled))
        row, key = known[library], {"task": task.name, **describe(shape), "library": library}
        if row.reason is not None:
            missing = result_of(key, row)
            _does_not.append(missing)
            append(missing)
            assert not library.startswith(OURS), row.reason
            pytest.skip(row.reason)
        record(benchmark, key, row)

    return run


def record(benchmark: Any, key: dict[str, Any], row: Row) -> None:
    """Pass measured times to pytest-benchmark."""
    benchmark.extra_info.update(key | row.info)
    times = row.times or [0.0]
    benchmark.pedantic(STOPWATCH.play, args=(iter(times),), rounds=len(times))
    if benchmark.enabled:
        result = result_of(key, row)
        _timed.append({**result["extra_info"], "median s": result["stats"]["median"], "rounds": len(times)})
        append(result)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # the default has the host's name and no versions
    machine_info.update(results.describe_machine())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["does_not"] = _does_not
    for benchmark in output_json["benchmarks"]:
        for name in ("param", "params", "options", "fullname"):
            benchmark.pop(name, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _timed:
        terminalreporter.write_line("")
        terminalreporter.write_line(results.table(_timed + _does_not))
