"""Losses as pure functions of log-probabilities: SEGA, DPO, IPO, PRO, the listwise form of DPO, and a KL term.

`group_loss` applies the configured one to a group. A new loss is a function here, its case in `group_loss`, and its name in
gem/config.py.

S sequences, K members of one group, N tokens. A sequence log-prob is the sum over its completion tokens, in nats, fp32
or fp64: bf16 would round a sum near -1000 to a multiple of 4. Gradients flow to the policy's log-probs only; weights and
reference log-probs are constants. beta > 0 is the weight of the KL term in the objective behind DPO and IPO. Every
function raises TypeError for another dtype, and ValueError for mismatched shapes or values out of range.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem.config import CHOICES, LossArguments
from gem.group import ROLES, Role


class _Members(NamedTuple):
    """The K members of one group: log-probs summed over the tokens of each, nats, and its entries in the batch."""

    log_pi: Tensor  # (K,), under the policy
    log_ref: Tensor  # (K,), under the reference
    lengths: Tensor  # (K,) completion tokens
    weight: Tensor  # (K,) w of Eq. 2
    chosen: Tensor  # (K,) bool
    rejected: Tensor  # (K,) bool


def group_loss(
    logprob: Tensor,
    ref_logprob: Tensor | None,
    sequence: Tensor,
    weight: Tensor,
    role: Tensor,
    fresh: Tensor,
    arguments: LossArguments,
) -> dict[str, Tensor]:
    """Return the loss of one group and its parts, in nats.

    Args:
        logprob: (n,) log-probs of the group's tokens under the policy.
        ref_logprob: (n,) log-probs under the reference, NaN for the members of which `reads_reference` is False; None if it is
            for all of them. Without those of the candidates there is no part `kl`.
        sequence: (n,) int64, index of each token's member.
        weight: (K,) w of Eq. 2.
        role: (K,) numbers of gem.group.ROLES.
        fresh: (K,) bool, true for members sampled from the policy as it is now.
        arguments: the loss and its weights.

    Returns:
        {"loss": scalar, and the parts that the report shows}. sft gives a sum over tokens, which the caller averages.

    Raises:
        ValueError: the loss is unknown, or the group lacks the reference log-probs or the human pair that it needs.
    """
    chosen, rejected, candidate = (role == ROLES[r] for r in ("chosen", "rejected", "candidate"))
    match arguments.loss:
        case "sft":
            return {"loss": -(logprob * chosen[sequence]).sum()}
        case "sega":
            main_term, needs_pair, has_kl = _sega_term, False, True
        case "listwise_dpo":
            main_term, needs_pair, has_kl = _listwise_dpo_term, True, True
        case "dpo":
            main_term, needs_pair, has_kl = _dpo_term, True, False
        case "ipo":
            main_term, needs_pair, has_kl = _ipo_term, True, False
        case "pro":
            main_term, needs_pair, has_kl = _pro_term, True, False
        case unknown:  # a name that config.py lists and this match lacks ends here too
            known = ", ".join(name for name in CHOICES["loss"] if name != unknown)
            raise ValueError(f"loss must be one of {known}, got {unknown!r}")
    has_pair = bool(chosen.any() and rejected.any())
    if ref_logprob is None:
        ref_logprob = torch.full_like(logprob, torch.nan)
        needs_reference = any(map(partial(reads_reference, arguments), _names(role), fresh.tolist()))
    else:
        needs_reference = False
    if needs_reference or (needs_pair and not has_pair):
        raise ValueError(f"loss={arguments.loss} needs groups with the log-probs of a reference and a human pair")

    lengths = torch.bincount(sequence, minlength=len(role))
    log_pi, log_ref = (torch.zeros_like(weight).index_add(0, sequence, x) for x in (logprob, ref_logprob))
    if arguments.loss == "sega" and arguments.taper:
        weight = _tapered(weight, log_pi, log_ref, fresh)
    members = _Members(log_pi, log_ref, lengths, weight, chosen, rejected)
    loss = main_term(members, arguments)
    # The mean over tokens of the chosen answers anchors the policy on what people wrote.
    nll = -log_pi[chosen].sum() / lengths[chosen].sum().clamp(min=1)
    loss = loss + arguments.sft_weight * nll
    # k3 estimates the KL from samples of the policy: from the candidates alone, as a mean over sequences.
    sampled = candidate[sequence]
    kl = kl_k3(logprob[sampled], ref_logprob[sampled]).sum() / candidate.sum().clamp(min=1)
    counts = has_kl and arguments.kl_weight > 0
    if counts:
        loss = loss + arguments.kl_weight * kl
    parts = {"loss": loss}
    if counts or (bool(candidate.any()) and not bool(ref_logprob[sampled].isnan().any())):
        parts["kl"] = kl
    if reads(arguments, "candidate"):
        parts |= {"weight_positive": weight.clamp(min=0).sum(), "weight_negative": -weight.clamp(max=0).sum()}
    if has_pair:
        parts |= {"logprob_chosen": log_pi[chosen].mean(), "logprob_rejected": log_pi[rejected].mean()}
    return parts


def reads(arguments: LossArguments, role: Role) -> bool:
    """Return True if `group_loss` reads the log-probs of members of this role, False if they need no forward.

    Args:
        arguments: the loss and its weights.
        role: of the member.
    """
    match arguments.loss:
        case "sft":
            return role == "chosen"
        case "dpo" | "ipo":
            return role != "candidate"
        case _:
            return True


def reads_reference(arguments: LossArguments, role: Role, fresh: bool) -> bool:
    """Return True if `group_loss` reads the reference log-probs of members of this role.

    Args:
        arguments: the loss and its weights.
        role: of the member.
        fresh: True if it was sampled from the policy as it is now.
    """
    match arguments.loss:
        case "sega":
            return (role == "candidate" and arguments.kl_weight > 0) or (arguments.taper and not fresh)
        case "listwise_dpo" | "dpo" | "ipo":
            return reads(arguments, role)
        case _:  # sft and pro
            return False


def _names(role: Tensor) -> list[Role]:
    return [list(ROLES)[number] for number in role.tolist()]


def _tapered(weight: Tensor, log_pi: Tensor, log_ref: Tensor, fresh: Tensor) -> Tensor:
    """Return the weights (K,) of SEGA with the push on off-policy members bounded.

    SEGA's negative weights are constants. On a response that the policy no longer gives, a constant pushes without end and
    breaks everything else. The truncated importance ratio min(1, pi / pi_ref) of TOPR (arXiv 2503.14286) ends the push.
    """
    ratio = (log_pi - log_ref).detach().clamp(max=0.0).exp()
    return torch.where((weight < 0) & ~fresh, weight * ratio, weight)


def _sega_term(members: _Members, arguments: LossArguments) -> Tensor:
    per_token = arguments.length_norm == "tokens"
    return sega_loss_fn(members.log_pi / members.lengths if per_token else members.log_pi, members.weight)


def _listwise_dpo_term(members: _Members, arguments: LossArguments) -> Tensor:
    target = members.chosen.float() / members.chosen.sum()
    reward = listwise_dpo_reward(members.log_pi, members.log_ref, target, beta=arguments.beta)
    return sega_loss_fn(members.log_pi, reward)


def _dpo_term(members: _Members, arguments: LossArguments) -> Tensor:
    return dpo_loss(*_pair(members), beta=arguments.beta).sum()


def _ipo_term(members: _Members, arguments: LossArguments) -> Tensor:
    return ipo_loss(*_pair(members), beta=arguments.beta).sum()


def _pro_term(members: _Members, arguments: LossArguments) -> Tensor:
    """Order the members by weight, with the human chosen answer moved up by one and the rejected one down."""
    rank = members.weight + members.chosen.float() - members.rejected.float()
    best_first = torch.argsort(rank, descending=True, stable=True)
    return pro_loss(members.log_pi[best_first], members.lengths[best_first])


def _pair(members: _Members) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log-probs of the chosen and the rejected answer under the policy, then under the reference."""
    chosen, rejected = members.chosen, members.rejected
    return members.log_pi[chosen], members.log_pi[rejected], members.log_ref[chosen], members.log_ref[rejected]


def sega_loss_fn(logprob: Tensor, weight: Tensor) -> Tensor:
    """L = -sum_i w_i log pi(a_i): Eq. 2 of GEM, arXiv 2511.13007, without its mean over the queries.

    Args:
        logprob: (S,) sequence log-probs.
        weight: (S,) weights from gem.sega.sega_weights; constants.

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

    Each member in turn competes with all members ranked below it (Plackett-Luce). The temperatures that the paper can take
    from a reward model are left out. The caller adds the supervised term.

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
    r = (logprob / lengths).flip(0)  # worst first: the sum over lower ranks is then a running sum
    return (r.logcumsumexp(0) - r).sum()  # the worst member's own term is 0


def listwise_dpo_reward(logprob: Tensor, ref: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """r_i = beta (y_i - softmax(h)_i), h = beta (log pi - log pi_ref): SEGA's f = listwise_dpo.

    With r as reward and no normalisation, SEGA has the gradient of -sum_i y_i log softmax(h)_i (Plackett-Luce, top one)
    for every K; one-hot y and K = 2 give DPO. r sums to 0, so r is its own advantage.

    Args:
        logprob, ref: (K,) sequence log-probs of one group under the policy and the reference.
        target: (K,), y >= 0 with sum 1, for instance one-hot at the human chosen response.

    Returns:
        (K,), without gradient.
    """
    _check(logprob=logprob, ref=ref, target=target)
    _check_beta(beta)
    if bool((target < 0).any()) or abs(target.sum().item() - 1) > 1e-4:
        raise ValueError(f"target must be >= 0 and sum to 1, got {target.tolist()}")
    return beta * (target - torch.softmax(beta * (logprob - ref), 0)).detach()


def kl_k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """e^x - 1 - x, x = log pi_ref - log pi: the estimator k3 of KL(pi || pi_ref) for tokens sampled from pi.

    It is never negative, and exactly 0 where the two agree. http://joschu.net/blog/kl-approx.html

    Args:
        logprob, ref_logprob: (N,) log-probs of the tokens.

    Returns:
        (N,), one estimate per token; its gradient with respect to logprob is 1 - e^x.
    """
    _check(logprob=logprob, ref_logprob=ref_logprob)
    x = ref_logprob.detach() - logprob
    return torch.expm1(x) - x


def _log_ratio_gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Return h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected), (S,)."""
    _check(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    _check_beta(beta)
    return (chosen - rejected) - (ref_chosen - ref_rejected).detach()


def _check(**values: Tensor) -> None:
    """Raise unless all values are fp32 or fp64 and of one shape (N,)."""
    for name, t in values.items():
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64 (sums of log-probs in 16 bits round), got {t.dtype}")
    shapes = {name: tuple(t.shape) for name, t in values.items()}
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"expected {', '.join(shapes)} of one shape (N,), got {shapes}")


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be finite and > 0, got {beta}")
