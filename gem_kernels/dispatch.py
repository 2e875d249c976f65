"""Which implementation serves a call. "auto" is the only rule that chooses; an explicit impl never falls back."""

from __future__ import annotations

from typing import get_args

import torch

from gem_kernels.types import Impl


def choose_impl(op: str, impl: str, dtype: torch.dtype) -> Impl:
    """Resolve `impl` for an op on tensors of `dtype`.

    auto is `chunked`, except for fp64, which only the reference computes in fp64. (Measured on CPU: chunked is the faster
    one from a few hundred vocabulary entries on, see benchmarks.)

    Raises:
        ValueError: unknown impl, or one that cannot serve the call; the message lists those that can.
    """
    known = get_args(Impl)
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    able: tuple[Impl, ...] = ("reference",) if dtype == torch.float64 else ("reference", "chunked")
    if impl == "auto":
        return able[-1]
    for candidate in able:
        if impl == candidate:
            return candidate
    reason = "it computes in fp32" if impl == "chunked" else "this release has no Triton kernel for it"
    raise ValueError(f"impl={impl!r} cannot serve {op} on {dtype}: {reason}; these can: {', '.join(able)}")
