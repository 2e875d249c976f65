"""The public surface: names, field order, immutability."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import gem_kernels
from gem_kernels import IGNORE_INDEX, GroupLoss, LogitTransform, Score, TokenStats, linear_logprob_entropy


def test_public_names_exist() -> None:
    for name in gem_kernels.__all__:
        assert getattr(gem_kernels, name) is not None
    assert sorted(gem_kernels.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)) == gem_kernels.__all__


def test_field_order_is_part_of_the_api() -> None:
    assert TokenStats._fields == ("logprob", "entropy", "lse", "max_logprob")
    assert GroupLoss._fields == ("loss", "stats")
    assert Score._fields == ("score", "final_entropy", "branch_entropy")
    assert IGNORE_INDEX == -100 == torch.nn.CrossEntropyLoss().ignore_index


def test_transform_is_a_frozen_value() -> None:
    transform = LogitTransform(softcap=30.0)
    assert transform == LogitTransform(softcap=30.0) and hash(transform) == hash(LogitTransform(softcap=30.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        transform.scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("targets", [[0, 1], [-100, 1], [-100, -100]], ids=str)
def test_one_result_type_for_every_input(dtype: torch.dtype, targets: list[int]) -> None:
    stats = linear_logprob_entropy(torch.ones(2, 3).to(dtype), torch.ones(4, 3).to(dtype), torch.tensor(targets))
    assert isinstance(stats, TokenStats)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(s.dtype == want and s.shape == (2,) for s in stats)
