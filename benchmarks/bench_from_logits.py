"""Statistics and gradient of logits that already exist: memory traffic and no GEMM."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Exact, Result, Step, Task, taken
from benchmarks.gold import Gold
from benchmarks.measure import DoesNotError
from benchmarks.peers import available, impl_of, lacking
from benchmarks.results import EAGER, OURS
from benchmarks.shapes import SMALL
from gem_kernels import logprob_entropy

_OfLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def _eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _fn(library: str) -> _OfLogits:
    if library.startswith(OURS):
        impl = impl_of(library)
        return lambda logits, targets: logprob_entropy(logits, targets, impl=impl)
    if library == EAGER:
        return _eager
    if library == "torch.compile":
        torch._dynamo.reset()
        compiled: _OfLogits = torch.compile(_eager, dynamic=False)
        return compiled
    available("trl", gpu_only=True)
    try:
        fn: _OfLogits = importlib.import_module("trl.kernels").selective_log_softmax_and_entropy
    except ImportError as error:
        raise DoesNotError(lacking(error, "TRL")) from error
    return fn


def _half(gold: Gold) -> Tensor:
    """Return logits (N / 2, V); (N, V) would not fit beside an fp32 log_softmax and its gradient."""
    rows = gold.x.hidden.shape[0] // 2
    return gold.x.hidden[:rows] @ gold.x.weight.T


def _from_logits(gold: Gold, library: str) -> Step:
    fn, x, logits = _fn(library), gold.x, _half(gold).requires_grad_()
    rows = logits.shape[0]

    def step() -> Result:
        logprob, entropy, *_ = fn(logits, x.targets[:rows])
        ((x.a[:rows] * logprob).sum() + (x.b[:rows] * entropy).sum()).backward()
        return Result(logprob.detach(), entropy.detach(), others=tuple(taken(logits)))

    return step


def _exact(gold: Gold) -> Exact:
    log_p = _half(gold).double().log_softmax(-1)  # the op reads rounded logits, so the reference does too
    targets = gold.x.targets[: log_p.shape[0], None]
    return Exact(log_p.gather(-1, targets)[:, 0], -(log_p.exp() * log_p).sum(-1))


FROM_LOGITS = Task(
    "logits at hand: logprob and entropy, forward + backward",
    _from_logits,
    _exact,
    0,
    [OURS, EAGER, "torch.compile", "TRL"],
)


@pytest.mark.over(shapes=SMALL, libraries=FROM_LOGITS.libraries)
def test_from_logits(bench: Callable[[Task], None]) -> None:
    bench(FROM_LOGITS)
