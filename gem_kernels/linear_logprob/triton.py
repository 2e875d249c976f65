"""linear_logprob_entropy by the fused kernels: 2NDV FLOP forward, 2NDV + 4NDV backward, logits in registers only.

Where tokens can be ignored, forward sorts them behind the others and leaves their number on the device. Backward reads that
number back, once, because the GEMM library has to know it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gem_kernels import fused
from gem_kernels.gradients import Gradients
from gem_kernels.operands import Operands, Upstream
from gem_kernels.softmax import RowGradient, Transform
from gem_kernels.tokens import Kept


def forward(x: Operands, targets: Tensor, transform: Transform, ignore_index: int | None) -> Tensor:
    """Return the state of every token (len(STATE), M) fp32; the columns of ignored tokens are undefined."""
    return fused.launch_forward(x, targets, ignore_index, transform)


def backward(
    x: Operands,
    targets: Tensor,
    state: Tensor,
    upstream: Upstream,
    transform: Transform,
    ignore_index: int | None,
    needed: Sequence[bool],
    ranks: str,
) -> list[Tensor | None]:
    """Return the gradients (hidden, weight, bias, a, b), None where not needed."""
    kept = Kept.compacted(targets, ignore_index)
    mine = x._replace(hidden=kept.take(x.hidden))
    gradient = RowGradient.of(kept.state(targets, state), kept.upstream(upstream), transform)
    gradients = Gradients(mine, needed, passes=1)
    gradients.accumulate(fused.FusedTiles(mine, transform), gradient)
    dhidden, *others = gradients.finish(ranks)
    return [None if dhidden is None else kept.put(dhidden), *others]
