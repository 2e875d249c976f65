"""Time the launch tiles on this device: every candidate of every table in gem_kernels/tiles.py.

    python -m tools.sweep [--json FILE] [--stage NAME] [--seconds 150] [--quick | --dry-run]

The shape is N=8192, D=4096, V=128256 in bf16, smaller with --quick; the most important tables come first. A candidate is put
into its table in memory and must reproduce the result of the present entry. A candidate that does not compile, or needs too
much shared memory, is left out. The output is {table, key, candidate, ms, best} for each, and lines to paste into tiles.py; the
file itself is not changed. A second start with the same FILE continues after the rows that are in it. With --stage they are the
entry NAME of "stages" in FILE, which other processes may write too.

--dry-run runs on a CPU: two candidates of every table of sm_90, interpreted, at a tiny shape. Start it with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gem_kernels import compat, tiles
from tools.device import LOST, pretend_hopper, times
from tools.files import Json, read_json, update_json
from tools.sweep_tables import CUDA, META, QUICK, REFERENCE, Shape, Table, Tile, entry, tables

DRY = Shape(4, 64, 250)


class Rows:
    """Results on file, one row at a time.

    A row is claimed before its work starts. If the process dies during that work, the file shows it, and the next process does
    not try again.
    """

    def __init__(self, path: Path | None, stage: str | None = None) -> None:
        self.path, self.stage = path, stage
        found = (read_json(path) if path else None) or {}
        self.document: Json = {"rows": []} | self._mine(found)

    def _mine(self, whole: Json) -> Json:
        """Return our part of the whole file's document."""
        if self.stage is None:
            return whole
        mine: Json = whole.setdefault("stages", {}).setdefault(self.stage, {})
        return mine

    def claim(self, **key: Any) -> Json | None:
        """Return a new row, on file as one that did not return; None if it was claimed before."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.document["rows"]):
            return None
        row = {**key, "error": "did not return: the process hung or died"}
        self.document["rows"].append(row)
        self.save()
        return row

    def put(self, row: Json, **results: Any) -> None:
        row.pop("error", None)
        row.update(results)
        self.save()

    def save(self) -> None:
        if self.path:
            update_json(self.path, lambda whole: self._mine(whole).update(self.document))


def compile_ahead(shape: Shape, arch: int, processors: int, number: int, candidate: int) -> None:
    """Compile one candidate into triton's cache on disk, in its own process: compiling takes seconds of one core."""
    table = tables(shape, arch)[number]

    def warm_up(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        kernel.warmup(*args, grid=grid, **meta)

    with compat.compiling(arch, warm_up, processors), entry(table.entries, table.key, table.all()[candidate]):
        table.make(META)()


def compile_all(shape: Shape, arch: int, device: torch.device, seconds: float, most: int | None = None) -> None:
    """Compile the fused kernels' candidates in parallel, `most` at most. One that fails here raises again when it is timed."""
    jobs = [
        (shape, arch, compat.processors(device), i, j)
        for i, table in enumerate(tables(shape, arch))
        for j in range(len(table.all()))
        if table.name.startswith("LINEAR")
    ][:most]
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


def sweep(table: Table, rows: Rows, device: torch.device, deadline: float, most: int | None = None) -> None:
    """Time the candidates of a table, `most` at most, until the deadline."""
    key: Json = {"table": table.name, "key": list(table.key)}
    present = table.present()

    def known(tile: Tile) -> Json | None:
        return next((row for row in rows.document["rows"] if is_row(row, key, tile)), None)

    todo = [tile for tile in table.all()[:most] if known(tile) is None]
    first = known(present)
    if not todo or time.monotonic() > deadline or (first is not None and "error" in first):
        return
    run, want = table.make(device), None
    if first is not None:
        with entry(table.entries, table.key, present):
            want = run()
    best = min((row["ms"] for row in rows.document["rows"] if is_row(row, key) and "ms" in row), default=float("inf"))
    for tile in todo:
        if time.monotonic() > deadline:
            return
        row = rows.claim(**key, candidate=tile._asdict(), present=tile == present)
        assert row is not None
        try:
            with entry(table.entries, table.key, tile):
                got = run()
                want = got.clone() if want is None else want
                if not same(got, want):
                    raise ArithmeticError("its result differs from that of the present entry")
                taken = times(run, least=1, most=1)
                if taken[0] < 2 * best:
                    taken = times(run)
            rows.put(row, ms=round(statistics.median(taken), 4), least=round(min(taken), 4), runs=len(taken))
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
            return  # no result to compare the others with
        _wait(device)  # raises if the device is lost; the next process goes on


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def is_row(row: Json, key: Json, tile: Tile | None = None) -> bool:
    mine = all(row[name] == value for name, value in key.items())
    return mine and (tile is None or row["candidate"] == tile._asdict())


def suggestion(rows: Rows) -> str:
    """Return lines for tiles.py: the fastest candidate of each table and key, and the time of the present entry.

    A new architecture needs all of its keys in tiles.py. Copy those that were not timed from the nearest architecture.
    """
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
    parser.add_argument("--stage", help="the results are this entry of `stages` in the file")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--quick", action="store_true", help="a smaller shape")
    parser.add_argument("--dry-run", action="store_true", help="two candidates of each table, on a CPU")
    args = parser.parse_args(argv)
    if args.dry_run:
        pretend_hopper()
    elif not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    shape, device, most = (DRY, torch.device("cpu"), 2) if args.dry_run else (REFERENCE, CUDA, None)
    shape = QUICK if args.quick else shape
    arch, deadline = compat.arch(device), time.monotonic() + args.seconds
    rows = Rows(args.json, args.stage)
    name = "a dry run" if args.dry_run else torch.cuda.get_device_name()
    rows.document |= {"device": name, "arch": arch, "shape": shape._asdict()}
    try:
        compile_all(shape, arch, device, args.seconds / 3, most)
    except Exception as error:  # every candidate then compiles when it is timed
        print(f"nothing compiled ahead: {type(error).__name__}: {error}", flush=True)
    for table in tables(shape, arch):
        try:
            sweep(table, rows, device, deadline, most)
        except Exception as error:  # the other tables are still timed
            print(f"{table.name}[{table.key}]: {type(error).__name__}: {error}", flush=True)
        try:
            _wait(device)
        except RuntimeError:
            return LOST
        torch.cuda.empty_cache()  # does nothing without a CUDA device
    print(f"\nFor gem_kernels/tiles.py:\n{suggestion(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
