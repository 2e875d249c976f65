"""Time and peak memory of libraries that take turns; pytest-benchmark gets the finished numbers."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, Shape
from tools.device import milliseconds

ROUNDS, SECONDS = (3, 8.0) if DEVICE.type == "cpu" else (25, 0.5)
"""Runs per library. If they would take longer than SECONDS there are fewer, but at least two."""
CLAIM_ROUNDS = 5 if DEVICE.type == "cpu" else 9
"""Runs at least of the libraries that a claim is about, however long they take."""
MANY_ROUNDS, FEW_SECONDS = max(9, ROUNDS), 0.25
"""Up to MANY_ROUNDS runs within FEW_SECONDS, because short runs are easily disturbed."""
MIB = 1 << 20


class DoesNotError(Exception):
    """The library does not support the task, and no user would compose it from its parts; the message names what is missing."""


class Stopwatch:
    """A clock for pytest-benchmark that advances by times measured before, because the libraries take turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, times: Iterator[float]) -> None:
        self.now += next(times)


STOPWATCH = Stopwatch()


def seconds(step: Callable[[], object]) -> float:
    """Time one run on the device."""
    return milliseconds(step) / 1e3


def in_turns(steps: Mapping[str, Callable[[], object]], claimed: Collection[str] = ()) -> dict[str, list[float]]:
    """Time every step in turns, A B C A B C ..., so that a busy moment affects all of them; return seconds.

    Args:
        steps: name -> step; each has run before.
        claimed: names of the steps that get CLAIM_ROUNDS.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(MANY_ROUNDS):
        for name, step in steps.items():
            with_this = sum(times[name]) * (done + 1) / max(1, done)
            wanted = max(CLAIM_ROUNDS if name in claimed else 2, ROUNDS if with_this <= SECONDS else 0)
            if done < wanted or with_this <= FEW_SECONDS:
                times[name].append(seconds(step))
    return times


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """Return VmRSS or VmHWM of this process, MiB."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> float:
    """Reset VmHWM of this process and return what is resident now, MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def _start_peak() -> float | None:
    """Reset the peak and return what is in use now, MiB; None if this system does not show it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, so that its next use counts
        return forget_peak()
    except (OSError, AttributeError):
        return None


_T = TypeVar("_T")


def peak_memory(step: Callable[[], _T], tensors: Callable[[_T], Iterable[Tensor | None]]) -> tuple[float | None, _T]:
    """Return the MiB that a step needed beyond what was in use before and beyond the tensors of its result, and the result."""
    before = _start_peak()
    result = step()
    if before is None:
        return None, result
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / MIB
    else:
        peak = resident("VmHWM")
    return peak - before - sum(t.nbytes for t in tensors(result) if t is not None) / MIB, result


# --- the unit ---------------------------------------------------------------------------------------------------------

_units: dict[tuple[int, int, int, torch.dtype], float] = {}


def bare_mm(shape: Shape) -> float:
    """Return the seconds of one torch.mm of 2NDV FLOP with operands of this dtype: the unit of every table."""
    key = (shape.n, shape.d, shape.v, shape.dtype)
    if key not in _units:
        hidden, weight = (torch.randn(size, shape.d, device=DEVICE).to(shape.dtype) for size in (shape.n, shape.v))
        out = torch.empty(shape.n, shape.v, device=DEVICE, dtype=shape.dtype)

        def step() -> None:
            torch.mm(hidden, weight.T, out=out)

        step()
        _units[key] = statistics.median(in_turns({"mm": step})["mm"])
    return _units[key]
