"""topm_mean over 5000 ragged sequences of 64 to 2048 tokens, m a tenth of each: one call, and one launch on a GPU."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import record, tiny
from benchmarks.contest import Row
from benchmarks.measure import in_turns, peak_memory
from benchmarks.results import OURS
from benchmarks.shapes import DEVICE
from gem_kernels import topm_mean

M = 0.1


def _spans(sequences: int) -> tuple[Tensor, Tensor]:
    """Return values and cu_seqlens. The values are exponential, as the entropies of a trained model: most are small."""
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


_FUNCTIONS = {OURS: _ours, "loop of torch.topk": _loop, "padded and sorted": _padded}


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


@pytest.mark.over(libraries=list(_FUNCTIONS))
def test_topm_mean(request: pytest.FixtureRequest, benchmark: Any, library: str) -> None:
    sequences = 50 if tiny(request.config) else 5000
    row = _rows(sequences, benchmark.enabled)[library]
    shape = {"shape": f"{sequences} sequences of 64 to 2048", "N": int(_spans(sequences)[1][-1]), "dtype": "float32"}
    record(benchmark, {"task": "topm_mean of ragged sequences, forward", **shape, "library": library}, row)


def test_topm_mean_backward() -> None:
    """Check the gradient without timing it: in a loop every slice has a gradient of full length (20 s for 5000 on a CPU)."""
    values, cu_seqlens = _spans(20)
    ours, loop = (values.clone().requires_grad_() for _ in range(2))
    _ours(ours, cu_seqlens).sum().backward()
    _loop(loop, cu_seqlens).sum().backward()
    torch.testing.assert_close(ours.grad, loop.grad)
