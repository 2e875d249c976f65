"""The fused forward at many and few tokens of wide and narrow heads, and `chunked`. Which tile, and which impl for which D?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_stages.sentences import TIES, Rows, decision, digits, percent, times_as_fast
from benchmarks.shapes import DEVICE, REFERENCE
from gem_kernels import Impl, compat, linear_logprob_entropy
from gem_kernels.tiles import FusedTile
from tools.device import times
from tools.files import Json
from tools.sweep_tables import Shape, Table, entry, linear_inputs, tables

BF16 = torch.bfloat16
TOKENS, HIDDEN = (8192, 2100), (4096, 896)
HOPPER = [FusedTile(128, 256, 64, 16, 8, 4), FusedTile(128, 256, 128, 16, 8, 2)]
IMPLS: tuple[Impl, ...] = ("triton", "chunked")


def shape_of(n: int, d: int, dry: bool) -> Shape:
    return Shape(n // 2048, d // 64, 250) if dry else Shape(n, d, REFERENCE.v)


def table_of(shape: Shape) -> Table:
    """Return the table of the forward for bf16 without bias, which is the sweep's first."""
    return tables(shape, compat.arch(DEVICE))[0]


def candidates(table: Table) -> list[FusedTile]:
    """Return the present tile, and the candidates for this architecture."""
    others = HOPPER if table.key[0] >= 90 else table.candidates[:2]
    found = [table.present(), *others]
    return [tile for tile in dict.fromkeys(found) if isinstance(tile, FusedTile)]


def words(tile: FusedTile) -> str:
    return f"{tile.block_n}x{tile.block_v}x{tile.block_d}x{tile.stages}"


def name_of(what: str, n: int, d: int) -> str:
    return f"{what}, N={n} D={d}"


def _timed(run: Callable[[], object], shape: Shape, dry: bool) -> Json:
    run()
    ms = statistics.median(times(run, seconds=0.3, least=1 if dry else 3, most=15))
    return {"ms": digits(ms), "TFLOP/s": digits(2e-9 * shape.n * shape.d * shape.v / ms)}


def time_tile(tile: FusedTile, n: int, d: int, dry: bool) -> Json:
    shape = shape_of(n, d, dry)
    table = table_of(shape)
    with entry(table.entries, table.key, tile):
        results = _timed(table.make(DEVICE), shape, dry)
    return {**results, "tile": words(tile), "present": tile == table.present()}


@torch.no_grad()
def time_impl(impl: Impl, n: int, d: int, dry: bool) -> Json:
    """Time the public op as a caller of `auto` gets it, with no token to ignore."""
    shape = shape_of(n, d, dry)
    x, targets = linear_inputs(shape, BF16, False, DEVICE)
    run = partial(linear_logprob_entropy, x.hidden, x.weight, targets, ignore_index=None, impl=impl)
    return _timed(run, shape, dry)


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    for d in HIDDEN:
        for n in TOKENS:
            for tile in candidates(table_of(shape_of(n, d, dry))):
                yield name_of(words(tile), n, d), partial(time_tile, tile, n, d, dry)
            for impl in IMPLS:
                yield name_of(impl, n, d), partial(time_impl, impl, n, d, dry)


# --- the decisions ----------------------------------------------------------------------------------------------------


def _of_tiles(rows: Rows, n: int, d: int) -> dict[str, Json]:
    found = {row["tile"]: row for name, row in rows.items() if name.endswith(name_of("", n, d)) and "tile" in row}
    if not found:
        raise KeyError(name_of("a tile", n, d))
    return found


def _tile(rows: Rows) -> str:
    """Choose one tile for all shapes, by the mean of its times relative to the best tile of each shape."""
    shapes = [_of_tiles(rows, n, d) for d in HIDDEN for n in TOKENS]
    everywhere = set.intersection(*(set(found) for found in shapes))
    least = [min(row["ms"] for row in found.values()) for found in shapes]
    cost = {t: statistics.mean(f[t]["ms"] / best for f, best in zip(shapes, least, strict=True)) for t in everywhere}
    best = min(cost, key=cost.__getitem__)
    present = next(tile for tile, row in shapes[0].items() if row["present"])
    if cost[present] <= cost[best] * (1 + TIES):
        return f"Tile: keep {present}, within {percent(TIES)} of the best."
    return f"Tile: use {best}, {percent(cost[present] / cost[best] - 1)} faster than the present {present}."


def _waves(rows: Rows) -> str:
    """Compare the rate at few tokens with that at many: a bad split of the vocabulary leaves processors idle."""
    said = []
    for d in HIDDEN:
        many, few = (max(row["TFLOP/s"] for row in _of_tiles(rows, n, d).values()) for n in TOKENS)
        said.append(f"D={d} {percent(few / many)}")
    return f"Rate at N={TOKENS[1]} relative to N={TOKENS[0]}: {', '.join(said)} (below 90 %: look at the waves first)."


def _auto(rows: Rows) -> str:
    said = []
    for d in HIDDEN:
        ms = {impl: rows[name_of(impl, TOKENS[0], d)]["ms"] for impl in IMPLS}
        better, other = sorted(IMPLS, key=ms.__getitem__)
        chosen = better if ms[other] > (1 + TIES) * ms[better] else "either"
        said.append(f"D={d} {chosen} ({better} {times_as_fast(ms[other], ms[better])})")
    return f"auto for scoring: {', '.join(said)}."


def decide(stage: Json) -> str:
    return decision(stage, _tile, _waves, _auto)
