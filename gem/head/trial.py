"""Conditions and inputs of the check on attach: evaluation mode, gathered weights, exact sums, ordinary tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gem.distributed import local_part
from gem_kernels import IGNORE_INDEX

TOKENS = 8  # that go through the model
REPEATS = 1 / 16  # largest distance between hidden states of two calls on the same tokens, relative to their length
_SHORTCUTS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in its own mode."""
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
    """Inside, CUDA sums narrow products in fp32 throughout: partial sums that are rounded have no useful bound."""
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
    """Inside, a model that ZeRO-3 has partitioned and that has no engine yet gathers its weights module by module."""
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


@contextmanager
def repeating(name: str, head: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the head gets the hidden states of an earlier call again, provided that the new ones are nearly the same.

    Experts whose terms are summed in the order in which they finish change the last bits from call to call. This is rounding
    of the body, which the bounds of the head do not cover.
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


def trial_tokens(model: Any, vocab: int | None = None) -> Tensor:
    """Return (2, TOKENS) ids of ordinary tokens (no image, no padding): the first ones, and some spread over the vocabulary.

    vocab: logits of a token, if known.
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
    """Return ids as labels, more of them ignored in one row than in the other: this shows how a loss counts them."""
    labels = ids.clone()
    if ids.shape[1] >= 6:
        labels[0, 1:3] = labels[1, 2:6] = IGNORE_INDEX
    return labels
