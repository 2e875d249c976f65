"""Which launch tiles are fastest on this device: the candidates of every table in gem_kernels/tiles.py, timed.

    python -m benchmarks.sweep [--json FILE] [--seconds 150] [--quick]

At N=8192, D=4096, V=128256 in bf16 (--quick: smaller), the most important tables first. A candidate is put into its table in
memory, must give the result of the present entry, and is left out where it does not compile or needs too much shared memory.
What comes out is {table, key, candidate, ms, best} for each, and lines to paste into tiles.py; the file itself is not touched.
A second start with the same FILE goes on behind what is in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import LOST, Json, Rows, milliseconds
from gem_kernels import compat, linear_logprob_entropy, logprob_entropy, sega_loss, tiles, topm_mean
from gem_kernels.streaming import LogitGradient, OnlineStats, Transform, buffer_size, matrix, ranges
from gem_kernels.tiles import ChunkTile, FusedTile, RowTile
from gem_kernels.types import LogitTransform, Operands

CUDA = torch.device("cuda")
META = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32
Tile = FusedTile | ChunkTile | RowTile


class Shape(NamedTuple):
    n: int
    d: int
    v: int


REFERENCE, QUICK = Shape(8192, 4096, 128_256), Shape(2048, 1024, 32_000)


class Table(NamedTuple):
    """Candidates of one entry, and what is timed with them."""

    name: str
    entries: dict[Any, Any]
    key: tuple[int, ...]
    candidates: Sequence[Tile]
    make: Callable[[torch.device], Callable[[], Tensor]]
    """inputs on a device -> the run that is timed, and a result to compare"""

    def own(self) -> dict[Any, Any]:
        """The entries as they serve this key's architecture, under keys of its own: one of them alone would hide the rest."""
        served = max(key[0] for key in self.entries if 0 < key[0] <= self.key[0])
        mine = {(self.key[0], *key[1:]): tile for key, tile in self.entries.items() if key[0] == served}
        return {**self.entries, **mine}

    def present(self) -> Tile:
        """What serves this key now."""
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
    """Peaky logits (standard deviation 4.5), as of a trained model."""
    hidden = numbers(s.n, s.d, device=device, dtype=dtype)
    weight = numbers(s.v, s.d, device=device, dtype=dtype, size=4.5 / s.d**0.5)
    of_bias = numbers(s.v, device=device, dtype=dtype) if bias else None
    return Operands(hidden, weight, of_bias, None), integers(s.v, s.n, device)


def linear_forward(s: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> Callable[[], Tensor]:
    from gem_kernels.linear_logprob.triton import launch_forward

    x, targets = linear_inputs(s, dtype, bias, device)
    order = torch.arange(s.n, device=device)
    count = torch.full((1,), s.n, dtype=torch.int32, device=device)
    return lambda: launch_forward(x, targets, order, count, Transform.of(LogitTransform()))


def linear_backward(s: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> Callable[[], Tensor]:
    """dL/dlogits of all tokens and columns, chunk by chunk as `backward` asks for it, without its GEMMs."""
    from gem_kernels.linear_logprob.triton import launch_dlogits

    x, targets = linear_inputs(s, dtype, bias, device)
    rows = [numbers(s.n, device=device) for _ in range(3)]
    gradient = LogitGradient(targets, torch.full((s.n,), 20.0, device=device), *rows)
    shape, transform = tiles.chunk_tile(x.hidden), Transform.of(LogitTransform())
    buffer = x.hidden.new_empty(buffer_size(s.n, s.v, shape))

    def run() -> Tensor:
        for cols in ranges(s.v, shape.cols):
            for part in ranges(s.n, shape.rows):
                tile = x.columns(cols)._replace(hidden=x.hidden[part])
                dz = matrix(buffer, tile.hidden.shape[0], tile.weight.shape[0])
                launch_dlogits(tile, None, gradient.rows(part), cols.start, transform, dz)
        return dz

    return run


def chunked(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    """Scoring, forward and backward, and sega_loss: both walk the same tiles."""
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


def rows_of_a_tile(device: torch.device) -> Callable[[], Tensor]:
    """Statistics and gradient of a chunk of fp32 logits that lies in the level-2 cache or not, as `chunked` leaves it."""
    from gem_kernels import row_kernels

    n, cols = 4096, 4096
    z, dz = numbers(n, cols, device=device, size=4.5), numbers(n, cols, device=device, dtype=BF16)
    online = OnlineStats.start(integers(cols, n, device))
    transform = Transform.of(LogitTransform())
    columns = [numbers(n, device=device) for _ in range(3)]
    gradient = LogitGradient(online.targets, torch.full((n,), 20.0, device=device), *columns)

    def run() -> Tensor:
        row_kernels.update_statistics(z, None, online, 0, transform)
        return row_kernels.logit_gradient(z, None, gradient, 0, transform, dz)

    return run


def rows_of_logits(s: Shape, device: torch.device) -> Callable[[], Tensor]:
    logits = numbers(s.n // 2, s.v, device=device, dtype=BF16, size=4.5).requires_grad_()
    targets = integers(s.v, s.n // 2, device)

    def run() -> Tensor:
        stats = logprob_entropy(logits, targets, impl="triton")
        return torch.autograd.grad((stats.logprob + 0.1 * stats.entropy).sum(), logits)[0]

    return run


def spans(device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2000, (5000,), generator=generator)
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device)
    values = torch.rand(int(cu[-1]), generator=generator).to(device).requires_grad_()
    return lambda: torch.autograd.grad(topm_mean(values, cu, 0.1, impl="triton").sum(), values)[0]


# --- the candidates ---------------------------------------------------------------------------------------------------

HOPPER = [
    FusedTile(128, 256, 64, 16, 8, 3),
    FusedTile(128, 256, 64, 16, 8, 4),
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
CHUNKS = [ChunkTile(rows, cols, 0) for cols in (4096, 8192, 16384, 2048) for rows in (4096, 8192, 2048)]
ROW_TILES = [
    RowTile(rows, block, warps)
    for rows, block, warps in [
        (1, 8192, 8), (1, 4096, 8), (1, 4096, 4), (1, 8192, 16), (1, 2048, 4), (1, 2048, 8),
        (2, 4096, 8), (2, 2048, 8), (4, 1024, 8), (1, 1024, 4), (1, 16384, 16), (1, 16384, 8),
    ]
]  # fmt: skip
SPAN_TILES = [RowTile(1, block, warps) for block in (1024, 2048, 4096, 512) for warps in (4, 8, 2)]


def tables(s: Shape, arch: int) -> list[Table]:
    """The most important first."""
    copied = arch >= 90  # tiles are read by the copy engine
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
        Table("ROWS", tiles.ROWS, (arch, 4), ROW_TILES, rows_of_a_tile),
        Table("ROWS", tiles.ROWS, (arch, 2), ROW_TILES, partial(rows_of_logits, s)),
        Table("SPANS", tiles.SPANS, (arch, 4), SPAN_TILES, spans),
        Table("_CHUNKED_CUDA", tiles._CHUNKED_CUDA, (arch, 0), CHUNKS, partial(chunked, narrow)),
        *linear(4, 0 if copied else 1, small, False, FP32_TILES),
        *linear(2, 2, ragged, False, RAGGED),
        *(linear(2, 1, small, True, AMPERE) if copied else []),
    ]


@contextmanager
def entry(table: Table, tile: Tile) -> Iterator[None]:
    """The table with this tile for its key, in memory."""
    before = dict(table.entries)
    table.entries.update({**table.own(), table.key: tile})
    try:
        yield
    finally:
        table.entries.clear()
        table.entries.update(before)


# --- compile, run, report ---------------------------------------------------------------------------------------------


def compile_ahead(shape: Shape, arch: int, processors: int, number: int, candidate: int) -> None:
    """Into triton's cache on disk, in a process of its own: compiling takes seconds and one core, measuring does not."""
    table = tables(shape, arch)[number]
    compat.processors = lambda device: processors  # type: ignore[assignment]
    with (
        compat.compiling(arch, lambda kernel, grid, args, meta: kernel.warmup(*args, grid=grid, **meta)),
        entry(table, table.all()[candidate]),
    ):
        table.make(META)()


def compile_all(shape: Shape, arch: int, seconds: float) -> None:
    """The fused kernels' candidates, the first tables first, in parallel; what fails here will say so when it is run."""
    jobs = [
        (shape, arch, compat.processors(CUDA), i, j)
        for i, table in enumerate(tables(shape, arch))
        for j in range(len(table.all()))
        if table.name.startswith("LINEAR")
    ]
    start = time.monotonic()
    pool = ProcessPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), mp_context=get_context("spawn"))
    done, _ = wait([pool.submit(compile_ahead, *job) for job in jobs], timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    failed = [str(error) for future in done if (error := future.exception())]
    print(f"compiled ahead {len(done) - len(failed)} of {len(jobs)} in {time.monotonic() - start:.0f} s", flush=True)
    for message in dict.fromkeys(failed):
        print(f"  {message[:300]}", flush=True)


def same(got: Tensor, want: Tensor) -> bool:
    got, want = got.float().nan_to_num(nan=7.0), want.float().nan_to_num(nan=7.0)
    return bool(((got - want).abs().max() <= 1e-2 * want.abs().max()).item())


def sweep(table: Table, rows: Rows, deadline: float) -> None:
    key: Json = {"table": table.name, "key": list(table.key)}
    present = table.present()

    def known(tile: Tile) -> Json | None:
        return next((row for row in rows.document["rows"] if is_row(row, key, tile)), None)

    todo = [tile for tile in table.all() if known(tile) is None]
    first = known(present)
    if not todo or time.monotonic() > deadline or (first is not None and "error" in first):
        return
    run, want = table.make(CUDA), None
    if first is not None:
        with entry(table, present):
            want = run()
    best = min((row["ms"] for row in rows.document["rows"] if is_row(row, key) and "ms" in row), default=float("inf"))
    for tile in todo:
        if time.monotonic() > deadline:
            return
        row = rows.claim(**key, candidate=tile._asdict(), present=tile == present)
        assert row is not None
        try:
            with entry(table, tile):
                got = run()
                want = got.clone() if want is None else want
                if not same(got, want):
                    raise ArithmeticError("another result than that of the present entry")
                times = milliseconds(run, least=1, most=1)
                if times[0] < 2 * best:
                    times = milliseconds(run)
            rows.put(row, ms=round(statistics.median(times), 4), least=round(min(times), 4), runs=len(times))
            best = min(best, row["ms"])
        except Exception as error:
            rows.put(row, error=f"{type(error).__name__}: {error}"[:500])
        for other in rows.document["rows"]:
            if is_row(other, key):
                other["best"] = other.get("ms") == best
        rows.document["suggestion"] = suggestion(rows)
        rows.save()
        print(f"{table.name}[{table.key}] {tile}: {row.get('ms') or row.get('error')}", flush=True)
        if tile == present and "error" in row:
            return  # nothing to compare the others with
        torch.cuda.synchronize()  # a lost device raises here, and the next process goes on


def is_row(row: Json, key: Json, tile: Tile | None = None) -> bool:
    mine = all(row[name] == value for name, value in key.items())
    return mine and (tile is None or row["candidate"] == tile._asdict())


def suggestion(rows: Rows) -> str:
    """Lines for tiles.py: the fastest of each table and key, with what it gains. An architecture without entries of its own
    needs all of its keys: those that are not here as copies of the nearest architecture's."""
    found: dict[tuple[str, tuple[int, ...]], list[Json]] = {}
    for row in rows.document["rows"]:
        if "ms" in row:
            found.setdefault((row["table"], tuple(row["key"])), []).append(row)
    lines = []
    for (table, key), timed in found.items():
        best = min(timed, key=lambda row: row["ms"])
        present = next((row["ms"] for row in timed if row.get("present")), None)
        kind = type(next(iter(getattr(tiles, table).values()))).__name__
        values = ", ".join(f"{name}={value}" for name, value in best["candidate"].items())
        lines.append(f"{table}:  {key}: {kind}({values}),  # measured: {best['ms']} ms, the present entry {present}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the launch tiles of gem_kernels on this device.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--quick", action="store_true", help="a smaller shape")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    shape, arch = QUICK if args.quick else REFERENCE, compat.arch(CUDA)
    rows, deadline = Rows(args.json), time.monotonic() + args.seconds
    rows.document |= {"device": torch.cuda.get_device_name(), "arch": arch, "shape": shape._asdict()}
    try:
        compile_all(shape, arch, args.seconds / 3)
    except Exception as error:  # then every candidate is compiled when it is run
        print(f"nothing compiled ahead: {type(error).__name__}: {error}", flush=True)
    for table in tables(shape, arch):
        try:
            sweep(table, rows, deadline)
        except Exception as error:  # the tables after it must have their turn
            print(f"{table.name}[{table.key}]: {type(error).__name__}: {error}", flush=True)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return LOST
        torch.cuda.empty_cache()
    print(f"\nFor gem_kernels/tiles.py:\n{suggestion(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
