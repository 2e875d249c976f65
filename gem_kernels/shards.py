"""A vocabulary spread over the ranks of a process group: the parts of DTensors, and the checks that the ranks do together.

A rank that raised alone would leave the others waiting, so all ranks report to one another and raise together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.types import LowRank, VocabShard
from gem_kernels.validation import check_linear


def local_parts(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LowRank | None, VocabShard | None]:
    """Replace DTensors on the mesh of the weight by this rank's parts, and return the shard that they form."""
    from torch.distributed.tensor import Replicate, Shard

    if shard is not None:
        raise ValueError(
            "shard is for plain tensors, DTensor placements already describe it: leave it out, or pass .to_local()"
        )
    if not compat.is_dtensor(weight):
        raise ValueError(f"weight must be a DTensor where another argument is one, got {type(weight).__name__}")
    placements: Sequence[Any] = weight.placements  # type: ignore[attr-defined]
    if not compat.is_dtensor(hidden):
        raise ValueError(
            f"weight is a DTensor {placements} and hidden is not, so hidden does not say whether every rank has the same "
            "tokens: in tensor parallelism it has, under FSDP2, which places weights Shard(0) too, it has not. For tensor "
            "parallelism pass hidden as a DTensor (DTensor.from_local(hidden, weight.device_mesh, [Replicate()])), or "
            "weight.to_local() with shard=VocabShard.of(weight); under FSDP2 pass weight.full_tensor()"
        )
    shard, mesh = VocabShard.of(weight), weight.device_mesh  # type: ignore[attr-defined]

    def local(name: str, t: Any, placement: Any) -> Any:
        """Return this rank's part: a plain tensor as it is, a DTensor of this placement, which its gradient gets too."""
        if not compat.is_dtensor(t):
            return t
        if t.device_mesh != mesh or t.placements != (placement,):
            raise ValueError(
                f"{name} must be placed {(placement,)} on the mesh of weight, {mesh}, got {t.placements} on {t.device_mesh}"
            )
        return t.to_local()

    if isinstance(low_rank, LowRank):
        low_rank = low_rank._replace(
            a=local("low_rank.a", low_rank.a, Replicate()), b=local("low_rank.b", low_rank.b, Shard(0))
        )
    return (
        local("hidden", hidden, Replicate()),
        local("weight", weight, Shard(0)),
        local("targets", targets, Replicate()),
        local("bias", bias, Shard(0)),
        low_rank,
        shard,
    )


def check_linear_together(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    ignore_index: int | None,
    shard: VocabShard,
    agreed: Mapping[str, object],
) -> None:
    """Run check_linear on all ranks, compare the values that must agree, and check that the rows make up the vocabulary.

    All ranks pass, or all raise.
    """
    import torch.distributed as dist

    refusal, rows, facts = None, 0, dict(agreed)
    try:
        check_linear(hidden, weight, targets, bias, low_rank, ignore_index, shard)
    except (TypeError, ValueError) as error:
        refusal = error
    else:
        rows = weight.shape[0]
        facts |= {"hidden": _kind(hidden), "targets": targets, "bias": "none" if bias is None else "some"}
        facts |= {"weight": _gradient(weight)}
        facts |= {"low_rank.a": None if low_rank is None else _kind(low_rank.a)}
        facts |= {"ignore_index": ignore_index, "shard.total": shard.total}
    told = {name: _checksum(fact) if isinstance(fact, Tensor) else str(fact) for name, fact in facts.items()}
    reports: list[Any] = [None] * shard.group.size()
    dist.all_gather_object(reports, (refusal and str(refusal), (shard.start, shard.start + rows), told), shard.group)
    if refusal is not None:
        raise refusal
    for rank, (message, _, _) in enumerate(reports):
        if message is not None:
            raise ValueError(f"rank {rank} of shard.group refused its arguments: {message}")
    for rank, (_, _, others) in enumerate(reports):
        for name, fact in reports[0][-1].items():
            if others[name] != fact:
                raise ValueError(
                    f"{name} must be the same on all ranks of shard.group, got {fact} on rank 0 and {others[name]} on "
                    f"rank {rank}"
                )
    ranges = [own for _, own, _ in reports]
    held = sorted(own for own in ranges if own[0] < own[1])
    if [0, *(stop for _, stop in held)] != [*(start for start, _ in held), shard.total]:
        raise ValueError(
            f"the rows of the ranks of shard.group must be [0, total={shard.total}) without gap or overlap, got {ranges}"
        )


def _kind(t: Tensor) -> str:
    """Describe what decides how often, and in which sizes, the ranks exchange."""
    return f"{tuple(t.shape)} {t.dtype} {_gradient(t)}".replace("torch.", "")


def _gradient(t: Tensor) -> str:
    return "with gradient" if t.requires_grad and torch.is_grad_enabled() else "without gradient"


def _checksum(t: Tensor) -> str:
    values = t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(t.shape)} {t.dtype} of checksum {zlib.crc32(values):08x}".replace("torch.", "")
