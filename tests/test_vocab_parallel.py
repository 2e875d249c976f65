"""A vocabulary spread over 2 and 4 processes: statistics, losses and gradients of one process; refusals on all, never a hang.

The processes (vocab_ranks.py) are started once for each number of them. The tests hold their results against the one-process
reference by the rule of numerics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from bounds import Bound
from group_losses import D, N, V
from numerics import assert_all_close, assert_same
from vocab_ranks import AGAIN, DTENSORS, Results, Scenario, names, process, scenarios

from gem_kernels import IGNORE_INDEX

WORLDS = (2, 4)
ROWS = ("dweight", "dbias", "db")  # gradients of a rank's own rows


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


# --- the numbers ------------------------------------------------------------------------------------------------------


def put_together(of_ranks: Sequence[Results]) -> Results:
    """Return the result of the whole vocabulary; a result that every rank has must be the same to the bit."""
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
            assert_same(of_rank["again"][name], of_rank[name])


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


# --- refusals: every rank raises, so that none waits for another -------------------------------------------------

SAME = "ValueError: {} must be the same on all ranks of shard.group, got "
TILES = f"ValueError: the rows of the ranks of shard.group must be [0, total={V}) without gap or overlap, got [(0, "
REFUSALS = {
    "one rank's dtype": "hidden and weight must have one dtype",
    "a target": f"ValueError: targets must be in [0, V={V}) or ignore_index=-100, got {V} at token 1",
    "other targets": SAME.format("targets") + f"({N},) int64 of checksum ",
    "other tokens": SAME.format("hidden") + f"({N}, {D}) float32 without gradient on rank 0 and ({N - 1}, {D})",
    "a gradient on one rank": SAME.format("hidden") + f"({N}, {D}) float32 without gradient on rank 0 and ({N}, {D})",
    "a frozen head on one rank": SAME.format("weight") + "with gradient on rank 0 and without gradient on rank ",
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
    "dtensor and shard": "ValueError: shard is for plain tensors, DTensor placements already describe it",
    "of a plain tensor": "ValueError: VocabShard.of needs a DTensor, got Tensor",
    "of columns": "ValueError: a vocabulary is spread over the ranks by placements (Shard(dim=0),) on a mesh of one",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_every_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    of_ranks = [r["refusals"][name] for r in ranks]
    if name in ("one rank's dtype", "beyond"):  # the last rank's own error; the others name the rank
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
