"""Per-token fields beyond log-probs and entropies that some losses and logs want, each without the logits where that can be.

N tokens, D hidden size, V vocabulary. Each takes the statistics and the arguments of the call that gave them; no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gem.adapters import product_of
from gem.head_transform import apply
from gem_kernels import LogitTransform, MaxTokenStats, linear_logprob_entropy

_TILE_BYTES = 64 << 20


def is_top1(stats: MaxTokenStats, *_: Any) -> Tensor:
    """Whether no token is likelier than the label; from the pass that made the statistics."""
    return stats.logprob == stats.max_logprob


def log_sum_sq_probs(stats: MaxTokenStats, arguments: dict[str, Any]) -> Tensor:
    """log sum_v p_v^2 = lse(2 z) - 2 lse(z), and 2 z is z at half the temperature: one more forward, 2NDV FLOP."""
    transform: LogitTransform = arguments["transform"]
    sharper = replace(transform, temperature=transform.temperature / 2)
    return linear_logprob_entropy(**{**arguments, "transform": sharper}).lse - 2 * stats.lse


def mean_logits(_: MaxTokenStats, arguments: dict[str, Any]) -> Tensor:
    """Mean of the transformed logits over the vocabulary.

    Without a softcap the mean of h W^T is h times the mean row of W: one pass over the weight, none over N x V. A softcap is
    not linear: then the logits are made, a few tokens at a time.
    """
    hidden, weight, bias, low = (arguments[name] for name in ("hidden", "weight", "bias", "low_rank"))
    transform: LogitTransform = arguments["transform"]
    if arguments["shard"] is not None:
        raise ValueError("mean_logits of a vocabulary-parallel lm_head is not supported: leave it out of outputs")
    if transform.softcap is None:
        mean_low = None if low is None else low._replace(b=low.b.mean(0, keepdim=True, dtype=torch.float32))
        mean_bias = None if bias is None else bias.mean(0, keepdim=True, dtype=torch.float32)
        mean_row = weight.mean(0, keepdim=True, dtype=torch.float32)
        return apply(transform, product_of(hidden, mean_row, mean_bias, mean_low, torch.float32)[..., 0])
    rows = hidden.flatten(0, -2).split(max(1, _TILE_BYTES // (4 * weight.shape[0])))
    means = [apply(transform, product_of(h, weight, bias, low, torch.float32)).mean(-1) for h in rows]
    return torch.cat(means).view(hidden.shape[:-1])


EXTRA_OUTPUTS: dict[str, Callable[[MaxTokenStats, dict[str, Any]], Tensor]] = {
    "is_top1": is_top1,
    "mean_logits": mean_logits,
    "log_sum_sq_probs": log_sum_sq_probs,
}
