"""A vocabulary spread over the ranks of a process group: everything that they say to one another.

Every rank holds some rows of the weight and the hidden states of all N tokens. What crosses the wire are the statistics of
its columns, 16 bytes a token, and the gradients that are sums over the vocabulary: dhidden (N, D), and (N, r) for an adapter.

`ranks` is the name of the group, as a torch operator takes no groups; "": one process holds all, and nothing is exchanged.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.types import LowRank, Operands, VocabShard
from gem_kernels.validation import check_linear

if TYPE_CHECKING:
    from gem_kernels.streaming import OnlineStats


IGNORED = -1
"""The ignore_index of local_targets: theirs are [0, rows], in which any other could lie."""


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def merge_(online: OnlineStats, ranks: str) -> None:
    """Statistics of this rank's columns -> of the whole vocabulary, in place.

    Every rank merges all of them in the order of the ranks: the same bits everywhere, and in every run.
    """
    if not ranks or not online.values.numel():
        return
    import torch.distributed as dist

    group = compat.process_group(ranks)
    mine = online.values.contiguous()  # (4, N)
    first, *others = parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    online.values.copy_(first)
    for part in others:
        *columns, target_logit = part
        online.merge(*columns)
        unseen = online.values[3].isnan()  # the target is among the columns of one rank at most
        online.values[3] = torch.where(unseen, target_logit, online.values[3])


def sum_(terms: Iterable[Tensor | None], ranks: str) -> None:
    """Each tensor -> its sum over the ranks, in place."""
    if not ranks:
        return
    import torch.distributed as dist

    for t in terms:
        if t is not None and t.numel():
            dist.all_reduce(t, group=compat.process_group(ranks))


def local_targets(targets: Tensor, ignore_index: int, rows: int, start: int) -> Tensor:
    """Indices in the whole vocabulary -> in this rank's rows, `rows` (out of range) where another rank has the target."""
    mine = (targets >= start) & (targets < start + rows)
    return torch.where(mine, targets - start, rows).masked_fill(targets == ignore_index, IGNORED)


class _WholeRows(torch.autograd.Function):
    """The rows of all ranks; what follows is computed by each of them, so the gradient of its own rows is a slice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: VocabShard) -> Tensor:
        ctx.mine = slice(shard.start, shard.start + rows.shape[0])
        whole = rows.new_zeros(shard.total, *rows.shape[1:])
        whole[ctx.mine] = rows
        sum_([whole], shard.group.group_name)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.mine], None


def whole(x: Operands, shard: VocabShard) -> Operands:
    """The operands of the whole vocabulary, on every rank: for the reference, which defines what the others compute."""

    def gathered(t: Tensor) -> Tensor:
        return _WholeRows.apply(t, shard)  # type: ignore[no-any-return]

    low = x.low_rank
    return Operands(
        x.hidden,
        gathered(x.weight),
        None if x.bias is None else gathered(x.bias),
        None if low is None else low._replace(b=gathered(low.b)),
    )


# --- DTensors ---------------------------------------------------------------------------------------------------------


def shard_of(weight: Tensor) -> VocabShard:
    """VocabShard.of."""
    if not compat.is_dtensor(weight):
        raise ValueError(f"VocabShard.of needs a DTensor, got {type(weight).__name__}")
    from torch.distributed.tensor import Shard

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            f"a vocabulary is spread over the ranks by placements (Shard(dim=0),) on a mesh of one dimension, "
            f"got {placements} on {mesh}"
        )
    return VocabShard(mesh.get_group(), compat.first_row(weight), weight.shape[0])


def local_parts(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LowRank | None, VocabShard | None]:
    """DTensors on the mesh of the weight -> this rank's parts of them, and where its rows stand."""
    from torch.distributed.tensor import Replicate, Shard

    if shard is not None:
        raise ValueError(
            "shard is for plain tensors, the placements of DTensors say it: leave it out, or pass .to_local()"
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
    shard, mesh = shard_of(weight), weight.device_mesh  # type: ignore[attr-defined]

    def local(name: str, t: Any, placement: Any) -> Any:
        """A plain tensor is this rank's part already. Gradients have the placement of what they are gradients of."""
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


# --- checks that the ranks do together: one that raised alone would leave the others waiting for it ---------------------


def check_linear_together(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    ignore_index: int,
    shard: VocabShard,
    agreed: Mapping[str, object],
) -> None:
    """check_linear on all ranks, or none passes; what they must agree on, they do; their rows are the vocabulary."""
    import torch.distributed as dist

    refusal, rows, facts = None, 0, dict(agreed)
    try:
        check_linear(hidden, weight, targets, bias, low_rank, ignore_index, shard)
    except (TypeError, ValueError) as error:
        refusal = error
    else:
        rows = weight.shape[0]
        facts |= {"hidden": _kind(hidden), "targets": targets, "bias": "none" if bias is None else "some"}
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
    """What decides how often, and in which sizes, the ranks exchange."""
    gradient = "with" if t.requires_grad and torch.is_grad_enabled() else "without"
    return f"{tuple(t.shape)} {t.dtype} {gradient} gradient".replace("torch.", "")


def _checksum(t: Tensor) -> str:
    values = t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(t.shape)} {t.dtype} of checksum {zlib.crc32(values):08x}".replace("torch.", "")
