"""Time, peak memory, and libraries in turns; what pytest-benchmark does not do, it is handed ready."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, Shape

ROUNDS = 5
SECONDS = 18.0
"""A library that is slower than this over all rounds gets fewer, at least two."""
MIB = 1 << 20


class DoesNotError(Exception):
    """The library has no such thing, and no composition of it that a user would write; the message says what is missing."""


class Stopwatch:
    """A clock for pytest-benchmark that advances only by times that were measured before: libraries run in turns there."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, times: Iterator[float]) -> None:
        self.now += next(times)


STOPWATCH = Stopwatch()


def seconds(step: Callable[[], object]) -> float:
    """One run on the device. On a GPU by events, behind a write over the level-2 cache, as in a model."""
    gc.collect()
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def in_turns(steps: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Times in seconds of every step, which has run before: A B C A B C ..., so that a busy moment hits them all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds = ROUNDS if DEVICE.type == "cpu" else 25
    for done in range(rounds):
        for name, step in steps.items():
            spent = sum(times[name])
            limit = SECONDS if DEVICE.type == "cpu" else 0.5
            if done < 2 or spent * (done + 1) / done <= limit:
                times[name].append(seconds(step))
    return times


# --- memory -----------------------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def _start_peak() -> int | None:
    """Bytes in use now, from which the peak is counted; None: this system does not tell."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that what was freed is asked for anew, and seen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from here
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


_T = TypeVar("_T")


def peak_memory(step: Callable[[], _T], tensors: Callable[[_T], Iterable[Tensor | None]]) -> tuple[float | None, _T]:
    """(MiB that a step needed beyond what was there before and beyond the tensors that it returns, its result)."""
    before = _start_peak()
    result = step()
    if before is None:
        return None, result
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _resident("VmHWM")
    return (peak - before - sum(t.nbytes for t in tensors(result) if t is not None)) / MIB, result


# --- the unit ---------------------------------------------------------------------------------------------------------

_units: dict[tuple[int, int, int, torch.dtype], float] = {}


def bare_mm(shape: Shape) -> float:
    """Seconds of one torch.mm of 2NDV FLOP with operands of this dtype, nothing else: 1.0 in every table.

    On a CPU of a part of the vocabulary, scaled up.
    """
    key = (shape.n, shape.d, shape.v, shape.dtype)
    if key not in _units:
        v = shape.v if DEVICE.type == "cuda" else min(shape.v, 16_384)
        hidden, weight = (torch.randn(size, shape.d, device=DEVICE).to(shape.dtype) for size in (shape.n, v))
        out = torch.empty(shape.n, v, device=DEVICE, dtype=shape.dtype)

        def step() -> None:
            torch.mm(hidden, weight.T, out=out)

        step()
        _units[key] = statistics.median(in_turns({"mm": step})["mm"]) * shape.v / v
    return _units[key]
