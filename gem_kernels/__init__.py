"""gem_kernels: log-probabilities, entropies and group losses of a language model without its [tokens, vocabulary] logits."""

from gem_kernels.dispatch import choose_impl
from gem_kernels.group_loss.op import linear_group_loss, sega_loss
from gem_kernels.linear_logprob.op import linear_logprob_entropy
from gem_kernels.logprob.op import logprob_entropy
from gem_kernels.scoring.op import gem_score, topm_mean
from gem_kernels.types import (
    IGNORE_INDEX,
    GroupLoss,
    Impl,
    LogitTransform,
    LowRank,
    Score,
    TokenStats,
    VocabShard,
)

__version__ = "0.1.0"

__all__ = [
    "IGNORE_INDEX",
    "GroupLoss",
    "Impl",
    "LogitTransform",
    "LowRank",
    "Score",
    "TokenStats",
    "VocabShard",
    "choose_impl",
    "gem_score",
    "linear_group_loss",
    "linear_logprob_entropy",
    "logprob_entropy",
    "sega_loss",
    "topm_mean",
]
