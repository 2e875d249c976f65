"""Launch tables: the share of a problem that one program, or one GEMM, takes at a time.

Read by the launchers, the compile report (tools.aot), the sweep and the benchmarks. First key: compute capability; a
device takes the entry of the nearest one not above its own. Second key: bytes of an element, unless said otherwise. 0 is the
interpreter: tiles smaller than the tests' shapes, so that every loop runs several times and ends on a ragged step.

Entries not marked "measured" come from counting bytes and from what compiles without spilling registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gem_kernels import compat, plan
from gem_kernels.plan import padded


class ChunkTile(NamedTuple):
    """The tile of logits of the chunked implementation."""

    rows: int
    """tokens per GEMM, at most"""
    cols: int
    """vocabulary entries per GEMM of so many tokens; fewer tokens get more, up to as many logits"""
    block: int
    """elements that one row function of torch ops touches at a time, so that its passes stay in the level-2 cache"""


class FusedTile(NamedTuple):
    """The tile of logits that one Triton program holds in registers."""

    block_n: int
    """tokens"""
    block_v: int
    """vocabulary entries"""
    block_d: int
    """hidden entries per step of the inner loop"""
    group_n: int
    """row blocks that are in flight together: they share a tile of the weight, and their hidden rows stay in the cache"""
    warps: int
    stages: int
    """loads in flight ahead of the tensor cores"""


class RowTile(NamedTuple):
    """One program reads a few rows (or one span) in blocks."""

    rows: int
    block: int
    """elements of a row per step"""
    warps: int


CHUNKED = ChunkTile(rows=1024, cols=4096, block=1 << 17)  # CPU, measured

# CUDA: (capability, D at least) -> rows x cols of fp32 logits. 66 MiB are 528 blocks of a GEMM library, four waves of 132
# processors. The host takes 50 to 80 us to launch a GEMM and its row kernel (est.); for a tile of 66 MiB a Hopper takes 120 us
# at D = 2048, but only about as long as the host at D = 896, where 132 MiB (130 us) hide it and more would only take memory.
# An Ampere takes 150 us for 66 MiB at D = 896.
_CHUNKED_CUDA = {
    (0, 0): ChunkTile(rows=61, cols=144, block=0),
    (80, 0): ChunkTile(rows=8448, cols=2048, block=0),
    (90, 0): ChunkTile(rows=8448, cols=4096, block=0),
    (90, 2048): ChunkTile(rows=8448, cols=2048, block=0),
}

# (capability, bytes of an element, demand). Whatever else must stay in registers limits how big a tile can be
# before it spills (tools.aot): 0, nothing, tiles are read through descriptors; 1, a bias, a softcap or addresses;
# 2, an adapter, or masks because D is ragged. A missing demand takes the next higher one.
LINEAR_FORWARD = {
    (0, 2, 2): FusedTile(block_n=64, block_v=128, block_d=32, group_n=2, warps=4, stages=1),
    (0, 4, 2): FusedTile(block_n=64, block_v=128, block_d=32, group_n=2, warps=4, stages=1),
    (80, 2, 1): FusedTile(block_n=128, block_v=128, block_d=64, group_n=16, warps=8, stages=3),
    (80, 2, 2): FusedTile(block_n=64, block_v=128, block_d=32, group_n=16, warps=8, stages=3),
    (80, 4, 2): FusedTile(block_n=64, block_v=64, block_d=32, group_n=16, warps=8, stages=3),
    (90, 2, 0): FusedTile(block_n=128, block_v=256, block_d=128, group_n=16, warps=8, stages=2),
    (90, 2, 1): FusedTile(block_n=128, block_v=128, block_d=64, group_n=16, warps=8, stages=3),
    (90, 2, 2): FusedTile(block_n=64, block_v=128, block_d=32, group_n=16, warps=8, stages=3),
    (90, 4, 0): FusedTile(block_n=64, block_v=128, block_d=32, group_n=16, warps=8, stages=3),
    (90, 4, 2): FusedTile(block_n=64, block_v=64, block_d=32, group_n=16, warps=8, stages=3),
    (100, 2, 1): FusedTile(block_n=128, block_v=128, block_d=64, group_n=16, warps=8, stages=3),
    (100, 2, 2): FusedTile(block_n=64, block_v=128, block_d=32, group_n=16, warps=8, stages=3),
    (100, 4, 0): FusedTile(block_n=64, block_v=128, block_d=32, group_n=16, warps=8, stages=3),
    (100, 4, 2): FusedTile(block_n=64, block_v=64, block_d=32, group_n=16, warps=8, stages=3),
}
LINEAR_BACKWARD = {
    **LINEAR_FORWARD,
    (90, 2, 0): FusedTile(block_n=128, block_v=256, block_d=64, group_n=16, warps=8, stages=3),
    (100, 2, 0): FusedTile(block_n=128, block_v=256, block_d=64, group_n=16, warps=8, stages=3),
}
RAGGED = 64  # D is ragged when this, a multiple of every block_d that reads through addresses, does not divide it

# By element size. 16 logits a thread share the cost of a step's reduction (at 8 it is a third of the instructions), and leave
# room for 32 warps on a processor. A tile of `chunked` (fp32) has few steps a row, so what a thread does once a row counts:
# fewer threads. The caller's logits (2 bytes) have many.
ROWS = {
    (0, 2): RowTile(rows=64, block=128, warps=4),
    (0, 4): RowTile(rows=64, block=128, warps=4),
    (80, 2): RowTile(rows=1, block=2048, warps=4),
    (80, 4): RowTile(rows=1, block=1024, warps=2),
}

# Spans of up to `block` tokens stay in registers.
SPANS = {
    (0, 4): RowTile(rows=1, block=128, warps=4),
    (80, 4): RowTile(rows=1, block=2048, warps=4),
}

_Tile = TypeVar("_Tile")


def nearest(table: Mapping[tuple[int, int], _Tile], arch: int, size: int) -> _Tile:
    """Return the entry of the highest architecture not above `arch`, then of the highest second key not above `size`.

    A GPU never gets the interpreter's entry.
    """
    mine = [key for key in table if (key[0] == 0) == (arch == 0)]
    best = max((key[0] for key in mine if key[0] <= arch), default=min(mine)[0])
    return table[best, max(key[1] for key in mine if key[0] == best and key[1] <= size)]


def linear_tile(table: Mapping[tuple[int, int, int], FusedTile], hidden: Tensor, demand: int) -> FusedTile:
    """Return the entry of LINEAR_FORWARD or LINEAR_BACKWARD for hidden (N, D)."""
    arch, size = compat.arch(hidden.device), hidden.element_size()
    mine = {key for key in table if key[1] == size and (key[0] == 0) == (arch == 0)}
    best = max((key[0] for key in mine if key[0] <= arch), default=min(mine)[0])
    return table[best, size, min(key[2] for key in mine if key[0] == best and key[2] >= demand)]


def row_tile(table: Mapping[tuple[int, int], RowTile], z: Tensor) -> RowTile:
    return nearest(table, compat.arch(z.device), z.element_size())


# CPU, measured at N=1024, D=512, V=128256: slabs of 64 MiB take 8 % longer (dweight is passed over more often), larger ones
# than this the same time and more memory.
_SLAB_BYTES_CPU = 256 << 20


def slab_bytes(device: torch.device, cache_bytes: int) -> int:
    """Return how many bytes of its cache a group loss fills with small groups before it starts the next slab."""
    return cache_bytes if compat.on_triton(device) else min(cache_bytes, _SLAB_BYTES_CPU)


# Of a tile on CUDA, over D: four launches (three GEMMs, a row kernel) of about 5 us, in waves, which take a Hopper D x 13 ns.
_LAUNCHES = 1536


def chunk_tile(hidden: Tensor) -> ChunkTile:
    """Return the entry of the table for hidden (N, D)."""
    if compat.on_triton(hidden.device):
        return nearest(_CHUNKED_CUDA, compat.arch(hidden.device), hidden.shape[1])
    return CHUNKED


def tiling(hidden: Tensor, columns: int) -> plan.Tiling:
    """Return the tiles of the logits of hidden (N, D) and so many columns of the vocabulary.

    Columns are cut at multiples of 16: rows are padded to that, so cached tiles are adjacent.
    """
    (n, d), tile = hidden.shape, chunk_tile(hidden)
    blocks = plan.Blocks(rows=1, columns=16, processors=1, launches=0.0)  # without waves the fewest tiles win
    if compat.on_triton(hidden.device) and compat.arch(hidden.device):
        blocks = plan.Blocks(128, 256, compat.processors(hidden.device), _LAUNCHES / d)
    return plan.tiling(n, d, columns, tile.rows, tile.rows * tile.cols, blocks)


# --- tiles in memory --------------------------------------------------------------------------------------------------


def matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """View the start of a buffer as (rows, columns), each row padded."""
    return buffer[: rows * padded(columns)].view(rows, padded(columns))[:, :columns]
