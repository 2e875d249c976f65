"""Timing on a CUDA device, and what a process reports when it lost the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

LOST = 77
"""Exit status of a process whose CUDA context is lost (an illegal address). Only a new process can use the device again."""


def milliseconds(step: Callable[[], object]) -> float:
    """Time one run on the device by events.

    The level-2 cache is overwritten first, so that small inputs are read from memory, as in a model.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))
