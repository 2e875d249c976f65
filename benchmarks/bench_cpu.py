"""Time of forward + backward beside naive eager on the CPU, one process, alternating runs, medians.

    pytest benchmarks/ -s

The two sides are checked against one another before they are timed. Memory is a test: tests/test_memory.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gem_kernels import linear_logprob_entropy, sega_loss

N, D, V = 1024, 512, 128256
CU_SEQLENS = torch.tensor([0, 256, 512, 700, 1024])
WEIGHTS = torch.tensor([1.0, -0.5, 0.3, -0.8])
ROUNDS = 5

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs() -> Inputs:
    """Peaky logits (standard deviation 4.5, mean entropy about 2.5 nats), as of a trained model."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = 0.2 * torch.randn(V, D, generator=generator)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def naive_score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (1.3 * log_p.gather(-1, targets[:, None])[:, 0] + 0.7 * entropy).sum()


def our_score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    stats = linear_logprob_entropy(hidden, weight, targets)
    return (1.3 * stats.logprob + 0.7 * stats.entropy).sum()


def naive_sega(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return -(WEIGHTS.repeat_interleave(CU_SEQLENS.diff()) * logprob).sum()


def our_sega(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return sega_loss(hidden, weight, targets, CU_SEQLENS, WEIGHTS).loss


def run(loss: Callable[..., Tensor], inputs: Inputs) -> tuple[float, list[Tensor]]:
    """Seconds of forward + backward, and the gradients of hidden and weight."""
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    start = time.perf_counter()
    loss(hidden, weight, inputs[2]).backward()
    seconds = time.perf_counter() - start
    assert hidden.grad is not None
    assert weight.grad is not None
    return seconds, [hidden.grad, weight.grad]


@pytest.mark.parametrize(
    ("name", "ours", "naive", "limit"),
    [("linear_logprob_entropy", our_score, naive_score, 1.25), ("sega_loss", our_sega, naive_sega, 1.1)],
    ids=["linear_logprob_entropy", "sega_loss"],
)
def test_time_beside_naive(name: str, ours: Callable[..., Tensor], naive: Callable[..., Tensor], limit: float) -> None:
    inputs = make_inputs()
    for got, expected in zip(run(ours, inputs)[1], run(naive, inputs)[1], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-3)
    times: dict[str, list[float]] = {"ours": [], "naive": []}
    for _ in range(ROUNDS):
        times["ours"].append(run(ours, inputs)[0])
        times["naive"].append(run(naive, inputs)[0])
    mine, theirs = (statistics.median(times[k]) for k in ("ours", "naive"))
    print(
        f"\n{name}: {mine:.2f} s, naive {theirs:.2f} s, ratio {mine / theirs:.2f} (limit {limit}), N={N} D={D} V={V} fp32"
    )
    assert mine <= limit * theirs
