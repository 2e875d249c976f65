"""A second device for machines that have none, and a script that runs commands of gem on it, for test_device.py.

Its tensors report the device `second:0` and keep their numbers on the CPU. Mixing them with tensors of the CPU raises, as on
CUDA. torch knows the device for the rest of the process, so this file runs in a process of its own:

    python tests/second_device.py '[["doctor", "cfg/config.json", "--device", "second"], ...]'

prints, as JSON, for each command its status, the devices of all weights that a linear layer used, and what it printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "second"
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor of the second device. raw: its numbers, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.raw!r})"


class SecondDevice(TorchDispatchMode):
    """Inside, torch computes on the second device too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, Elsewhere)]
    device = kwargs.get("device")
    place = bool(there) if device is None else torch.device(device).type == NAME
    if not there and not place:
        return func(*args, **kwargs)
    if there and func not in MOVES:
        mixed = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, Elsewhere) and t.ndim]
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, {func} got cpu and {NAME}:0")
    if func is torch.ops.aten._fused_sdp_choice.default:
        return 0  # plain attention: fused kernels are chosen by the name of the device
    cpu = [
        t.raw if isinstance(t, Elsewhere) else torch.device("cpu") if isinstance(t, torch.device) else t for t in flat
    ]
    raw_args, raw_kwargs = tree_unflatten(cpu, spec)
    out = func(*raw_args, **raw_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    known = {id(t.raw): t for t in there}  # a tensor changed in place keeps its identity

    def back(result: Any) -> Any:
        if not isinstance(result, Tensor) or not place:
            return result
        return known[id(result)] if id(result) in known else Elsewhere(result)

    return tree_map(back, out)


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def register() -> torch.library.Library:
    """Register the device with torch. Keep the returned library alive."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `.to` unties the weights of a tensor subclass
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL")

    # torch.tensor(..., device=) passes by the dispatch mode.
    def empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Elsewhere(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Tensor:
        getattr(target, "raw", target).copy_(getattr(source, "raw", source))
        return target  # type: ignore[no-any-return]

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def run_commands(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run the commands; return status, devices and output of each."""
    import gem.head.adapters
    from gem import cli
    from gem.trainer import GEMTrainer

    # A head whose weight is a subclass of Tensor is refused as quantised; on a GPU it is no subclass.
    gem.head.adapters.type = lambda t: nn.Parameter if isinstance(t, Elsewhere) else type(t)  # type: ignore[attr-defined]
    GEMTrainer.save_model = lambda self, *_: None  # type: ignore[assignment, method-assign]  # there is no storage to write
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"  # the Trainer's device
    seen: set[str] = set()

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            seen.add(str(module.weight.device))

    nn.modules.module.register_module_forward_pre_hook(note)
    results = []
    for command in commands:
        seen.clear()
        printed = io.StringIO()
        with SecondDevice(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = cli.main(command)
        results.append({"status": status, "devices": sorted(seen), "printed": printed.getvalue()})
    return results


def mixing_raises() -> bool:
    """True if the device behaves like one: mixing its tensors with those of the CPU raises."""
    with SecondDevice():
        layer = nn.Linear(2, 2).to(NAME)
        assert layer(torch.ones(1, 2, device=NAME)).cpu().shape == (1, 2)
        try:
            layer(torch.ones(1, 2))
        except RuntimeError:
            return True
    return False


if __name__ == "__main__":
    library = register()
    print(json.dumps({"mixing raises": mixing_raises(), "commands": run_commands(json.loads(sys.argv[1]))}))
