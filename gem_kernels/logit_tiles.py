"""Tiles of logits from the GEMM library: the engine under every `chunked` implementation.

A tile is made by one GEMM, its rows go through the row functions (rows_triton.py where Triton runs, rows_torch.py elsewhere),
and the next tile overwrites it. N tokens, D hidden size, V vocabulary, r rank of the adapter. Logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gem_kernels import compat, rows_torch
from gem_kernels.operands import Operands, RowPart
from gem_kernels.plan import padded
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import matrix, tiling


class RowFunctions(Protocol):
    """The two modules that work on the rows of a tile: rows_torch and rows_triton.

    `prepare` gets the product of the GEMM, the other two get its result. rows_torch applies bias and transform in it, and
    ignores them later; rows_triton applies them as it reads logits. `update` is called with rising first_col, and with 0 on
    a fresh state.
    """

    def prepare(self, z: Tensor, bias: Tensor | None, transform: Transform) -> Tensor: ...

    def update(self, z: Tensor, bias: Tensor | None, state: State, first_col: int, transform: Transform) -> None: ...

    def gradient(
        self, z: Tensor, bias: Tensor | None, gradient: RowGradient, first_col: int, transform: Transform, out: Tensor
    ) -> Tensor: ...


class LogitTiles:
    """Tiles of the logits of all N rows, columns outermost, and the weight rows that made them.

    cache: fp32 elements for the logits of all rows and columns, kept by `statistics` for `dlogits`; None: they are
    recomputed.
    """

    def __init__(self, x: Operands, transform: Transform, cache: Tensor | None = None) -> None:
        self.x, self.transform, self.cache = x, transform, cache
        self.hidden, self.low_hidden = x.hidden.to(compat.gemm_dtype(x.hidden)), x.adapter_hidden()
        self.tiling = tiling(x.hidden, x.weight.shape[0])
        self.row_parts = RowPart.cut(self.hidden, self.low_hidden, self.tiling.rows)
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, int, int], Tensor] = {}
        self.weight_buffer: Tensor | None = None
        self.row_functions: RowFunctions = rows_torch
        self.gradient_dtype = torch.float32
        if compat.on_triton(x.hidden.device):
            from gem_kernels import rows_triton

            self.row_functions, self.gradient_dtype = rows_triton, x.gradient_dtype()

    def columns(self) -> Iterator[tuple[slice, Operands]]:
        """Yield column ranges and their operands in the dtype of the GEMM; the next ones overwrite them."""
        for cols in self.tiling.columns:
            part = self.x.columns(cols)
            weight, dtype = part.weight, self.hidden.dtype
            if weight.dtype != dtype:  # into the same memory each time: new memory costs more than a copy
                if self.weight_buffer is None:
                    self.weight_buffer = weight.new_empty(self.tiling.widest, weight.shape[1], dtype=dtype)
                weight = self.weight_buffer[: weight.shape[0]].copy_(weight)
            yield cols, part._replace(hidden=self.hidden, weight=weight)

    def rows(self) -> Sequence[RowPart]:
        return self.row_parts

    def tile(self, rows: RowPart, part: Operands, out: Tensor | None = None) -> Tensor:
        """Return prepared fp32 logits (R, C), in `out` or in the one buffer that the next tile overwrites."""
        if out is None:
            out = self._buffer(torch.float32, rows.hidden.shape[0], part.weight.shape[0])
        compat.mm(rows.hidden, part.weight.t(), out)
        if rows.low_hidden is not None and part.low_rank is not None:
            out.addmm_(rows.low_hidden, part.low_rank.b.float().t())
        return self.row_functions.prepare(out, part.bias, self.transform)

    def statistics(self, targets: Tensor) -> State:
        """Walk the vocabulary once and return the state of all rows."""
        state = State.fresh(targets)
        states = [(rows, state.rows(rows.rows)) for rows in self.rows()]
        for cols, part in self.columns():
            for rows, of_rows in states:
                z = self.tile(rows, part, self._cached(rows.rows, cols))
                self.row_functions.update(z, part.bias, of_rows, cols.start, self.transform)
        return state

    def dlogits(self, gradient: RowGradient, rows: RowPart, cols: slice, part: Operands) -> Tensor:
        """Return dL/d(raw logits) (R, C) of one tile, for the gradient of its rows; the next tile overwrites it."""
        z = self._cached(rows.rows, cols)
        if z is None:
            z = self.tile(rows, part)
        # The next GEMMs read dlogits: overwrite z where they take fp32, else write a second buffer.
        out = z if self.gradient_dtype == torch.float32 else self._buffer(self.gradient_dtype, *z.shape)
        return self.row_functions.gradient(z, part.bias, gradient, cols.start, self.transform, out)

    def _buffer(self, dtype: torch.dtype, height: int, width: int) -> Tensor:
        """Return a matrix of this size in the one buffer of this dtype, which is allocated when it is first needed."""
        key = dtype, height, width
        if key not in self.views:
            if dtype not in self.buffers:
                self.buffers[dtype] = torch.empty(self.tiling.elements, dtype=dtype, device=self.hidden.device)
            self.views[key] = matrix(self.buffers[dtype], height, width)
        return self.views[key]

    def _cached(self, rows: slice, cols: slice) -> Tensor | None:
        """Return the place of a tile in the cache of n padded(V) elements; only the last tile's width needs padding."""
        if self.cache is None:
            return None
        height, width, n = rows.stop - rows.start, cols.stop - cols.start, self.x.hidden.shape[0]
        return matrix(self.cache[n * cols.start + rows.start * padded(width) :], height, width)
