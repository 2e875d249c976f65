"""fp64 results on the same inputs. Every library is compared with them before it is timed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, Inputs, Shape, make_inputs

_SAMPLE = 64
_BLOCK_BYTES = 256 << 20 if DEVICE.type == "cpu" else 4 << 30


class Gold(NamedTuple):
    """Statistics of every token, and the log-probabilities that the gradients of some tokens and vocabulary entries need."""

    x: Inputs
    logprob: Tensor  # (N,) fp64
    entropy: Tensor  # (N,) fp64
    sample: Tensor  # (K,) tokens whose dhidden is compared
    columns: Tensor  # (C,) vocabulary entries whose dweight is compared
    log_p_columns: Tensor  # (N, C)
    distribution: dict[str, float]  # how peaked the probabilities are

    def gradients(self, a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dhidden[sample] and dweight[columns] of Σ a_n logprob_n + b_n entropy_n.

        dz_v = a (1[v = y] - p_v) - b p_v (log p_v + H).
        """
        a = a.double()
        b = torch.zeros_like(a) if b is None else b.double()

        def dlogits(log_p: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
            p, hit = log_p.exp(), cols[None] == self.x.targets[rows, None]
            of_logprob = a[rows, None] * (hit.double() - p)
            return of_logprob - b[rows, None] * p * (log_p + self.entropy[rows, None])

        weight = self.x.weight.double()
        of_sample = (self.x.hidden[self.sample].double() @ weight.T).log_softmax(1)
        everything = torch.arange(weight.shape[0], device=DEVICE)
        dhidden = dlogits(of_sample, self.sample, everything) @ weight
        every_token = torch.arange(self.x.hidden.shape[0], device=DEVICE)
        dweight = dlogits(self.log_p_columns, every_token, self.columns).T @ self.x.hidden.double()
        return dhidden, dweight


def make_gold(x: Inputs) -> Gold:
    n, v = x.hidden.shape[0], x.weight.shape[0]
    g = torch.Generator(DEVICE).manual_seed(1)
    sample = torch.randint(0, n, (_SAMPLE,), generator=g, device=DEVICE).unique()
    columns = torch.randint(0, v, (_SAMPLE,), generator=g, device=DEVICE)
    columns = torch.cat((columns, x.targets[:_SAMPLE])).unique()
    weight = x.weight.double()
    parts = []
    for rows in torch.arange(n, device=DEVICE).split(max(1, _BLOCK_BYTES // (8 * v))):
        z = x.hidden[rows].double() @ weight.T
        largest = z.abs().amax(1)
        log_p = z.log_softmax(1)
        logprob = log_p.gather(1, x.targets[rows, None])[:, 0]
        above = (log_p > -12 * torch.log(torch.tensor(2.0))).sum(1).double()
        log_p_columns = log_p[:, columns]
        parts.append((logprob, -(log_p.exp() * log_p).sum(1), log_p_columns, above, largest))
    logprob, entropy, log_p_columns, above, largest = (torch.cat(t) for t in zip(*parts, strict=True))
    distribution = {
        "mean entropy (nats)": round(float(entropy.mean()), 2),
        "mean entries above 2^-12": round(float(above.mean()), 1),
        "largest |logit|": round(float(largest.max()), 1),
    }
    return Gold(x, logprob, entropy, sample, columns, log_p_columns, distribution)


@lru_cache(maxsize=1)  # enough, because benchmarks are sorted by shape
def gold_of(shape: Shape) -> Gold:
    return make_gold(make_inputs(shape))


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return |got - exact| / |exact|."""
    return float((got.double() - exact).norm() / exact.norm())
