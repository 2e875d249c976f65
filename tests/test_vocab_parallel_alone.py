"""A vocabulary of one rank, in this process: fields of a shard, torch.compile, and the messages between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from devices import each_case
from group_losses import CACHES, D, N, V
from numerics import IMPLS, make_case
from torch import Tensor
from vocab_ranks import Scenario

from gem_kernels import VocabShard, linear_logprob_entropy, sega_loss


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[VocabShard]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield VocabShard(dist.group.WORLD, 0, V)
    dist.destroy_process_group()


def test_a_shard_needs_a_process_group() -> None:
    case = make_case(N, D, V)
    with pytest.raises(TypeError, match="shard must be a gem_kernels.VocabShard, got int"):
        linear_logprob_entropy(case.hidden, case.weight, case.targets, shard=3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"shard needs torch.distributed.init_process_group to have run, and it has not"
    ):
        linear_logprob_entropy(case.hidden, case.weight, case.targets, shard=VocabShard(None, 0, V))  # type: ignore[arg-type]


def test_fields_of_a_shard(alone: VocabShard) -> None:
    case = make_case(N, D, V)
    for changes, message in (
        ({"group": None}, "shard.group must be a torch.distributed.ProcessGroup with this rank in it, got NoneType"),
        ({"start": 0.0}, "shard.start must be an int, got float"),
        ({"total": True}, "shard.total must be an int, got bool"),
    ):
        with pytest.raises(TypeError, match=message):
            linear_logprob_entropy(case.hidden, case.weight, case.targets, shard=alone._replace(**changes))  # type: ignore[arg-type]


@each_case(impl=[impl for impl in IMPLS if impl != "reference"], op=["linear", "sega"])
def test_no_graph_break(op: str, impl: str, alone: VocabShard) -> None:
    torch._dynamo.reset()
    case = make_case(N, D, V, rank=0)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = {"bias": bias, "impl": impl, "shard": alone}
        if op == "sega":
            offsets, weights = torch.tensor([0, 20, N]), torch.tensor([1.0, -1.0])
            return 2 * sega_loss(2 * hidden, weight, case.targets, offsets, weights, **rest).loss  # type: ignore[arg-type]
        stats = linear_logprob_entropy(2 * hidden, weight, case.targets, **rest)  # type: ignore[arg-type]
        return (stats.logprob + 0.1 * stats.entropy).sum()

    eager, compiled = case.leaves(), case.leaves()
    want = loss(eager.hidden, eager.weight, eager.bias)  # type: ignore[arg-type]
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled.hidden, compiled.weight, compiled.bias)
    want.backward()
    got.backward()
    assert torch.equal(got, want)
    for name, grad in eager.gradients().items():
        assert grad is None or torch.equal(grad, compiled.gradients()[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["linear", "group", "sega"])
def test_what_crosses_the_wire(op: str, alone: VocabShard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward sends the statistics; backward sends the sums over the vocabulary that are needed."""
    sent: list[tuple[str, tuple[int, ...]]] = []

    def spy(name: str, original: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        sent.append((name, tuple(args[-1].shape)))
        original(*args, **kwargs)

    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, partial(spy, name, getattr(dist, name)))
    case = make_case(N, D, V, ignored=0.0)
    statistics, dhidden, through_adapter = ("all_gather", (4, N)), ("all_reduce", (N, D)), ("all_reduce", (N, 3))
    for needs, gradients in (
        ((True,) * 5, [dhidden, through_adapter]),
        ((False, True, True, False, True), []),
        ((False, False, False, True, False), [through_adapter]),
    ):
        sent.clear()
        Scenario(case, op, needs=needs).run(case, "chunked", alone)
        assert sent == [statistics, *gradients]
    plain = replace(case, low_rank=None)
    sent.clear()
    Scenario(plain, op, needs=(True, *[False] * 4)).run(plain, "chunked", alone)
    assert sent == [statistics, dhidden]
    if op != "linear":  # one message a slab
        sent.clear()
        small = Scenario(plain, op, needs=(False, True, *[False] * 3), options={"cache_bytes": CACHES["slabs"]})
        small.run(plain, "chunked", alone)
        assert len(sent) > 1 and sum(shape[1] for _, shape in sent) == N
