"""Accumulators of the gradients of (hidden, weight, bias, a, b): every implementation adds its tiles of dL/dlogits here.

N tokens, D hidden size, V vocabulary, r rank of the adapter; R rows and C columns of a tile. Sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gem_kernels import compat
from gem_kernels.operands import Operands, RowPart
from gem_kernels.ranks import sum_ranks_
from gem_kernels.softmax import RowGradient
from gem_kernels.tiles import tiling


class TileSource(Protocol):
    """Tiles of dL/dlogits, columns outermost: LogitTiles, or the fused kernels."""

    def columns(self) -> Iterator[tuple[slice, Operands]]: ...

    def rows(self) -> Sequence[RowPart]: ...

    def dlogits(self, gradient: RowGradient, rows: RowPart, cols: slice, part: Operands) -> Tensor: ...


class _Sum:
    """An fp32 sum of matrix products. The first product overwrites the memory, which is therefore never zeroed."""

    def __init__(self, total: Tensor, empty: bool) -> None:
        self.total, self.empty = total, empty

    def add(self, a: Tensor, b: Tensor) -> None:
        (compat.mm if self.empty else compat.addmm_)(a=a, b=b, out=self.total)
        self.empty = False


class Gradients:
    """fp32 accumulators of the gradients of Operands (hidden, weight, bias, a, b), allocated where a gradient is needed.

    `passes` counts the walks over the vocabulary, each in the order of its columns. With one pass a narrow weight gradient is
    accumulated in a tile and rounded once on its way out; several passes need a whole fp32 accumulator.
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
        self.columns_seen = 0  # beyond them dweight is uninitialised
        self.tile: Tensor | None = None
        self.bias = zeros(need_bias, v)
        self.low_hidden = zeros(rank > 0 and (need_hidden or self.need_a), n, rank)
        self.b = zeros(need_b, v, rank)

    def accumulate(self, tiles: TileSource, gradient: RowGradient, first_row: int = 0) -> None:
        """Add the gradients of every tile, whose rows begin at first_row of the accumulators."""
        gradients = [(rows, gradient.rows(rows.rows)) for rows in tiles.rows()]
        for cols, part in tiles.columns():
            dweight = self.open(cols)
            for rows, of_rows in gradients:
                dz = tiles.dlogits(of_rows, rows, cols, part)
                self.add_hidden(dz, part, slice(first_row + rows.rows.start, first_row + rows.rows.stop))
                self.add_weight(dz, rows.hidden, rows.low_hidden, cols, dweight)
            self.close(cols, dweight)

    def open(self, cols: slice) -> _Sum | None:
        """Return what collects dweight of these columns: a view of an fp32 gradient, or a tile that close rounds."""
        if self.weight is None:
            return None
        new, self.columns_seen = cols.start >= self.columns_seen, max(cols.stop, self.columns_seen)
        of_cols = self.weight[cols]
        if of_cols.dtype == torch.float32:
            return _Sum(of_cols, new)
        if self.tile is None:  # there is one pass, so its tiles are those of x
            widest = tiling(self.x.hidden, self.weight.shape[0]).widest
            self.tile = of_cols.new_empty(widest, of_cols.shape[1], dtype=torch.float32)
        return _Sum(self.tile[: of_cols.shape[0]], new)

    def takes_whole_slab(self) -> bool:
        """True if add_weight needs no tiles: dweight is collected in fp32, and no adapter's gradient copies dz to fp32."""
        return self.b is None and (self.weight is None or self.weight.dtype == torch.float32)

    def add_hidden(self, dz: Tensor, part: Operands, rows: slice) -> None:
        """Add dz W to dhidden for dz (R, C) of these rows, and the adapter's part to its own sum."""
        if self.hidden is not None:
            compat.addmm_(self.hidden[rows], dz.to(part.weight.dtype), part.weight)
        if self.low_hidden is not None and part.low_rank is not None:
            compat.addmm_(self.low_hidden[rows], dz, part.low_rank.b)

    def scale_hidden_(self, rows: slice, coefficient: Tensor) -> None:
        """Multiply rows of dhidden, which this slab alone adds to, by a coefficient (R, 1) each."""
        for t in (self.hidden, self.low_hidden):
            if t is not None:
                t[rows] *= coefficient

    def add_weight(
        self,
        dz: Tensor,
        hidden: Tensor,
        low_hidden: Tensor | None,
        cols: slice,
        dweight: _Sum | None,
        coefficient: Tensor | None = None,
    ) -> None:
        """Add dz^T hidden to dweight for dz (R, C) of these columns, and the gradients of bias and adapter.

        With a coefficient (R, 1), dL/dz is coefficient * dz, and hidden and low_hidden contain the coefficient already.
        """
        if dweight is not None:
            dweight.add(dz.to(hidden.dtype).t(), hidden)
        if self.bias is not None and coefficient is not None:
            compat.addmm_(self.bias[cols].unsqueeze(0), coefficient.t().to(dz.dtype), dz)
        elif self.bias is not None:
            self.bias[cols] += dz.sum(0, dtype=torch.float32)
        if self.b is not None and low_hidden is not None:
            self.b[cols].addmm_(dz.float().t(), low_hidden)  # low_hidden is fp32: db has no bf16 operand to gain from

    def close(self, cols: slice, dweight: _Sum | None) -> None:
        """Finish dweight of these columns: 0 where no token contributed, rounded where it was collected in a tile."""
        if dweight is not None and dweight.empty:
            dweight.total.zero_()
        if self.weight is not None and dweight is not None and self.weight.dtype != torch.float32:
            self.weight[cols] = dweight.total

    def finish(self, ranks: str) -> list[Tensor | None]:
        """Return [hidden, weight, bias, a, b] in their own dtypes. dhidden is summed in fp32 and rounded once."""
        x, a, low = self.x, None, self.x.low_rank
        sum_ranks_((self.hidden, self.low_hidden), ranks)
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
