"""Launches of every op at a few shapes, on meta tensors: the cases of the compile report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels.gradients import Gradients
from gem_kernels.operands import Operands, Upstream
from gem_kernels.plan import padded
from gem_kernels.softmax import Transform
from gem_kernels.types import IGNORE_INDEX, LogitTransform, LowRank

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """Launches of one op at one shape."""

    launch: Callable[[torch.dtype], None]
    dtypes: Sequence[str] = tuple(DTYPES)


class _Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


_ALIGNED = _Shape(8192, 4096, 128256)
_RAGGED_VOCABULARY = _Shape(2047, 4096, 50257)
_RAGGED = _Shape(2047, 1001, 50257)  # triton specialises on divisibility by 16: here no stride and no size is


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _transform(softcap: float | None) -> Transform:
    return Transform.of(LogitTransform(softcap=softcap))


def _linear_arguments(shape: _Shape, everything: bool, dtype: torch.dtype) -> tuple[Operands, Tensor, Transform]:
    """Return operands, targets and transform; with bias, adapter and softcap if `everything`."""
    n, d, v = shape
    x = Operands(_meta(n, d, dtype=dtype), _meta(v, d, dtype=dtype), None, None)
    if everything:
        adapter = LowRank(_meta(16, d, dtype=dtype), _meta(v, 16, dtype=dtype), 2.0)
        x = x._replace(bias=_meta(v, dtype=dtype), low_rank=adapter)
    return x, _meta(n, dtype=torch.int64), _transform(30.0 if everything else None)


def _upstreams(n: int) -> list[Upstream]:
    """Return the gradients of a loss with entropies, and of a loss of log-probabilities alone."""
    return [Upstream(_meta(n), _meta(n)), Upstream(_meta(n))]


def _linear(impl: str, shape: _Shape, everything: bool, dtype: torch.dtype) -> None:
    """Launch forward and backward of linear_logprob_entropy."""
    backend = import_module(f"gem_kernels.linear_logprob.{impl}")
    x, targets, transform = _linear_arguments(shape, everything, dtype)
    state = backend.forward(x, targets, transform, IGNORE_INDEX)
    for upstream in _upstreams(shape.tokens)[: 1 if everything else 2]:
        backend.backward(x, targets, state, upstream, transform, IGNORE_INDEX, (True,) * 5, "")


def _linear_none_ignored(shape: _Shape, dtype: torch.dtype) -> None:
    """Launch the forward of linear_logprob_entropy with ignore_index=None; the backward launches nothing else for it."""
    from gem_kernels.linear_logprob import triton as backend

    x, targets, transform = _linear_arguments(shape, False, dtype)
    backend.forward(x, targets, transform, None)


def _group(shape: _Shape, everything: bool, dtype: torch.dtype) -> None:
    """Launch one slab of a group loss with cached exponentials (bf16); other dtypes launch the kernels of `chunked`."""
    from gem_kernels.group_loss.exponentials import Exponentials, follow_maximum_

    x, targets, transform = _linear_arguments(shape, everything, dtype)
    slab = Exponentials(x, targets, transform, _meta(shape.tokens * padded(shape.vocabulary), dtype=dtype), "")
    follow_maximum_(slab.cache, slab.reference, slab.state)
    slab.backward(Upstream(_meta(shape.tokens)), Gradients(x, (True,) * 5, passes=1), 0)


def _logits(shape: _Shape, softcap: float | None, dtype: torch.dtype) -> None:
    """Launch forward and backward of logprob_entropy on logits[:, :-1] of two sequences."""
    from gem_kernels.logprob import triton as backend

    n = 2 * shape.tokens
    logits = _meta(2, shape.tokens + 1, shape.vocabulary, dtype=dtype)[:, :-1]
    transform, targets = _transform(softcap), _meta(n, dtype=torch.int64)
    state = backend.forward(logits, targets, transform, IGNORE_INDEX)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for upstream in _upstreams(n):
        backend.backward(logits, targets, state, upstream, transform, IGNORE_INDEX, out)


def _spans(tokens: int, dtype: torch.dtype) -> None:
    """Launch forward and backward of topm_mean and gem_score."""
    from gem_kernels.scoring import triton as backend

    values, spans, counts = _meta(tokens, dtype=dtype), _meta(64, 2, dtype=torch.int32), _meta(64, dtype=torch.int64)
    mean, threshold, cut = backend.forward(values, spans, counts)
    backend.backward(mean, values, spans, counts, threshold, cut)


def _hand_over(elements: int, dtype: torch.dtype) -> None:
    """Launch what the backward of a group loss does to a gradient."""
    from gem_kernels.scale_triton import scale_

    scale_(_meta(elements, dtype=dtype), _meta())


CASES = {
    "linear": Case(partial(_linear, "triton", _ALIGNED, False)),
    "linear, none ignored": Case(partial(_linear_none_ignored, _ALIGNED)),
    "linear, everything": Case(partial(_linear, "triton", _ALIGNED, True)),
    "linear, ragged vocabulary": Case(partial(_linear, "triton", _RAGGED_VOCABULARY, False)),
    "linear, ragged": Case(partial(_linear, "triton", _RAGGED, True)),
    "chunked": Case(partial(_linear, "chunked", _ALIGNED, False)),
    "chunked, everything": Case(partial(_linear, "chunked", _ALIGNED, True)),
    "chunked, ragged": Case(partial(_linear, "chunked", _RAGGED, True)),
    "group": Case(partial(_group, _ALIGNED, False), ("bf16",)),
    "group, ragged": Case(partial(_group, _RAGGED, True), ("bf16",)),
    "hand-over": Case(partial(_hand_over, _ALIGNED.vocabulary * _ALIGNED.hidden)),
    "hand-over, ragged": Case(partial(_hand_over, 2**31 + 1)),
    "logits": Case(partial(_logits, _ALIGNED, None)),
    "logits, ragged": Case(partial(_logits, _RAGGED, 30.0)),
    "spans": Case(partial(_spans, _ALIGNED.tokens), ("fp32",)),
    "spans, ragged": Case(partial(_spans, _RAGGED.tokens), ("fp32",)),
}
