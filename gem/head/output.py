"""The output of a fused call.

B sequences, T tokens of a sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


class HeadStats(NamedTuple):
    """Statistics of a fused call, as gem_kernels.TokenStats names them."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


STATISTICS = ("log_probs", "entropy", "lse")
"""The fields of FusedCausalLMOutput that hold HeadStats, in its order."""


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """Output of a fused call. Per-token fields are (B, T - 1), or (B, T) with shift_labels, fp32, 0 where ignored.

    Fields that TRL's output also has mean the same as there. With a loss_fn only the loss has a gradient.
    """

    loss: Tensor | None = None
    """scalar: -sum(log_probs) / num_items_in_batch (default: the number of labels), smoothed by label_smoothing, or the group
    loss; with router logits plus router_aux_loss_coef * aux_loss, as in the model's own loss"""
    log_probs: Tensor | None = None
    """log p of the next token, nats"""
    entropy: Tensor | None = None
    """entropy of the next-token distribution, nats"""
    lse: Tensor | None = None
    """log sum exp of the transformed logits"""
    label_mask: Tensor | None = None
    """bool: True where there is a label"""
    aux_loss: Tensor | None = None
    """load-balancing loss of a mixture of experts over the tokens of this call; None if the model returns none"""
    router_usage: Tensor | None = None
    """(E,) mean number of times that a token of this call chooses each expert, no gradient; None if the router loss has
    another form than that of gem/head/router.py"""
    mean_logits: Tensor | None = None
    """mean of the logits over the vocabulary, no gradient; None unless in `outputs`, like the next two"""
    is_top1: Tensor | None = None
    """bool: True where no token is likelier than the label"""
    log_sum_sq_probs: Tensor | None = None
    """log sum_v p_v^2, no gradient"""

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.log_probs.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"something around the model rounded log_probs to {self.log_probs.dtype}: give FSDP2 a "
                "MixedPrecisionPolicy(output_dtype=torch.float32); accelerate's default is the dtype of the parameters"
            )
        super().__post_init__()
