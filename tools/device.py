"""Timing on a CUDA device, and what a process reports when it lost the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gem_kernels import compat

LOST = 77
"""Exit status of a process whose CUDA context is lost (an illegal address). Only a new process can use the device again."""
_AHEAD = 2_000_000
"""Cycles, about a millisecond, that the device sleeps before a timed run, while the host enqueues a run of small kernels."""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's collector off inside the block: with transformers and trl loaded, a pass of it takes half a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def milliseconds(step: Callable[[], object]) -> float:
    """Time one run on the device by events; without a CUDA device, by the clock.

    The level-2 cache is overwritten first, so that small inputs are read from memory, as in a model. The device then sleeps
    while the host enqueues, so that the time of small kernels is theirs and not the host's.
    """
    with no_garbage_collection():
        if not torch.cuda.is_available():
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_AHEAD)
        began.record()
        step()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))


def times(run: Callable[[], object], seconds: float = 0.5, least: int = 3, most: int = 25) -> list[float]:
    """Time as many runs as fit into `seconds`, in milliseconds. run has run before."""
    found: list[float] = []
    while len(found) < least or (len(found) < most and sum(found) < 1e3 * seconds):
        found.append(milliseconds(run))
    return found


def pretend_hopper() -> None:
    """Take the tiles of sm_90 from now on: a dry run on a CPU then interprets the kernels as a Hopper GPU would run them."""
    compat.arch = lambda device: 90
