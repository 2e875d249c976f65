"""Device functions: the mathematical steps that the Triton kernels are made of, each once. Only kernels import them.

BLOCK_N tokens, BLOCK_V vocabulary entries, BLOCK_D hidden entries. Logits, statistics and sums are fp32. A state is the tuple
of the statistics in `operands.STATE`, (BLOCK_N,) each; kernels carry it whole, so that a new statistic leaves them as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gem_kernels.compat import INTERPRETED
from gem_kernels.operands import STATE

_INTERPRETED = tl.constexpr(INTERPRETED)
_STATE_ROWS = tl.constexpr(len(STATE))

# The running maximum starts finite and z - max is floored where it multiplies: -inf logits (masked or padded vocabulary) then
# give exp = 0 and 0 * -87, never 0 * inf or inf - inf. exp(-87) is the smallest normal fp32 number.
LOWEST = tl.constexpr(-3.4028234663852886e38)
FLOOR = tl.constexpr(-87.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """Return acc + a b in fp32; fp32 operands become three TF32 products on the tensor cores, which keep 22 bits of each."""
    if _INTERPRETED:  # tl.dot of bf16 returns garbage there
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return tl.dot(a, b, acc)


@triton.jit
def exp(x):
    """Return e^x for x <= 0 as 2^(x log2 e). Below 2^-126 that is 0; tl.exp spends three more instructions on such numbers."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh(x):
    """Return tanh(x) to 1.3 units in the last place: 1 - 2 / (e^2x + 1), and near 0, where that cancels, x + x^3 P(x^2)."""
    size = tl.abs(x)
    square = x * x
    series = -0.0062763886526227 * square + 0.021116213873028755
    series = series * square - 0.053875137120485306
    series = series * square + 0.13332924246788025
    series = series * square - 0.3333333134651184
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def transform_logits(z, gain, limit, SOFTCAP: tl.constexpr):
    """Return limit tanh(gain z), or gain z without a softcap: softmax.Transform.apply_."""
    if SOFTCAP:
        return limit * tanh(z * gain)
    return z * gain


@triton.jit
def transform_slope(z, gain, limit):
    """Return dz'/dz of the softcap as a function of z': softmax.Transform.slope, with its exactness near saturation."""
    return (limit - z) * (limit + z) * (gain / limit)


@triton.jit
def fresh_state(BLOCK: tl.constexpr):
    """Return the state of rows none of whose columns have been seen; the logit of a target out of range stays NaN."""
    zeros = tl.zeros((BLOCK,), tl.float32)
    return tl.full((BLOCK,), LOWEST, tl.float32), zeros, zeros, tl.full((BLOCK,), float("nan"), tl.float32)


@triton.jit
def load_state(state_ptr, stride, mask):
    """Load the state of the rows at state_ptr, whose statistics are `stride` apart; masked rows get finite numbers."""
    return (
        tl.load(state_ptr, mask=mask, other=0.0),
        tl.load(state_ptr + stride, mask=mask, other=1.0),
        tl.load(state_ptr + 2 * stride, mask=mask, other=0.0),
        tl.load(state_ptr + 3 * stride, mask=mask, other=0.0),
    )


@triton.jit
def store_state(state_ptr, stride, state, mask):
    for k in tl.static_range(_STATE_ROWS):
        tl.store(state_ptr + k * stride, state[k], mask=mask)


@triton.jit
def update_state(state, z, targets, cols, first_col, n_cols):
    """Update the state with transformed logits z (BLOCK_N, BLOCK_V), -inf where there are none.

    cols (BLOCK_V,): their columns in the vocabulary, of which [first_col, first_col + n_cols) exist.
    """
    maximum, total, weighted, target_logit = state
    here = (targets >= first_col) & (targets < first_col + n_cols)
    found = tl.sum(tl.where(cols[None, :] == targets[:, None], z, 0.0), 1)
    target_logit = tl.where(here, found, target_logit)
    new = tl.maximum(maximum, tl.max(z, 1))
    shifted = z - new[:, None]
    exps = exp(shifted)
    drop = tl.maximum(maximum - new, FLOOR)
    decay = exp(drop)
    weighted = decay * (weighted + drop * total) + tl.sum(exps * tl.maximum(shifted, FLOOR), 1)
    total = decay * total + tl.sum(exps, 1)
    return new, total, weighted, target_logit


# A kernel that walks rows of logits in memory keeps their sums in lanes, one for each column of a block: a step then reduces
# nothing but the maximum. Lanes are the tuple (m (BLOCK_N,), s and t (BLOCK_N, BLOCK_V)), with sums relative to m.


@triton.jit
def open_lanes(state, BLOCK_V: tl.constexpr):
    """Return the lanes of rows with this state; the first lane has their sums so far."""
    maximum, total, weighted, _ = state
    first = (tl.arange(0, BLOCK_V) == 0)[None, :]
    return maximum, tl.where(first, total[:, None], 0.0), tl.where(first, weighted[:, None], 0.0)


@triton.jit
def rises(maximum, z):
    """Return the maximum of every row with the logits z (BLOCK_N, BLOCK_V), and whether that of any row is a new one."""
    new = tl.maximum(maximum, tl.max(z, 1))
    return new, tl.max((new > maximum).to(tl.int32), 0) > 0


@triton.jit
def raise_lanes(lanes, new):
    """Move the sums to the new maximum. After a few blocks a row rarely has one, so this is behind a branch."""
    maximum, total, weighted = lanes
    drop = tl.maximum(maximum - new, FLOOR)[:, None]
    decay = exp(drop)
    return new, decay * total, decay * (weighted + drop * total)


@triton.jit
def add_to_lanes(lanes, z):
    """Add logits z (BLOCK_N, BLOCK_V), -inf where there are none, none above the maximum; return e^(z - m) too."""
    maximum, total, weighted = lanes
    shifted = z - maximum[:, None]
    exps = exp(shifted)
    return (maximum, total + exps, weighted + exps * tl.maximum(shifted, FLOOR)), exps


@triton.jit
def _add_pairs(s, t, other_s, other_t):
    return s + other_s, t + other_t


@triton.jit
def close_lanes(lanes, target_logit):
    """Return the state of rows from their lanes."""
    maximum, total, weighted = lanes
    if _INTERPRETED:  # a reduction with a function of our own is a loop in Python there
        total = tl.sum(total, 1)
        weighted = tl.sum(weighted, 1)
    else:  # both at once, behind one set of barriers
        total, weighted = tl.reduce((total, weighted), 1, _add_pairs)
    return maximum, total, weighted, target_logit


@triton.jit
def merge_states(state, other):
    """Merge the states of two disjoint parts of the rows' columns; at most one part has the target."""
    maximum, total, weighted, target_logit = state
    other_maximum, other_total, other_weighted, other_target = other
    new = tl.maximum(maximum, other_maximum)
    drop = tl.maximum(maximum - new, FLOOR)
    other_drop = tl.maximum(other_maximum - new, FLOOR)
    decay = exp(drop)
    other_decay = exp(other_drop)
    weighted = decay * (weighted + drop * total) + other_decay * (other_weighted + other_drop * other_total)
    total = decay * total + other_decay * other_total
    return new, total, weighted, tl.where(other_target == other_target, other_target, target_logit)


@triton.jit
def load_gradient(gradient_ptr, rows, stride, mask, DEGREE: tl.constexpr):
    """Load softmax.RowGradient of these rows, whose numbers are `stride` apart: the maximum, c_0, c_1, the target's entry."""
    maximum = tl.load(gradient_ptr + rows, mask=mask, other=0.0)
    constant = tl.load(gradient_ptr + 2 * stride + rows, mask=mask, other=0.0)
    slope = tl.load(gradient_ptr + 3 * stride + rows, mask=mask, other=0.0) if DEGREE > 0 else constant
    at_target = tl.load(gradient_ptr + stride + rows, mask=mask, other=0.0)
    return maximum, constant, slope, at_target


@triton.jit
def dlogits(z, gradient, gain, limit, SOFTCAP: tl.constexpr, DEGREE: tl.constexpr):
    """Return dL/d(raw logits) of every column but the target's: e^(z-m) (c_0 + c_1 (z - m))."""
    maximum, constant, slope, _ = gradient
    shifted = z - maximum[:, None]
    dz = exp(shifted)
    if DEGREE > 0:
        dz *= constant[:, None] + slope[:, None] * tl.maximum(shifted, FLOOR)
    else:
        dz *= constant[:, None]
    if SOFTCAP:
        dz *= transform_slope(z, gain, limit)
    return dz


@triton.jit
def logits_tile(
    hidden,  # pointer (N, D), or its descriptor with blocks (BLOCK_N, BLOCK_D)
    weight,  # pointer (V, D), or its descriptor with blocks (BLOCK_V, BLOCK_D)
    bias_ptr,
    low_hidden_ptr,  # (N, R) fp32, dense
    low_weight_ptr,  # (V, R), dense
    first_row,
    first_col,
    n_rows,
    n_cols,
    D,
    R,
    stride_hidden_n,
    stride_hidden_d,
    stride_weight_v,
    stride_weight_d,
    gain,
    limit,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # 0: no adapter
):
    """Return transformed logits (BLOCK_N, BLOCK_V) from row first_row and column first_col on; -inf beyond n_cols."""
    cols = first_col + tl.arange(0, BLOCK_V)
    # Beyond the edge the last row or column is read again: a clamp costs nothing, a mask would slow every load.
    safe_rows = tl.minimum(first_row + tl.arange(0, BLOCK_N), n_rows - 1).to(tl.int64)
    safe_cols = tl.minimum(cols, n_cols - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if USE_TMA:
        for d in range(0, D, BLOCK_D):
            acc = dot(hidden.load([first_row, d]), weight.load([first_col, d]).T, acc)
    else:
        inner = tl.arange(0, BLOCK_D)
        hidden_tile = hidden + safe_rows[:, None] * stride_hidden_n + inner[None, :] * stride_hidden_d
        weight_tile = weight + safe_cols[None, :] * stride_weight_v + inner[:, None] * stride_weight_d
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                acc = dot(tl.load(hidden_tile), tl.load(weight_tile), acc)
            else:
                h = tl.load(hidden_tile, mask=inner[None, :] < D - d, other=0.0)
                w = tl.load(weight_tile, mask=inner[:, None] < D - d, other=0.0)
                acc = dot(h, w, acc)
            hidden_tile += BLOCK_D * stride_hidden_d
            weight_tile += BLOCK_D * stride_weight_d
    if BLOCK_R > 0:
        for r in range(0, R, BLOCK_R):
            inner_r = r + tl.arange(0, BLOCK_R)
            low_hidden = tl.load(
                low_hidden_ptr + safe_rows[:, None] * R + inner_r[None, :], mask=inner_r[None, :] < R, other=0.0
            )
            low_weight = tl.load(
                low_weight_ptr + safe_cols[None, :] * R + inner_r[:, None], mask=inner_r[:, None] < R, other=0.0
            )
            acc = dot(low_hidden, low_weight.to(tl.float32), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    z = transform_logits(acc, gain, limit, SOFTCAP)
    return tl.where((cols < n_cols)[None, :], z, float("-inf"))
