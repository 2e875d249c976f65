"""One task at one shape: every library is compared with fp64, its memory is measured, then all are timed in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gold import Gold, gold_of, relative_error
from benchmarks.measure import DoesNotError, bare_mm, in_turns, peak_memory
from benchmarks.peers import ENTROPY_FIRST, LIBRARIES, lacking
from benchmarks.results import EAGER, OURS
from benchmarks.shapes import DEVICE, MAIN, TINY, Shape


class Result(NamedTuple):
    """Results of a step; None where the library computes none. Gradients do not count as extra memory."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    others: tuple[Tensor | None, ...] = ()


Step = Callable[[], Result]
CLAIMED = (OURS, EAGER, ENTROPY_FIRST, "TRL")


class Exact(NamedTuple):
    """The fp64 values for a result: statistics of every token, gradients of gold.sample and gold.columns."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


class Task(NamedTuple):
    name: str
    make: Callable[[Gold, str], Step]
    """(inputs, library) -> a step; raises DoesNotError"""
    exact: Callable[[Gold], Exact]
    gemms: int
    """products of 2NDV FLOP that the task cannot avoid; the share of the GEMM rate counts these"""
    libraries: Sequence[str] = LIBRARIES


class Row(NamedTuple):
    """One library at one task: the reason for having no result, or measurements and times in seconds."""

    reason: str | None
    info: dict[str, Any]
    times: list[float]


# Our errors come from the order of a GEMM's fp32 sums at |z| up to 40, and from rounding a gradient once to bf16. A peer beyond
# its limit computes something else and is not timed.
_OURS = {"logprob": 1e-3, "entropy": 1e-3, "dhidden": 1e-2, "dweight": 1e-2}
_PEERS = {"logprob": 1.0, "entropy": 1.0, "dhidden": 0.2, "dweight": 0.2}


def errors(result: Result, exact: Exact, gold: Gold) -> dict[str, float]:
    """Return the largest errors of the statistics (nats) and the relative errors of the gradients."""
    pairs = {
        "dhidden": (result.dhidden, exact.dhidden, gold.sample),
        "dweight": (result.dweight, exact.dweight, gold.columns),
    }
    found = {
        name: float((got.detach().double() - want).abs().max())
        for name, got, want in (("logprob", result.logprob, exact.logprob), ("entropy", result.entropy, exact.entropy))
        if got is not None and want is not None
    }
    for name, (got, want, at) in pairs.items():
        if got is not None and want is not None:
            found[name] = relative_error(got[at], want)
    return found


def _enter(task: Task, gold: Gold, exact: Exact, library: str) -> tuple[Step | None, Row]:
    """Run once, check the result and measure the memory."""
    try:
        step = task.make(gold, library)
        if DEVICE.type == "cuda" or library == "torch.compile":
            step()  # compiles outside the measurement
        peak, result = peak_memory(step, lambda result: (*result[:4], *result.others))
        found = errors(result, exact, gold)
        limits = _OURS if library.startswith(OURS) else _PEERS
        wrong = {name: value for name, value in found.items() if not value < limits[name]}
        if wrong:
            raise DoesNotError(f"disagrees with fp64: {', '.join(f'{k} by {v:.2g}' for k, v in wrong.items())}")
    except DoesNotError as error:
        return None, Row(str(error), {}, [])
    except Exception as error:
        if library.startswith(OURS):
            raise
        if isinstance(error, ImportError):  # some libraries import their kernels when they are called
            return None, Row(lacking(error, library), {}, [])
        said = str(error).splitlines()[0] if str(error) else ""
        return None, Row(f"fails: {type(error).__name__}: {said}"[:300], {}, [])
    info = {"peak extra MiB": None if peak is None else round(peak, 1)}
    info |= {f"error of {name}": float(f"{value:.2e}") for name, value in found.items()}
    return step, Row(None, info, [])


def compete(task: Task, shape: Shape, libraries: Iterable[str], timed: bool) -> dict[str, Row]:
    """Return a row for every library."""
    gold = gold_of(shape)
    exact = task.exact(gold)
    steps, rows = {}, {}
    for library in libraries:
        step, rows[library] = _enter(task, gold, exact, library)
        if step is not None:
            steps[library] = step
        else:
            gc.collect()  # the traceback of its error may hold tensors
    if not timed:
        return rows
    unit = bare_mm(shape)
    for library, times in in_turns(steps, claimed=CLAIMED if shape == MAIN[0] else ()).items():
        median = sorted(times)[len(times) // 2]
        info = {
            **rows[library].info,
            "of bare mm": round(median / unit, 3),
        }
        if task.gemms:
            info["share of GEMM rate"] = round(task.gemms * unit / median, 3)
        rows[library] = Row(None, info, times)
    return rows


def result_of(key: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return a row as benchmarks/results holds it: with times, or with the reason for having none."""
    if row.reason is not None:
        return {**key, "reason": row.reason}
    times = row.times or [0.0]
    stats = {"median": statistics.median(times), "min": min(times), "rounds": len(times)}
    return {"extra_info": key | row.info, "stats": stats}


def describe(shape: Shape) -> dict[str, Any]:
    dtype = str(shape.dtype).removeprefix("torch.")
    sizes = {"shape": shape.name, "N": shape.n, "D": shape.d, "V": shape.v, "dtype": dtype}
    return {**sizes, **gold_of(shape).distribution} if shape != TINY else sizes


def taken(*leaves: Tensor) -> list[Tensor | None]:
    """Return the gradients and drop them from the leaves, so that every step starts with the same memory."""
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def train_step(
    gold: Gold, loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]], train_head: bool = True
) -> Step:
    """Return a step that runs loss(hidden, weight) -> (scalar, logprob, entropy) and its backward."""
    hidden = gold.x.hidden.detach().requires_grad_()
    weight = gold.x.weight.detach().requires_grad_(train_head)

    def step() -> Result:
        value, logprob, entropy = loss(hidden, weight)
        value.backward()
        logprob, entropy = (None if t is None else t.detach() for t in (logprob, entropy))
        dhidden, dweight = taken(hidden, weight)
        return Result(logprob, entropy, dhidden, dweight)

    return step


@torch.no_grad()
def no_grad(fn: Callable[[], Result]) -> Result:
    return fn()
