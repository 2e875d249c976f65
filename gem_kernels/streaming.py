"""The vocabulary streamed through one tile of logits: the torch engine under every `chunked` implementation.

Three steps, each once: a tile of logits, the online statistics of its rows, the gradient of its rows. The row steps walk
the tile in blocks that stay in the level-2 cache: one block is passed over several times, memory only once.

N tokens (ignored ones already dropped), D hidden size, V vocabulary, r rank of the adapter. All arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels.tiles import CHUNKED
from gem_kernels.types import LogitTransform, Operands, TokenStats, Upstream

# exp(-87) is the smallest normal fp32 number. Flooring z - max there moves a row's sum by less than V * 2e-38, far below
# its rounding, and it keeps -inf logits (masked or padded vocabulary) from giving 0 * inf.
_FLOOR = -87.0


def ranges(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def apply_transform_(z: Tensor, transform: LogitTransform) -> Tensor:
    """z' = cap tanh(scale z / cap) / temperature, in place."""
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
    elif transform.scale != transform.temperature:
        z.mul_(transform.scale / transform.temperature)
    return z


def _transform_slope(z: Tensor, transform: LogitTransform) -> Tensor | float:
    """dz'/dz as a function of z': scale (1 - (z' / limit)^2) / temperature with limit = cap / temperature.

    As (limit - z') (limit + z'): near saturation that difference is exact, where 1 - tanh^2 would lose its last digits.
    """
    factor = transform.scale / transform.temperature
    if transform.softcap is None:
        return factor
    limit = transform.softcap / transform.temperature
    return (limit - z).mul_(z + limit).mul_(factor / limit**2)


class OnlineStats(NamedTuple):
    """Running maximum m, sum s = Σ e^(z-m), weighted sum t = Σ e^(z-m)(z-m) and target logit of N rows.

    A tile with maximum m' moves (m, s, t) to the new maximum M = max(m, m'): s e^(m-M), e^(m-M) (t + (m-M) s).
    """

    targets: Tensor
    maximum: Tensor
    total: Tensor
    weighted: Tensor
    target_logit: Tensor

    @staticmethod
    def start(targets: Tensor) -> OnlineStats:
        n, device = targets.shape[0], targets.device
        lowest = torch.full((n,), torch.finfo(torch.float32).min, device=device)
        unseen = torch.full((n,), float("nan"), device=device)  # so a target out of range gives NaN
        return OnlineStats(targets, lowest, torch.zeros(n, device=device), torch.zeros(n, device=device), unseen)

    def update(self, z: Tensor, rows: slice, first_col: int) -> None:
        """Take in logits z (R, C) fp32 of these rows and of the columns from first_col on; z is left as it is."""
        columns = z.shape[1]
        step = max(1, CHUNKED.block // columns)
        shifted_buffer, exp_buffer = z.new_empty(step * columns), z.new_empty(step * columns)
        for block in ranges(z.shape[0], step):
            zb = z[block]
            at = slice(rows.start + block.start, rows.start + block.stop)
            shifted, exps = (b[: zb.numel()].view_as(zb) for b in (shifted_buffer, exp_buffer))
            old = self.maximum[at]
            new = torch.maximum(old, zb.amax(1))
            torch.sub(zb, new[:, None], out=shifted).clamp_(min=_FLOOR)
            torch.exp(shifted, out=exps)
            drop = (old - new).clamp_(min=_FLOOR)
            decay = drop.exp()
            self.weighted[at] = decay * (self.weighted[at] + drop * self.total[at])
            self.total[at] = decay * self.total[at] + exps.sum(1)
            self.weighted[at] += exps.mul_(shifted).sum(1)
            self.maximum[at] = new
        hit, column = target_columns(self.targets[rows], first_col, columns)
        self.target_logit[rows.start + hit] = z[hit, column]

    def finish(self) -> TokenStats:
        """log p = (z_y - m) - log s; H = log s - t / s: both shifted, so nothing cancels at large |z|."""
        log_total = self.total.log()
        return TokenStats(
            logprob=(self.target_logit - self.maximum) - log_total,
            entropy=log_total - self.weighted / self.total,
            lse=self.maximum + log_total,
        )


def target_columns(targets: Tensor, first_col: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in this tile, and its column within the tile."""
    column = targets.long() - first_col
    hit = ((column >= 0) & (column < columns)).nonzero().squeeze(1)
    return hit, column[hit]


class LogitGradient:
    """dL/dz of N rows for upstream a = dL/dlogprob, b = dL/dH, c = dL/dlse.

    dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H) + c p_v, times the transform's derivative. With d = z - m this is
    p̃ (α + β d), p̃ = e^d, where α = (c - a + b (log s - H)) / s and β = -b / s: no pass over the row normalises it.
    The target's entry is a (1 - p_y) = -a expm1(log p_y), which keeps its digits when p_y -> 1.
    """

    def __init__(self, online: OnlineStats, upstream: Upstream, transform: LogitTransform) -> None:
        stats = online.finish()
        zero = torch.zeros_like(stats.logprob)
        a, b, c = (zero if g is None else g.float() for g in upstream)
        log_total, probability = online.total.log(), stats.logprob.exp()
        self.online, self.transform = online, transform
        self.constant = (c - a + b * (log_total - stats.entropy)) / online.total
        self.slope = None if upstream.entropy is None else -b / online.total
        log_p = stats.logprob.clamp_min(_FLOOR)  # a target of probability 0: p log p is 0, not 0 * -inf
        self.at_target = (c - b * (log_p + stats.entropy)) * probability - a * stats.logprob.expm1()
        self.at_target *= _transform_slope(online.target_logit, transform)
        if transform.softcap is None:  # then the derivative is one number, folded into the row's coefficients
            factor = transform.scale / transform.temperature
            self.constant *= factor
            self.slope = None if self.slope is None else self.slope * factor

    def apply_(self, z: Tensor, rows: slice, first_col: int) -> Tensor:
        """Turn transformed logits z (R, C) into dL/d(raw logits), in place."""
        step = max(1, CHUNKED.block // z.shape[1])
        for block in ranges(z.shape[0], step):
            zb = z[block]
            at = slice(rows.start + block.start, rows.start + block.stop)
            derivative = None if self.transform.softcap is None else _transform_slope(zb, self.transform)
            zb.sub_(self.online.maximum[at, None])
            if self.slope is None:
                zb.exp_().mul_(self.constant[at, None])
            else:
                exps = zb.exp()
                zb.clamp_(min=_FLOOR).mul_(self.slope[at, None]).add_(self.constant[at, None]).mul_(exps)
            if derivative is not None:
                zb.mul_(derivative)
        hit, column = target_columns(self.online.targets[rows], first_col, z.shape[1])
        z[hit, column] = self.at_target[rows.start + hit]
        return z


class LogitTiles:
    """Tiles of the transformed logits of all N rows, columns outermost, and the weight rows that made them."""

    def __init__(self, x: Operands, transform: LogitTransform) -> None:
        self.x, self.transform = x, transform
        self.hidden = x.hidden.float()
        n, v = x.hidden.shape[0], x.weight.shape[0]
        self.buffer = self.hidden.new_empty(min(n, CHUNKED.rows) * min(v, CHUNKED.cols))

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Column ranges and their weight rows in fp32 (C, D)."""
        for cols in ranges(self.x.weight.shape[0], CHUNKED.cols):
            yield cols, self.x.weight[cols].float()

    def rows(self) -> Iterator[slice]:
        return ranges(self.x.hidden.shape[0], CHUNKED.rows)

    def tile(self, rows: slice, cols: slice, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """(R, C) fp32 logits, in `out` or in the one buffer that the next tile overwrites."""
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        if out is None:
            out = self.buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(self.hidden[rows], weight.t(), out=out)
        if self.x.low_hidden is not None and self.x.low_weight is not None:
            out.addmm_(self.x.low_hidden[rows].float(), self.x.low_weight[cols].float().t())
        if self.x.bias is not None:
            out.add_(self.x.bias[cols].float())
        return apply_transform_(out, self.transform)


class Gradients:
    """fp32 accumulators of the gradients of Operands, only of those that are needed.

    `passes`: how often each vocabulary column is visited. With one pass a narrow weight gradient is accumulated in a
    tile and rounded once on its way out; with several it needs a whole fp32 accumulator.
    """

    def __init__(self, x: Operands, needed: Sequence[bool], passes: int) -> None:
        weight_dtype = x.weight.dtype if passes == 1 else torch.float32
        dtypes = (torch.float32, weight_dtype, torch.float32, torch.float32, torch.float32)
        self.hidden, self.weight, self.bias, self.low_hidden, self.low_weight = (
            torch.zeros(t.shape, dtype=dtype, device=t.device) if need and t is not None else None
            for t, need, dtype in zip(x, needed, dtypes, strict=True)
        )

    def like(self, x: Operands) -> list[Tensor | None]:
        """In the order and the dtypes of Operands."""
        pairs = zip((self.hidden, self.weight, self.bias, self.low_hidden, self.low_weight), x, strict=True)
        return [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]


def statistics(tiles: LogitTiles, targets: Tensor, cache: list[Tensor] | None = None) -> OnlineStats:
    """One pass over the vocabulary. With a `cache` the tiles are kept there for the gradient pass."""
    online = OnlineStats.start(targets)
    for cols, weight in tiles.columns():
        for rows in tiles.rows():
            out = None
            if cache is not None:
                out = weight.new_empty(rows.stop - rows.start, cols.stop - cols.start)
                cache.append(out)
            online.update(tiles.tile(rows, cols, weight, out), rows, cols.start)
    return online


def accumulate_gradients(
    tiles: LogitTiles, dlogits: LogitGradient, into: Gradients, first_row: int = 0, cache: list[Tensor] | None = None
) -> None:
    """dhidden += dz W, dweight += dz^T hidden, and so on, tile by tile (recomputed, or from the cache)."""
    x = tiles.x
    cached = iter(cache or ())
    for cols, weight in tiles.columns():
        # A view for an fp32 gradient, a tile to be rounded for a narrow one.
        dweight = None if into.weight is None else into.weight[cols].float()
        for rows in tiles.rows():
            out_rows = slice(first_row + rows.start, first_row + rows.stop)
            z = next(cached) if cache is not None else tiles.tile(rows, cols, weight)
            dz = dlogits.apply_(z, rows, cols.start)
            if into.hidden is not None:
                into.hidden[out_rows].addmm_(dz, weight)
            if dweight is not None:
                dweight.addmm_(dz.t(), tiles.hidden[rows])
            if into.bias is not None:
                into.bias[cols] += dz.sum(0)
            if into.low_hidden is not None and x.low_weight is not None:
                into.low_hidden[out_rows].addmm_(dz, x.low_weight[cols].float())
            if into.low_weight is not None and x.low_hidden is not None:
                into.low_weight[cols].addmm_(dz.t(), x.low_hidden[rows].float())
        if into.weight is not None and dweight is not None and into.weight.dtype != torch.float32:
            into.weight[cols] = dweight.to(into.weight.dtype)
