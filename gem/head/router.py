"""The load-balancing loss of a mixture of experts, for a batch that goes through the model in parts.

This is the loss of Switch Transformer (arXiv 2101.03961, Eq. 4 to 6) as transformers computes it, over the n tokens of a batch
in all layers together. With p the router probabilities of a token,

    A = E sum_e f_e P_e,    f_e = mean number of times a token chooses expert e, no gradient,    P_e = mean of p_e.

Padding does not count. A is a product of two means, so the losses A_m of parts of a batch do not add up to that of the whole.
With s_m = n_m / n the share of the tokens in part m, f = sum_m s_m f(m) and P = sum_m s_m P(m). Therefore

    A = sum_m s_m E sum_e f_e P_e(m),                                                                     (1)
    sum_m s_m A_m = A + E sum_e sum_m s_m (f_e(m) - f_e) (P_e(m) - P_e).                                  (2)

(1) is exact in value and gradient, and needs the f of the whole batch before the first backward. (2) needs only the shares.
Its error is its last term, the covariance of f and P over the parts: it demands balance in every part, and is 0 where the
parts choose alike.

B sequences, T tokens of a sequence, N tokens of all layers, E experts, k experts that a token chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gem.head.rounding import roundoff

WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")  # names under which models keep its weight


class Routing(NamedTuple):
    """Means over the tokens of a call, each (E,) fp32."""

    usage: Tensor
    """f: mean number of times a token chooses each expert; no gradient; the sum is k"""
    probs: Tensor
    """P: mean router probability, with gradient; the sum is 1"""

    def loss(self, usage: Tensor) -> Tensor:
        """Return E sum_e f_e P_e (scalar), with the f (E,) of another batch."""
        return len(self.probs) * (usage.to(self.probs.device) * self.probs).sum()


def router_weight(model: Any) -> float:
    """Return the weight of the load-balancing loss in the own loss of a transformers model."""
    owners = (model, model.config.get_text_config())
    return next((float(w) for o in owners for name in WEIGHTS if (w := getattr(o, name, None)) is not None), 0.0)


def adds_router_loss(model: Any) -> bool:
    """True if the loss of a transformers model contains a router loss by default."""
    owners = (model.config, model.config.get_text_config())
    return any(getattr(c, "output_router_logits", False) for c in owners) and router_weight(model) != 0


def routing(router_logits: Sequence[Tensor], attention_mask: Tensor | None, top_k: int) -> Routing:
    """Return f and P of all layers together.

    Args:
        router_logits: one (B T, E) for each layer, as a transformers model returns them.
        attention_mask: (B, T), 0 where a token is padding; None if there is no padding.
    """
    probs, counts = _tokens(router_logits, attention_mask)
    chosen = probs.detach().topk(top_k, -1).indices
    usage = counts.new_zeros(probs.shape[-1]).scatter_add(0, chosen.flatten(), counts.repeat_interleave(top_k))
    return Routing(usage / counts.sum(), (probs.float() * counts[:, None]).sum(0) / counts.sum())


def find_top_k(router_logits: Sequence[Tensor], attention_mask: Tensor, aux_loss: Tensor) -> int:
    """Return the k for which E sum_e f_e P_e is a model's own aux_loss; 0 if there is none: its router loss has another form.

    Args:
        attention_mask: (B, T), with some padding: a loss in which padding counts has another form.
    """
    probs, counts = (t.detach() for t in _tokens(router_logits, attention_mask))
    rows, experts = probs.shape
    mean = (probs.float() * counts[:, None]).sum(0) / counts.sum()
    # The experts at rank 1, 2, ... each add a term to the loss.
    ranked = mean[probs.sort(-1, descending=True).indices]
    losses = experts * ((ranked * counts[:, None]).sum(0) / counts.sum()).cumsum(0)
    own = aux_loss.detach().to(losses)
    top_k = int((losses - own).abs().argmin()) + 1
    ours = routing(router_logits, attention_mask, top_k)  # breaks ties between equal probabilities as the model does
    # The terms have one sign, so each rounding counts once. Some models average in the dtype of the router.
    rounding = (rows + experts + 8) * roundoff(torch.float32) + 4 * roundoff(router_logits[0].dtype)
    return top_k if bool((ours.loss(ours.usage).detach() - own).abs() <= rounding * own) else 0


def _tokens(router_logits: Sequence[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return router probabilities (N, E) of the tokens of all layers, and (N,) fp32, 1 or 0 for padding."""
    # The softmax is in the dtype of the logits, as in the model: it decides which of two close probabilities comes first.
    device = router_logits[0].device
    layers = [z.reshape(-1, z.shape[-1]).to(device).softmax(-1) for z in router_logits]
    probs = torch.cat(layers)
    if attention_mask is None:
        return probs, probs.new_ones(len(probs), dtype=torch.float32)
    return probs, attention_mask.reshape(-1).to(device, torch.float32).repeat(len(layers))
