"""The calls that `tools.plan` records: every op with a cost, as its users call it on packed tokens, none of them ignored.

N tokens, D hidden size, V vocabulary. Sequences and groups are those of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import ragged
from gem_kernels import GroupLoss, TokenStats, linear_group_loss, linear_logprob_entropy, logprob_entropy, sega_loss
from gem_kernels.types import Impl


class Shape(NamedTuple):
    n: int
    d: int
    v: int
    dtype: torch.dtype


Call = Callable[[], Any]
"""What is recorded; returns its results."""


class Op(NamedTuple):
    """A pass over a head: what is recorded, and how many matrix products of 2NDV FLOP it is."""

    says: str
    prepare: Callable[[Shape], Call]
    """makes the inputs, and for a backward its forward"""
    products: int


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _inputs(s: Shape, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return hidden, weight, targets, and those of them that need a gradient."""
    hidden, weight = _meta(s.n, s.d, dtype=s.dtype).requires_grad_(), _meta(s.v, s.d, dtype=s.dtype)
    trained = [hidden] if frozen else [hidden, weight.requires_grad_()]
    return hidden, weight, _meta(s.n, dtype=torch.int64), trained


def _backward(stats: TokenStats, of: list[Tensor]) -> Call:
    """Return the backward of a loss of log-probabilities and entropies."""
    upstream = [torch.empty_like(stats.logprob) for _ in range(2)]
    return lambda: torch.autograd.grad([stats.logprob, stats.entropy], of, upstream)


def _score(impl: Impl, s: Shape) -> Call:
    hidden, weight, targets, _ = _inputs(s)
    return torch.no_grad()(lambda: linear_logprob_entropy(hidden, weight, targets, ignore_index=None, impl=impl))


def _score_backward(impl: Impl, s: Shape) -> Call:
    hidden, weight, targets, trained = _inputs(s)
    return _backward(linear_logprob_entropy(hidden, weight, targets, ignore_index=None, impl=impl), trained)


def _sega(frozen: bool, s: Shape) -> Call:
    hidden, weight, targets, trained = _inputs(s, frozen)
    cu_seqlens = ragged(s.n)[0]
    seq_weight = _meta(cu_seqlens.shape[0] - 1)

    def call() -> tuple[GroupLoss, Any]:
        out = sega_loss(hidden, weight, targets, cu_seqlens, seq_weight, ignore_index=None, impl="chunked")
        return out, torch.autograd.grad(out.loss, trained)

    return call


def _group(frozen: bool, s: Shape) -> Call:
    """Record a loss of log-probabilities whose weights come from the entropies of the same pass."""
    hidden, weight, targets, trained = _inputs(s, frozen)
    cu_groups = ragged(s.n)[1]

    def loss_fn(stats: TokenStats, group: int) -> Tensor:
        return -(stats.entropy.detach() * stats.logprob).sum()

    def call() -> tuple[GroupLoss, Any]:
        out = linear_group_loss(hidden, weight, targets, cu_groups, loss_fn, ignore_index=None, impl="chunked")
        return out, torch.autograd.grad(out.loss, trained)

    return call


def _logits(s: Shape) -> tuple[Tensor, Tensor]:
    return _meta(s.n, s.v, dtype=s.dtype).requires_grad_(), _meta(s.n, dtype=torch.int64)


def _logprob(s: Shape) -> Call:
    logits, targets = _logits(s)
    return torch.no_grad()(lambda: logprob_entropy(logits, targets, ignore_index=None, impl="triton"))


def _logprob_backward(s: Shape) -> Call:
    logits, targets = _logits(s)
    return _backward(logprob_entropy(logits, targets, ignore_index=None, impl="triton"), [logits])


OPS = {
    "score": Op("`linear_logprob_entropy`, chunked", partial(_score, "chunked"), 1),
    "score-triton": Op("`linear_logprob_entropy`, triton", partial(_score, "triton"), 1),
    "score-backward": Op("backward of `linear_logprob_entropy`, chunked", partial(_score_backward, "chunked"), 3),
    "score-backward-triton": Op("backward of `linear_logprob_entropy`, triton", partial(_score_backward, "triton"), 3),
    "sega": Op("`sega_loss`, forward and backward", partial(_sega, False), 3),
    "sega-frozen": Op("`sega_loss` with a frozen head", partial(_sega, True), 2),
    "group": Op("`linear_group_loss`, forward and backward", partial(_group, False), 3),
    "group-frozen": Op("`linear_group_loss` with a frozen head", partial(_group, True), 2),
    "logprob": Op("`logprob_entropy`", _logprob, 0),
    "logprob-backward": Op("backward of `logprob_entropy`", _logprob_backward, 0),
}
