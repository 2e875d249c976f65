"""Log-probability and entropy of every token: forward alone, as scoring needs them, and with a loss that differentiates both.

The forward costs 2NDV FLOP. The backward costs 6NDV, because it computes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from benchmarks.contest import Exact, Result, Step, Task, no_grad, train_step
from benchmarks.gold import Gold
from benchmarks.peers import PerToken, impl_of, per_token
from benchmarks.results import OURS
from benchmarks.shapes import DEVICE, MAIN, NARROW, SMALL
from gem_kernels import linear_logprob_entropy


def _statistics(library: str) -> PerToken:
    if library.startswith(OURS):
        impl = impl_of(library)
        return lambda hidden, weight, targets, entropy: linear_logprob_entropy(hidden, weight, targets, impl=impl)[:2]
    return per_token(library, entropy=True)


def _forward(gold: Gold, library: str) -> Step:
    fn, x = _statistics(library), gold.x
    return lambda: no_grad(lambda: Result(*fn(x.hidden, x.weight, x.targets, True)))


def _forward_backward(gold: Gold, library: str) -> Step:
    fn, x = _statistics(library), gold.x

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logprob, entropy = fn(hidden, weight, x.targets, True)
        assert entropy is not None
        return (x.a * logprob).sum() + (x.b * entropy).sum(), logprob, entropy

    return train_step(gold, loss)


def _exact(gold: Gold) -> Exact:
    return Exact(gold.logprob, gold.entropy)


def _exact_backward(gold: Gold) -> Exact:
    return Exact(gold.logprob, gold.entropy, *gold.gradients(gold.x.a, gold.x.b))


SCORE = Task("score: logprob and entropy, forward", _forward, _exact, 1)
SCORE_BACKWARD = Task("score: logprob and entropy, forward + backward", _forward_backward, _exact_backward, 4)


@pytest.mark.over(shapes=MAIN if DEVICE.type == "cuda" else [*NARROW, *SMALL], libraries=SCORE.libraries)
def test_score(bench: Callable[[Task], None]) -> None:
    bench(SCORE)


@pytest.mark.over(shapes=SMALL, libraries=SCORE_BACKWARD.libraries)
def test_score_and_backward(bench: Callable[[Task], None]) -> None:
    bench(SCORE_BACKWARD)
