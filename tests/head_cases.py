"""A batch, its statistics by definition and a changed model, for the tests of the head."""

from __future__ import annotations

from typing import Any

import torch
from architectures import VOCAB
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gem.head import HeadStats
from gem_kernels import TokenStats

B, T = 3, 10
SKIP = -100


def batch() -> dict[str, Tensor]:
    ids = torch.randint(10, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = SKIP
    labels[2, 5] = SKIP
    return {"input_ids": ids, "labels": labels}


def from_logits(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return every field of the output by its definition, in fp64; 0 where ignored."""
    z = z.double()
    log_p = z.log_softmax(-1)
    fields = {
        "log_probs": log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "lse": z.logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }
    return {name: f * (targets != SKIP) for name, f in fields.items()}


def entropy_weighted(stats: TokenStats | HeadStats, group: int) -> Tensor:
    return -(stats.entropy.detach() * stats.logprob).sum() / (group + 1)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


class Changed(LlamaForCausalLM):
    """Does something to its logits that its config does not name."""

    change = staticmethod(lambda z: z * 1.7)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
        return out


class Bent(nn.Linear):
    """Nearly a product while its logits are small."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 59 * torch.tanh(super().forward(hidden) / 59)
