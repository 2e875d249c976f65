"""A vocabulary spread over 2 and 4 processes: statistics, losses and gradients of one process; refusals on all, never a hang.

The processes are started once for each number of them. They run every scenario and leave what they got in a file; the tests
hold it against the one-process reference by the rule of numerics.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bounds import Bound
from numerics import IMPLS, STATS, THREADS, TRANSFORMS, Case, assert_all_close, make_case, make_upstream, weighted_sum
from op_bounds import LossFn, group_bounds, linear_bounds
from test_group_loss import (
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
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from gem_kernels import IGNORE_INDEX, LowRank, VocabShard, linear_group_loss, linear_logprob_entropy, sega_loss
from gem_kernels.tiles import ChunkTile

WORLDS = (2, 4)
DTYPES = (torch.float32, torch.bfloat16)
ROWS = ("dweight", "dbias", "db")  # gradients of a rank's own rows
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
        """Statistics and gradients on `case`, which is whole, or what a rank holds of it."""
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
        """Of the whole vocabulary in one process: its spread over ranks changes the order of sums."""
        ignored = self.case.targets == self.options.get("ignore_index", IGNORE_INDEX)
        case = replace(self.case, targets=self.case.targets.masked_fill(ignored, IGNORE_INDEX))
        if self.op == "linear":
            return linear_bounds(case, make_upstream(case.targets.shape[0]))
        return group_bounds(case, self.loss_fn if self.op == "group" else weighted_likelihood(WEIGHTS), OFFSETS)

    def rows(self, world: int) -> list[tuple[int, int]]:
        """Of each rank. Uneven: a few rows, many, none, the rest."""
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
    """The first targets are these."""
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
        # On the rank that begins with row 109, 110 or 165 these minus its start are IGNORE_INDEX.
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
    """With the implementation as a parameter of its own, by which conftest counts."""
    return [pytest.param(name, s.impl, id=name) for name, s in scenarios().items() if s.op == op]


# --- what one process does --------------------------------------------------------------------------------------------


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
    """The gradients put together again; each has the placement of its parameter."""
    x, results = dtensors(case, group)
    for name, t in x.tensors().items():
        if t is not None:
            assert isinstance(t.grad, DTensor) and t.grad.placements == t.placements, name  # type: ignore[attr-defined]
            results[f"d{name}"] = t.grad.full_tensor()
    return {name: results.get(name) for name in (*STATS, *x.gradients())}


def unchecked(group: dist.ProcessGroup) -> Results:
    """What a GPU would see: nobody looks at the targets."""
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
    """conftest's `_deterministic` and `small_tiles`, for a process that pytest does not know."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for module in ("tiles", "streaming"):
        pytest.MonkeyPatch().setattr(f"gem_kernels.{module}.CHUNKED", ChunkTile(rows=37, cols=48, block=523))


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


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


# --- the numbers ------------------------------------------------------------------------------------------------------


def put_together(of_ranks: Sequence[Results]) -> Results:
    """The result of the whole vocabulary; what every rank has, each must have to the bit."""
    first, *others = of_ranks
    whole: Results = {}
    for name, value in first.items():
        if name in ROWS and value is not None:
            whole[name] = torch.cat([r[name] for r in of_ranks])  # type: ignore[misc]
            continue
        for other in others:
            mine = other[name]
            assert (value is None and mine is None) or torch.equal(value, mine), name  # type: ignore[arg-type]
        whole[name] = value
    return whole


@cache
def expected(name: str) -> tuple[Results, dict[str, Bound]]:
    s = scenarios()[name]
    return s.run(s.case.double(), "reference"), s.bounds()


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    s, got = scenarios()[name], put_together([r[name] for r in ranks])
    assert_all_close(got, *expected(name))
    if bool((s.case.targets == IGNORE_INDEX).all()):
        assert not any(value.any() for value in got.values() if value is not None)


@pytest.mark.op("linear_logprob_entropy")
@pytest.mark.parametrize(("name", "impl"), names("linear"))
def test_statistics_and_gradients(name: str, impl: str, ranks: list[dict[str, Any]]) -> None:
    check(name, ranks)


@pytest.mark.op("linear_group_loss")
@pytest.mark.parametrize(("name", "impl"), names("group"))
def test_a_group_loss(name: str, impl: str, ranks: list[dict[str, Any]]) -> None:
    check(name, ranks)


@pytest.mark.op("sega_loss")
@pytest.mark.parametrize(("name", "impl"), names("sega"))
def test_sega(name: str, impl: str, ranks: list[dict[str, Any]]) -> None:
    check(name, ranks)


def test_same_input_same_bits(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        for name in AGAIN:
            for key, value in of_rank[name].items():
                assert torch.equal(value, of_rank["again"][name][key]), (name, key)


@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors(name: str, ranks: list[dict[str, Any]]) -> None:
    s = Scenario(DTENSORS[name])
    gold, bounds = s.run(s.case.double(), "reference"), s.bounds()
    for of_rank in ranks:
        assert_all_close(of_rank["dtensors"][name], gold, bounds)


def test_an_unchecked_target_out_of_range_gives_nan_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    wrong = torch.arange(N) < 3
    for of_rank in ranks:
        got = of_rank["unchecked"]
        assert torch.equal(got["logprob"].isnan(), wrong)
        assert got["entropy"].isfinite().all() and got["lse"].isfinite().all()


# --- refusals: by every rank, so that none waits for one that is gone -------------------------------------------------

SAME = "ValueError: {} must be the same on all ranks of shard.group, got "
TILES = f"ValueError: the rows of the ranks of shard.group must be [0, total={V}) without gap or overlap, got [(0, "
REFUSALS = {
    "one rank's dtype": "hidden and weight must have one dtype",
    "a target": f"ValueError: targets must be in [0, V={V}) or ignore_index=-100, got {V} at token 1",
    "other targets": SAME.format("targets") + f"({N},) int64 of checksum ",
    "other tokens": SAME.format("hidden") + f"({N}, {D}) float32 without gradient on rank 0 and ({N - 1}, {D})",
    "a gradient on one rank": SAME.format("hidden") + f"({N}, {D}) float32 without gradient on rank 0 and ({N}, {D})",
    "other impl": SAME.format("impl") + "chunked on rank 0 and reference on rank ",
    "a bias on one rank": SAME.format("bias") + "none on rank 0 and some on rank ",
    "other groups": SAME.format("cu_groups") + "(3,) int64 of checksum ",
    "overlap": TILES,
    "gap": TILES,
    "beyond": "shard must satisfy 0 <= start <= start + rows of weight <= total, got start=",
    "plain hidden": "ValueError: weight is a DTensor (Shard(dim=0),) and hidden is not, so hidden does not say whether",
    "plain hidden, whole weight": "ValueError: weight is a DTensor (Replicate(),) and hidden is not, so hidden does not say",
    "whole weight": "ValueError: a vocabulary is spread over the ranks by placements (Shard(dim=0),) on a mesh of one",
    "split hidden": "ValueError: hidden must be placed (Replicate(),) on the mesh of weight, ",
    "whole bias": "ValueError: bias must be placed (Shard(dim=0),) on the mesh of weight, ",
    "plain weight": "ValueError: weight must be a DTensor where another argument is one, got Tensor",
    "dtensor and shard": "ValueError: shard is for plain tensors, the placements of DTensors say it",
    "of a plain tensor": "ValueError: VocabShard.of needs a DTensor, got Tensor",
    "of columns": "ValueError: a vocabulary is spread over the ranks by placements (Shard(dim=0),) on a mesh of one",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_every_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    of_ranks = [r["refusals"][name] for r in ranks]
    if name in ("one rank's dtype", "beyond"):  # the last rank's own error; the others say whose it is
        *others, last = of_ranks
        assert REFUSALS[name] in last and "of shard.group refused" not in last
        for message in others:
            assert message.startswith(
                f"ValueError: rank {len(ranks) - 1} of shard.group refused its arguments: {REFUSALS[name]}"
            )
        return
    for message in of_ranks:
        assert message.startswith(REFUSALS[name]), message
    assert len(set(of_ranks)) == 1
    assert set(ranks[0]["refusals"]) == set(REFUSALS)


# --- one rank, in this process ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("op", ["linear", "sega"])
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
    """Forward the statistics, backward what is a sum over the vocabulary, and of that what is needed."""
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
    if op != "linear":  # once a slab
        sent.clear()
        small = Scenario(plain, op, needs=(False, True, *[False] * 3), options={"cache_bytes": CACHES["slabs"]})
        small.run(plain, "chunked", alone)
        assert len(sent) > 1 and sum(shape[1] for _, shape in sent) == N
