"""The row kernels alone, over tiles: GB/s, and the share of a copy's rate. Which tiles should gem_kernels/tiles.py have?"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_stages.gemm import present_tile as tile_of_logits
from benchmarks.gpu_stages.sentences import TIES_OF_MANY, Rows, decision, digits, gain, percent
from benchmarks.shapes import DEVICE, REFERENCE
from gem_kernels import compat, rows_triton, tiles
from gem_kernels.group_loss.exponentials import cache_exponentials
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import RowTile
from gem_kernels.types import LogitTransform
from tools.device import times
from tools.files import Json
from tools.sweep_tables import ROW_TILES, entry, row_gradient

BF16 = torch.bfloat16
TILES = ROW_TILES[:5]
"""the sweep tries more, and times less; each of these is compiled for every kernel, which takes most of the stage's time"""
COPY = "copy"


class Walk(NamedTuple):
    """Logits (N, count C) that a kernel reads C columns at a time, as `chunked` makes them; from memory, not from the cache."""

    z: Tensor
    width: int
    out: Tensor  # (N, count C) bf16
    state: State
    reference: Tensor  # (N,)
    gradient: RowGradient

    def parts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, self.z.shape[1], self.width):
            part = slice(first, first + self.width)
            yield first, self.z[:, part], self.out[:, part]


TRANSFORM = Transform.of(LogitTransform())


def _statistics(walk: Walk) -> None:
    for first, z, _ in walk.parts():
        rows_triton.update(z, None, walk.state, first, TRANSFORM)


def _exponentials(walk: Walk) -> None:
    for first, z, _ in walk.parts():
        cache_exponentials(z, None, walk.state, walk.reference, walk.out, first, TRANSFORM)


def _gradient(walk: Walk) -> None:
    for first, z, out in walk.parts():
        rows_triton.gradient(z, None, walk.gradient, first, TRANSFORM, out)


class Kernel(NamedTuple):
    run: Callable[[Walk], None]
    dtype: torch.dtype  # of the logits
    whole_rows: bool  # in one launch, as logprob_entropy launches it
    bytes: int  # read and written for a logit


KERNELS = {
    "statistics": Kernel(_statistics, torch.float32, False, 4),
    "exponentials": Kernel(_exponentials, torch.float32, False, 6),
    "gradient": Kernel(_gradient, torch.float32, False, 6),
    "logits at hand, forward": Kernel(_statistics, BF16, True, 2),
    "logits at hand, backward": Kernel(_gradient, BF16, True, 4),
}


def make_walk(kernel: Kernel, dry: bool) -> Walk:
    rows, width = (2, 250) if dry else tile_of_logits(REFERENCE.d)
    count = 2 if dry else 8
    if kernel.whole_rows:
        rows, width, count = (2, 250, 1) if dry else (4096, REFERENCE.v, 1)
    z = torch.empty(rows, width * count, device=DEVICE).normal_(0, 4.5).to(kernel.dtype)
    targets = (torch.arange(rows, device=DEVICE) * 7919) % (width * count)
    out, reference = torch.empty_like(z, dtype=BF16), torch.empty(rows, device=DEVICE)
    return Walk(z, width, out, State.fresh(targets), reference, row_gradient(targets))


def of_tile(name: str, tile: RowTile) -> str:
    return f"{name} ({tile.block}, {tile.warps})"


def present_tile(kernel: Kernel) -> RowTile:
    return tiles.row_tile(tiles.ROWS, torch.empty(0, dtype=kernel.dtype, device=DEVICE))


def time_kernel(name: str, tile: RowTile | None, dry: bool) -> Json:
    """Time a kernel with a tile, or with the present entry of the table."""
    kernel = KERNELS[name]
    walk, key = make_walk(kernel, dry), (compat.arch(DEVICE), kernel.dtype.itemsize)
    used = tile or present_tile(kernel)
    with entry(tiles.ROWS, key, used):
        kernel.run(walk)
        taken = times(partial(kernel.run, walk), seconds=0.1, least=1 if dry else 3, most=15)
    ms = statistics.median(taken)
    return {
        "ms": digits(ms),
        "least": digits(min(taken)),
        "GB/s": digits(kernel.bytes * walk.z.numel() / ms / 1e6),
        "tile": of_tile("", used).strip(),
    }


def time_copy(dry: bool) -> Json:
    source = torch.ones(1 << 10 if dry else 1 << 30, dtype=torch.int8, device=DEVICE)
    copy = torch.empty_like(source)
    copy.copy_(source)
    ms = statistics.median(times(lambda: copy.copy_(source)))
    return {"ms": digits(ms), "GB/s": digits(2 * source.nbytes / ms / 1e6)}


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    yield COPY, partial(time_copy, dry)
    for name in KERNELS:
        yield f"{name}, the present tile", partial(time_kernel, name, None, dry)
    for tile in TILES[:2] if dry else TILES:
        for name in (name for name, kernel in KERNELS.items() if tile != present_tile(kernel)):
            yield of_tile(name, tile), partial(time_kernel, name, tile, dry)


# --- the decisions ----------------------------------------------------------------------------------------------------


def _rate(row: Json, rows: Rows) -> str:
    return f"{row['GB/s']} GB/s, {percent(row['GB/s'] / rows[COPY]['GB/s'])} of a copy's rate"


def _best_tile(name: str) -> Callable[[Rows], str]:
    def sentence(rows: Rows) -> str:
        present = rows[f"{name}, the present tile"]
        timed = [row for tile in TILES if (row := rows.get(of_tile(name, tile)))]
        best = min([present, *timed], key=lambda row: row["ms"])
        faster, of = gain(present, best), f"of {1 + len(timed)} tiles"
        if faster < TIES_OF_MANY:
            return f"{name}: keep {present['tile']} {of}: {_rate(present, rows)}."
        return f"{name}: use {best['tile']} {of}: {_rate(best, rows)}, {percent(faster)} faster than {present['tile']}."

    sentence.__name__ = name
    return sentence


def _one_tile_for_fp32(rows: Rows) -> str:
    """Choose the one entry of the table that serves the three kernels on fp32 logits."""
    names = [name for name, kernel in KERNELS.items() if not kernel.whole_rows]
    present = sum(rows[f"{name}, the present tile"]["ms"] for name in names)
    sums: dict[str, float] = {}
    for tile in TILES:
        ms = [rows[of_tile(name, tile)]["ms"] for name in names if of_tile(name, tile) in rows]
        if len(ms) == len(names):
            sums[of_tile("", tile).strip()] = sum(ms)
    best = min(sums, key=sums.__getitem__, default="")
    if not best or present <= (1 + TIES_OF_MANY) * sums[best]:
        return f"One tile for all fp32 logits: keep the present one, {digits(present)} ms for the three kernels."
    return f"One tile for all fp32 logits: use {best}, {digits(sums[best])} ms for the three kernels, not {digits(present)}."


def decide(stage: Json) -> str:
    said = decision(stage, *map(_best_tile, KERNELS), _one_tile_for_fp32)
    if shutil.which("ncu"):
        command = "ncu --clock-control none -k regex:_row_ --section SpeedOfLight --section SchedulerStats"
        said += f" Issue slots: {command} python3 -m benchmarks.gpu_stages.rows."
    return said


if __name__ == "__main__":  # for ncu: every kernel once, with the present tile
    for each in KERNELS.values():
        each.run(make_walk(each, dry=False))
