"""Bounds on rounding: how far apart two correct computations of the same logits may be, for each number that is compared.

docs/models.md derives them. The unit roundoff u, half an eps, is the largest relative error of one rounding.

T tokens, D hidden size, V vocabulary, r rank of an adapter. Bounds are fp64, and >= 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gem.head.adapters import HeadParts
from gem.head.output import HeadStats
from gem_kernels import LogitTransform, LowRank

# Relative error that a GEMM library may make in a fp32 operand: it truncates to TF32, and rounds to bf16.
_NARROW = {"tf32": 2.0**-10, "bf16": 2.0**-8}
_STEPS = 8  # elementary operations between a sum and a statistic, each of one or two roundings


class Arithmetic(NamedTuple):
    """The arithmetic in which hidden states and weight are multiplied."""

    dtype: torch.dtype  # the operands' own, or the dtype to which autocast converts them first
    operand: float  # relative error that the GEMM library then makes in an operand (TF32); 0: none
    total: float  # u of the sums

    @staticmethod
    def of(hidden: Tensor, weight: Tensor) -> Arithmetic:
        """Return the arithmetic of a product. Inside the model's forward autocast and the gathered weight are visible."""
        device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        operand = _narrowed(device) if dtype == torch.float32 else 0.0
        return Arithmetic(dtype, operand, roundoff(torch.float64 if dtype == torch.float64 else torch.float32))


class Product(NamedTuple):
    """The logits of a head before the model's transform and bounds on their errors, each (..., V)."""

    exact: Tensor
    own: Tensor
    """bound on the error of the head's own forward"""
    ours: Tensor
    """bound on the error of the logits from which our statistics are computed"""


def roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a dtype."""
    return float(torch.finfo(dtype).eps) / 2


def narrowing(source: torch.dtype, target: torch.dtype) -> float:
    """Return u of the conversion from one dtype to the other; 0 if it is exact."""
    return roundoff(target) if roundoff(target) > roundoff(source) else 0.0


def growth(terms: Tensor) -> Tensor:
    """Return the error of a sum of n terms in any order, as a multiple of u times the sum of absolute values.

    It is at most n. If roundings are independent and uniform, it exceeds 4 sqrt(n) with a probability of 1e-10.
    """
    n = terms.double()
    return torch.minimum(n, 4 * n.sqrt())


def product_bounds(hidden: Tensor, parts: HeadParts, arithmetic: Arithmetic, result: torch.dtype) -> Product:
    """Return the exact logits of hidden (..., D), finite, and the bounds for a head that returns the dtype `result`."""
    h = hidden.to(arithmetic.dtype).double()
    exact, size = _both(h, parts.weight, arithmetic.dtype)
    nonzero = h.count_nonzero(-1)
    # A power of two times a weight is exact, and so is adding zeros to it.
    mantissa = h.frexp().mantissa.abs()
    single = (nonzero <= 1) & ((mantissa == 0) | (mantissa == 0.5)).all(-1)
    steps = growth(nonzero).masked_fill(single, 0)[..., None]
    terms, addends, sums = exact.abs(), 0, 2 * arithmetic.operand * size
    if parts.low_rank is not None:
        low, low_size, off = _adapter_bounds(h, parts.low_rank, arithmetic)
        exact, sums, terms, addends = exact + low, sums + off, terms + low_size, 2
    if parts.bias is not None:
        exact = exact + parts.bias.double()
        for bias in parts.biases or (parts.bias,):
            # A bias is rounded to the dtype of the products, and a GEMM may start its sum with it.
            amount = bias.double().masked_fill(bias.isinf(), 0).abs()
            sums = sums + narrowing(bias.dtype, arithmetic.dtype) * amount
            size, terms, addends = size + amount, terms + amount, addends + 1
    sums = sums + arithmetic.total * steps * size
    info = torch.finfo(result)
    rounded = (1 + addends) * roundoff(result) * terms + info.smallest_normal * info.eps
    return Product(exact, sums + rounded, sums + (1 + addends) * arithmetic.total * terms)


def _adapter_bounds(h: Tensor, low_rank: LowRank, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale (h a^T) b^T, the same product of absolute values, and the bound on the error.

    Operands, the r products in the middle and the result are rounded to the dtypes of the adapter, or of autocast.
    """
    a, b, scale = low_rank
    low, low_size = _both(h, a, a.dtype)
    low, low_size = scale * low @ b.double().T, abs(scale) * low_size @ b.double().abs().T
    u = max(roundoff(t) for t in (a.dtype, b.dtype, arithmetic.dtype))
    steps = float(growth(torch.tensor(h.shape[-1])) + growth(torch.tensor(a.shape[0])))
    return low, low_size, (arithmetic.total * steps + 2 * arithmetic.operand + 8 * u) * low_size


def transform_roundoff(transform: LogitTransform, u: float) -> float:
    """Return the largest relative error of a transformed logit.

    Each product, quotient and tanh is stored in arithmetic of unit roundoff u; constants and the inside of a tanh are fp32.
    """
    stored = (transform.scale != 1) + 3 * (transform.softcap is not None) + (transform.temperature != 1)
    inside = (transform.scale != 1) + 6 * (transform.softcap is not None) + (transform.temperature != 1)
    return stored * u + inside * min(u, roundoff(torch.float32))


def transformed(transform: LogitTransform, bound: Tensor, logits: Tensor, u: float, stored: float = 0.0) -> Tensor:
    """Return the bound on `logits` (..., V), which the transform has computed in arithmetic of unit roundoff u.

    bound: of the logits before the transform. stored: u of the dtype in which the result is then stored; 0 if it is not
    converted. A tanh lengthens no distance, and no step has a relative error larger than that of its input.
    """
    size = logits.masked_fill(logits.isinf(), 0).abs()
    return abs(transform.scale) / transform.temperature * bound + (transform_roundoff(transform, u) + stored) * size


def statistics_bounds(z: Tensor, bound: Tensor, targets: Tensor, u: float) -> HeadStats:
    """Return bounds (T,) on the statistics of logits z (T, V), each of which may be off by `bound` (T, V).

    u: unit roundoff of the arithmetic in which the statistics are computed.
    """
    p, lse = z.softmax(-1), z.logsumexp(-1)
    possible = ~z.isinf()
    log_p = (z - lse[:, None]).where(possible, 0)
    below = (z.amax(-1, keepdim=True) - z).where(possible, 0)  # the exponents, max - z
    bound = bound.where(possible, 0)
    entropy = -(p * log_p).sum(-1)
    # lse moves most if all dz have one sign and their full size: by log Σ p e^dz. p_v then grows by e^(dz_v + dlse) at most.
    moved = (z - lse[:, None] + bound).logsumexp(-1).clamp(min=0)
    most = (log_p + bound + moved[:, None]).exp().where(possible, 0) * bound
    # dH = -Σ p (log p + H) dz along the way, where log p has moved by dz_v + dlse and H by dH itself.
    further = (most * ((log_p + entropy[:, None]).abs() + bound + moved[:, None])).sum(-1)
    share = most.sum(-1)
    # The entropy stays between 0 and log V in any case.
    entropy_moved = (further / (1 - share)).where(share < 1, torch.inf).clamp(max=math.log(z.shape[-1]))
    # Sums over V, and exponentials of rounded arguments: e^-x has a relative error of u x.
    sums = u * (float(growth(torch.tensor(z.shape[-1]))) + _STEPS)
    depth, depth2 = (p * below).sum(-1), (p * below.square()).sum(-1)
    total = sums + 2 * u * depth
    at = targets[:, None]
    target = bound.gather(-1, at)[:, 0] + 2 * u * log_p.gather(-1, at)[:, 0].abs()
    return HeadStats(
        logprob=target + moved + total + u * entropy.abs(),
        entropy=entropy_moved + sums * (1 + 2 * depth) + 2 * u * (depth + depth2),
        lse=moved + total + 2 * u * lse.abs(),
    )


def _both(h: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return h W^T and |h| |W|^T in fp64, W rounded to dtype first. It goes by parts of W: all of it may be gigabytes."""
    products = []
    for rows in weight.split(4096):
        w = rows.to(dtype).double()
        products.append((h @ w.T, h.abs() @ w.abs().T))
    exact, size = zip(*products, strict=True)
    return torch.cat(exact, -1), torch.cat(size, -1)


def _narrowed(device: str) -> float:
    """Return the relative error that torch's settings allow in a fp32 operand on this device; 0 if none."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is None:  # before torch 2.9
        older = torch.get_float32_matmul_precision()
        setting = {"highest": "ieee", "high": "tf32", "medium": "tf32" if device == "cuda" else "bf16"}[older]
    return _NARROW.get(setting, 0.0)
