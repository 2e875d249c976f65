"""torch.profiler on one SEGA step and on one scoring call of a narrow head: does the device wait for the host?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity

from benchmarks.bench_group_loss import SEGA
from benchmarks.bench_score import SCORE
from benchmarks.contest import Step, Task
from benchmarks.gold import gold_of
from benchmarks.gpu_stages.sentences import Rows, decision, digits, percent
from benchmarks.results import OURS
from benchmarks.shapes import DEVICE, DRY, HEADS, REFERENCE, Shape
from tools.device import no_garbage_collection
from tools.files import Json

NARROW = next(head for head in HEADS if head.name == "qwen2.5-0.5b")
PROFILED = {"a SEGA step": (SEGA, REFERENCE), "a score of a narrow head": (SCORE, NARROW)}
BUSY = 0.9
"""the share of time below which the device waits for the host"""

Interval = tuple[float, float, str]
"""start and end in microseconds, name"""


def summary(intervals: Iterable[Interval]) -> Json:
    """Return how busy the device was between its first kernel and its last, its gaps, and its longest kernels."""
    found = sorted(intervals)
    reached, busy, gaps = found[0][0], 0.0, []
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for start, end, name in found:
        if start > reached:
            gaps.append(start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        total[name] += end - start  # type: ignore[assignment]
        count[name] += 1
    longest = {name[:80]: f"{count[name]} in {digits(us / 1e3)} ms" for name, us in total.most_common(8)}
    span = reached - found[0][0]
    return {
        "ms": digits(span / 1e3),
        "busy": digits(busy / span),
        "kernels": len(found),
        "largest gaps in us": [digits(gap) for gap in sorted(gaps, reverse=True)[:5]],
        "longest": longest,
    }


def profiled(task: Task, shape: Shape) -> Json:
    """Profile three steps and return the busiest. The first also starts the profiler, and does not count."""
    step = task.make(gold_of(shape), OURS)
    for _ in range(2):
        step()
    with no_garbage_collection():
        _, *found = [_profiled_once(step) for _ in range(3)]
    return max(found, key=lambda row: float(row["busy"]))


def _profiled_once(step: Step) -> Json:
    on_gpu = DEVICE.type == "cuda"
    # On a GPU its kernels alone are recorded: recording the host would slow the host down.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if on_gpu:
        kernels = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    else:  # the outermost operations in place of kernels
        kernels = [e for e in events if e.cpu_parent is None]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: may this user read the GPU's counters (CUPTI)?")
    return summary((e.time_range.start, e.time_range.end, e.name) for e in kernels)


def measurements(dry: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    for name, (task, shape) in PROFILED.items():
        yield name, partial(profiled, task, DRY if dry else shape)


def _busy(name: str) -> Callable[[Rows], str]:
    def sentence(rows: Rows) -> str:
        row = rows[name]
        gap = max(row["largest gaps in us"], default=0.0)
        said = f"{name}: busy {percent(row['busy'])} of {row['ms']} ms, {row['kernels']} kernels, largest gap {gap} us"
        return f"{said}: {'the host keeps up' if row['busy'] >= BUSY else 'HOST-BOUND, launch less'}."

    sentence.__name__ = name
    return sentence


def decide(stage: Json) -> str:
    return decision(stage, *map(_busy, PROFILED))
