"""Choice of the implementation that serves a call: only "auto" chooses, an explicit impl never falls back."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import torch
from torch import Tensor

from gem_kernels.compat import HAS_TRITON, on_triton
from gem_kernels.types import Impl

# Off CUDA `chunked` is fastest. On CUDA the choice comes from counting bytes until it is measured (docs/costs.md): a GEMM
# library beats our own GEMM, and one launch that reads everything once beats several.
_ON_CUDA: dict[str, Impl] = {"logprob_entropy": "triton", "topm_mean": "triton", "gem_score": "triton"}


def choose_impl(op: str, impl: str, source: Tensor) -> Impl:
    """Resolve `impl` for an op whose inputs have the dtype and the device of `source`.

    "auto" means `chunked`, on CUDA `triton` for the ops without a GEMM, and the reference for fp64.

    Raises:
        ValueError: unknown impl, or one that cannot serve the call; the message lists those that can.
    """
    known = get_args(Impl)
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    fp64 = source.dtype == torch.float64
    able: list[Impl] = ["reference"] if fp64 else ["reference", "chunked"]
    if not fp64 and on_triton(source.device):
        able.append("triton")
    if impl == "auto":
        if source.device.type == "cuda" and "triton" in able:
            return _ON_CUDA.get(op, "chunked")
        return "reference" if fp64 else "chunked"
    for candidate in able:
        if impl == candidate:
            return candidate
    if fp64:
        reason = "it computes in fp32"
    elif not HAS_TRITON:
        reason = "triton is not installed"
    else:
        reason = f"Triton kernels need CUDA tensors, or TRITON_INTERPRET=1 on the CPU, and these are on {source.device}"
    raise ValueError(f"impl={impl!r} cannot serve {op} on {source.dtype}: {reason}; these can: {', '.join(able)}")


def implementation(package: str, impl: str) -> Any:
    """Import gem_kernels.<package>.<impl> on first use, because a `triton` module imports triton."""
    return import_module(f"gem_kernels.{package}.{impl}")
