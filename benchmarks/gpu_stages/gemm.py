"""The GEMM library: bf16 against fp32 results, accumulation, tile sizes, slabs, slivers. Which shapes should our GEMMs have?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_stages.sentences import TIES, Rows, decision, digits, percent, times_as_fast
from benchmarks.shapes import DEVICE, REFERENCE
from gem_kernels import compat, tiles
from gem_kernels.plan import even, ranges
from tools.device import times
from tools.files import Json

BF16, FP32 = torch.bfloat16, torch.float32
N, D, V = REFERENCE.n, REFERENCE.d, REFERENCE.v
SLIVER = 88  # rows: what was left of a slab of 4184 in tiles of 4096


class Gemm(NamedTuple):
    """(m, k) (k, n) of bf16 operands, laid out in memory as in the product of this name.

    logits = hidden weight^T, dhidden = cache weight, dweight = cache^T hidden.
    """

    m: int
    k: int
    n: int
    product: Literal["logits", "dhidden", "dweight"] = "logits"
    out: torch.dtype = FP32
    beta: int = 0


HIDDEN = (D, 896)
TILES = ((4096, 4096), (8192, 2048), (8192, 4096), (8192, 8192))
"""rows and columns of logits: the first two hold 64 MiB, about the level-2 cache"""
LOGITS = {
    "4096x4096 logits, bf16": Gemm(4096, D, 4096, out=BF16),
    "4096x4096 logits, fp32, beta 1": Gemm(4096, D, 4096, beta=1),
    f"{SLIVER}x4096 logits, fp32": Gemm(SLIVER, D, 4096),
}
GRADIENTS = {
    "dhidden, K=V": Gemm(4184, V, D, "dhidden"),
    "dweight, K=4184": Gemm(4096, 4184, D, "dweight"),
    "dweight, K=8192": Gemm(4096, N, D, "dweight"),
    "dweight, K=8192, beta 1": Gemm(4096, N, D, "dweight", beta=1),
    "all of dweight in one, K=8192": Gemm(V, N, D, "dweight"),
}


def numbers(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(rows, columns, device=DEVICE, dtype=dtype).normal_()


def timed(run: Callable[[], object], flop: float) -> Json:
    """Return the median time and the rate of a run, after one that warms up."""
    run()
    ms = statistics.median(times(run, seconds=0.15, most=15))
    return {"ms": digits(ms), "TFLOP/s": digits(flop / ms / 1e9)}


def time_gemm(gemm: Gemm, shrink: int) -> Json:
    m, k, n = (max(16, size // shrink) for size in gemm[:3])
    a = numbers(k, m).T if gemm.product == "dweight" else numbers(m, k)
    b = numbers(n, k).T if gemm.product == "logits" else numbers(k, n)
    out = torch.zeros(m, n, device=DEVICE, dtype=gemm.out)

    def run() -> None:
        if gemm.out == BF16:
            torch.mm(a, b, out=out)
        elif gemm.beta:
            compat.addmm_(out, a, b)
        else:
            compat.mm(a, b, out)

    return timed(run, 2.0 * m * k * n)


def time_slabs(slabs: int, shrink: int) -> Json:
    """Time the gradient GEMMs of one SEGA step with a bf16 weight.

    One slab writes dweight tile by tile; several add to fp32, each in one product, and round at the end.
    """
    n, d, v = (max(16, size // shrink) for size in (N, D, V))
    cache, hidden, weight = numbers(n, v), numbers(n, d), numbers(v, d)
    dhidden, dweight = torch.empty(n, d, device=DEVICE), torch.empty_like(weight)
    columns = max(16, 4096 // shrink)
    accumulator = torch.empty(v if slabs > 1 else columns, d, device=DEVICE)

    def run() -> None:
        for i, part in enumerate(even(n, slabs)):
            compat.mm(cache[part], weight, dhidden[part])
            for cols in ranges(v, v if slabs > 1 else columns):
                into = accumulator[cols] if slabs > 1 else accumulator[: cols.stop - cols.start]
                a, b = cache[part, cols].T, hidden[part]
                compat.addmm_(into, a, b) if i else compat.mm(a, b, into)
                if slabs == 1:
                    dweight[cols] = into
        if slabs > 1:
            dweight.copy_(accumulator)

    return timed(run, 4.0 * n * d * v)


def time_dweight_in_tiles(shrink: int) -> Json:
    """Time fp32 dweight = cache^T hidden in GEMMs of 4096 rows, for comparison with one."""
    n, d, v = (max(16, size // shrink) for size in (N, D, V))
    cache, hidden, dweight = numbers(n, v), numbers(n, d), torch.empty(v, d, device=DEVICE)

    def run() -> None:
        for cols in ranges(v, max(16, 4096 // shrink)):
            compat.mm(cache[:, cols].T, hidden, dweight[cols])

    return timed(run, 2.0 * n * d * v)


def present_tile(d: int) -> tuple[int, int]:
    """Return the rows and columns of the largest tile that `chunked` takes now; the others are a granule smaller."""
    parts = tiles.tiling(torch.empty(N, d, dtype=BF16, device=DEVICE), V)
    return max(part.stop - part.start for part in parts.rows), parts.widest


def time_tile(rows: int, columns: int, d: int, shrink: int) -> Json:
    return time_gemm(Gemm(rows, d, columns), shrink) | {"present": (rows, columns) == present_tile(d)}


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    shrink = 64 if dry else 1
    for d in HIDDEN:
        for rows, columns in dict.fromkeys([*TILES, present_tile(d)]):
            yield f"{rows}x{columns} logits, D={d}", partial(time_tile, rows, columns, d, shrink)
    for name, gemm in (LOGITS | GRADIENTS).items():
        yield name, partial(time_gemm, gemm, shrink)
    for slabs in (1, 2):
        yield f"gradients of {slabs} slab{'s' * (slabs > 1)}", partial(time_slabs, slabs, shrink)
    yield "all of dweight in tiles, K=8192", partial(time_dweight_in_tiles, shrink)


# --- the decisions ----------------------------------------------------------------------------------------------------


def _result_dtype(rows: Rows) -> str:
    wide, narrow, added = (rows[f"4096x4096 logits, {what}"]["TFLOP/s"] for what in (f"D={D}", "bf16", "fp32, beta 1"))
    return f"fp32 results run at {percent(wide / narrow)} of bf16's rate, with beta 1 at {percent(added / narrow)}."


def _tile_size(rows: Rows) -> str:
    return f"Tiles of logits: {'; '.join(_tile_of(rows, d) for d in HIDDEN)}."


def _tile_of(rows: Rows, d: int) -> str:
    suffix = f" logits, D={d}"
    rates = {name.removesuffix(suffix): row for name, row in rows.items() if name.endswith(suffix)}
    present = next((tile for tile, row in rates.items() if row["present"]), None)
    if present is None:
        raise KeyError(f"the present tile at D={d}")
    best = max(rates, key=lambda tile: float(rates[tile]["TFLOP/s"]))
    now, most = rates[present]["TFLOP/s"], rates[best]["TFLOP/s"]
    # A larger tile of logits leaves the level-2 cache before its row kernel reads it: a few percent are not worth that.
    if most <= 1.05 * now:
        return f"D={d} keep {present} ({now} TFLOP/s, the best {most})"
    return f"D={d} use {best} ({most} TFLOP/s, {present} has {now})"


def _slivers(rows: Rows) -> str:
    sliver, whole = rows[f"{SLIVER}x4096 logits, fp32"]["ms"], rows[f"4096x4096 logits, D={D}"]["ms"]
    fair = SLIVER / 4096
    keep = "keep even splits" if sliver > 2 * fair * whole else "slivers cost little"
    share = f"{percent(sliver / whole)} of the time of one of 4096, for {percent(fair)} of the work"
    return f"A tile of {SLIVER} rows takes {share}: {keep}."


def _one_slab(rows: Rows) -> str:
    one, two = rows["gradients of 1 slab"]["ms"], rows["gradients of 2 slabs"]["ms"]
    if one <= (1 + TIES) * two:
        return f"One slab is {times_as_fast(two, one)} as two ({one} and {two} ms): keep the rule."
    return f"Two slabs are {times_as_fast(one, two)} as one ({two} and {one} ms): drop the rule."


def _one_dweight_gemm(rows: Rows) -> str:
    one, many = rows["all of dweight in one, K=8192"]["ms"], rows["all of dweight in tiles, K=8192"]["ms"]
    if one <= (1 + TIES) * many:
        return f"fp32 dweight in one GEMM is {times_as_fast(many, one)} as in tiles ({one} and {many} ms): keep one."
    return f"fp32 dweight in tiles is {times_as_fast(one, many)} as in one GEMM ({many} and {one} ms): use tiles."


def decide(stage: Json) -> str:
    return decision(stage, _result_dtype, _tile_size, _slivers, _one_slab, _one_dweight_gemm)
