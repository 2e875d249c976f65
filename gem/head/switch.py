"""The switch in front of an lm_head's forward: in a fused call something else computes the head's output.

D hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gem.head.adapters import serving_module

HeadForward = Callable[[nn.Module, Tensor], Tensor]
"""Takes the head and its input (..., D), and returns what goes on in place of logits."""


class HeadSwitch:
    """The forward of an lm_head: its own or, inside `replaced_head`, another one. The head's hooks fire either way.

    It stays in place between calls, because torch.compile cannot follow a method that comes and goes. Each thread has its own
    replacement, which is inactive while it runs: a loss_fn may call the model.
    """

    def __init__(self, head: nn.Module, slot: str) -> None:
        self.head, self.slot, self.shadowed = head, slot, vars(head).get(slot)
        self.own_forward = getattr(head, slot)
        self.replacements: dict[int, HeadForward] = {}  # by thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replacement = self.replacements.pop(_thread(), None)
        if replacement is None:
            return self.own_forward(*args, **kwargs)
        try:
            if len(args) != 1 or kwargs:
                extra = [*args[1:], *kwargs]
                raise ValueError(f"the lm_head must be called with the hidden states alone, got {extra} too")
            return replacement(self.head, args[0])
        finally:
            self.replacements[_thread()] = replacement

    @staticmethod
    def of(causal_lm: Any, attach: bool = False) -> HeadSwitch:
        """Return the switch of the head in use, and install one if there is none: peft may have changed the head.

        Raises:
            ValueError: attach is False, and the head's forward was replaced after fuse_lm_head, so it was never checked.
        """
        head = serving_module(causal_lm.get_output_embeddings())
        # accelerate wraps the forward of a head that it moves between devices and keeps the original in _old_forward.
        slot = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        present = vars(head).get(slot)
        if isinstance(present, HeadSwitch):
            return present
        if present is not None and slot == "forward" and not attach:
            raise ValueError(
                "lm_head.forward was replaced after fuse_lm_head: call fuse_lm_head again, which checks it"
            )
        switch = HeadSwitch(head, slot)
        setattr(head, slot, switch)
        return switch

    @staticmethod
    def remove_all(model: nn.Module) -> None:
        """Remove every switch in the model, and restore what it replaced."""
        for module in model.modules():
            for slot in ("forward", "_old_forward"):
                switch = vars(module).get(slot)
                if isinstance(switch, HeadSwitch):
                    delattr(module, slot)
                    if switch.shadowed is not None:
                        setattr(module, slot, switch.shadowed)


@contextmanager
def replaced_head(switch: HeadSwitch, replacement: HeadForward) -> Iterator[None]:
    """Inside, calls of the lm_head from this thread run `replacement(head, hidden)`."""
    outer = switch.replacements.get(_thread())
    switch.replacements[_thread()] = replacement
    try:
        yield
    finally:
        del switch.replacements[_thread()]
        if outer is not None:
            switch.replacements[_thread()] = outer


@torch.compiler.assume_constant_result
def _thread() -> int:
    return threading.get_ident()
