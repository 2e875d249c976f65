"""Every bad input is refused by a message that names the argument, the expectation and the value."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gem_kernels import (
    LogitTransform,
    LowRank,
    gem_score,
    linear_group_loss,
    linear_logprob_entropy,
    logprob_entropy,
    sega_loss,
    topm_mean,
)

N, D, V, R = 6, 4, 9, 2


def linear(**changes: object) -> dict[str, object]:
    """Return good arguments of the linear ops, with some of them replaced."""
    good: dict[str, object] = {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D),
        "targets": torch.tensor([0, 8, -100, 3, 4, 5]),
    }
    return good | changes


def group_op(**kwargs: object) -> object:
    args: dict[str, object] = {"cu_groups": torch.tensor([0, 2, 6]), "loss_fn": lambda s, g: s.logprob.sum()}
    return linear_group_loss(**(args | kwargs))  # type: ignore[arg-type]


def sega_op(**kwargs: object) -> object:
    args: dict[str, object] = {"cu_seqlens": torch.tensor([0, 2, 6]), "seq_weight": torch.tensor([1.0, -1.0])}
    return sega_loss(**(args | kwargs))  # type: ignore[arg-type]


LINEAR_OPS: list[Callable[..., object]] = [linear_logprob_entropy, group_op, sega_op]
each_linear_op = pytest.mark.parametrize(
    "op", LINEAR_OPS, ids=["linear_logprob_entropy", "linear_group_loss", "sega_loss"]
)


def low_rank(a: Tensor | None = None, b: Tensor | None = None) -> LowRank:
    return LowRank(torch.randn(R, D) if a is None else a, torch.randn(V, R) if b is None else b, 1.0)


BAD_LINEAR = {
    "hidden list": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "hidden int": ({"hidden": torch.ones(N, D).int()}, TypeError, r"hidden must be bfloat16.*got \(6, 4\) int32"),
    "hidden width": ({"hidden": torch.randn(N, 5)}, ValueError, r"hidden \(\.\.\., D\).*\(6, 5\).*\(9, 4\)"),
    "hidden scalar": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden \(\.\.\., D\).*got hidden \(\)"),
    "no width": (
        {"hidden": torch.randn(N, 0), "weight": torch.randn(V, 0)},
        ValueError,
        r"weight must have .* one column .*\(9, 0\)",
    ),
    "weight None": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "weight 1-D": ({"weight": torch.randn(D)}, ValueError, r"weight \(V, D\).*got.*weight \(4,\)"),
    "weight empty": ({"weight": torch.randn(0, D)}, ValueError, r"weight must have at least one row.*\(0, 4\)"),
    "weight dtype": ({"weight": torch.randn(V, D).bfloat16()}, TypeError, r"one dtype.*float32.*bfloat16"),
    "weight device": ({"weight": torch.empty(V, D, device="meta")}, ValueError, r"weight must be on.*cpu.*got meta"),
    "targets float": ({"targets": torch.zeros(N)}, TypeError, r"targets must be int64 or int32.*got \(6,\) float32"),
    "targets bool": ({"targets": torch.zeros(N).bool()}, TypeError, "targets must be int64 or int32.*bool"),
    "targets length": ({"targets": torch.zeros(5).long()}, ValueError, r"targets must have .*\(6,\), got \(5,\)"),
    "targets = V": ({"targets": torch.tensor([0, 0, 9, 0, 0, 0])}, ValueError, r"targets .*V=9.*got 9 at token 2"),
    "targets < 0": ({"targets": torch.tensor([0, 0, 0, 0, -1, 0])}, ValueError, r"targets .*-100, got -1 at token 4"),
    "targets device": ({"targets": torch.empty(N, device="meta").long()}, ValueError, "targets must be on.*got meta"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, or None, got float"),
    "ignore_index bool": ({"ignore_index": True}, TypeError, "ignore_index must be an int, or None, got bool"),
    "ignore_index None": (
        {"ignore_index": None},
        ValueError,
        r"targets must be in \[0, V=9\) \(ignore_index is None\), got -100 at token 2",
    ),
    "another ignore_index": ({"ignore_index": -1}, ValueError, r"ignore_index=-1, got -100 at token 2"),
    "bias shape": ({"bias": torch.zeros(V, 1)}, ValueError, r"bias must be \(V=9,\).*got \(9, 1\)"),
    "bias dtype": ({"bias": torch.zeros(V).half()}, ValueError, r"bias must be .*float32, got \(9,\) float16"),
    "bias device": ({"bias": torch.zeros(V, device="meta")}, ValueError, "bias must be on.*got meta"),
    "low_rank tuple": ({"low_rank": (1, 2, 3)}, TypeError, "low_rank must be a gem_kernels.LowRank, got tuple"),
    "low_rank.a": ({"low_rank": low_rank(a=torch.randn(R, 5))}, ValueError, r"low_rank.a \(r, D=4\).*got a \(2, 5\)"),
    "low_rank.b": ({"low_rank": low_rank(b=torch.randn(V, 3))}, ValueError, r"low_rank.b \(V=9, r\).*b \(9, 3\)"),
    "low_rank dtype": (
        {"low_rank": low_rank(a=torch.randn(R, D).half(), b=torch.randn(V, R).half())},
        TypeError,
        r"low_rank.a and .b must both be .*float32.*float16",
    ),
    "low_rank int": (
        {"low_rank": low_rank(a=torch.ones(R, D).int())},
        TypeError,
        r"low_rank.a must be bfloat16.*int32",
    ),
    "low_rank device": (
        {"low_rank": low_rank(a=torch.randn(R, D, device="meta"))},
        ValueError,
        "low_rank.a must be on",
    ),
    "transform": ({"transform": {"scale": 2.0}}, TypeError, "transform must be a gem_kernels.LogitTransform, got dict"),
    "impl": ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, chunked, triton, got 'fast'"),
    "impl None": ({"impl": None}, ValueError, "impl must be one of .*, got None"),
    "impl triton": ({"impl": "triton"}, ValueError, "impl='triton' cannot serve .* these can: reference, chunked"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_LINEAR.values(), ids=BAD_LINEAR)
@each_linear_op
def test_linear_arguments(
    op: Callable[..., object], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    op(**linear())
    with pytest.raises(error, match=message):
        op(**linear(**changes))


@pytest.mark.parametrize(
    "changes", [{"weight": None}, {"bias": [0.0]}, {"low_rank": (1, 2, 3)}, {"hidden": 3}], ids=str
)
@each_linear_op
def test_messages_are_the_same_under_autocast(op: Callable[..., object], changes: dict[str, object]) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{next(iter(changes))} must be a"):
        op(**linear(**changes))


@each_linear_op
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_an_ignore_index_inside_the_vocabulary_is_allowed(op: Callable[..., object], impl: str) -> None:
    """As in F.cross_entropy: a batch padded with token 0 may ignore token 0, which is then never a target."""
    targets = torch.tensor([0, 8, 0, 3, 4, 5])
    base = linear(targets=targets)
    inside = op(**base, ignore_index=0, impl=impl)
    usual = op(**(base | {"targets": targets.where(targets != 0, -100)}), impl=impl)
    for one, other in zip(getattr(inside, "stats", inside), getattr(usual, "stats", usual), strict=True):
        assert torch.equal(one, other) and not one[[0, 2]].any()


BAD_OFFSETS = {
    "list": ([0, 6], TypeError, "must be a torch.Tensor, got list"),
    "float": (torch.tensor([0.0, 6.0]), ValueError, r"must be a 1-D int32 or int64 .*got \(2,\) float32"),
    "2-D": (torch.tensor([[0, 6]]), ValueError, r"must be a 1-D int32 or int64 .*got \(1, 2\) int64"),
    "none": (torch.tensor([]).int(), ValueError, r"must be a 1-D .*got \(0,\) int32"),
    "start": (torch.tensor([1, 6]), ValueError, r"must start at 0 and end at the number of tokens 6, got \[1, 6\]"),
    "end": (torch.tensor([0, 5]), ValueError, r"must start at 0 and end at the number of tokens 6, got \[0, 5\]"),
    "beyond": (torch.tensor([0, 7]), ValueError, r"must start at 0 and end at the number of tokens 6, got \[0, 7\]"),
    "falling": (torch.tensor([0, 4, 2, 6]), ValueError, "must not fall, got 4 then 2 at index 1"),
}
NOT_EMPTY = {"empty": (torch.tensor([0, 2, 2, 6]), ValueError, "must not hold an empty group, got offset 2 twice")}


@pytest.mark.parametrize(("value", "error", "message"), (BAD_OFFSETS | NOT_EMPTY).values(), ids=BAD_OFFSETS | NOT_EMPTY)
def test_offsets_of_groups(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="cu_groups " + message):
        group_op(**linear(cu_groups=value))
    with pytest.raises(error, match="cu_seqlens " + message):
        sega_op(**linear(cu_seqlens=value, seq_weight=torch.zeros(3)))


@pytest.mark.parametrize(("value", "error", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_of_sequences(value: object, error: type[Exception], message: str) -> None:
    """Sequences may be empty, unlike groups."""
    topm_mean(torch.zeros(6), torch.tensor([0, 2, 2, 6]), 1)
    with pytest.raises(error, match="cu_seqlens " + message):
        topm_mean(torch.zeros(6), value, 1)  # type: ignore[arg-type]


def test_offsets_count_flattened_tokens() -> None:
    shaped = linear(hidden=torch.randn(2, 3, D), targets=torch.zeros(2, 3).long())
    group_op(**shaped)
    with pytest.raises(ValueError, match="cu_groups must start at 0 and end at the number of tokens 6"):
        group_op(**shaped, cu_groups=torch.tensor([0, 3]))


def test_loss_fn_must_be_callable() -> None:
    with pytest.raises(TypeError, match="loss_fn must be callable, got float"):
        group_op(**linear(loss_fn=1.0))


@pytest.mark.parametrize("value", [0, -1, 1e9, True, "1GB", None], ids=str)
@pytest.mark.parametrize("op", [group_op, sega_op])
def test_cache_bytes(op: Callable[..., object], value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"cache_bytes must be an int >= 1, got"):
        op(**linear(cache_bytes=value))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"seq_weight must be \(S=2,\), got \(3,\)"),
        (torch.zeros(2, 1), ValueError, r"seq_weight must be \(S=2,\), got \(2, 1\)"),
        (torch.tensor(1.0), ValueError, r"seq_weight must be \(S=2,\), got \(\)"),
        (torch.zeros(2).long(), TypeError, r"seq_weight must be bfloat16.*got \(2,\) int64"),
        ([1.0, 2.0], TypeError, "seq_weight must be a torch.Tensor, got list"),
        (torch.zeros(2).requires_grad_(), ValueError, "seq_weight must not require a gradient"),
        (torch.tensor([1.0, math.nan]), ValueError, "seq_weight must be finite, got nan at sequence 1"),
        (torch.tensor([-math.inf, 1.0]), ValueError, "seq_weight must be finite, got -inf at sequence 0"),
        (torch.zeros(2, device="meta"), ValueError, "seq_weight must be on .*got meta"),
    ],
    ids=str,
)
def test_seq_weight(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sega_op(**linear(seq_weight=value))


BAD_LOGITS = {
    "logits int": ({"logits": torch.ones(6, 9).int()}, TypeError, r"logits must be bfloat16.*got \(6, 9\) int32"),
    "logits None": ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType"),
    "logits empty": (
        {"logits": torch.zeros(6, 0)},
        ValueError,
        r"logits must be \(\.\.\., V\) with V >= 1, got \(6, 0\)",
    ),
    "logits scalar": ({"logits": torch.tensor(0.0)}, ValueError, r"logits must be \(\.\.\., V\).*got \(\)"),
    **{
        k: v for k, v in BAD_LINEAR.items() if k.startswith(("targets", "transform", "impl", "ignore_index", "another"))
    },
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_LOGITS.values(), ids=BAD_LOGITS)
def test_logits(changes: dict[str, object], error: type[Exception], message: str) -> None:
    good: dict[str, object] = {"logits": torch.randn(N, V), "targets": linear()["targets"]}
    logprob_entropy(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        logprob_entropy(**(good | changes))  # type: ignore[arg-type]


BAD_M = {
    "zero": (0, ValueError, "m as a count must be >= 1, got 0"),
    "negative": (-3, ValueError, "m as a count must be >= 1, got -3"),
    "zero share": (0.0, ValueError, r"m as a fraction must be in \(0, 1\], got 0.0"),
    "large share": (1.5, ValueError, r"m as a fraction must be in \(0, 1\], got 1.5 \(pass an int for a count\)"),
    "count as float": (5.0, ValueError, r"m as a fraction must be in \(0, 1\], got 5.0"),
    "nan": (math.nan, ValueError, r"m as a fraction must be in \(0, 1\], got nan"),
    "bool": (True, TypeError, r"m must be an int \(count\) or a float \(fraction\), got bool"),
    "tensor": (torch.tensor(2), TypeError, "m must be an int .*got Tensor"),
    "None": (None, TypeError, "m must be an int .*got NoneType"),
}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("m", "error", "message"), BAD_M.values(), ids=BAD_M)
def test_m(m: object, error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        topm_mean(torch.zeros(6), torch.tensor([0, 6]), m, impl=impl)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        gem_score(torch.zeros(6), torch.tensor([[0, 6]]), torch.tensor([[0, 6]]), m=m, impl=impl)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "must be a torch.Tensor, got list"),
        (torch.zeros(6).int(), TypeError, r"must be bfloat16.*got \(6,\) int32"),
        (torch.zeros(6, 1), ValueError, r"must be \(N,\), got \(6, 1\)"),
    ],
    ids=str,
)
def test_scored_values(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="values " + message):
        topm_mean(value, torch.tensor([0, 6]), 1)  # type: ignore[arg-type]
    with pytest.raises(error, match="entropy " + message):
        gem_score(value, torch.tensor([[0, 6]]), torch.tensor([[0, 6]]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["branch_span", "answer_span"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[0, 1]], TypeError, "must be a torch.Tensor, got list"),
        (torch.tensor([[0.0, 1.0]]), ValueError, r"must be \(S, 2\) int32 or int64.*got \(1, 2\) float32"),
        (torch.tensor([0, 1]), ValueError, r"must be \(S, 2\) .*got \(2,\) int64"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"must be \(S, 2\) .*got \(1, 3\) int64"),
        (torch.tensor([[2, 1]]), ValueError, r"must satisfy 0 <= start <= end <= 6, got \[2, 1\] at sequence 0"),
        (torch.tensor([[-1, 1]]), ValueError, r"must satisfy .*got \[-1, 1\] at sequence 0"),
        (torch.tensor([[5, 7]]), ValueError, r"must satisfy .*got \[5, 7\] at sequence 0"),
        (torch.zeros(1, 2, device="meta").int(), ValueError, "must be on .*got meta"),
    ],
    ids=str,
)
def test_spans(name: str, value: object, error: type[Exception], message: str) -> None:
    good = {"branch_span": torch.tensor([[0, 6]]), "answer_span": torch.tensor([[0, 6]])}
    with pytest.raises(error, match=f"{name} {message}"):
        gem_score(torch.zeros(6), **(good | {name: value}))  # type: ignore[arg-type]


def test_as_many_answers_as_branches() -> None:
    with pytest.raises(ValueError, match=r"answer_span must have the shape of branch_span \(1, 2\), got \(2, 2\)"):
        gem_score(torch.zeros(6), torch.tensor([[0, 6]]), torch.tensor([[0, 6], [0, 6]]))


@pytest.mark.parametrize("field", ["scale", "softcap", "temperature"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_transform_fields(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"LogitTransform.{field} must be .*got {value}"):
        LogitTransform(**{field: value})


@pytest.mark.parametrize("field", ["softcap", "temperature"])
def test_transform_fields_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=rf"LogitTransform.{field} must be .*got -1.0"):
        LogitTransform(**{field: -1.0})
    assert LogitTransform(scale=-1.0).scale == -1.0
