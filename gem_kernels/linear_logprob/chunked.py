"""linear_logprob_entropy through one tile of logits: 2NDV FLOP forward, 2NDV + 4NDV backward (the logits once more).

On CUDA nothing is read back from the device, so ignored tokens are computed and come out as zeros; elsewhere they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gem_kernels import compat
from gem_kernels.gradients import Gradients
from gem_kernels.logit_tiles import LogitTiles
from gem_kernels.operands import Operands, Upstream
from gem_kernels.softmax import RowGradient, Transform
from gem_kernels.tokens import Kept


def _kept(targets: Tensor, ignore_index: int | None) -> Kept:
    return (Kept.masked if compat.on_triton(targets.device) else Kept.compacted)(targets, ignore_index)


def forward(x: Operands, targets: Tensor, transform: Transform, ignore_index: int | None) -> Tensor:
    """Return the state of every token (len(STATE), M) fp32; the columns of ignored tokens are undefined."""
    kept = _kept(targets, ignore_index)
    tiles = LogitTiles(x._replace(hidden=kept.take(x.hidden)), transform)
    state = tiles.statistics(kept.rows(targets)).values
    return state if kept.at is None else kept.put(state.t()).t().contiguous()


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
    kept = _kept(targets, ignore_index)
    mine = x._replace(hidden=kept.take(x.hidden))
    gradient = RowGradient.of(kept.state(targets, state), kept.upstream(upstream), transform)
    gradients = Gradients(mine, needed, passes=1)
    gradients.accumulate(LogitTiles(mine, transform), gradient)
    dhidden, *others = gradients.finish(ranks)
    return [None if dhidden is None else kept.put(dhidden), *others]
