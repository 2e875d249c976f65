"""A loss of log-probability and entropy, both differentiated, forward + backward: 2NDV and 6NDV FLOP, the logits twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.bench_score import statistics_of
from benchmarks.contest import Exact, Step, Task, train_step
from benchmarks.gold import Gold
from benchmarks.shapes import SMALL

SHAPES = SMALL


def _forward_backward(gold: Gold, library: str) -> Step:
    fn, x = statistics_of(library), gold.x

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logprob, entropy = fn(hidden, weight, x.targets, True)
        assert entropy is not None
        return (x.a * logprob).sum() + (x.b * entropy).sum(), logprob, entropy

    return train_step(gold, loss)


def test_score_and_backward(bench: Callable[[Task], None]) -> None:
    def exact(gold: Gold) -> Exact:
        return Exact(gold.logprob, gold.entropy, *gold.gradients(gold.x.a, gold.x.b))

    bench(Task("score: logprob and entropy, forward + backward", _forward_backward, exact, gemms=4))
