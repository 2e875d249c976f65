"""Whether a model computes something else in training mode than in evaluation mode: dropout, layer drop, router jitter."""

from __future__ import annotations

from torch import nn

_NAMES = ("drop", "jitter")


def active_noise(model: nn.Module) -> str:
    """Return the first cause of noise in training mode, such as "p=0.1 of model.layers.0.dropout"; "" if there is none.

    Modules of dropout have a probability, and other modules keep theirs as a number whose name says drop or jitter: attention
    passes it to a function.
    """
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_rate = (key == "p" and "dropout" in type(module).__name__.lower()) or any(n in key for n in _NAMES)
            rates = value.values() if isinstance(value, dict) else [value]  # peft has one for each adapter
            largest = max((rate for rate in rates if isinstance(rate, float)), default=0.0) if is_rate else 0.0
            if largest > 0:
                return f"{key}={largest:g} of {name or type(module).__name__}"
    return ""
