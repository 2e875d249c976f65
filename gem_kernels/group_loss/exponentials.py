"""The cache of a slab in bf16: e^(z - reference) of every token and vocabulary entry, written while z is in the level-2 cache.

For a loss of log-probabilities alone (SEGA, DPO, GRPO), dL/dz_n is a number times the cached row, once the target's entry is
corrected. That number goes into the hidden states of dweight = cache^T (number hidden) and onto the rows of dhidden = number
(cache W), so that nothing passes over N x V any more but the two GEMMs that read it.

A loss that differentiates the entropy needs log p, which rounded exponentials give only to 2^-9: where log p + H is small, dz
would lose its digits. It recomputes the logits in tiles (8NDV), and so does one of lse. With a softcap, whose slope needs z
too, there are no cached exponentials in the first place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gem_kernels import compat
from gem_kernels.gradients import Gradients
from gem_kernels.logit_tiles import LogitTiles
from gem_kernels.operands import Operands, Upstream
from gem_kernels.primitives import (
    add_to_lanes,
    close_lanes,
    exp,
    fresh_state,
    load_state,
    open_lanes,
    raise_lanes,
    rises,
    store_state,
)
from gem_kernels.ranks import merge_ranks_
from gem_kernels.rows_triton import Rows, block_addresses, load_logits, load_target_logit
from gem_kernels.softmax import RowGradient, State, Transform
from gem_kernels.tiles import matrix

# A row of cached exponentials is rescaled when its maximum has risen this far above the reference: far from the end of
# bf16's range (e^88), far above what a trained model does.
_MAX_GAP = tl.constexpr(60.0)


@triton.jit
def _rescale(cache, rows, factor, n_cols, BLOCK_V: tl.constexpr):
    """Multiply the first n_cols cached entries of these rows (BLOCK_N,), which begin at `cache`, by a factor (BLOCK_N,)."""
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = rows[:, None] & (cols < n_cols)[None, :]
        exps = tl.load(cache[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(cache[:, None] + cols[None, :], exps.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _follow(cache, inside, reference, maximum, n_cols, BLOCK_V: tl.constexpr):
    """Move the reference of rows whose maximum is far above it, and what they have cached, to the maximum."""
    outgrown = inside & (maximum - reference > _MAX_GAP)
    if tl.max(outgrown.to(tl.int32), 0) > 0:  # rare
        factor = exp(reference - maximum)
        tl.debug_barrier()  # other threads of this program may have written what this one reads
        _rescale(cache, outgrown, factor, n_cols, BLOCK_V)
        tl.debug_barrier()
    return tl.where(outgrown, maximum, reference)


@triton.jit
def _cache_block(
    lanes,
    reference,  # (BLOCK_N,)
    scale,  # (BLOCK_N,): e^(m - reference)
    cache,  # (BLOCK_N,): where the rows of the cache begin
    inside,  # (BLOCK_N,): rows that exist
    first_col,
    logits,
    start,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the block of logits from column `start` on to the lanes, and cache e^(z - reference) of them."""
    z = load_logits(logits, start, HAS_BIAS, False, False, RAGGED, BLOCK_V)
    new, risen = rises(lanes[0], z)
    if risen:
        lanes = raise_lanes(lanes, new)
        reference = _follow(cache, inside, reference, new, first_col + start, BLOCK_V)
        scale = tl.exp(new - reference)
    lanes, exps = add_to_lanes(lanes, z)
    exps *= scale[:, None]
    cols = start + tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (cols < logits[2])[None, :] if RAGGED else inside[:, None]
    tl.store(block_addresses(cache, first_col + start, 1, BLOCK_V), exps.to(cache.dtype.element_ty), mask=mask)
    return lanes, reference, scale


@triton.jit(do_not_specialize=["n_rows", "stride_state"])
def _row_exponentials_kernel(
    z_ptr,  # (N, C) fp32
    bias_ptr,  # (C,)
    targets_ptr,  # (N,)
    state_ptr,  # (STATE, N)
    reference_ptr,  # (N,) fp32
    cache_ptr,  # (N, V)
    n_rows,
    n_cols,
    first_col,
    stride_state,
    stride_z_n,
    stride_cache_n,
    gain,
    HAS_BIAS: tl.constexpr,
    FRESH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    state_rows = state_ptr + rows.to(tl.int64)
    state = fresh_state(BLOCK_N) if FRESH else load_state(state_rows, stride_state, inside)
    # Without a state the reference is the lowest number, so the first block's maximum outgrows it.
    reference = state[0] if FRESH else tl.load(reference_ptr + rows, mask=inside, other=0.0)
    scale = tl.exp(state[0] - reference)
    cache = cache_ptr + safe_rows * stride_cache_n
    logits = (z_ptr + safe_rows * stride_z_n, inside, n_cols, 1, bias_ptr, gain, 1.0)
    lanes = open_lanes(state, BLOCK_V)
    full = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        lanes, reference, scale = _cache_block(
            lanes, reference, scale, cache, inside, first_col, logits, start, HAS_BIAS, False, BLOCK_V
        )
    if full < n_cols:
        lanes, reference, scale = _cache_block(
            lanes, reference, scale, cache, inside, first_col, logits, full, HAS_BIAS, True, BLOCK_V
        )
    column = tl.load(targets_ptr + safe_rows) - first_col
    target_logit = load_target_logit(logits, column, state[3], HAS_BIAS, False)
    store_state(state_rows, stride_state, close_lanes(lanes, target_logit), inside)
    tl.store(reference_ptr + rows, reference, mask=inside)


def cache_exponentials(
    z: Tensor,
    bias: Tensor | None,
    state: State,
    reference: Tensor,
    cache: Tensor,
    first_col: int,
    transform: Transform,
) -> None:
    """Do rows_triton.update and write e^(z - reference) to cache[:, first_col:][:, :C] in the same read of z (N, C).

    reference (N,): near the row's maximum, at most _MAX_GAP below it, and the same for all columns of the cache (N, V) bf16,
    whose range is fp32's: so the cached row times one number is the row's softmax.
    """
    rows = Rows(z)
    if rows.n_rows == 0:
        return
    compat.launch(
        _row_exponentials_kernel,
        rows.grid,
        z,
        bias if bias is not None else z,
        state.targets,
        state.values,
        reference,
        cache,
        rows.n_rows,
        rows.n_cols,
        first_col,
        state.values.stride(0),
        z.stride(0),
        cache.stride(0),
        transform.gain,
        HAS_BIAS=bias is not None,
        FRESH=first_col == 0,
        **rows.blocks,
    )


@triton.jit(do_not_specialize=["n_rows"])
def _follow_maximum_kernel(
    cache_ptr,  # (N, V)
    maximum_ptr,  # (N,) fp32
    reference_ptr,  # (N,) fp32
    n_rows,
    n_cols,
    stride_cache_n,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n_rows
    maximum = tl.load(maximum_ptr + rows, mask=inside, other=0.0)
    reference = tl.load(reference_ptr + rows, mask=inside, other=0.0)
    cache = cache_ptr + rows.to(tl.int64) * stride_cache_n
    tl.store(reference_ptr + rows, _follow(cache, inside, reference, maximum, n_cols, BLOCK_V), mask=inside)


def follow_maximum_(cache: Tensor, reference: Tensor, state: State) -> None:
    """Rescale cache and reference to the maximum where that, now of all ranks, is far above the reference.

    Otherwise the target's entry, which is of the size of e^(maximum - reference), could leave the range of bf16.
    """
    rows = Rows(cache)
    arguments = (cache, state.values[0], reference, rows.n_rows, rows.n_cols, cache.stride(0))
    compat.launch(_follow_maximum_kernel, rows.grid, *arguments, **rows.blocks)


@triton.jit(do_not_specialize=["n_rows"])
def _fold_target_kernel(
    cache_ptr,  # (N, V)
    targets_ptr,  # (N,)
    entry_ptr,  # (N,) fp32
    n_rows,
    n_cols,
    stride_cache_n,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1)
    entry = tl.load(entry_ptr + rows, mask=inside, other=0.0)
    at = cache_ptr + rows.to(tl.int64) * stride_cache_n + targets
    # A target out of range (another rank's, or unchecked on CUDA) writes nowhere.
    tl.store(at, entry.to(cache_ptr.dtype.element_ty), mask=inside & (targets >= 0) & (targets < n_cols))


def fold_target_(cache: Tensor, reference: Tensor, state: State, gradient: RowGradient) -> Tensor:
    """Make dL/dz_n = coefficient_n cache_n for a loss of log-probs alone, without a pass over the cache (N, V).

    dz = -a gain (p - 1[y]) = coefficient (e^(z - reference) - 1[y] s e^(m - reference)): the target's entry alone changes, to
    (p_y - 1) s e^(m - reference) = expm1(log p_y) ..., which keeps its digits. Returns the coefficient (N,).
    """
    (n, v), block = cache.shape, 128
    rescale = (state.values[0] - reference).exp()
    entry = state.finish().logprob.expm1() * state.values[1] * rescale
    grid = (triton.cdiv(n, block),)
    compat.launch(_fold_target_kernel, grid, cache, state.targets, entry, n, v, cache.stride(0), BLOCK=block)
    return gradient.constant / rescale


class Exponentials:
    """A slab's statistics and its cached exponentials (R, V), in a buffer of R padded(V) elements or more."""

    def __init__(self, x: Operands, targets: Tensor, transform: Transform, cache: Tensor, ranks: str) -> None:
        self.tiles, self.state = LogitTiles(x, transform), State.fresh(targets)
        n, v = x.hidden.shape[0], x.weight.shape[0]
        self.reference = torch.empty(n, dtype=torch.float32, device=targets.device)
        self.cache = matrix(cache, n, v)
        views = [(r, self.state.rows(r.rows), self.reference[r.rows], self.cache[r.rows]) for r in self.tiles.rows()]
        for cols, part in self.tiles.columns():
            for rows, state, reference, of_cache in views:
                z = self.tiles.tile(rows, part)
                cache_exponentials(z, part.bias, state, reference, of_cache, cols.start, transform)
        if ranks:
            merge_ranks_(self.state, ranks)
            follow_maximum_(self.cache, self.reference, self.state)

    def backward(self, upstream: Upstream, into: Gradients, first_row: int) -> None:
        tiles = self.tiles
        gradient = RowGradient.of(self.state, upstream, tiles.transform)
        if any(g is not None for g in upstream[1:]):  # of more than log-probabilities
            into.accumulate(tiles, gradient, first_row)
            return
        coefficient = fold_target_(self.cache, self.reference, self.state, gradient)[:, None]
        hidden = (tiles.x.hidden * coefficient).to(tiles.x.hidden.dtype)  # fp32 times bf16, then rounded once
        low_hidden = None if tiles.low_hidden is None else tiles.low_hidden * coefficient
        rows = slice(first_row, first_row + self.cache.shape[0])
        into.add_hidden(self.cache, tiles.x, rows)  # one GEMM: no accumulator is read again
        into.scale_hidden_(rows, coefficient)
        for cols in (slice(0, self.cache.shape[1]),) if into.takes_whole_slab() else tiles.tiling.columns:
            dweight = into.open(cols)
            into.add_weight(self.cache[:, cols], hidden, low_hidden, cols, dweight, coefficient)
            into.close(cols, dweight)
