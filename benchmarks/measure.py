"""Time, peak memory, and libraries in turns; what pytest-benchmark does not do, it is handed ready."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, Shape

ROUNDS, SECONDS = (3, 8.0) if DEVICE.type == "cpu" else (25, 0.5)
"""Runs of a library; fewer, but two, where they would take longer than so many seconds."""
CLAIM_ROUNDS = max(5, ROUNDS)
"""Of the libraries that a claim is about, however long they take."""
MANY_ROUNDS, FEW_SECONDS = max(9, ROUNDS), 0.25
"""So many while they take no longer than that together: what is short is easily disturbed."""
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


def in_turns(steps: Mapping[str, Callable[[], object]], claimed: Collection[str] = ()) -> dict[str, list[float]]:
    """Times in seconds of every step, which has run before: A B C A B C ..., so that a busy moment hits them all.

    claimed: those that get CLAIM_ROUNDS.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(MANY_ROUNDS):
        for name, step in steps.items():
            with_this = sum(times[name]) * (done + 1) / max(1, done)
            wanted = CLAIM_ROUNDS if name in claimed else ROUNDS if with_this <= SECONDS else 2
            if done < wanted or with_this <= FEW_SECONDS:
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
    """Seconds of one torch.mm of 2NDV FLOP with operands of this dtype, nothing else: 1.0 in every table."""
    key = (shape.n, shape.d, shape.v, shape.dtype)
    if key not in _units:
        hidden, weight = (torch.randn(size, shape.d, device=DEVICE).to(shape.dtype) for size in (shape.n, shape.v))
        out = torch.empty(shape.n, shape.v, device=DEVICE, dtype=shape.dtype)

        def step() -> None:
            torch.mm(hidden, weight.T, out=out)

        step()
        _units[key] = statistics.median(in_turns({"mm": step})["mm"])
    return _units[key]
