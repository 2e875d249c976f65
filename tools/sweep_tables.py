"""The candidates of every table in gem_kernels/tiles.py, and the run that times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gem_kernels import linear_logprob_entropy, logprob_entropy, sega_loss, tiles, topm_mean
from gem_kernels.operands import Operands
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import ChunkTile, FusedTile, RowTile, matrix, tiling
from gem_kernels.types import LogitTransform

CUDA = torch.device("cuda")
META = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32
Tile = FusedTile | ChunkTile | RowTile


class Shape(NamedTuple):
    n: int
    d: int
    v: int


REFERENCE, QUICK = Shape(8192, 4096, 128_256), Shape(2048, 1024, 32_000)


def own_entries(entries: dict[Any, Any], arch: int) -> dict[Any, Any]:
    """Copy the entries that serve an architecture to keys of its own: a single new key would hide the other entries."""
    served = max(key[0] for key in entries if 0 < key[0] <= arch)
    return {**entries, **{(arch, *key[1:]): tile for key, tile in entries.items() if key[0] == served}}


class Table(NamedTuple):
    """The candidates of one entry, and the run that times them."""

    name: str
    entries: dict[Any, Any]
    key: tuple[int, ...]
    candidates: Sequence[Tile]
    make: Callable[[torch.device], Callable[[], Tensor]]
    """device -> the run to time; it returns a result to compare"""

    def own(self) -> dict[Any, Any]:
        return own_entries(self.entries, self.key[0])

    def present(self) -> Tile:
        """Return the tile that serves this key now."""
        arch, second, *demand = self.key
        if not demand:
            nearest: Tile = tiles.nearest(self.entries, arch, second)
            return nearest
        own = self.own()
        found: Tile = own[arch, second, min(key[2] for key in own if key[:2] == (arch, second) and key[2] >= demand[0])]
        return found

    def all(self) -> list[Tile]:
        return [self.present(), *(c for c in self.candidates if c != self.present())]


def numbers(*shape: int, device: torch.device, dtype: torch.dtype = FP32, size: float = 1.0) -> Tensor:
    if device == META:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, size)


def integers(high: int, n: int, device: torch.device) -> Tensor:
    return (torch.arange(n, device=device) * 7919) % high


def linear_inputs(s: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> tuple[Operands, Tensor]:
    """Return operands and targets. Logits have a standard deviation of 4.5, as in a trained model."""
    hidden = numbers(s.n, s.d, device=device, dtype=dtype)
    weight = numbers(s.v, s.d, device=device, dtype=dtype, size=4.5 / s.d**0.5)
    of_bias = numbers(s.v, device=device, dtype=dtype) if bias else None
    return Operands(hidden, weight, of_bias, None), integers(s.v, s.n, device)


def row_gradient(targets: Tensor) -> RowGradient:
    """Return the gradient of a loss with entropies: maxima of 20, random coefficients."""
    values = numbers(4, targets.shape[0], device=targets.device)
    values[0].fill_(20.0)
    return RowGradient(targets, values)


def linear_forward(s: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> Callable[[], Tensor]:
    from gem_kernels.fused import launch_forward

    x, targets = linear_inputs(s, dtype, bias, device)
    return lambda: launch_forward(x, targets, None, Transform.of(LogitTransform()))


def linear_backward(s: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> Callable[[], Tensor]:
    """Time dL/dlogits of all tokens and columns, in the chunks of `backward`, without the gradient GEMMs."""
    from gem_kernels.fused import launch_dlogits

    x, targets = linear_inputs(s, dtype, bias, device)
    gradient = row_gradient(targets)
    parts, transform = tiling(x.hidden, s.v), Transform.of(LogitTransform())
    buffer = x.hidden.new_empty(parts.elements)

    def run() -> Tensor:
        for cols in parts.columns:
            for part in parts.rows:
                tile = x.columns(cols)._replace(hidden=x.hidden[part])
                dz = matrix(buffer, tile.hidden.shape[0], tile.weight.shape[0])
                launch_dlogits(tile, None, gradient.rows(part), cols.start, transform, dz)
        return dz

    return run


def chunked(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    """Time scoring, forward and backward, and sega_loss: both use the same tiles."""
    x, targets = linear_inputs(s, BF16, False, device)
    hidden, weight = x.hidden.requires_grad_(), x.weight.requires_grad_()
    cu, weights = torch.tensor([0, s.n // 3, s.n], device=device), torch.tensor([1.0, -0.5], device=device)

    def run() -> Tensor:
        stats = linear_logprob_entropy(hidden, weight, targets, impl="chunked")
        scoring = (stats.logprob + 0.1 * stats.entropy).sum()
        sega = sega_loss(hidden, weight, targets, cu, weights, impl="chunked").loss
        dhidden, _ = torch.autograd.grad(scoring + sega, (hidden, weight))
        return dhidden

    return run


def rows_of_a_tile(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    """Time statistics, gradient and cached exponentials of one chunk of fp32 logits, as `chunked` computes them."""
    from gem_kernels import rows_triton
    from gem_kernels.group_loss.exponentials import cache_exponentials

    n, cols = min(s.n, 4096), min(s.v, 4096)
    z, out = numbers(n, cols, device=device, size=4.5), numbers(2, n, cols, device=device, dtype=BF16)
    reference = numbers(n, device=device)
    state = State.fresh(integers(cols, n, device))
    transform = Transform.of(LogitTransform())
    gradient = row_gradient(state.targets)

    def run() -> Tensor:
        rows_triton.update(z, None, state, 0, transform)
        rows_triton.gradient(z, None, gradient, 0, transform, out[0])
        cache_exponentials(z, None, state, reference, out[1], 0, transform)
        return out

    return run


def rows_of_logits(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    logits = numbers(s.n // 2, s.v, device=device, dtype=BF16, size=4.5).requires_grad_()
    targets = integers(s.v, s.n // 2, device)

    def run() -> Tensor:
        stats = logprob_entropy(logits, targets, impl="triton")
        return torch.autograd.grad((stats.logprob + 0.1 * stats.entropy).sum(), logits)[0]

    return run


def spans(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2000, (max(1, 5000 * s.n // REFERENCE.n),), generator=generator)
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device)
    values = torch.rand(int(cu[-1]), generator=generator).to(device).requires_grad_()
    return lambda: torch.autograd.grad(topm_mean(values, cu, 0.1, impl="triton").sum(), values)[0]


# --- the candidates ---------------------------------------------------------------------------------------------------

HOPPER = [
    FusedTile(128, 256, 64, 16, 8, 4),
    FusedTile(128, 256, 64, 16, 8, 3),
    FusedTile(128, 256, 64, 8, 8, 3),
    FusedTile(128, 256, 64, 32, 8, 3),
    FusedTile(256, 128, 64, 8, 8, 3),
    FusedTile(256, 128, 64, 8, 8, 4),
    FusedTile(128, 128, 64, 16, 8, 3),
    FusedTile(128, 128, 64, 16, 4, 3),
    FusedTile(128, 128, 128, 16, 8, 2),
    FusedTile(64, 256, 64, 16, 4, 3),
    FusedTile(64, 256, 64, 32, 8, 4),
    FusedTile(128, 256, 128, 16, 8, 2),
]
AMPERE = [
    FusedTile(128, 128, 32, 16, 8, 4),
    FusedTile(128, 128, 32, 16, 4, 4),
    FusedTile(128, 128, 64, 16, 4, 3),
    FusedTile(128, 128, 64, 16, 8, 4),
    FusedTile(128, 256, 32, 16, 8, 3),
    FusedTile(128, 256, 64, 16, 8, 2),
    FusedTile(64, 256, 32, 16, 8, 3),
    FusedTile(64, 256, 32, 32, 4, 3),
    FusedTile(64, 128, 64, 32, 4, 3),
    FusedTile(128, 128, 64, 8, 8, 3),
    FusedTile(128, 128, 64, 32, 8, 3),
]
RAGGED = [
    FusedTile(64, 128, 32, 32, 8, 3),
    FusedTile(64, 128, 64, 16, 8, 3),
    FusedTile(64, 128, 32, 16, 4, 3),
    FusedTile(128, 64, 32, 16, 8, 3),
    FusedTile(64, 64, 64, 32, 4, 3),
    FusedTile(128, 128, 32, 16, 8, 3),
]
FP32_TILES = [
    FusedTile(64, 64, 32, 16, 4, 3),
    FusedTile(64, 128, 32, 16, 4, 3),
    FusedTile(64, 128, 32, 16, 8, 3),
    FusedTile(128, 64, 32, 16, 8, 3),
    FusedTile(128, 128, 32, 16, 8, 3),
    FusedTile(128, 128, 32, 16, 8, 2),
]
CHUNKS = [ChunkTile(rows, cols, 0) for cols in (2048, 4096, 1024, 8192) for rows in (8448, 4224)]
ROW_TILES = [
    RowTile(rows, block, warps)
    for rows, block, warps in [
        (1, 1024, 2), (1, 512, 1), (1, 2048, 4), (1, 8192, 8), (1, 4096, 8), (1, 4096, 4), (1, 8192, 16), (1, 2048, 8),
        (2, 4096, 8), (2, 2048, 8), (4, 1024, 8), (1, 1024, 4), (1, 16384, 16), (1, 16384, 8),
    ]
]  # fmt: skip
SPAN_TILES = [RowTile(1, block, warps) for block in (1024, 2048, 4096, 512) for warps in (4, 8, 2)]


def tables(s: Shape, arch: int) -> list[Table]:
    """Return the tables, the most important first."""
    copied = arch >= 90  # the copy engine reads the tiles
    small, narrow = s._replace(n=s.n // 4), s._replace(d=s.d // 4)
    ragged = s._replace(n=s.n // 2, d=s.d // 2 + 1)  # rows that the copy engine cannot read

    def linear(size: int, demand: int, shape: Shape, bias: bool, candidates: Sequence[Tile]) -> list[Table]:
        dtype, key = BF16 if size == 2 else FP32, (arch, size, demand)
        run = [partial(make, shape, dtype, bias) for make in (linear_forward, linear_backward)]
        return [
            Table("LINEAR_FORWARD", tiles.LINEAR_FORWARD, key, candidates, run[0]),
            Table("LINEAR_BACKWARD", tiles.LINEAR_BACKWARD, key, candidates, run[1]),
        ]

    return [
        *linear(2, 0 if copied else 1, s, False, HOPPER if copied else AMPERE),
        Table("_CHUNKED_CUDA", tiles._CHUNKED_CUDA, (arch, 2048), CHUNKS, partial(chunked, s)),
        Table("ROWS", tiles.ROWS, (arch, 4), ROW_TILES, partial(rows_of_a_tile, s)),
        Table("ROWS", tiles.ROWS, (arch, 2), ROW_TILES, partial(rows_of_logits, s)),
        Table("SPANS", tiles.SPANS, (arch, 4), SPAN_TILES, partial(spans, s)),
        Table("_CHUNKED_CUDA", tiles._CHUNKED_CUDA, (arch, 0), CHUNKS, partial(chunked, narrow)),
        *linear(4, 0 if copied else 1, small, False, FP32_TILES),
        *linear(2, 2, ragged, False, RAGGED),
        *(linear(2, 1, small, True, AMPERE) if copied else []),
    ]


@contextmanager
def entry(entries: dict[Any, Any], key: tuple[int, ...], tile: Tile) -> Iterator[None]:
    """Put a tile into a table of gem_kernels/tiles.py, in memory, inside the block."""
    before = dict(entries)
    entries.update({**own_entries(entries, key[0]), key: tile})
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
