"""Tiles of logits from the GEMM library: the engine under every `chunked` implementation.

A tile is made by one GEMM, its rows go through the row functions (rows_triton.py where Triton runs, rows_torch.py elsewhere),
and the next tile overwrites it. N tokens, D hidden size, V vocabulary, r rank of the adapter. Logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from gem_kernels import compat, rows_torch
from gem_kernels.operands import Operands
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import buffer_size, chunk_tile, matrix, padded, ranges


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
        n, v = x.hidden.shape[0], x.weight.shape[0]
        self.shape = chunk_tile(x.hidden)
        self.buffer = torch.empty(buffer_size(n, v, self.shape), dtype=torch.float32, device=x.hidden.device)
        self.weight_buffer: Tensor | None = None
        self.gradient_buffer: Tensor | None = None
        self.row_functions: RowFunctions = rows_torch
        self.gradient_dtype = torch.float32
        if compat.on_triton(x.hidden.device):
            from gem_kernels import rows_triton

            self.row_functions, self.gradient_dtype = rows_triton, x.gradient_dtype()

    def columns(self) -> Iterator[tuple[slice, Operands]]:
        """Yield column ranges and their operands in the dtype of the GEMM; the next ones overwrite them."""
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
        """Return prepared fp32 logits (R, C), in `out` or in the one buffer that the next tile overwrites."""
        if out is None:
            out = matrix(self.buffer, rows.stop - rows.start, part.weight.shape[0])
        compat.mm(self.hidden[rows], part.weight.t(), out)
        if self.low_hidden is not None and part.low_rank is not None:
            out.addmm_(self.low_hidden[rows], part.low_rank.b.float().t())
        return self.row_functions.prepare(out, part.bias, self.transform)

    def statistics(self, targets: Tensor) -> State:
        """Walk the vocabulary once and return the state of all rows."""
        state = State.fresh(targets)
        for cols, part in self.columns():
            for rows in self.rows():
                out = None if self.cache is None else self._cached(rows, cols)
                z = self.tile(rows, part, out)
                self.row_functions.update(z, part.bias, state.rows(rows), cols.start, self.transform)
        return state

    def dlogits(self, gradient: RowGradient, rows: slice, cols: slice, part: Operands) -> Tensor:
        """Return dL/d(raw logits) (R, C) of one tile; the next tile overwrites it."""
        z = self.tile(rows, part) if self.cache is None else self._cached(rows, cols)
        # The next GEMMs read dlogits: overwrite z where they take fp32, else write a second buffer.
        out = z
        if self.gradient_dtype != torch.float32:
            if self.gradient_buffer is None:
                self.gradient_buffer = torch.empty(self.buffer.shape, dtype=self.gradient_dtype, device=z.device)
            out = matrix(self.gradient_buffer, *z.shape)
        return self.row_functions.gradient(z, part.bias, gradient.rows(rows), cols.start, self.transform, out)

    def _cached(self, rows: slice, cols: slice) -> Tensor:
        """Return the place of a tile in the cache of n padded(V) elements; only the last tile's width needs padding."""
        assert self.cache is not None
        height, width, n = rows.stop - rows.start, cols.stop - cols.start, self.x.hidden.shape[0]
        return matrix(self.cache[n * cols.start + rows.start * padded(width) :], height, width)
