"""Scenarios of a vocabulary that is spread over processes, and the program of each process.

A process runs every scenario and leaves its results in a file, which test_vocab_parallel.py reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bounds import Bound
from devices import use_small_tiles
from group_losses import (
    CACHES,
    OFFSETS,
    D,
    N,
    V,
    all_three,
    likelihood,
    sega_with_its_own_entropies,
    weighted_likelihood,
)
from numerics import IMPLS, STATS, THREADS, TRANSFORMS, Case, make_case, make_upstream, weighted_sum
from op_bounds import LossFn, group_bounds, linear_bounds
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from gem_kernels import IGNORE_INDEX, LowRank, VocabShard, linear_group_loss, linear_logprob_entropy, sega_loss

DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS = torch.linspace(-1, 1, len(OFFSETS) - 1)  # of sega_loss
NEEDS = [(True, *[False] * 4), (False, *[True] * 4), (False, False, False, True, False)]
Results = dict[str, Tensor | None]


# --- scenarios --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    case: Case
    op: str = "linear"
    impl: str = "chunked"
    loss_fn: LossFn = all_three
    needs: Sequence[bool] = (True,) * 5
    even: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, case: Case, impl: str, shard: VocabShard | None = None) -> Results:
        """Return statistics and gradients on `case`: the whole of it, or the part of a rank."""
        x = case.leaves(self.needs)
        rest = {"bias": x.bias, "transform": x.transform, "low_rank": x.low_rank, "impl": impl, "shard": shard}
        rest |= self.options
        if self.op == "linear":
            stats = linear_logprob_entropy(x.hidden, x.weight, x.targets, **rest)
            weighted_sum(stats, make_upstream(case.targets.shape[0])).backward()
            return {**{name: s.detach() for name, s in stats._asdict().items()}, **x.gradients()}
        if self.op == "group":
            out = linear_group_loss(x.hidden, x.weight, x.targets, torch.tensor(OFFSETS), self.loss_fn, **rest)
        else:
            out = sega_loss(x.hidden, x.weight, x.targets, torch.tensor(OFFSETS), WEIGHTS, **rest)
        out.loss.backward()
        return {"loss": out.loss.detach(), **out.stats._asdict(), **x.gradients()}

    def bounds(self) -> dict[str, Bound]:
        """Return the bounds of one process with the whole vocabulary: ranks change only the order of sums."""
        case, ignore_index = self.case, self.options.get("ignore_index", IGNORE_INDEX)
        if ignore_index is not None:
            case = replace(case, targets=case.targets.masked_fill(case.targets == ignore_index, IGNORE_INDEX))
        if self.op == "linear":
            return linear_bounds(case, make_upstream(case.targets.shape[0]))
        return group_bounds(case, self.loss_fn if self.op == "group" else weighted_likelihood(WEIGHTS), OFFSETS)

    def rows(self, world: int) -> list[tuple[int, int]]:
        """Return each rank's first and last row. Uneven: a few rows, many, none, the rest."""
        v = self.case.weight.shape[0]
        share = -(-v // world)
        stops = [min(v, share * (i + 1)) for i in range(world)] if self.even else [*[3, 120, 120][: world - 1], v]
        return list(itertools.pairwise([0, *stops]))

    def on_rank(self, group: dist.ProcessGroup) -> Results:
        start, stop = self.rows(group.size())[group.rank()]
        return self.run(
            part(self.case, slice(start, stop)), self.impl, VocabShard(group, start, self.case.weight.shape[0])
        )


def part(case: Case, rows: slice) -> Case:
    low = case.low_rank
    return replace(
        case,
        weight=case.weight[rows],
        bias=None if case.bias is None else case.bias[rows],
        low_rank=None if low is None else low._replace(b=low.b[rows]),
    )


def at(targets: Tensor, *values: int) -> Tensor:
    """Replace the first targets by `values`."""
    return torch.cat([targets.new_tensor(values), targets[len(values) :]])


def cases(dtype: torch.dtype) -> dict[str, Case]:
    case = make_case(N, D, V, dtype=dtype)
    assert case.bias is not None
    steps = torch.zeros(V).index_fill(0, torch.arange(40), 200).index_fill(0, torch.arange(40, 120), 100)
    masked = torch.zeros(V).index_fill(0, torch.arange(60), -torch.inf)
    return {
        "everything": make_case(N, D, V, dtype=dtype, transform=TRANSFORMS["combined"]),
        "plain head": make_case(N, D, V, dtype=dtype, bias=False, rank=0, ignored=0.0, targets_dtype=torch.int32),
        "peaky": make_case(N, D, V, dtype=dtype, peaky=30.0),
        "targets of one rank": replace(case, targets=case.targets % 3),
        "all ignored": make_case(N, D, V, dtype=dtype, ignored=1.0),
        # Minus the first row of a rank, 109, 110 or 165, these targets are IGNORE_INDEX.
        "a target that looks ignored": replace(case, targets=at(case.targets, 9, 10, 65)),
        "a rank with all the mass": replace(case, bias=(case.bias + steps).to(dtype)),
        "a rank with no mass": replace(
            case, bias=(case.bias + masked).to(dtype), targets=60 + case.targets.abs() % 100
        ),
    }


def variants(dtype: torch.dtype, impl: str) -> Iterator[tuple[str, Scenario]]:
    every = cases(dtype)
    peaky, odd = every["peaky"], every["plain head"]
    inside = replace(odd, targets=at(odd.targets, 7, 8, 7, 9))
    for name, case in every.items():
        yield name, Scenario(case)
        yield name, Scenario(case, "sega", options={"cache_bytes": CACHES["one group at most"]})
        yield name, Scenario(case, "group", loss_fn=likelihood)
    for op in ("linear", "group", "sega"):
        yield "uneven", Scenario(peaky, op, even=False)
        yield "ignored inside the vocabulary", Scenario(inside, op, options={"ignore_index": 7})
        yield "nothing is ignored", Scenario(odd, op, options={"ignore_index": None})
    if impl != "chunked":
        return
    for op, needs in itertools.product(("linear", "group", "sega"), NEEDS):
        yield f"needs {needs}", Scenario(peaky, op, needs=needs)
    for (name, cache_bytes), even in itertools.product(CACHES.items(), (True, False)):
        for loss_fn in (all_three, sega_with_its_own_entropies):
            key = f"cache for {name}, {loss_fn.__name__}, {'even' if even else 'uneven'}"
            yield (
                key,
                Scenario(peaky, "group", "", loss_fn, even=even, options={"cache_bytes": max(1, cache_bytes // 2)}),
            )


@cache
def scenarios() -> dict[str, Scenario]:
    found = {"linear, in fp64": Scenario(cases(torch.float64)["everything"], impl="reference")}
    for dtype, impl in itertools.product(DTYPES, IMPLS):
        found |= {f"{s.op}, {name}, {impl}, {dtype}": replace(s, impl=impl) for name, s in variants(dtype, impl)}
    return found


def names(op: str) -> list[Any]:
    """Return the parameters of a test: a scenario and its implementation, by which conftest counts."""
    return [pytest.param(name, s.impl, id=name) for name, s in scenarios().items() if s.op == op]


# --- the program of a process --------------------------------------------------------------------------------------------


def dtensors(case: Case, group: dist.ProcessGroup) -> tuple[Case, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (group.size(),))

    def place(t: Tensor | None, placement: Shard | Replicate) -> Any:
        return None if t is None else distribute_tensor(t.detach(), mesh, [placement]).requires_grad_()

    low = case.low_rank
    x = replace(
        case,
        hidden=place(case.hidden, Replicate()),
        weight=place(case.weight, Shard(0)),
        bias=place(case.bias, Shard(0)),
        low_rank=low and LowRank(place(low.a, Replicate()), place(low.b, Shard(0)), low.scale),
    )
    stats = linear_logprob_entropy(
        x.hidden, x.weight, x.targets, bias=x.bias, transform=x.transform, low_rank=x.low_rank
    )
    assert not any(isinstance(s, DTensor) for s in stats)
    weighted_sum(stats, make_upstream(N)).backward()
    return x, {name: s.detach() for name, s in stats._asdict().items()}


def with_dtensors(case: Case, group: dist.ProcessGroup) -> Results:
    """Return statistics and whole gradients; each gradient must have the placement of its parameter."""
    x, results = dtensors(case, group)
    for name, t in x.tensors().items():
        if t is not None:
            assert isinstance(t.grad, DTensor) and t.grad.placements == t.placements, name  # type: ignore[attr-defined]
            results[f"d{name}"] = t.grad.full_tensor()
    return {name: results.get(name) for name in (*STATS, *x.gradients())}


def unchecked(group: dist.ProcessGroup) -> Results:
    """Run as on a GPU, where the values of the targets are not checked."""
    patch = pytest.MonkeyPatch()
    for module in ("inputs", "validation"):
        patch.setattr(f"gem_kernels.{module}.values_are_readable", lambda _: False)
    case = cases(torch.float32)["plain head"]
    results = Scenario(replace(case, targets=at(case.targets, V, -7, V + 40))).on_rank(group)
    patch.undo()
    return results


def refusals(group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    case, rank, world = make_case(N, D, V), group.rank(), group.size()
    start, stop = Scenario(case).rows(world)[rank]
    mine, shard = part(case, slice(start, stop)), VocabShard(group, start, V)
    mesh = init_device_mesh("cpu", (world,))
    sharded, whole = (distribute_tensor(case.weight, mesh, [p]) for p in (Shard(0), Replicate()))
    hidden, split_hidden = (distribute_tensor(case.hidden, mesh, [p]) for p in (Replicate(), Shard(0)))
    odd = rank == world - 1

    def call(**changes: Any) -> Callable[[], object]:
        arguments = {"hidden": case.hidden, "weight": mine.weight, "targets": case.targets, "shard": shard} | changes
        return lambda: linear_logprob_entropy(**arguments)

    def loss(offsets: Sequence[int]) -> Callable[[], object]:
        arguments = (case.hidden, mine.weight, case.targets, torch.tensor(offsets), lambda s, _: s.logprob.sum())
        return lambda: linear_group_loss(*arguments, shard=shard)

    return {
        "one rank's dtype": call(weight=mine.weight.to(torch.float64 if odd else torch.float32)),
        "a target": call(targets=at(case.targets, 4, V)),
        "other targets": call(targets=at(case.targets, rank)),
        "other tokens": call(hidden=case.hidden[: N - rank], targets=case.targets[: N - rank]),
        "a gradient on one rank": call(hidden=case.hidden.clone().requires_grad_(odd)),
        "a frozen head on one rank": call(weight=mine.weight.clone().requires_grad_(not odd)),
        "other impl": call(impl="reference" if odd else "chunked"),
        "a bias on one rank": call(bias=mine.bias if odd else None),
        "other groups": loss([0, 10 + rank, N]),
        "overlap": call(weight=case.weight[max(0, start - 1) : stop], shard=shard._replace(start=max(0, start - 1))),
        "gap": call(weight=case.weight[start : stop - 1]),
        "beyond": call(shard=shard._replace(total=stop - 1 if odd else V)),
        "plain hidden": call(weight=sharded, shard=None),
        "plain hidden, whole weight": call(weight=whole, shard=None),
        "whole weight": call(hidden=hidden, weight=whole, shard=None),
        "split hidden": call(hidden=split_hidden, weight=sharded, shard=None),
        "whole bias": call(hidden=hidden, weight=sharded, bias=distribute_tensor(case.bias, mesh, [Replicate()]), shard=None),
        "plain weight": call(hidden=hidden, weight=case.weight, shard=None),
        "dtensor and shard": call(hidden=hidden, weight=sharded),
        "of a plain tensor": lambda: VocabShard.of(case.weight),
        "of columns": lambda: VocabShard.of(distribute_tensor(case.weight, mesh, [Shard(1)])),
    }  # fmt: skip


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


def prepare() -> None:
    """Set what conftest's `_deterministic` and `small_tiles` set, in a process without pytest."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    use_small_tiles(pytest.MonkeyPatch())


def process(rank: int, world: int, folder: Path) -> None:
    prepare()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD
    results: dict[str, Any] = {name: scenario.on_rank(group) for name, scenario in scenarios().items()}
    results["again"] = {name: scenarios()[name].on_rank(group) for name in AGAIN}
    results["dtensors"] = {name: with_dtensors(case, group) for name, case in DTENSORS.items()}
    results["unchecked"] = unchecked(group)
    results["refusals"] = {name: refusal(call) for name, call in refusals(group).items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


AGAIN = [name for name in scenarios() if "peaky" in name]
DTENSORS = {
    "uneven rows": make_case(N, D, V, transform=TRANSFORMS["combined"]),
    "the last rank has no row": make_case(N, D, 9),  # 3 + 3 + 3 + 0
    "plain": make_case(N, D, V, bias=False, rank=0),
}
