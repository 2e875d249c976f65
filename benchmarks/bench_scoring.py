"""topm_mean of 5000 ragged sequences of 64 to 2048 tokens, the largest tenth of each: one call, and one launch on a GPU."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.conftest import record
from benchmarks.contest import Row
from benchmarks.measure import in_turns, peak_memory
from benchmarks.peers import OURS
from benchmarks.shapes import DEVICE
from gem_kernels import topm_mean

M = 0.1
LIBRARIES = [OURS, "loop of torch.topk", "padded and sorted"]


def _spans(sequences: int) -> tuple[Tensor, Tensor]:
    """Entropies of a trained model: exponential, most of them small."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 2049, (sequences,), generator=g)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    values = torch.empty(int(cu_seqlens[-1])).exponential_(2.0, generator=g)
    return values.to(DEVICE), cu_seqlens.to(DEVICE)


def _ours(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return topm_mean(values, cu_seqlens, M)


def _loop(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    means = []
    for start, end in pairwise(cu_seqlens.tolist()):
        m = max(1, -(-(end - start) // round(1 / M)))
        means.append(values[start:end].topk(m).values.mean())
    return torch.stack(means)


def _padded(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    width = torch.arange(int(lengths.max()), device=values.device)
    inside = width < lengths[:, None]
    table = values.new_full(inside.shape, float("-inf"))
    table[inside] = values
    counts = (lengths * M).ceil().clamp(min=1)
    largest = table.sort(1, descending=True).values
    return largest.masked_fill(width >= counts[:, None], 0.0).sum(1) / counts


_FUNCTIONS = dict(zip(LIBRARIES, (_ours, _loop, _padded), strict=True))


@lru_cache
def _rows(sequences: int, timed: bool) -> dict[str, Row]:
    values, cu_seqlens = _spans(sequences)
    steps = {name: (lambda fn=fn: (fn(values, cu_seqlens),)) for name, fn in _FUNCTIONS.items()}
    exact = _loop(values.double(), cu_seqlens)
    info: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        peak, (means,) = peak_memory(step, tuple)
        error = float((means.double() - exact).abs().max())
        assert error < 1e-5, f"{name} is wrong by {error}"
        info[name] = {
            "peak extra MiB": None if peak is None else round(peak, 1),
            "error of mean": float(f"{error:.2e}"),
        }
    times = in_turns(steps) if timed else {}
    return {name: Row(None, info[name], times.get(name, [])) for name in steps}


def test_topm_mean(benchmark: Any, library: str) -> None:
    sequences = 5000 if benchmark.enabled else 50
    row = _rows(sequences, benchmark.enabled)[library]
    shape = {"shape": f"{sequences} sequences of 64 to 2048", "N": int(_spans(sequences)[1][-1]), "dtype": "float32"}
    record(benchmark, {"task": "topm_mean of ragged sequences, forward", **shape, "library": library}, row)


def test_topm_mean_backward() -> None:
    """Not timed: a loop of slices has a gradient of the whole length for each of them (20 s for these sequences on a CPU)."""
    values, cu_seqlens = _spans(20)
    ours, loop = (values.clone().requires_grad_() for _ in range(2))
    _ours(ours, cu_seqlens).sum().backward()
    _loop(loop, cu_seqlens).sum().backward()
    torch.testing.assert_close(ours.grad, loop.grad)
