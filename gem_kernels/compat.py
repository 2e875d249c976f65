"""Differences between versions of torch and triton, devices, and the interpreter; only this module depends on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""True if kernels run as NumPy on CPU tensors. triton reads the variable when a kernel's module is imported: set it before."""

# Before torch 2.10, addmm(out_dtype=) wants an accumulator of the operands' dtype, not of the result's.
_ADDMM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)

_compile: Callable[..., None] | None = None
_compile_arch = _compile_processors = 0


def _on_cuda(device: torch.device) -> bool:
    """True for a CUDA device, and for the meta device while kernels are compiled: what follows is what CUDA would do."""
    return device.type == "cuda" or (_compile is not None and device.type == "meta")


def on_triton(device: torch.device) -> bool:
    """True if Triton kernels can read tensors of this device, or of the meta device while kernels are compiled."""
    return HAS_TRITON and (_on_cuda(device) or INTERPRETED)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def arch(device: torch.device) -> int:
    """Return the compute capability, 90 for sm_90; 0 for the interpreter."""
    if _compile is not None:
        return _compile_arch
    return _capability(device) if device.type == "cuda" else 0


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 2 for the interpreter, so that kernels are split there too."""
    if _compile is not None:
        return _compile_processors
    return _processors(device) if device.type == "cuda" else 2


@contextmanager
def compiling(arch: int, compile_kernel: Callable[..., None], processors: int = 132) -> Iterator[None]:
    """Hand every launch, as (kernel, grid, args, meta), to `compile_kernel` for sm_<arch> instead of running it.

    processors: streaming multiprocessors of the device for which launches are planned.
    """
    global _compile, _compile_arch, _compile_processors
    before = _compile, _compile_arch, _compile_processors
    _compile, _compile_arch, _compile_processors = compile_kernel, arch, processors
    try:
        yield
    finally:
        _compile, _compile_arch, _compile_processors = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch kernel[grid](*args, **meta) on the device of the first tensor, which need not be the current one."""
    if _compile is not None:
        _compile(kernel, grid, args, meta)
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    # Triton launches on the current device. To enter a context costs the host microseconds, so only where it is another one.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **meta)


def takes_descriptors(*tensors: Tensor) -> bool:
    """True if the copy engine (TMA) can read tiles of these matrices: Hopper or later, dense rows, apart by 16 bytes."""
    import triton.language as tl

    def apart(t: Tensor) -> int:  # the interpreter of triton 3.4 counts elements
        return t.stride(0) * (1 if INTERPRETED else t.element_size())

    return hasattr(tl, "make_tensor_descriptor") and all(
        (arch(t.device) >= 90 or INTERPRETED)
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and apart(t) % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def allow_descriptors(device: torch.device) -> None:
    """Give triton a workspace for descriptors that a kernel builds; call it in every thread that launches one.

    triton allocates the workspace during the launch, when the current device is the kernel's. The allocator is global, so
    kernels of other libraries may use it too.
    """
    if _compile is None and device.type == "cuda":
        import triton

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def process_group(name: str) -> Any:
    """Return the ProcessGroup with this `group_name`."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def is_dtensor(t: object) -> bool:
    """True for a DTensor, without the half second that importing torch.distributed.tensor takes."""
    return hasattr(t, "device_mesh") and hasattr(t, "placements")


def gemm_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype in which the GEMM library multiplies t into fp32: its own on CUDA, fp32 elsewhere."""
    return t.dtype if _on_cuda(t.device) else torch.float32


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a b to fp32 `out`: exact products, fp32 sums, no rounding to the operands' dtype.

    fp32 operands follow torch.set_float32_matmul_precision as everywhere: unless "highest", the products are TF32, or bf16
    for "medium" on a CPU with AMX.
    """
    if _on_cuda(a.device) and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to fp32 `out` with exact products and fp32 sums."""
    if _on_cuda(a.device) and a.dtype != torch.float32:
        if _ADDMM_WIDENS:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return out.add_(torch.mm(a, b, out_dtype=torch.float32))
    return out.addmm_(a.float(), b.float())
