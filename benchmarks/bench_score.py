"""Log-probability and entropy of every token, forward: what scoring and an old policy's log-probabilities need."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.contest import Exact, Result, Step, Task, no_grad
from benchmarks.gold import Gold
from benchmarks.peers import OURS, PerToken, impl_of, per_token
from benchmarks.shapes import DEVICE, MAIN, NARROW, SMALL
from gem_kernels import linear_logprob_entropy

SHAPES = MAIN if DEVICE.type == "cuda" else [*NARROW, *SMALL]


def statistics_of(library: str) -> PerToken:
    if library.startswith(OURS):
        impl = impl_of(library)
        return lambda hidden, weight, targets, entropy: linear_logprob_entropy(hidden, weight, targets, impl=impl)[:2]
    return per_token(library, entropy=True)


def _forward(gold: Gold, library: str) -> Step:
    fn, x = statistics_of(library), gold.x
    return lambda: no_grad(lambda: Result(*fn(x.hidden, x.weight, x.targets, True)))


def test_score(bench: Callable[[Task], None]) -> None:
    bench(
        Task("score: logprob and entropy, forward", _forward, lambda gold: Exact(gold.logprob, gold.entropy), gemms=1)
    )
