"""Losses as pure functions of log-probabilities: SEGA, DPO, IPO, PRO, the listwise form of DPO, and a KL term.

S sequences, K members of one group, N tokens. A sequence log-prob is the sum over its completion tokens, in nats, fp32
or fp64: in bf16 a sum near -1000 would be rounded to a multiple of 4. Gradients flow to the policy's log-probs only;
weights and reference log-probs are constants. beta, the weight of the KL term in the objective behind DPO and IPO, is
> 0. All raise TypeError for another dtype and ValueError for shapes that differ or values out of range.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sega_loss_fn(logprob: Tensor, weight: Tensor) -> Tensor:
    """L = -sum_i w_i log pi(a_i): Eq. 2 of GEM, arXiv 2511.13007, without its mean over the queries.

    Args:
        logprob, weight: (S,); weight from gem.sega.sega_weights, a constant.

    Returns:
        scalar; the caller divides by the number of queries, or puts 1 / B into the weights.
    """
    _check(logprob=logprob, weight=weight)
    return -(weight.detach() * logprob).sum()


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """-log s(beta h): DPO, arXiv 2305.18290, eq. 7.

    h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected), s the logistic function.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (S,) sequence log-probs of S pairs.

    Returns:
        (S,), one loss per pair.
    """
    return -F.logsigmoid(beta * _log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected, beta))


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, h as in dpo_loss: IPO, arXiv 2310.12036, eq. 17, whose tau is our beta.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (S,) sequence log-probs of S pairs.

    Returns:
        (S,), one loss per pair.
    """
    return (_log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected, beta) - 1 / (2 * beta)).square()


def pro_loss(logprob: Tensor, lengths: Tensor) -> Tensor:
    """-sum_{k<K} log(e^{r_k} / sum_{i>=k} e^{r_i}), r = logprob / lengths: the ranking term of PRO, arXiv 2306.17492.

    Each member in turn against all that rank below it (Plackett-Luce). Without the temperatures that the paper can take
    from a reward model; its supervised term is the caller's.

    Args:
        logprob: (K,) sequence log-probs of one group, ordered from best to worst, K >= 2.
        lengths: (K,) numbers of completion tokens, integer or floating, > 0.

    Returns:
        scalar.
    """
    _check(logprob=logprob)
    if logprob.ndim != 1 or len(logprob) < 2 or lengths.shape != logprob.shape:
        raise ValueError(
            f"expected logprob and lengths (K,) with K >= 2, got {tuple(logprob.shape)}, {tuple(lengths.shape)}"
        )
    if bool((lengths <= 0).any()):
        raise ValueError(f"lengths must be > 0, got {lengths.tolist()}")
    r = (logprob / lengths).flip(0)  # worst first: the sums over those that rank below are running ones
    return (r.logcumsumexp(0) - r).sum()  # the worst member's own term is 0


def listwise_dpo_reward(logprob: Tensor, ref: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """r_i = beta (y_i - softmax(h)_i), h = beta (log pi - log pi_ref): SEGA's f = listwise_dpo.

    With r as reward and no normalisation, SEGA has the gradient of -sum_i y_i log softmax(h)_i (Plackett-Luce, top one)
    for every K; one-hot y and K = 2 is DPO. r sums to 0, so that r is its own advantage.

    Args:
        logprob, ref: (K,) sequence log-probs of one group under the policy and the reference.
        target: (K,), y >= 0 with sum 1, for instance one-hot at the human chosen response.

    Returns:
        (K,) without gradient.
    """
    _check(logprob=logprob, ref=ref, target=target)
    _check_beta(beta)
    if bool((target < 0).any()) or abs(target.sum().item() - 1) > 1e-4:
        raise ValueError(f"target must be >= 0 and sum to 1, got {target.tolist()}")
    return beta * (target - torch.softmax(beta * (logprob - ref), 0)).detach()


def kl_k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """e^x - 1 - x, x = log pi_ref - log pi: the estimator k3 of KL(pi || pi_ref) for tokens sampled from pi.

    Never negative, and 0 exactly where the two agree. http://joschu.net/blog/kl-approx.html

    Args:
        logprob, ref_logprob: (N,) log-probs of the tokens.

    Returns:
        (N,), one estimate per token; its gradient with respect to logprob is 1 - e^x.
    """
    _check(logprob=logprob, ref_logprob=ref_logprob)
    x = ref_logprob.detach() - logprob
    return torch.expm1(x) - x


def _log_ratio_gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected), (S,)."""
    _check(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _check_beta(beta)
    return (chosen - rejected) - (ref_chosen - ref_rejected).detach()


def _check(**values: Tensor) -> None:
    """All fp32 or fp64 and of one shape (N,)."""
    for name, t in values.items():
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64 (sums of log-probs in 16 bits round), got {t.dtype}")
    shapes = {name: tuple(t.shape) for name, t in values.items()}
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"expected {', '.join(shapes)} of one shape (N,), got {shapes}")


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be finite and > 0, got {beta}")
