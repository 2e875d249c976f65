"""Predict how long the recorded work takes on a GPU, from counts: FLOP, bytes, instructions, waves.

What it is made of:

- A matrix product runs in tiles of 128 x 256, one at a time on each streaming multiprocessor, at the rate of a large product. A
  last wave that is not full takes as long as a full one. Where K is long and tiles are few, K is split. The result goes to
  memory after the product, and with beta = 1 is read before. No product is faster than a large one.
- A row kernel takes the longer of two times: that of its bytes, and that of its instructions, of which a multiprocessor issues
  70 % of its peak. docs/aot.md counts those of a step in the machine code; what comes before and after the steps is added.
- The fused forward and backward run their own tiles at 90 % of that rate, or as fast as the level-2 cache delivers their
  operands, and the work on each tile of logits follows while the tensor cores wait.
- Everything else takes the time of its bytes. Every launch takes 3 µs to start and to drain.

Left out: what the level-2 cache saves between a product and the row kernel behind it, clocks that fall under load, the size of
a GEMM library's tile in truth, and launches that overlap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tools.aot import read_page, variant
from tools.record import Event, Gemm, Launch, Shaped

RAMP = 3e-6
"""seconds that a launch takes to start and to drain"""
ISSUE = 0.7
"""share of the peak instruction rate that a kernel with loads, exponentials and barriers reaches"""
TRITON = 0.9
"""rate of a product in Triton over that of the GEMM library"""
EPILOGUE = 16
"""instructions a logit that follow the product in the fused kernels (counted for sm_90 in the machine code)"""
_OUTSIDE = {"_row_statistics_kernel": 270, "_row_gradient_kernel": 150, "_row_exponentials_kernel": 250}
"""instructions of a thread before and after its steps (the shortest way through the machine code of sm_90, counted once)"""
_LANES = 4 * 32  # of a multiprocessor: four schedulers, each an instruction of 32 threads a cycle
_TILE = (128, 256)  # of the GEMM library
_SPLIT = 4096  # entries of K below which a product is not split
_LARGE = 8192  # a product of this size in all three directions gives the rate
_PAGE = Path(__file__).resolve().parent.parent / "docs" / "aot.md"


class Device(NamedTuple):
    """A GPU. Rates are those that large kernels reach, not those of the data sheet."""

    arch: int
    processors: int
    clock: float
    """Hz, under load"""
    memory: float
    """bytes a second"""
    l2: float
    """bytes a second from the level-2 cache"""
    gemm: float
    """FLOP/s of a 16-bit product of 8192 x 8192 x 8192 in the GEMM library, result and all"""
    fp32: float
    """FLOP/s of such a product in full fp32, without tensor cores"""

    def of_large(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of a large product, result and all: none is faster."""
        return self.fp32 if dtype == torch.float32 else self.gemm

    def rate(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of one multiprocessor within a tile, from the time of the large product."""
        waves = -(-(_LARGE // _TILE[0]) * (_LARGE // _TILE[1]) // self.processors)
        seconds = 2 * _LARGE**3 / self.of_large(dtype) - dtype.itemsize * _LARGE**2 / self.memory - RAMP
        return waves * 2 * _TILE[0] * _TILE[1] * _LARGE / seconds

    def issue(self) -> float:
        """Return the instructions of single threads that one multiprocessor issues in a second."""
        return ISSUE * _LANES * self.clock


# Data sheets: 108 or 132 multiprocessors; 2.04, 3.35 and 4.8 TB/s, of which kernels reach 88 to 90 %. The GEMM rates are what
# others measured: 270 TFLOP/s on an A100 of 80 GB, 790 on an H200; an H100 (SXM) has the same tensor cores.
DEVICES = {
    "a100": Device(80, 108, 1.41e9, 1.8e12, 4.5e12, 270e12, 17e12),
    "h100": Device(90, 132, 1.75e9, 3.0e12, 6.2e12, 790e12, 55e12),
    "h200": Device(90, 132, 1.75e9, 4.3e12, 6.2e12, 790e12, 55e12),
}


class Work(NamedTuple):
    """What one event costs."""

    part: str
    """GEMM, fused, rows or other"""
    seconds: float
    bytes: int
    flops: int = 0
    use: float = 1.0
    """share of the multiprocessors' time that a product uses: the rest is ragged edges and the last wave"""
    limit: str = "memory"
    """what its time is made of: memory, instructions, tensor cores, level-2 cache"""


def work(event: Event, device: Device) -> Work:
    """Return the cost of one event."""
    if isinstance(event, Gemm):
        return _gemm(event, device)
    if isinstance(event, Launch):
        return _KERNELS.get(event.kernel, _once)(event, device)
    return _small(event.bytes, device) if event.bytes else Work("other", 0.0, 0)


def _gemm(g: Gemm, device: Device) -> Work:
    written = g.m * g.n * g.out_dtype.itemsize * (2 if g.accumulates else 1)
    read = (g.m + g.n) * g.k * g.dtype.itemsize
    ideal = g.flops / (device.rate(g.dtype) * device.processors)

    def split(tile: tuple[int, int], parts: int) -> tuple[float, float, int]:
        """Return the seconds, those of the product alone, and the bytes, with K in this many parts."""
        tiles = -(-g.m // tile[0]) * -(-g.n // tile[1]) * parts
        of_tile = 2 * tile[0] * tile[1] * g.k / parts / device.rate(g.dtype)
        product = -(-tiles // device.processors) * of_tile
        output = written + (8 * parts * g.m * g.n if parts > 1 else 0)  # fp32 sums of each part, written and read
        return max(product, read / device.memory) + output / device.memory + RAMP, product, read + output

    candidates = [split(tile, parts) for tile in (_TILE, _TILE[::-1]) for parts in range(1, max(2, g.k // _SPLIT + 1))]
    seconds, product, moved = min(candidates)
    seconds = max(seconds, g.flops / device.of_large(g.dtype))
    return Work("GEMM", seconds, moved, g.flops, ideal / product, "tensor cores")


def _rows(*per_logit: str) -> Callable[[Launch, Device], Work]:
    """Cost a kernel that walks rows, one program each, and reads or writes an element of these tensors for each logit."""

    def cost(launch: Launch, device: Device) -> Work:
        a = launch.arguments
        rows, cols, block = a["n_rows"], a["n_cols"], a["BLOCK_V"]
        moved = rows * cols * sum(a[name].itemsize for name in per_logit)
        issued = (
            -(-cols // block) * block * instructions(launch, device) + 32 * a["num_warps"] * _OUTSIDE[launch.kernel]
        )
        issue = rows * issued / (device.issue() * device.processors)
        use = rows / (-(-rows // device.processors) * device.processors)
        seconds, limit = max((issue, "instructions"), (moved / device.memory, "memory"))
        return Work("rows", seconds / use + RAMP, moved, limit=limit)

    return cost


def _fused_forward(launch: Launch, device: Device) -> Work:
    a = launch.arguments
    row_blocks, tiles = -(-a["N"] // a["BLOCK_N"]), -(-a["V"] // a["BLOCK_V"])
    lengths = [min(a["tiles_per_split"], tiles - split * a["tiles_per_split"]) for split in range(a["splits"])]
    groups = [min(a["GROUP_N"], row_blocks - first) for first in range(0, row_blocks, a["GROUP_N"])]
    programs = [length for members in groups for length in lengths for _ in range(members)]
    return _fused(launch, device, programs, a["N"] * a["V"], len(groups), a["partial_ptr"].bytes)


def _fused_gradient(launch: Launch, device: Device) -> Work:
    a = launch.arguments
    row_blocks, tiles = -(-a["N"] // a["BLOCK_N"]), -(-a["C"] // a["BLOCK_V"])
    groups = -(-row_blocks // a["GROUP_N"])
    return _fused(launch, device, [1] * row_blocks * tiles, a["N"] * a["C"], groups, a["dlogits_ptr"].bytes)


def _fused(launch: Launch, device: Device, programs: list[int], logits: int, groups: int, written: int) -> Work:
    """Cost programs of so many tiles each, started in this order on the multiprocessor that is free first.

    groups: of row blocks, each of which reads the weight once.
    """
    a, free = launch.arguments, [0] * device.processors
    for tiles in programs:
        heapq.heapreplace(free, free[0] + tiles)
    tile, limit = _tile(launch, device)
    moved = a["hidden_ptr"].bytes + groups * a["weight_ptr"].bytes + written
    use = logits / (a["BLOCK_N"] * a["BLOCK_V"] * max(free) * device.processors)
    seconds, limit = max((max(free) * tile, limit), (moved / device.memory, "memory"))
    return Work("fused", seconds + RAMP, moved, 2 * logits * a["D"], use, limit)


def _tile(launch: Launch, device: Device) -> tuple[float, str]:
    """Return the seconds of one tile of a fused kernel, and what its product waits for."""
    a = launch.arguments
    rows, cols, size = a["BLOCK_N"], a["BLOCK_V"], a["hidden_ptr"].itemsize
    # fp32 operands become three products of TF32, which the tensor cores multiply at half the rate.
    rate = TRITON * device.rate(torch.bfloat16) / (6 if size == 4 else 1)
    loads = (rows + cols) * a["D"] * size * device.processors / device.l2
    seconds, limit = max((2 * rows * cols * a["D"] / rate, "tensor cores"), (loads, "level-2 cache"))
    return seconds + EPILOGUE * rows * cols / device.issue(), limit


def _once(launch: Launch, device: Device) -> Work:
    """Cost a kernel that reads or writes each of its tensors once."""
    return _small(sum(value.bytes for value in launch.arguments.values() if isinstance(value, Shaped)), device)


def _fold_target(launch: Launch, device: Device) -> Work:
    """Cost one entry of the cache a row, of which the rest is not read."""
    a = launch.arguments
    return _small(a["n_rows"] * sum(a[name].itemsize for name in ("targets_ptr", "entry_ptr", "cache_ptr")), device)


def _scale(launch: Launch, device: Device) -> Work:
    """Cost the usual factor, 1, beside which nothing is read."""
    return _small(launch.arguments["factor_ptr"].bytes, device)


def _small(moved: int, device: Device) -> Work:
    return Work("other", moved / device.memory + RAMP, moved)


_KERNELS: dict[str, Callable[[Launch, Device], Work]] = {
    "_row_statistics_kernel": _rows("z_ptr"),
    "_row_gradient_kernel": _rows("z_ptr", "out_ptr"),
    "_row_exponentials_kernel": _rows("z_ptr", "cache_ptr"),
    "_linear_logprob_fwd_kernel": _fused_forward,
    "_linear_logprob_bwd_kernel": _fused_gradient,
    "_fold_target_kernel": _fold_target,
    "_scale_kernel": _scale,
}


@cache
def _compiled() -> list[dict[str, str]]:
    return read_page(_PAGE)


def instructions(launch: Launch, device: Device) -> float:
    """Return the instructions of a thread for each logit, as docs/aot.md has them: of the nearest variant the dearest row."""
    words, itemsize = set(variant(launch.arguments).split()), launch.arguments["z_ptr"].itemsize

    def distance(row: dict[str, str]) -> tuple[bool, int]:
        # The caller's logits have the dtype of the case; those of a tile are fp32.
        narrow = row["case"].startswith("logits") and row["dtype"] != "fp32"
        return narrow != (itemsize == 2), len(words.symmetric_difference(row["variant"].split()))

    rows = [row for row in _compiled() if row["kernel"] == launch.kernel and row["arch"] == f"sm_{device.arch}"]
    nearest = min(map(distance, rows))
    return max(float(row["instructions/logit"]) for row in rows if distance(row) == nearest)
