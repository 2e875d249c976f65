"""The check on attach: a few tokens go through the model's own logits and loss, and through ours.

Both must agree within the bounds of gem/head/rounding.py. B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gem.finite import not_finite_weights
from gem.head.adapters import head_parts
from gem.head.call import FusedHead
from gem.head.output import STATISTICS, FusedCausalLMOutput, HeadStats
from gem.head.product import check_head
from gem.head.rounding import Product, growth, roundoff, statistics_bounds, transformed
from gem.head.router import find_top_k, router_weight
from gem.head.switch import HeadForward, HeadSwitch, replaced_head
from gem.head.transform import Found, find_transform
from gem.head.trial import full_sums, gathering, repeating, trial_labels, trial_tokens, undisturbed
from gem_kernels import IGNORE_INDEX


class Gap(NamedTuple):
    """Difference between two numbers, nats, and how much of it rounding allows."""

    seen: float
    allowed: float


def examine(fused: FusedHead, wrapped: nn.Module) -> None:
    """Find out what the model does to its logits, store it in `fused`, and check that our numbers are the model's own.

    Args:
        fused: already the forward of its model.
        wrapped: the model, or a wrapper of peft around it.

    Raises:
        ValueError: they are not, or the model has weights that are not finite: what comes of them is no number.
    """
    if problem := not_finite_weights(fused.model):
        raise ValueError(f"the weights of {type(fused.model).__name__} must be finite, got {problem}")
    own = _OwnModel(fused, HeadSwitch.of(fused.model, attach=True))
    with undisturbed(fused.model), gathering(fused.model), full_sums():
        ids = trial_tokens(fused.model)[:1]
        own.check_that_it_runs(ids)
        found = find_transform(fused.model, fused.transform.temperature, lambda forward: own.logits(ids, forward))
        fused.transform, fused.vocab, fused.rows, fused.roundoff, _ = found
        _check_statistics(own, ids, found)
        _check_losses(own, trial_tokens(fused.model, found.vocab))
        if hasattr(wrapped, "get_base_model"):
            _check_wrapper(own, wrapped, ids)


@dataclass
class _OwnModel:
    """The model without our forward: what we compare with."""

    fused: FusedHead
    switch: HeadSwitch

    @property
    def name(self) -> str:
        return type(self.fused.model).__name__

    def __call__(self, **inputs: Any) -> Any:
        return self.fused.model(**inputs, **self.fused.options)

    def logits(self, ids: Tensor, head_forward: HeadForward | None = None) -> Tensor:
        """Return the model's logits (B, T, V) for ids (B, T), with its lm_head's forward replaced if one is given."""
        if head_forward is not None:
            with replaced_head(self.switch, head_forward):
                return self.logits(ids)
        out = self(input_ids=ids)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise ValueError(f"{self.name} must return an output with its logits, got {type(out).__name__} without")
        return cast(Tensor, out.logits)

    def check_that_it_runs(self, ids: Tensor) -> None:
        """Raise ValueError if the model needs more than token ids and labels."""
        try:
            self(input_ids=ids, labels=ids)
        except Exception as error:
            raise ValueError(
                f"{self.name} must run on token ids and labels alone for its lm_head to be checked, it raised {error!r}"
            ) from error


def _check_statistics(own: _OwnModel, ids: Tensor, found: Found) -> None:
    """Compare product and statistics of the head with the model's own, on the hidden states of ids (1, T)."""
    fused, seen = own.fused, list[tuple[Tensor, Product]]()

    def own_product(head: nn.Module, hidden: Tensor) -> Tensor:
        logits, bounds = check_head(fused.model, own.switch.own_forward, hidden, head_parts(head).local())
        seen.append((hidden, bounds))
        return logits

    logits = own.logits(ids, own_product)
    ((hidden, bounds),) = seen
    with repeating(own.name, own.switch.head, hidden):
        ours = fused.model(input_ids=ids, labels=ids, fused_lm_head=True)
    stats = HeadStats(*(ours[name] for name in STATISTICS))
    fused.largest_gap = check_against_logits(own.name, logits, ids, stats, found, bounds)


def _check_losses(own: _OwnModel, ids: Tensor) -> None:
    """Compare the model's own loss on ids (2, T) with ours, and its router loss if it can have one."""
    labels, config = trial_labels(ids), own.fused.model.config.get_text_config()
    out = own(input_ids=ids, labels=labels)
    logits = getattr(out, "logits", None)  # some models leave them out beside a loss
    logits = own.logits(ids) if logits is None else logits
    check_loss(own.name, out, logits, labels, router_weight(own.fused.model))
    routes = "output_router_logits" in inspect.signature(own.fused).parameters or hasattr(
        config, "output_router_logits"
    )
    if routes:
        _find_router_loss(own, ids, labels, logits)


def _find_router_loss(own: _OwnModel, ids: Tensor, labels: Tensor, logits: Tensor) -> None:
    """Store in `fused` if the loss with router logits is ours, and if the router loss has the form of gem/head/router.py."""
    fused, model = own.fused, own.fused.model
    try:
        out = own(input_ids=ids, labels=labels, output_router_logits=True)
        check_loss(own.name, out, logits, labels, router_weight(model))
        model(input_ids=ids, labels=labels, output_router_logits=True, fused_lm_head=True)
    except Exception as error:  # errors of the model itself too: some cannot return router logits
        fused.router_problem = f"the router loss of {own.name} cannot be reproduced: {error}"
        return
    mask = torch.ones_like(ids)
    mask[1, mask.shape[1] // 2 :] = 0
    try:
        out = own(input_ids=ids, attention_mask=mask, output_router_logits=True)
        fused.router_top_k = find_top_k(out.router_logits, mask, out.aux_loss)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # router logits of an unusual form
        fused.router_top_k = 0


def _check_wrapper(own: _OwnModel, wrapped: nn.Module, ids: Tensor) -> None:
    """Raise ValueError if a call of the wrapper does not reach the fused forward."""
    out = cast(Any, wrapped)(input_ids=ids, labels=ids, fused_lm_head=True)
    if not isinstance(out, FusedCausalLMOutput):
        raise ValueError(
            f"{type(wrapped).__name__} does not pass a call on to the forward of {own.name}: fuse that alone"
        )


def check_against_logits(name: str, logits: Tensor, ids: Tensor, ours: HeadStats, found: Found, head: Product) -> Gap:
    """Return the largest difference between our statistics (1, T - 1) and those of the model's logits (1, T, V).

    Args:
        logits: the model's own, without our temperature.
        head: bounds on the logits from which the head and our statistics start.

    Raises:
        ValueError: rounding does not explain a difference.
    """
    transform, targets = found.transform, ids[0, 1:].to(logits.device)
    z, u_stats = logits[0, :-1].double(), roundoff(ours.lse.dtype)
    own_bound, our_bound = (b[0, :-1, : found.vocab].to(z.device) for b in (head.own, head.ours))
    untempered = replace(transform, temperature=1.0)
    bound = transformed(untempered, own_bound, z, found.roundoff, found.stored) / transform.temperature
    z = z / transform.temperature
    bound = bound + transformed(transform, our_bound, z, u_stats)
    allowed = statistics_bounds(z, bound, targets, u_stats)
    largest = Gap(0.0, 0.0)
    for statistic, a, b, limit in zip(HeadStats._fields, statistics(z, targets), ours, allowed, strict=True):
        b = b[0].to(z.device)
        wrong = ~((a == b) | ((a - b).abs() <= limit))
        if wrong.any():
            own, our, within = (float(t[wrong][0]) for t in (a, b, limit))
            raise ValueError(
                f"{name} does something to its logits that its config does not name: the {statistic} of its own logits is "
                f"{own:.9g}, ours {our:.9g}, expected to agree within {within:.3g}"
            )
        gaps = (a - b).abs().nan_to_num(nan=0.0)  # both -inf: no gap
        largest = max(largest, Gap(float(gaps.max()), float(limit[gaps.argmax()])))
    return largest


def check_loss(name: str, own: Any, logits: Tensor, labels: Tensor, router_weight: float = 0.0) -> None:
    """Raise ValueError unless the model's own loss is the mean of -log p of the next token plus the weighted router loss.

    Args:
        own: the model's output for labels (B, T), IGNORE_INDEX where they do not count.
        logits: (B, T, V), the model's own for the same tokens.
    """
    loss = getattr(own, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name} must return a scalar tensor as its loss when it is given labels, got {kind}")
    kept = labels[:, 1:].to(logits.device) != IGNORE_INDEX
    z, targets = logits[:, :-1][kept].double(), labels[:, 1:].to(logits.device)[kept]
    u = max(roundoff(loss.dtype), roundoff(torch.float32))  # transformers computes every loss in fp32 at most
    log_p = statistics(z, targets).logprob
    limit = statistics_bounds(z, torch.zeros_like(z), targets, u).logprob.mean()
    limit = limit + u * (float(growth(torch.tensor(len(targets)))) + 2) * log_p.abs().mean()
    expected = -log_p.mean()
    if (router := getattr(own, "aux_loss", None)) is not None:
        router = router_weight * router.double().to(expected.device)
        expected, limit = expected + router, limit + 4 * u * router.abs()
    got = loss.double().reshape(()).to(expected.device)
    if not bool((got == expected) | ((got - expected).abs() <= limit)):
        raise ValueError(
            f"the loss of {name} is another than the mean of -log p of the next token (it shifts its labels otherwise, counts "
            f"those of {IGNORE_INDEX}, or adds a term that its config does not weigh so): its own is {float(got):.9g}, ours "
            f"{float(expected):.9g}, and rounding explains {float(limit):.2g}"
        )


def statistics(z: Tensor, targets: Tensor) -> HeadStats:
    """Return the statistics of logits (T, V), each (T,), by their definition."""
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
    return HeadStats(log_p.gather(-1, targets[:, None])[:, 0], entropy, z.logsumexp(-1))
