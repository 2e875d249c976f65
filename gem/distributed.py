"""One model on several processes: FSDP2, which accelerate sets up, and work that the processes share.

    accelerate launch --config_file fsdp2.yaml -m gem train ...

FSDP2 keeps a part of each weight on each process, and gathers the weights of a layer while it runs. So a forward of a sharded
model is one of all processes: each must make it, as often as the others. What says "collective" here is called by all of them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from gem.launch import check_engine, check_several, fsdp_is_on, several

T = TypeVar("T")


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Return True for a model that FSDP2 has spread over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def awaits_shards(model: nn.Module) -> bool:
    """Return True for a model that accelerate has yet to shard: only the first process is sure to have its weights."""
    return fsdp_is_on() and not is_sharded(model)


def launched(device: str | None) -> Accelerator | None:
    """Return the accelerator of a command that trains nothing; None for one process.

    Args:
        device: the setting of that name.

    Raises:
        ValueError: from check_engine; or it names one device for several processes.
    """
    check_engine()
    check_several()
    if not several():
        return None
    count = int(os.environ["WORLD_SIZE"])
    if device not in (None, "cpu"):
        raise ValueError(f"device must be cpu, or left to the {count} processes of the launch, got {device!r}")
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    set_up_fsdp(accelerator)
    return accelerator


def loading_device(device: torch.device) -> torch.device:
    """Return where a model is loaded that goes to `device`: the CPU if FSDP2 moves it there layer by layer."""
    return torch.device("cpu") if fsdp_is_on() else device


def set_up_fsdp(accelerator: Accelerator) -> bool:
    """Have FSDP2, if it is asked for, keep gradients and outputs in fp32, and return True if it is.

    accelerate itself leaves processes on CPUs without FSDP, and rounds gradients and outputs to the dtype of the computation.

    Raises:
        ValueError: there are no devices for FSDP2.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU and fsdp_is_on():
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # type: ignore[attr-defined]
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and fsdp_is_on():
        raise ValueError(
            f"FSDP2 must have a GPU for each process, got {accelerator.device.type}: ACCELERATE_USE_CPU=true before the launch "
            "lets the processes run on CPUs"
        )
    if plugin is None:
        return False
    computed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    output = torch.float32 if computed else None  # without a cast of its inputs, the next layer needs them as they are
    plugin.mixed_precision_policy = MixedPrecisionPolicy(computed, torch.float32, output)
    return True


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model that is not trained, in place, as accelerate does with one that is. Collective."""
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model.requires_grad_(False))
    wake_up(sharded)
    return sharded


def wake_up(model: nn.Module) -> None:
    """Run a sharded model once, on two tokens: FSDP2 takes the module that runs first for the root. Collective.

    The weights that are the root's own stay whole, as what is inside a wrapper of peft needs them to be fused.
    """
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))


@contextmanager
def saved_whole(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a sharded model is saved whole by Trainer, whose save_model otherwise saves nothing with SHARDED_STATE_DICT."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a sharded model, in the dtype of the computation. Collective at its start.

    Within it the processes are independent: each may run the model as often as it likes, without gradients. An inner block
    does nothing.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in parameter_groups(unit)]
    before = [group.post_forward_mesh_info for group in groups]
    if all(group.is_unsharded and mesh is None for group, mesh in zip(groups, before, strict=True)):
        yield
        return
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # keep them after a forward
        for unit in units:
            unit.unshard()
        yield
    finally:
        reshard(model)
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
            # The next backward would gather what ran here, too, on each process something else.
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a forward without a backward has left: what is loaded or stepped next are the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def parameter_groups(unit: FSDPModule) -> list[Any]:
    """Return the parameter groups of a unit of FSDP2, which has at most one in older releases of torch."""
    state: Any = unit._get_fsdp_state()
    found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in found if group is not None]


def local_part(tensor: Any) -> Tensor:
    """Return this process's part of a DTensor; a plain tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole_norm(norms: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """Return the norm of all tensors together, from the norms of this process's parts of them. Collective if one is sharded.

    Args:
        norms: one scalar for the part of each tensor, none if there are no tensors.
        tensors: DTensors, each spread over all processes, or plain tensors that are the same on all of them.
    """
    if not norms:
        return 0.0
    sharded = [hasattr(tensor, "to_local") for tensor in tensors]
    together = torch.stack([norm.to(norms[0]) for norm in norms])
    if not any(sharded):
        return float(torch.linalg.vector_norm(together))
    squares = together.square()
    own = squares[torch.tensor(sharded, device=squares.device)].sum()
    dist.all_reduce(own)
    return float((own + squares[~torch.tensor(sharded, device=squares.device)].sum()).sqrt())


# --- shared work ------------------------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """Return (number of this process, number of all processes) of the process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def most(number: int) -> int:
    """Return the largest of the processes' numbers. Collective."""
    return max(gathered(number))


def gathered(own: T) -> list[T]:
    """Return what each process has, in their order. Collective."""
    _, count = processes()
    found: list[Any] = [own] * count
    if count > 1:
        dist.all_gather_object(found, own)
    return found


def _travels(error: Exception) -> bool:
    """Return True for an exception that can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def decided(decide: Callable[[], T]) -> T:
    """Return on every process what the first one decides, or raise its error. Collective."""
    rank, count = processes()
    verdict: list[Any] = [None, None]
    if rank == 0:
        try:
            verdict[0] = decide()
        except Exception as error:
            verdict[1] = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
    if count > 1:
        dist.broadcast_object_list(verdict)
    if verdict[1] is not None:
        raise verdict[1]
    result: T = verdict[0]
    return result
