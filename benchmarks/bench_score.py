"""Log-probability and entropy of every token: the forward alone, and with the backward of a loss of both."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.contest import Exact, Result, Step, Task, no_grad, train_step
from benchmarks.gold import Gold
from benchmarks.peers import OURS, PerToken, impl_of, per_token
from benchmarks.shapes import MAIN, NARROW
from gem_kernels import linear_logprob_entropy

SHAPES = [*MAIN, *(shape for shape in NARROW if shape not in MAIN)]


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

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        logprob, entropy = fn(hidden, weight, x.targets, True)
        assert entropy is not None
        return (x.a * logprob).sum() + (x.b * entropy).sum(), logprob, entropy

    return train_step(gold, loss)


def test_score(bench: Callable[[Task], None]) -> None:
    bench(
        Task("score: logprob and entropy, forward", _forward, lambda gold: Exact(gold.logprob, gold.entropy), gemms=1)
    )


def test_score_and_backward(bench: Callable[[Task], None]) -> None:
    def exact(gold: Gold) -> Exact:
        return Exact(gold.logprob, gold.entropy, *gold.gradients(gold.x.a, gold.x.b))

    bench(Task("score: logprob and entropy, forward + backward", _forward_backward, exact, gemms=4))
