"""The arithmetic of a row of logits: transform, running statistics, and the gradient of the row.

N tokens, V vocabulary, z transformed logits, p their softmax. Statistics are fp32. The device functions of primitives.py are
the same formulas for Triton kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gem_kernels.operands import STATE, Upstream
from gem_kernels.types import LogitTransform, TokenStats

# exp(-87) is the smallest normal fp32 number. Flooring z - max there moves a row's sum by less than V * 2e-38, far below
# its rounding, and it keeps -inf logits (masked or padded vocabulary) from giving 0 * inf.
FLOOR = -87.0
TARGET = STATE.index("target_logit")  # its row in the values of a State


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
        """Transform raw logits in place."""
        if self.softcap:
            return z.mul_(self.gain).tanh_().mul_(self.limit)
        return z if self.gain == 1 else z.mul_(self.gain)

    def slope(self, z: Tensor) -> Tensor:
        """Return dz'/dz of the softcap as a function of z': gain limit (1 - (z' / limit)^2).

        As (limit - z') (limit + z'): near saturation that difference is exact, where 1 - tanh^2 would lose its last digits.
        """
        return (self.limit - z).mul_(z + self.limit).mul_(self.gain / self.limit)


class State(NamedTuple):
    """Running statistics of N rows: m = max z, s = Σ e^(z-m), t = Σ e^(z-m)(z-m), and the target's logit z_y.

    Columns with maximum m' move (m, s, t) to the new maximum M = max(m, m'): s e^(m-M), e^(m-M) (t + (m-M) s).
    """

    targets: Tensor  # (N,)
    values: Tensor  # (len(STATE), N) fp32

    @staticmethod
    def fresh(targets: Tensor) -> State:
        """Return the state of rows none of whose columns have been seen."""
        values = torch.zeros(len(STATE), targets.shape[0], dtype=torch.float32, device=targets.device)
        values[0] = torch.finfo(torch.float32).min
        values[TARGET] = float("nan")  # a target out of range is never seen and gives NaN
        return State(targets, values)

    def rows(self, rows: slice) -> State:
        return State(self.targets[rows], self.values[:, rows])

    def merge_(self, other: Tensor) -> None:
        """Merge in the statistics (len(STATE), N) of other columns of the same rows."""
        self.merge_sums_(*other[:3])
        # The target is in one part at most; in the others its logit is NaN.
        mine = self.values[TARGET]
        self.values[TARGET] = torch.where(mine.isnan(), other[TARGET], mine)

    def merge_sums_(self, other_maximum: Tensor, other_total: Tensor, other_weighted: Tensor) -> None:
        """Merge in (m, s, t) of other columns, each (N,)."""
        maximum, total, weighted = self.values[:3]
        new = torch.maximum(maximum, other_maximum)
        drop, other_drop = (maximum - new).clamp_(min=FLOOR), (other_maximum - new).clamp_(min=FLOOR)
        decay, other_decay = drop.exp(), other_drop.exp()
        weighted.add_(drop * total).mul_(decay).add_(other_decay * (other_weighted + other_drop * other_total))
        total.mul_(decay).add_(other_decay * other_total)
        maximum.copy_(new)

    def finish(self) -> TokenStats:
        """Return the statistics of whole rows. Shifted by m, nothing cancels at large |z|.

        log p = (z_y - m) - log s; H = log s - t / s; lse = m + log s; max log p = -log s.
        """
        maximum, total, weighted, target_logit = self.values
        log_total = total.log()
        return TokenStats(
            logprob=(target_logit - maximum) - log_total,
            entropy=log_total - weighted / total,
            lse=maximum + log_total,
            max_logprob=-log_total,
        )


class RowGradient(NamedTuple):
    """dL/dz of N rows for upstream a = dL/dlogprob, b = dL/dH, c = dL/dlse.

    dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H) + c p_v, times the transform's derivative. With d = z - m this is
    e^d (c_0 + c_1 d), c_0 = (c - a + b (log s - H)) / s and c_1 = -b / s: no pass over the row normalises it.
    The target's entry is a (1 - p_y) = -a expm1(log p_y), which keeps its digits when p_y -> 1.
    """

    targets: Tensor  # (N,)
    values: Tensor  # (3 + degree, N) fp32: m, the target's entry, c_0, ..., c_degree

    @property
    def degree(self) -> int:
        """Degree of the polynomial in z - m: 0 unless the loss depends on the entropy."""
        return self.values.shape[0] - 3

    @property
    def constant(self) -> Tensor:
        """c_0 (N,)."""
        return self.values[2]

    @staticmethod
    def of(state: State, upstream: Upstream, transform: Transform) -> RowGradient:
        """Return the coefficients for the state of whole rows."""
        stats = state.finish()
        maximum, total, _, target_logit = state.values
        zero = torch.zeros_like(stats.logprob)
        a, b, c = (zero if g is None else g.float() for g in upstream)
        coefficients = [(c - a + b * (total.log() - stats.entropy)) / total]
        if upstream.entropy is not None:
            coefficients.append(-b / total)
        log_p = stats.logprob.clamp_min(FLOOR)  # a target of probability 0: p log p is 0, not 0 * -inf
        at_target = (c - b * (log_p + stats.entropy)) * stats.logprob.exp() - a * stats.logprob.expm1()
        if transform.softcap:
            at_target *= transform.slope(target_logit)
        else:  # then the derivative is one number, folded into the row's coefficients
            at_target, *coefficients = (t * transform.gain for t in (at_target, *coefficients))
        return RowGradient(state.targets, torch.stack([maximum, at_target, *coefficients]))

    def rows(self, rows: slice) -> RowGradient:
        return RowGradient(self.targets[rows], self.values[:, rows])
