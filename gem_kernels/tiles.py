"""How much of the logits is in hand at a time: one table, read by the launchers and the benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class ChunkTile(NamedTuple):
    """The chunked implementation's tile of logits."""

    rows: int
    """tokens per GEMM"""
    cols: int
    """vocabulary entries per GEMM"""
    block: int
    """elements that one row function touches at a time, so that its passes stay in the level-2 cache"""


CHUNKED = ChunkTile(rows=1024, cols=4096, block=1 << 17)
