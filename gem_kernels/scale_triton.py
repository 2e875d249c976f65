"""A tensor times a number on the device, in place. A 1, the usual gradient of a loss, costs neither a pass nor a wait."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat

_BLOCK = 2048  # 16 elements for each thread of four warps: one or two loads
_PER_PROCESSOR = 8  # programs; they walk the tensor, so that few begin in vain


@triton.jit
def _scale_kernel(t_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # so is NaN
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, n, step):
            at = start + tl.arange(0, BLOCK)
            t = tl.load(t_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(t_ptr + at, (t * factor).to(t_ptr.dtype.element_ty), mask=at < n)


def scale_(t: Tensor, factor: Tensor) -> None:
    """Multiply a dense tensor by factor (), on the same device: in fp32, rounded once."""
    programs = min(triton.cdiv(t.numel(), _BLOCK), _PER_PROCESSOR * compat.processors(t.device))
    compat.launch(_scale_kernel, (programs,), t, factor, t.numel(), BLOCK=_BLOCK)
