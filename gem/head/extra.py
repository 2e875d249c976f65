"""Per-token fields beyond log-probs and entropies that some losses and logs need, computed without the logits where possible.

Each function takes the statistics and the arguments of the op call that returned them. N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gem.head.adapters import product_of
from gem.head.transform import apply
from gem_kernels import LogitTransform, LowRank, TokenStats, linear_logprob_entropy

_TILE_BYTES = 64 << 20


def is_top1(stats: TokenStats, *_: Any) -> Tensor:
    """True where no token is likelier than the label; costs nothing beyond the statistics."""
    return stats.logprob == stats.max_logprob


def log_sum_sq_probs(stats: TokenStats, arguments: dict[str, Any]) -> Tensor:
    """log sum_v p_v^2 = lse(2 z) - 2 lse(z), where 2 z is z at half the temperature: one more forward, 2NDV FLOP."""
    transform: LogitTransform = arguments["transform"]
    sharper = replace(transform, temperature=transform.temperature / 2)
    return linear_logprob_entropy(**{**arguments, "transform": sharper}).lse - 2 * stats.lse


def mean_logits(_: TokenStats, arguments: dict[str, Any]) -> Tensor:
    """Mean of the transformed logits over the vocabulary, with a gradient; fp32 (fp64 for fp64 inputs).

    Without a softcap the mean of h W^T is h times the mean row of W: one pass over the weight, none over N x V. A softcap is
    not linear: the logits are then made, one part of the vocabulary at a time, and made again in the backward.
    """
    hidden, weight, bias, low = (arguments[name] for name in ("hidden", "weight", "bias", "low_rank"))
    transform: LogitTransform = arguments["transform"]
    if arguments["shard"] is not None:
        raise ValueError(
            "the mean logit of a vocabulary-parallel lm_head is not supported: leave mean_logits out of outputs, and "
            "label_smoothing at 0"
        )
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the product
        if transform.softcap is not None:
            return _mean_of_capped(hidden.to(dtype), weight, bias, low, transform)
        mean_row = _column_means(weight, dtype)
        mean_bias = None if bias is None else _column_means(bias, dtype)
        mean_low = None if low is None else low._replace(b=_column_means(low.b, dtype))
        return apply(transform, product_of(hidden, mean_row, mean_bias, mean_low, dtype)[..., 0])


def _column_means(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, ...) -> (1, ...) in `dtype`. The gradient of a sum is a view; mean() would fill a (V, ...) of `dtype`."""
    return t.sum(0, keepdim=True, dtype=dtype) / len(t)


def _mean_of_capped(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank | None, transform: LogitTransform
) -> Tensor:
    """(..., D) -> (...), by parts of the vocabulary: each row of the weight gets its gradient from one product."""

    def sum_of(h: Tensor, rows: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
        part = None if low is None else LowRank(cast(Tensor, a), cast(Tensor, b), low.scale)
        return apply(transform, product_of(h, rows, bias, part, h.dtype)).sum(-1)

    tokens = max(1, hidden.shape[:-1].numel())
    step = max(1, _TILE_BYTES // (hidden.element_size() * tokens))
    rows = weight.split(step)
    biases = [None] * len(rows) if bias is None else bias.split(step)
    bs = [None] * len(rows) if low is None else low.b.split(step)
    # Converted once: the gradients of the parts add up in this dtype.
    a = None if low is None else low.a.to(hidden.dtype)
    total = hidden.new_zeros(hidden.shape[:-1])
    for w, v, b in zip(rows, biases, bs, strict=True):
        total = total + checkpoint(sum_of, hidden, w, v, a, b, use_reentrant=False, preserve_rng_state=False)
    return total / len(weight)


EXTRA_OUTPUTS: dict[str, Callable[[TokenStats, dict[str, Any]], Tensor]] = {
    "is_top1": is_top1,
    "mean_logits": mean_logits,
    "log_sum_sq_probs": log_sum_sq_probs,
}
