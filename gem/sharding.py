"""Shard a model without memory as accelerate shards it under FSDP2, and read off what one device holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gem.distributed import local_part, parameter_groups
from gem.launch import alone


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together.

    kept: they stay gathered from the forward to the backward. embedding: they are the input embeddings alone.
    """

    numel: int
    trained: int
    kept: bool
    embedding: bool = False


@dataclass(frozen=True)
class Shards:
    """What one device keeps of a model, from the first rank, whose parts are the largest.

    local: bytes of its parameters. trained: bytes of those that are trained, in the dtype of the optimizer's state; largest: of
    the largest of them. units: what FSDP gathers; none without FSDP.
    numel, numel_trained: parameters of the whole model, on all devices.
    """

    local: int
    trained: int
    largest: int
    numel: int
    numel_trained: int
    units: tuple[Unit, ...] = ()


def shards_of(
    model: Any, processes: int = 1, fsdp: Mapping[str, str] | None = None, *, masters: bool = False
) -> Shards:
    """Return what the first of so many devices keeps. With FSDP, the model is sharded in place.

    Args:
        model: a transformers model, or a peft model around one, on the meta device.
        processes: one a device.
        fsdp: the variables FSDP_* of accelerate; None or none: each device has the whole model.
        masters: True if trained parameters become fp32, as accelerate has it in mixed precision; frozen ones stay.
    """
    numel = sum(p.numel() for p in model.parameters())
    numel_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    units: tuple[Unit, ...] = ()
    if not fsdp:
        return Shards(*_held(model), numel, numel_trained)
    with _fake_group(processes) as mesh:
        _shard(model, mesh, fsdp, "bf16" if masters else "no")
        held, units = _held(model), tuple(_units(model))
    return Shards(*held, numel, numel_trained, units)


def _held(model: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of the local parameters, of those that are trained, and of the largest of these."""
    sizes = []
    for parameter in model.parameters():
        local = local_part(parameter)
        sizes.append((local.numel() * local.element_size(), parameter.requires_grad))
    trained = [size for size, of_optimizer in sizes if of_optimizer]
    return sum(size for size, _ in sizes), sum(trained), max(trained, default=0)


@contextmanager
def _fake_group(processes: int) -> Iterator[Any]:
    """Return a mesh of so many devices whose collectives do nothing; no process is started, none is waited for.

    Raises:
        ValueError: this process belongs to a real group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a dry run must be one process without a process group, got one that torch has started")
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (processes,), mesh_dim_names=("dp_shard_cp",))
    finally:
        dist.destroy_process_group()


def _shard(model: nn.Module, mesh: Any, fsdp: Mapping[str, str], mixed_precision: str) -> None:
    """Call what accelerate calls in `prepare`, with the plugin that it makes of its variables."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # Loading and checkpointing change no shard: without weights there is nothing to broadcast.
    with alone(**{**fsdp, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}):
        plugin = FullyShardedDataParallelPlugin()
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=mesh,
            parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard_cp"]),
            mixed_precision=mixed_precision,
            is_main_process=False,  # its log would need a real Accelerator
            device=torch.device("cpu"),
        )
        fsdp2_prepare_model(accelerator, model)


def _units(model: Any) -> Iterator[Unit]:
    from torch.distributed.fsdp import FSDPModule

    embedding = model.get_input_embeddings()
    seen: set[int] = set()
    for module in model.modules():
        for group in parameter_groups(module) if isinstance(module, FSDPModule) else ():
            if id(group) in seen:  # a unit may consist of several modules
                continue
            seen.add(id(group))
            sizes = [(math.prod(p._orig_size), p.sharded_param.requires_grad) for p in group.fsdp_params]
            kept = not group._reshard_after_forward
            first = module is embedding and not kept
            yield Unit(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), kept, first)
