"""Smoke: the accumulating GEMM, and every op in every implementation once, against fp64. Is there anything to fix first?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_from_logits import FROM_LOGITS
from benchmarks.bench_group_loss import FROZEN, SEGA
from benchmarks.bench_known_weights import KNOWN
from benchmarks.bench_lowrank import LOWRANK
from benchmarks.bench_score import SCORE, SCORE_BACKWARD
from benchmarks.contest import Task, compete
from benchmarks.gold import relative_error
from benchmarks.gpu_stages.sentences import Rows, decision, failures
from benchmarks.measure import peak_memory
from benchmarks.results import OURS
from benchmarks.shapes import DEVICE, DRY, REFERENCE, Shape, make_inputs
from gem_kernels import compat, gem_score, topm_mean
from tools.files import Json

TASKS = (SCORE, SCORE_BACKWARD, SEGA, KNOWN, FROZEN, LOWRANK, FROM_LOGITS)


def accumulating_gemm(shape: Shape, beta: int) -> Json:
    """Check compat.mm, or compat.addmm_ with beta = 1: exact products, fp32 sums, and no copy of the accumulator."""
    rows, columns = min(shape.n, 4096), min(shape.v, 4096)
    a, b = (torch.randn(size, shape.d, device=DEVICE).to(shape.dtype) for size in (rows, columns))
    out = torch.randn(rows, columns, device=DEVICE)
    exact = a.double() @ b.double().T + beta * out.double()
    multiply = compat.addmm_ if beta else _mm
    multiply(torch.empty_like(out), a, b.T)  # a GEMM library allocates its workspace once
    extra, _ = peak_memory(partial(multiply, out, a, b.T), lambda result: [])
    error = relative_error(out, exact)
    # Sums of D products in fp32 differ by a few roundings of 2^-24; one rounding to bf16 would be 2^-9.
    if not error < 1e-5:
        raise ArithmeticError(f"its relative error is {error:.1e}")
    copied = extra is not None and DEVICE.type == "cuda" and extra > out.nbytes / 2**21
    return {"relative error": f"{error:.1e}", "extra MiB": extra and round(extra, 1), "copies the accumulator": copied}


def _mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return compat.mm(a, b, out)


def check(task: Task, shape: Shape, impl: str) -> Json:
    """Run ours once, and compare with fp64: statistics of every token, gradients of a sample."""
    library = f"{OURS}, {impl}"
    row = compete(task, shape, [library], timed=False)[library]
    if row.reason is not None:
        raise ArithmeticError(row.reason)
    return row.info


def scoring(shape: Shape, impl: str) -> Json:
    """Compare topm_mean and gem_score of the groups' entropies with their reference in fp64."""
    x = make_inputs(shape._replace(d=8, v=64))
    values = x.b.abs()

    def differ(results: Callable[[Tensor, Any], Tensor], part: Tensor) -> float:
        return float((results(part, impl).double() - results(part.double(), "reference")).abs().max())

    worst = differ(lambda v, which: topm_mean(v, x.cu_seqlens, 0.1, impl=which), values)
    for group in x.groups:
        spans = group.branch, group.answer
        of_group = differ(lambda v, which, s=spans: gem_score(v, *s, impl=which).score, values[group.tokens])  # type: ignore[misc]
        worst = max(worst, of_group)
    if not worst < 1e-5:
        raise ArithmeticError(f"differs from fp64 by {worst:.1e}")
    return {"largest error": f"{worst:.1e}"}


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    shape = DRY if dry else REFERENCE
    yield "mm", partial(accumulating_gemm, shape, 0)
    yield "addmm_", partial(accumulating_gemm, shape, 1)
    for impl in ("chunked", "triton"):
        yield f"topm_mean and gem_score, {impl}", partial(scoring, shape, impl)
        for task in TASKS:
            yield f"{task.name}, {impl}", partial(check, task, shape, impl)


def decide(stage: Json) -> str:
    def fix_first(rows: Rows) -> str:
        if failures(stage):
            return "FIX FIRST what failed."
        if rows["addmm_"]["copies the accumulator"]:
            return "FIX FIRST: addmm_ copies its accumulator."
        worst = max((row["error of logprob"] for row in rows.values() if "error of logprob" in row), default=0.0)
        return f"Nothing to fix first: {len(rows)} checks agree with fp64, log-probabilities to {worst:.0e} nats."

    return decision(stage, fix_first)
