"""The plan of an op: slabs of tokens, tiles of their logits, parts of the vocabulary. Functions of integers alone.

N tokens, D hidden size, V vocabulary. The logits of a slab are kept from its forward to its backward; a tile is what one GEMM
computes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise, product
from typing import NamedTuple


def ranges(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(columns: int) -> int:
    """Round up to 16 columns.

    Rows of a buffer then begin on 16 bytes, as the fast kernels of a GEMM library require, and 16 elements apart, which triton
    specialises on.
    """
    return ceil_div(columns, 16) * 16


def even(total: int, parts: int, granule: int = 1) -> tuple[slice, ...]:
    """Cut range(total) into parts of whole granules, which differ by one granule at most; only the last one may be ragged.

    The last one is among the largest, so it is no sliver.
    """
    granules = ceil_div(total, granule)
    parts = min(parts, granules)
    cuts = [i * granules // parts * granule for i in range(parts)]
    return tuple(slice(start, stop) for start, stop in pairwise([*cuts, total]))


def fewest(total: int, most: int, granule: int = 1) -> int:
    """Return the number of parts with which `even` makes none larger than `most`, which is a granule at least."""
    return ceil_div(ceil_div(total, granule), most // granule)


# --- tiles ------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How a GEMM library computes a matrix: in blocks of rows x columns, of which one wave runs at the same time."""

    rows: int
    columns: int
    processors: int
    """blocks of a wave"""
    launches: float
    """time that the launches of a tile take, in waves of a product over D"""


class Tiling(NamedTuple):
    """The tiles of a matrix of logits: every range of rows with every range of columns."""

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]

    @property
    def widest(self) -> int:
        """Columns of the widest tile."""
        return max((part.stop - part.start for part in self.columns), default=0)

    @property
    def elements(self) -> int:
        """Size of a buffer that holds any of the tiles with padded rows."""
        return max((part.stop - part.start for part in self.rows), default=0) * padded(self.widest)


@lru_cache(maxsize=256)
def tiling(n: int, d: int, v: int, most_rows: int, most_logits: int, blocks: Blocks) -> Tiling:
    """Cut n x v logits into even tiles of at most `most_rows` rows and `most_logits` logits, in whole blocks.

    Of a few numbers of parts, those win whose forward and backward take the least predicted time.
    """
    height, width = max(1, ceil_div(n, blocks.rows)), max(1, ceil_div(v, blocks.columns))  # in blocks
    fewest_rows = fewest(height, max(1, most_rows // blocks.rows))
    most_parts = min(max(7, 2 * fewest_rows + 1), n // (8 * blocks.rows))  # shorter tiles are slivers

    def candidates() -> Iterator[tuple[float, int, int]]:
        for row_parts in range(fewest_rows, max(fewest_rows, most_parts) + 1, max(1, fewest_rows // 8)):
            rows = max(1, min(n, ceil_div(height, row_parts) * blocks.rows))
            fewest_columns = fewest(width, max(1, most_logits // rows // blocks.columns))
            for column_parts in range(fewest_columns, min(fewest_columns + 2, width) + 1):
                yield _waves(n, d, v, row_parts, column_parts, blocks), row_parts, column_parts

    _, row_parts, column_parts = min(candidates())
    return Tiling(even(n, row_parts, blocks.rows), even(v, column_parts, blocks.columns))


# A tile reads (rows + columns) D of the operands, and adds to as much of the gradients. For so many rows and columns that takes
# as long as a wave, whatever D is: counted from bytes and FLOP, of which a GEMM hides about half behind its products.
_SIDES_OF_A_WAVE = 5_000


def _waves(n: int, d: int, v: int, row_parts: int, column_parts: int, blocks: Blocks) -> float:
    """Predict the time of a forward and backward in so many parts, in waves of a product over D.

    logits (each tile begins a new wave) + dhidden (V / D as deep a product) + dweight (N / D) + bytes of the sides + launches.
    """

    def sizes(total: int, granule: int, parts: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the two sizes of `even` parts in blocks, each with the number of parts that have it."""
        size, larger = divmod(ceil_div(total, granule), parts)
        return (size, parts - larger), (size + 1, larger)

    def waves(height: int, width: int) -> int:
        return ceil_div(height * width, blocks.processors)

    heights, widths = sizes(n, blocks.rows, row_parts), sizes(v, blocks.columns, column_parts)
    deep, turned = ceil_div(d, blocks.columns), blocks.columns // blocks.rows  # columns are the rows of dweight
    logits = sum(rows * columns * waves(h, w) for (h, rows), (w, columns) in product(heights, widths))
    dhidden = sum(rows * waves(h, deep) for h, rows in heights) * v / d
    dweight = sum(columns * waves(w * turned, deep) for w, columns in widths) * n / d
    sides = (column_parts * n + row_parts * v) / _SIDES_OF_A_WAVE
    return logits + dhidden + dweight + sides + blocks.launches * row_parts * column_parts


# --- slabs ------------------------------------------------------------------------------------------------------------


class Slab(NamedTuple):
    """Groups [first, last) whose tokens are rows [start, stop)."""

    first: int
    last: int
    start: int
    stop: int


class Plan(NamedTuple):
    """What a group loss does: slab after slab, of which those of at most `cached_rows` rows keep their logits."""

    slabs: list[Slab]
    cached_rows: int
    """of the largest slab that keeps them, and so the size of the cache; -1: none does"""


class Cache(NamedTuple):
    """The memory of a group loss between the forward and the backward of a slab, in bytes."""

    row: int
    """the logits of a token"""
    shared: int
    """most for the logits of several groups"""
    most: int
    """most for the logits of one group"""
    spare: int
    """what several slabs need and one slab does not: an fp32 dweight beside a narrower one. One slab may use it for logits."""

    def plan(self, offsets: Sequence[int], own: Cache | None = None) -> Plan:
        """Plan the slabs of groups, which are indivisible: one, or the fewest that fit, with the largest as small as possible.

        A group that does not fit is a slab of its own.

        offsets (B+1,): of the groups into the rows.
        own: the memory of this rank, where all ranks have the slabs of `self`.
        """
        own = own or self
        slabs = self._slabs(offsets)
        most = own.most + (own.spare if len(slabs) == 1 else 0)
        fitting = [slab.stop - slab.start for slab in slabs if (slab.stop - slab.start) * own.row <= most]
        return Plan(slabs, max(fitting, default=-1))

    def pieces(self, total: int) -> list[int]:
        """Return the offsets of the fewest even groups of `total` tokens that fit, for a loss that takes any groups."""
        if not total:
            return [0]
        # Where not even one token fits, nothing is kept: then one group, recomputed in tiles, reads the weight least often.
        most = total if self._holds_all(total) or self.shared < self.row else self.shared // self.row
        parts, granule = fewest(total, most), 128
        # Whole blocks of a GEMM library, unless their price is one more slab.
        if most < granule or fewest(total, most, granule) > parts:
            granule = 1
        return [0, *(part.stop for part in even(total, parts, granule))]

    def _holds_all(self, rows: int) -> bool:
        return rows * self.row <= self.shared + self.spare

    def _slabs(self, offsets: Sequence[int]) -> list[Slab]:
        if len(offsets) > 1 and self._holds_all(offsets[-1]):
            return [Slab(0, len(offsets) - 1, 0, offsets[-1])]
        most = self.shared // self.row
        slabs = _filled(offsets, most)
        largest = max((slab.stop - slab.start for slab in slabs), default=0)
        smaller = range(ceil_div(offsets[-1], max(1, len(slabs))), min(most, largest))
        at = bisect_left(smaller, True, key=lambda rows: len(_filled(offsets, rows)) <= len(slabs))
        return _filled(offsets, smaller[at]) if at < len(smaller) else slabs


def _filled(offsets: Sequence[int], rows: int) -> list[Slab]:
    """Fill each slab with as many whole groups as fit into `rows`, at least one: no other cut at that size has fewer slabs."""
    slabs, first, groups = [], 0, len(offsets) - 1
    while first < groups:
        last = min(max(bisect_right(offsets, offsets[first] + rows) - 1, first + 1), groups)
        slabs.append(Slab(first, last, offsets[first], offsets[last]))
        first = last
    return slabs


# --- the fused forward ------------------------------------------------------------------------------------------------

# A program begins with no load in flight and ends with a state to store: about as long as an eighth of a tile of logits.
_PER_TILE = 8


@lru_cache(maxsize=4096)
def vocabulary_splits(row_blocks: int, tiles: int, group: int, processors: int) -> int:
    """Return the number of parts of the vocabulary with which the programs of the fused forward end soonest.

    There are row_blocks x parts programs of ceil(tiles / parts) tiles; the last part has what is left. Every part is one more
    state to write and to merge, so the fewest parts win that end within 1 % of the soonest.
    """
    ends: dict[int, int] = {}
    wanted = 1
    while wanted <= tiles:
        length = ceil_div(tiles, wanted)
        parts = ceil_div(tiles, length)  # none of them empty
        wanted = ceil_div(tiles, length - 1) if length > 1 else tiles + 1  # the next number with a shorter part
        # Spread evenly, the programs would end no sooner than this. It rises with the parts.
        if ends and row_blocks * (_PER_TILE * tiles + parts) >= processors * min(ends.values()):
            break
        if parts not in ends:
            ends[parts] = _end(row_blocks, length, parts, tiles, group, processors)
    soonest = min(ends.values())
    return min(parts for parts, end in ends.items() if 100 * end <= 101 * soonest)


def _end(row_blocks: int, length: int, parts: int, tiles: int, group: int, processors: int) -> int:
    """Return when the last program ends if each starts, in the order of the kernel, on the processor that is free first."""
    whole, rest = _PER_TILE * length + 1, _PER_TILE * (tiles - (parts - 1) * length) + 1
    free = [(0, processors)]  # heap of (time, processors that are free from then on)
    for first in range(0, row_blocks, group):
        members = min(group, row_blocks - first)
        for duration, programs in ((whole, (parts - 1) * members), (rest, members)):
            while programs:
                now, idle = heappop(free)
                while free and free[0][0] == now:
                    idle += heappop(free)[1]
                busy = min(idle, programs)
                programs -= busy
                heappush(free, (now + duration, busy))
                if idle > busy:
                    heappush(free, (now, idle - busy))
    return max(time for time, _ in free)
