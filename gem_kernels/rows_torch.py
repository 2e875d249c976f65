"""The row functions of a tile of logits in torch operations: prepare, update, gradient (rows_triton.py has them as kernels).

They walk the tile in blocks that stay in the level-2 cache: each block is passed over several times, memory only once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels.plan import ranges
from gem_kernels.softmax import FLOOR, TARGET, RowGradient, State, Transform
from gem_kernels.tiles import CHUNKED


def prepare(z: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    """Turn products z (N, C) into transformed logits, in place; the other two functions expect prepared logits."""
    if bias is not None:
        z.add_(bias.float())
    return transform.apply_(z)


def update(z: Tensor, bias: Tensor | None, state: State, first_col: int, transform: Transform) -> None:
    """Update the state with prepared logits z (N, C) of the columns from first_col on; z stays as it is."""
    columns = z.shape[1]
    step = max(1, CHUNKED.block // columns)
    shifted_buffer, exp_buffer = z.new_empty(step * columns), z.new_empty(step * columns)
    maximum, total, weighted = z.new_empty(3, z.shape[0])
    for at in ranges(z.shape[0], step):
        zb = z[at]
        shifted, exps = (b[: zb.numel()].view_as(zb) for b in (shifted_buffer, exp_buffer))
        torch.amax(zb, 1, out=maximum[at])
        # Clamped, as a row of -inf logits would give -inf - -inf.
        torch.sub(zb, maximum[at, None].clamp_(min=torch.finfo(z.dtype).min), out=shifted).clamp_(min=FLOOR)
        torch.sum(torch.exp(shifted, out=exps), 1, out=total[at])
        torch.sum(exps.mul_(shifted), 1, out=weighted[at])
    state.merge_sums_(maximum, total, weighted)
    hit, column = _target_columns(state.targets, first_col, columns)
    state.values[TARGET, hit] = z[hit, column]


def gradient(
    z: Tensor, bias: Tensor | None, gradient: RowGradient, first_col: int, transform: Transform, out: Tensor
) -> Tensor:
    """Write dL/d(raw logits) (N, C) of the columns from first_col on to `out`, which may be z; prepared z is overwritten."""
    maximum, at_target, constant, *slope = gradient.values
    for at in ranges(z.shape[0], max(1, CHUNKED.block // z.shape[1])):
        zb = z[at]
        derivative = transform.slope(zb) if transform.softcap else None
        zb.sub_(maximum[at, None])
        if slope:
            exps = zb.exp()
            zb.clamp_(min=FLOOR).mul_(slope[0][at, None]).add_(constant[at, None]).mul_(exps)
        else:
            zb.exp_().mul_(constant[at, None])
        if derivative is not None:
            zb.mul_(derivative)
    hit, column = _target_columns(gradient.targets, first_col, z.shape[1])
    z[hit, column] = at_target[hit]
    return z if out is z else out.copy_(z)


def _target_columns(targets: Tensor, first_col: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose target lies in this tile, and its column within the tile."""
    column = targets.long() - first_col
    hit = ((column >= 0) & (column < columns)).nonzero().squeeze(1)
    return hit, column[hit]
