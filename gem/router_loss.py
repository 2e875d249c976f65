"""The load-balancing loss of a mixture of experts, of a batch that goes through the model in parts.

The loss of Switch Transformer (arXiv 2101.03961, Eq. 4 to 6), as transformers computes it: of n tokens with p their router
probabilities, in all layers together,

    A = E sum_e f_e P_e,    f_e = how often a token chooses expert e, on average; no gradient,    P_e = the mean of p_e.

Padding does not count. A is a product of two means, so the losses A_m of parts of a batch do not add up to that of the whole.
With s_m = n_m / n the share of the tokens in part m, f = sum_m s_m f(m) and P = sum_m s_m P(m), and so

    A = sum_m s_m E sum_e f_e P_e(m),                                                                     (1)
    sum_m s_m A_m = A + E sum_e sum_m s_m (f_e(m) - f_e) (P_e(m) - P_e).                                  (2)

(1) is exact, value and gradient, and needs the f of the whole before the first backward. (2) needs nothing but the shares; its
last term, the covariance of f and P over the parts, is what it is off by: it asks for balance in every part, and is 0 where
the parts choose alike.

E experts, k of which a token chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gem.rounding import roundoff

WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")  # what models call the weight of it in their loss


class Routing(NamedTuple):
    """Of the tokens of a call, each (E,) fp32."""

    usage: Tensor
    """f: how often a token chooses each expert, on average; no gradient; the sum is k"""
    probs: Tensor
    """P: mean router probability, with gradient; the sum is 1"""

    def loss(self, usage: Tensor) -> Tensor:
        """E sum_e f_e P_e, scalar, with the f of another batch, (E,)."""
        return len(self.probs) * (usage.to(self.probs.device) * self.probs).sum()


def router_weight(model: Any) -> float:
    """Of the load-balancing loss in the own loss of a transformers model."""
    owners = (model, model.config.get_text_config())
    return next((float(w) for o in owners for name in WEIGHTS if (w := getattr(o, name, None)) is not None), 0.0)


def adds_router_loss(model: Any) -> bool:
    """Whether the loss of a transformers model contains one when the call does not say."""
    owners = (model.config, model.config.get_text_config())
    return any(getattr(c, "output_router_logits", False) for c in owners) and router_weight(model) != 0


def routing(router_logits: Sequence[Tensor], attention_mask: Tensor | None, top_k: int) -> Routing:
    """f and P of all layers together.

    Args:
        router_logits: of each layer, (B T, E), as a model of transformers returns them.
        attention_mask: (B, T), 0 where a token is padding; None: there is none.
    """
    probs, counts = _tokens(router_logits, attention_mask)
    chosen = probs.detach().topk(top_k, -1).indices
    usage = counts.new_zeros(probs.shape[-1]).scatter_add(0, chosen.flatten(), counts.repeat_interleave(top_k))
    return Routing(usage / counts.sum(), (probs.float() * counts[:, None]).sum(0) / counts.sum())


def find_top_k(router_logits: Sequence[Tensor], attention_mask: Tensor, aux_loss: Tensor) -> int:
    """The k with which E sum_e f_e P_e is a model's own aux_loss; 0: there is none, its router loss is another one.

    Args:
        attention_mask: (B, T), with some padding: a loss in which that counts is another one.
    """
    probs, counts = (t.detach() for t in _tokens(router_logits, attention_mask))
    rows, experts = probs.shape
    mean = (probs.float() * counts[:, None]).sum(0) / counts.sum()
    # What the tokens choose at rank 1, 2, ... adds its part to the loss.
    ranked = mean[probs.sort(-1, descending=True).indices]
    losses = experts * ((ranked * counts[:, None]).sum(0) / counts.sum()).cumsum(0)
    own = aux_loss.detach().to(losses)
    top_k = int((losses - own).abs().argmin()) + 1
    ours = routing(
        router_logits, attention_mask, top_k
    )  # equal probabilities in the order in which the model sees them
    # Sums of terms of one sign: each rounding counts once. Some transformers average in the dtype of the router.
    rounding = (rows + experts + 8) * roundoff(torch.float32) + 4 * roundoff(router_logits[0].dtype)
    return top_k if bool((ours.loss(ours.usage).detach() - own).abs() <= rounding * own) else 0


def _tokens(router_logits: Sequence[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the tokens of all layers: probabilities (N, E), and (N,) fp32 1, or 0 for padding."""
    # In the dtype of the logits, as in the model: it decides which of two close probabilities comes first.
    device = router_logits[0].device
    layers = [z.reshape(-1, z.shape[-1]).to(device).softmax(-1) for z in router_logits]
    probs = torch.cat(layers)
    if attention_mask is None:
        return probs, probs.new_ones(len(probs), dtype=torch.float32)
    return probs, attention_mask.reshape(-1).to(device, torch.float32).repeat(len(layers))
