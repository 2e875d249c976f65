"""The vocabulary streamed through one tile of logits: the engine under every `chunked` implementation.

Three steps, each once: a tile of logits (GEMM library), the online statistics of its rows, the gradient of its rows. Where
Triton runs, each row step is one kernel that reads the tile once (row_kernels.py). Elsewhere it is torch operations that walk
the tile in blocks that stay in the level-2 cache: one block is passed over several times, memory only once.

N tokens, D hidden size, V vocabulary, r rank of the adapter. Logits, statistics and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels import compat, vocab_parallel
from gem_kernels.tiles import CHUNKED, ChunkTile, chunk_tile
from gem_kernels.types import LogitTransform, Operands, TokenStats, Upstream

# exp(-87) is the smallest normal fp32 number. Flooring z - max there moves a row's sum by less than V * 2e-38, far below
# its rounding, and it keeps -inf logits (masked or padded vocabulary) from giving 0 * inf.
_FLOOR = -87.0


def ranges(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


class Transform(NamedTuple):
    """LogitTransform as the arithmetic needs it: z' = limit tanh(gain z), or gain z without a softcap."""

    gain: float
    limit: float
    softcap: bool

    @staticmethod
    def of(t: LogitTransform) -> Transform:
        if t.softcap is None:
            return Transform(t.scale / t.temperature, 1.0, False)
        return Transform(t.scale / t.softcap, t.softcap / t.temperature, True)

    def apply_(self, z: Tensor) -> Tensor:
        if self.softcap:
            return z.mul_(self.gain).tanh_().mul_(self.limit)
        return z if self.gain == 1 else z.mul_(self.gain)

    def slope(self, z: Tensor) -> Tensor:
        """dz'/dz of the softcap as a function of z': gain limit (1 - (z' / limit)^2).

        As (limit - z') (limit + z'): near saturation that difference is exact, where 1 - tanh^2 would lose its last digits.
        """
        return (self.limit - z).mul_(z + self.limit).mul_(self.gain / self.limit)


class OnlineStats(NamedTuple):
    """Running maximum m, sum s = Σ e^(z-m), weighted sum t = Σ e^(z-m)(z-m) and target logit z_y of N rows.

    A tile with maximum m' moves (m, s, t) to the new maximum M = max(m, m'): s e^(m-M), e^(m-M) (t + (m-M) s).
    """

    targets: Tensor  # (N,)
    values: Tensor  # (4, N) fp32: m, s, t, z_y

    @staticmethod
    def start(targets: Tensor) -> OnlineStats:
        values = torch.zeros(4, targets.shape[0], dtype=torch.float32, device=targets.device)
        values[0] = torch.finfo(torch.float32).min
        values[3] = float("nan")  # not seen yet: a target out of range gives NaN
        return OnlineStats(targets, values)

    def rows(self, rows: slice) -> OnlineStats:
        return OnlineStats(self.targets[rows], self.values[:, rows])

    def update(self, z: Tensor, first_col: int) -> None:
        """Take in transformed logits z (N, C) of the columns from first_col on, in torch; z is left as it is."""
        columns = z.shape[1]
        step = max(1, CHUNKED.block // columns)
        shifted_buffer, exp_buffer = z.new_empty(step * columns), z.new_empty(step * columns)
        tile_maximum, tile_total, tile_weighted = z.new_empty(3, z.shape[0])
        for at in ranges(z.shape[0], step):
            zb = z[at]
            shifted, exps = (b[: zb.numel()].view_as(zb) for b in (shifted_buffer, exp_buffer))
            torch.amax(zb, 1, out=tile_maximum[at])
            torch.sub(zb, tile_maximum[at, None].clamp_(min=torch.finfo(z.dtype).min), out=shifted).clamp_(min=_FLOOR)
            torch.sum(torch.exp(shifted, out=exps), 1, out=tile_total[at])
            torch.sum(exps.mul_(shifted), 1, out=tile_weighted[at])
        self.merge(tile_maximum, tile_total, tile_weighted)
        hit, column = target_columns(self.targets, first_col, columns)
        self.values[3, hit] = z[hit, column]

    def merge(self, other_maximum: Tensor, other_total: Tensor, other_weighted: Tensor) -> None:
        """(m, s, t) of further columns, each (N,), into those of the row."""
        maximum, total, weighted, _ = self.values
        new = torch.maximum(maximum, other_maximum)
        drop, other_drop = (maximum - new).clamp_(min=_FLOOR), (other_maximum - new).clamp_(min=_FLOOR)
        decay, other_decay = drop.exp(), other_drop.exp()
        weighted.add_(drop * total).mul_(decay).add_(other_decay * (other_weighted + other_drop * other_total))
        total.mul_(decay).add_(other_decay * other_total)
        maximum.copy_(new)

    def finish(self) -> TokenStats:
        """log p = (z_y - m) - log s; H = log s - t / s: both shifted, so nothing cancels at large |z|."""
        maximum, total, weighted, target_logit = self.values
        log_total = total.log()
        return TokenStats(
            logprob=(target_logit - maximum) - log_total,
            entropy=log_total - weighted / total,
            lse=maximum + log_total,
        )


def target_columns(targets: Tensor, first_col: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in this tile, and its column within the tile."""
    column = targets.long() - first_col
    hit = ((column >= 0) & (column < columns)).nonzero().squeeze(1)
    return hit, column[hit]


class LogitGradient(NamedTuple):
    """dL/dz of N rows for upstream a = dL/dlogprob, b = dL/dH, c = dL/dlse.

    dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H) + c p_v, times the transform's derivative. With d = z - m this is
    e^d (constant + slope d), constant = (c - a + b (log s - H)) / s and slope = -b / s: no pass over the row normalises it.
    The target's entry is a (1 - p_y) = -a expm1(log p_y), which keeps its digits when p_y -> 1.
    """

    targets: Tensor  # (N,), and so are the others
    maximum: Tensor
    constant: Tensor
    slope: Tensor | None  # None: the loss does not look at the entropy
    at_target: Tensor

    @staticmethod
    def of(online: OnlineStats, upstream: Upstream, transform: Transform) -> LogitGradient:
        stats = online.finish()
        maximum, total, _, target_logit = online.values
        zero = torch.zeros_like(stats.logprob)
        a, b, c = (zero if g is None else g.float() for g in upstream)
        constant = (c - a + b * (total.log() - stats.entropy)) / total
        slope = None if upstream.entropy is None else -b / total
        log_p = stats.logprob.clamp_min(_FLOOR)  # a target of probability 0: p log p is 0, not 0 * -inf
        at_target = (c - b * (log_p + stats.entropy)) * stats.logprob.exp() - a * stats.logprob.expm1()
        if transform.softcap:
            at_target *= transform.slope(target_logit)
        else:  # then the derivative is one number, folded into the row's coefficients
            constant, at_target = constant * transform.gain, at_target * transform.gain
            slope = None if slope is None else slope * transform.gain
        return LogitGradient(online.targets, maximum, constant, slope, at_target)

    def rows(self, rows: slice) -> LogitGradient:
        return LogitGradient(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def apply_(self, z: Tensor, first_col: int, transform: Transform) -> Tensor:
        """Turn transformed logits z (N, C) into dL/d(raw logits), in place, in torch."""
        for at in ranges(z.shape[0], max(1, CHUNKED.block // z.shape[1])):
            zb = z[at]
            derivative = transform.slope(zb) if transform.softcap else None
            zb.sub_(self.maximum[at, None])
            if self.slope is None:
                zb.exp_().mul_(self.constant[at, None])
            else:
                exps = zb.exp()
                zb.clamp_(min=_FLOOR).mul_(self.slope[at, None]).add_(self.constant[at, None]).mul_(exps)
            if derivative is not None:
                zb.mul_(derivative)
        hit, column = target_columns(self.targets, first_col, z.shape[1])
        z[hit, column] = self.at_target[hit]
        return z


def adapter_hidden(x: Operands) -> Tensor | None:
    """scale h a^T (N, r). fp32 whatever the dtype: rounding it to bf16 would be a second rounding of the logits."""
    return None if x.low_rank is None else x.low_rank.scale * (x.hidden.float() @ x.low_rank.a.float().T)


def padded(columns: int) -> int:
    """Columns of a buffer whose rows begin on 16 bytes, as the fast kernels of a GEMM library ask, and 16 elements apart, by
    which triton knows it."""
    return -(-columns // 16) * 16


def matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) at the start of a buffer, each row padded."""
    return buffer[: rows * padded(columns)].view(rows, padded(columns))[:, :columns]


def buffer_size(n: int, v: int, shape: ChunkTile) -> int:
    """Elements of a buffer that holds any one tile of (n, v) logits as a `matrix`."""
    return min(n, shape.rows) * padded(min(v, shape.cols))


class LogitTiles:
    """Tiles of the logits of all N rows, columns outermost, and the weight rows that made them."""

    def __init__(self, x: Operands, transform: Transform) -> None:
        self.x, self.transform = x, transform
        self.row_kernels = compat.on_triton(x.hidden.device)
        self.hidden, self.low_hidden = x.hidden.to(compat.gemm_dtype(x.hidden)), adapter_hidden(x)
        n, v = x.hidden.shape[0], x.weight.shape[0]
        self.shape = chunk_tile(x.hidden)
        self.buffer = torch.empty(buffer_size(n, v, self.shape), dtype=torch.float32, device=x.hidden.device)
        self.gradient_buffer: Tensor | None = None
        self.weight_buffer: Tensor | None = None

    def columns(self) -> Iterator[tuple[slice, Operands]]:
        """Column ranges and the operands of those columns, ready for the GEMM library, until the next ones are asked for."""
        for cols in ranges(self.x.weight.shape[0], self.shape.cols):
            part = self.x.columns(cols)
            weight, dtype = part.weight, self.hidden.dtype
            if weight.dtype != dtype:  # into the same memory each time: new memory costs more than a copy
                if self.weight_buffer is None:
                    self.weight_buffer = torch.empty_like(weight, dtype=dtype)
                weight = self.weight_buffer[: weight.shape[0]].copy_(weight)
            yield cols, part._replace(hidden=self.hidden, weight=weight)

    def rows(self) -> Iterator[slice]:
        return ranges(self.x.hidden.shape[0], self.shape.rows)

    def tile(self, rows: slice, part: Operands, out: Tensor | None = None) -> Tensor:
        """(R, C) fp32 logits, in `out` or in the one buffer that the next tile overwrites. The row kernels apply bias and
        transform to what they read; without them they are applied here."""
        if out is None:
            out = matrix(self.buffer, rows.stop - rows.start, part.weight.shape[0])
        compat.mm(self.hidden[rows], part.weight.t(), out)
        if self.low_hidden is not None and part.low_rank is not None:
            out.addmm_(self.low_hidden[rows], part.low_rank.b.float().t())
        if self.row_kernels:
            return out
        if part.bias is not None:
            out.add_(part.bias.float())
        return self.transform.apply_(out)

    def update(self, online: OnlineStats, z: Tensor, part: Operands, first_col: int) -> None:
        """Take the tile z into the statistics of its rows."""
        if self.row_kernels:
            from gem_kernels import row_kernels

            row_kernels.update_statistics(z, part.bias, online, first_col, self.transform)
        else:
            online.update(z, first_col)

    def gradient(self, gradient: LogitGradient, z: Tensor, part: Operands, first_col: int) -> Tensor:
        """The tile z -> dL/d(raw logits) of its rows; z is used up."""
        if self.row_kernels:
            from gem_kernels import row_kernels

            # It becomes an operand of the next GEMMs: in place for fp32, in the operands' dtype beside it otherwise.
            out, dtype = z, self.x.gradient_dtype()
            if dtype != torch.float32:
                if self.gradient_buffer is None:
                    self.gradient_buffer = torch.empty(self.buffer.shape, dtype=dtype, device=z.device)
                out = matrix(self.gradient_buffer, *z.shape)
            return row_kernels.logit_gradient(z, part.bias, gradient, first_col, self.transform, out)
        return gradient.apply_(z, first_col, self.transform)


class Sum:
    """fp32 sum of matrix products. The first is written and not added, so memory is never passed over to be zeroed."""

    def __init__(self, total: Tensor, empty: bool) -> None:
        self.total, self.empty = total, empty

    def add(self, a: Tensor, b: Tensor) -> None:
        (compat.mm if self.empty else compat.addmm_)(a=a, b=b, out=self.total)
        self.empty = False


class Gradients:
    """fp32 accumulators of the gradients of Operands (hidden, weight, bias, a, b), only of those that are needed.

    `passes`: how often each vocabulary column is visited, each time in order. With one pass a narrow weight gradient is
    accumulated in a tile and rounded once on its way out; with several it needs a whole fp32 accumulator.
    """

    def __init__(self, x: Operands, needed: Sequence[bool], passes: int) -> None:
        self.x, (need_hidden, need_weight, need_bias, self.need_a, need_b) = x, needed

        def zeros(need: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=x.hidden.device) if need else None

        (n, d), v = x.hidden.shape, x.weight.shape[0]
        rank = 0 if x.low_rank is None else x.low_rank.a.shape[0]
        self.hidden = zeros(need_hidden, n, d)
        dtype = x.weight.dtype if passes == 1 else torch.float32
        self.weight = x.hidden.new_empty(v, d, dtype=dtype) if need_weight else None
        self.columns_seen = 0  # what stands in dweight beyond them means nothing yet
        self.tile: Tensor | None = None
        self.bias = zeros(need_bias, v)
        self.low_hidden = zeros(rank > 0 and (need_hidden or self.need_a), n, rank)
        self.b = zeros(need_b, v, rank)

    def open(self, cols: slice) -> Sum | None:
        """What collects dweight of these columns: a view of an fp32 gradient, else a tile that close rounds."""
        if self.weight is None:
            return None
        new, self.columns_seen = cols.start >= self.columns_seen, max(cols.stop, self.columns_seen)
        of_cols = self.weight[cols]
        if of_cols.dtype == torch.float32:
            return Sum(of_cols, new)
        if self.tile is None:
            self.tile = torch.empty_like(of_cols, dtype=torch.float32)
        return Sum(self.tile[: of_cols.shape[0]], new)

    def add_hidden(self, dz: Tensor, part: Operands, rows: slice) -> None:
        """dhidden += dz W for dz (R, C) of these rows, and the same through the adapter."""
        if self.hidden is not None:
            compat.addmm_(self.hidden[rows], dz.to(part.weight.dtype), part.weight)
        if self.low_hidden is not None and part.low_rank is not None:
            compat.addmm_(self.low_hidden[rows], dz, part.low_rank.b)

    def scale_hidden_(self, rows: slice, coefficient: Tensor) -> None:
        """Rows of dhidden, which this slab alone adds to, times a number each (R, 1)."""
        for t in (self.hidden, self.low_hidden):
            if t is not None:
                t[rows] *= coefficient

    def add_weight(
        self,
        dz: Tensor,
        hidden: Tensor,
        low_hidden: Tensor | None,
        cols: slice,
        dweight: Sum | None,
        coefficient: Tensor | None = None,
    ) -> None:
        """dweight += dz^T hidden for dz (R, C) of these columns, and the same for bias and adapter.

        With a coefficient (R, 1) dL/dz is coefficient dz, and the hidden states have it in them already.
        """
        if dweight is not None:
            dweight.add(dz.to(hidden.dtype).t(), hidden)
        if self.bias is not None and coefficient is not None:
            compat.addmm_(self.bias[cols].unsqueeze(0), coefficient.t().to(dz.dtype), dz)
        elif self.bias is not None:
            self.bias[cols] += dz.sum(0, dtype=torch.float32)
        if self.b is not None and low_hidden is not None:
            self.b[cols].addmm_(dz.float().t(), low_hidden)

    def close(self, cols: slice, dweight: Sum | None) -> None:
        if dweight is not None and dweight.empty:  # no token was there
            dweight.total.zero_()
        if self.weight is not None and dweight is not None and self.weight.dtype != torch.float32:
            self.weight[cols] = dweight.total

    def finish(self, ranks: str) -> list[Tensor | None]:
        """[hidden, weight, bias, a, b] in their own dtypes. The terms of dhidden are rounded after their sum."""
        x, a, low = self.x, None, self.x.low_rank
        vocab_parallel.sum_((self.hidden, self.low_hidden), ranks)
        if self.weight is not None:
            self.weight[self.columns_seen :].zero_()
        if low is not None and self.low_hidden is not None:
            self.low_hidden *= low.scale
            if self.hidden is not None:
                self.hidden.addmm_(self.low_hidden, low.a.float())
            if self.need_a:
                a = (self.low_hidden.t() @ x.hidden.float()).to(low.a.dtype)
        return [
            None if self.hidden is None else self.hidden.to(x.hidden.dtype),
            None if self.weight is None else self.weight.to(x.weight.dtype),
            None if self.bias is None or x.bias is None else self.bias.to(x.bias.dtype),
            a,
            None if self.b is None or low is None else self.b.to(low.b.dtype),
        ]


def cached_tile(cache: Tensor, n: int, rows: slice, cols: slice) -> Tensor:
    """The place of a tile in a buffer of n padded(V) elements for n rows; only the last tile's width needs padding."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    return matrix(cache[n * cols.start + rows.start * padded(width) :], height, width)


def statistics(tiles: LogitTiles, targets: Tensor, cache: Tensor | None = None) -> OnlineStats:
    """One pass over the vocabulary. With a `cache` the tiles are kept there for the gradient pass."""
    online, n = OnlineStats.start(targets), targets.shape[0]
    for cols, part in tiles.columns():
        for rows in tiles.rows():
            out = None if cache is None else cached_tile(cache, n, rows, cols)
            tiles.update(online.rows(rows), tiles.tile(rows, part, out), part, cols.start)
    return online


def accumulate_gradients(
    tiles: LogitTiles, gradient: LogitGradient, into: Gradients, first_row: int = 0, cache: Tensor | None = None
) -> None:
    """Every tile (recomputed, or from the cache) -> its gradient -> the accumulators, whose rows begin at first_row."""
    n = tiles.x.hidden.shape[0]
    for cols, part in tiles.columns():
        dweight = into.open(cols)
        for rows in tiles.rows():
            z = tiles.tile(rows, part) if cache is None else cached_tile(cache, n, rows, cols)
            dz = tiles.gradient(gradient.rows(rows), z, part, cols.start)
            low_hidden = None if tiles.low_hidden is None else tiles.low_hidden[rows]
            out_rows = slice(first_row + rows.start, first_row + rows.stop)
            into.add_hidden(dz, part, out_rows)
            into.add_weight(dz, tiles.hidden[rows], low_hidden, cols, dweight)
        into.close(cols, dweight)
