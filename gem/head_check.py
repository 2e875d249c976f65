"""The proof that our head gives a model's own numbers: a few tokens go through its own logits and loss, and through ours.

The two must agree within the bound of gem.rounding. T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gem.head_product import local_part
from gem.head_transform import Found
from gem.rounding import Product, growth, roundoff, statistics_bounds, transformed
from gem_kernels import IGNORE_INDEX, TokenStats

TOKENS = 8  # that go through the model
REPEATS = 1 / 16  # how far hidden states of one call may be from those of the next, relative to their length
_SHORTCUTS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class Gap(NamedTuple):
    """Between two numbers, nats, and what rounding allows of it."""

    seen: float
    allowed: float


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and afterwards every module in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def full_sums() -> Iterator[None]:
    """Inside, CUDA sums narrow products in fp32 throughout: a part of a sum that is rounded on the way has no bound."""
    settings = torch.backends.cuda.matmul
    before = {name: True for name in _SHORTCUTS if getattr(settings, name, False) is True}
    try:
        for name in before:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside, a model whose weights ZeRO-3 has partitioned, and that has no engine yet, gathers them module by module."""
    open_contexts: list[Any] = []

    def gather(module: nn.Module, _: Any) -> None:
        from deepspeed import zero

        mine = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_status") and p.numel() == 0]
        open_contexts.append(zero.GatheredParameters(mine))
        open_contexts[-1].__enter__()

    def partition(*_: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    handles = []
    if any(hasattr(p, "ds_status") for p in model.parameters()):
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(gather))
                handles.append(module.register_forward_hook(partition, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trial_tokens(model: Any, vocab: int | None = None) -> Tensor:
    """(2, TOKENS) token ids that mean nothing special to the model (no image, no padding): the first, and some of all.

    vocab: logits of a token, where it is known.
    """
    configs = (model.config, model.config.get_text_config())
    special: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    ordinary = [i for i in range(vocab or model.config.get_text_config().vocab_size) if i not in special]
    n = min(TOKENS, len(ordinary))
    if n < 2:
        raise ValueError(
            f"a check of the lm_head needs 2 ordinary tokens, the vocabulary of {type(model).__name__} has {len(ordinary)}"
        )
    device = model.get_input_embeddings().weight.device
    spread = [ordinary[(len(ordinary) - 1) * i // (n - 1)] for i in range(n)]
    ids = torch.tensor([ordinary[:n], spread])
    return ids.to("cpu" if device.type == "meta" else device)  # accelerate moves what it offloads


def trial_labels(ids: Tensor) -> Tensor:
    """The same, some of them ignored, in one row more than in the other: how a loss counts them shows."""
    labels = ids.clone()
    if ids.shape[1] >= 6:
        labels[0, 1:3] = labels[1, 2:6] = IGNORE_INDEX
    return labels


@contextmanager
def repeating(name: str, head: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the head gets the hidden states of an earlier call again, if those of the new call are nearly the same.

    Experts whose terms are summed in the order in which they finish change the last bits from call to call. That is rounding
    of the body, of which the bounds of the head know nothing.
    """

    def again(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        first, second = local_part(hidden).double(), local_part(arguments[0]).double()
        same = first.shape == second.shape
        if not same or not bool(((first - second).norm(dim=-1) <= REPEATS * first.norm(dim=-1)).all()):
            raise ValueError(
                f"{name} must give the same hidden states for the same tokens in evaluation mode, they changed"
            )
        return (hidden, *arguments[1:])

    handle = head.register_forward_pre_hook(again)  # after all others
    try:
        yield
    finally:
        handle.remove()


def check_against_logits(name: str, logits: Tensor, ids: Tensor, ours: TokenStats, found: Found, head: Product) -> Gap:
    """The largest difference between our statistics (1, T - 1) and those of the model's logits (1, T, V).

    Args:
        logits: the model's own, without our temperature.
        head: bounds on the logits that head and we begin with.

    Raises:
        ValueError: a difference that rounding does not explain.
    """
    transform, targets = found.transform, ids[0, 1:].to(logits.device)
    z, of_stats = logits[0, :-1].double(), roundoff(ours.lse.dtype)
    own_bound, our_bound = (b[0, :-1, : found.vocab].to(z.device) for b in (head.own, head.ours))
    untempered = replace(transform, temperature=1.0)
    bound = transformed(untempered, own_bound, z, found.roundoff, found.stored) / transform.temperature
    z = z / transform.temperature
    bound = bound + transformed(transform, our_bound, z, of_stats)
    allowed = statistics_bounds(z, bound, targets, of_stats)
    largest = Gap(0.0, 0.0)
    for what, a, b, limit in zip(TokenStats._fields, statistics(z, targets), ours, allowed, strict=True):
        b = b[0].to(z.device)
        wrong = ~((a == b) | ((a - b).abs() <= limit))
        if wrong.any():
            theirs, mine, within = (float(t[wrong][0]) for t in (a, b, limit))
            raise ValueError(
                f"{name} does something to its logits that its config does not name: the {what} of its own logits is "
                f"{theirs:.9g}, ours {mine:.9g}, expected to agree within {within:.3g}"
            )
        gaps = (a - b).abs().nan_to_num(nan=0.0)  # both -inf: none
        largest = max(largest, Gap(float(gaps.max()), float(limit[gaps.argmax()])))
    return largest


def check_loss(name: str, own: Any, logits: Tensor, labels: Tensor, router_weight: float = 0.0) -> None:
    """Raise ValueError unless the model's own loss is ours: the mean of -log p of the next token, and the weighted router loss.

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
    u = max(roundoff(loss.dtype), roundoff(torch.float32))  # in which transformers computes the loss of any model
    log_p = statistics(z, targets).logprob
    limit = statistics_bounds(z, torch.zeros_like(z), targets, u).logprob.mean()
    limit = limit + u * (float(growth(torch.tensor(len(targets)))) + 2) * log_p.abs().mean()
    due = -log_p.mean()
    if (router := getattr(own, "aux_loss", None)) is not None:
        router = router_weight * router.double().to(due.device)
        due, limit = due + router, limit + 4 * u * router.abs()
    came = loss.double().reshape(()).to(due.device)
    if not bool((came == due) | ((came - due).abs() <= limit)):
        raise ValueError(
            f"the loss of {name} is another than the mean of -log p of the next token (it shifts its labels otherwise, counts "
            f"those of {IGNORE_INDEX}, or adds a term that its config does not weigh so): its own is {float(came):.9g}, ours "
            f"{float(due):.9g}, and rounding explains {float(limit):.2g}"
        )


def statistics(z: Tensor, targets: Tensor) -> TokenStats:
    """Of logits (T, V), each (T,), by the definition."""
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
    return TokenStats(log_p.gather(-1, targets[:, None])[:, 0], entropy, z.logsumexp(-1))
