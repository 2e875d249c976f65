"""The programs of the fused forward keep the processors busy: a simulation of what is launched, and of all that could be."""

from __future__ import annotations

import heapq
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.shapes import HEADS, Shape
from gem_kernels import compat
from gem_kernels.operands import Operands
from gem_kernels.plan import vocabulary_splits
from gem_kernels.softmax import Transform
from gem_kernels.types import LogitTransform

pytestmark = pytest.mark.skipif(not compat.HAS_TRITON, reason="needs triton")

GPUS = {"sm_90": (90, 132), "sm_80": (80, 108)}
"""Compute capability, processors"""
TOKENS = sorted({*range(128, 5121, 128), 2100, 4600, *range(5120, 65_536, 128 * 7), 65_536})
START = 0.1
"""The time that a program takes before its first tile and after its last, in tiles"""


def launched(head: Shape, n: int, arch: int, processors: int) -> tuple[int, dict[str, Any]]:
    """Return the number of programs of the forward and its arguments."""
    from gem_kernels.fused import launch_forward

    found = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        found.append((grid[0], dict(zip(kernel.arg_names, args, strict=False)) | meta))

    hidden, weight = (torch.empty(rows, head.d, dtype=head.dtype, device="meta") for rows in (n, head.v))
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    with compat.compiling(arch, record, processors):
        launch_forward(Operands(hidden, weight, None, None), targets, None, Transform.of(LogitTransform()))
    forward, _merge = found
    return forward


@cache
def use(row_blocks: int, tiles: int, splits: int, length: int, group: int, processors: int) -> float:
    """Return the busy share of the processors: each program, in its order, runs on the one that is free first."""
    free = [0.0] * processors
    for program in range(row_blocks * splits):  # as _linear_logprob_fwd_kernel counts
        first = program // (group * splits) * group
        split = program % (group * splits) // min(row_blocks - first, group)
        own = min((split + 1) * length, tiles) - split * length
        heapq.heapreplace(free, free[0] + own + START)
    return row_blocks * tiles / (processors * max(free))


def best_use(row_blocks: int, tiles: int, group: int, processors: int, known: float) -> float:
    """Return the best share of all numbers of parts, those left out that cannot exceed the known share by two points."""
    lengths = {-(-tiles // splits) for splits in range(1, tiles + 1)}
    worth = [(-(-tiles // length), length) for length in lengths]
    # What the starts leave were all processors always busy.
    worth = [(splits, length) for splits, length in worth if tiles / (tiles + START * splits) > known + 0.02]
    return max([known, *(use(row_blocks, tiles, *cut, group, processors) for cut in worth)])


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_no_number_of_parts_is_much_better(head: Shape, gpu: tuple[int, int]) -> None:
    arch, processors = gpu
    for n in TOKENS:
        programs, x = launched(head, n, arch, processors)
        row_blocks, tiles = -(-n // x["BLOCK_N"]), -(-head.v // x["BLOCK_V"])
        assert programs == row_blocks * x["splits"]
        assert (x["splits"] - 1) * x["tiles_per_split"] < tiles <= x["splits"] * x["tiles_per_split"]
        share = use(row_blocks, tiles, x["splits"], x["tiles_per_split"], x["GROUP_N"], processors)
        best = best_use(row_blocks, tiles, x["GROUP_N"], processors, share)
        assert share >= best - 0.02, f"{n} tokens: {share:.1%} in {x['splits']} parts, {best:.1%} is possible"
        assert n < 2048 or share >= 0.9, f"{n} tokens: {share:.1%}"


@pytest.mark.parametrize(("row_blocks", "tiles"), [(1, 1), (1, 3), (7, 2), (300, 1), (1, 5000), (17, 4)])
def test_no_part_is_empty(row_blocks: int, tiles: int) -> None:
    splits = vocabulary_splits(row_blocks, tiles, group=16, processors=132)
    assert 1 <= splits <= tiles
    assert (splits - 1) * -(-tiles // splits) < tiles
