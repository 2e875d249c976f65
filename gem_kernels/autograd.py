"""What the autograd.Functions of the ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable, which raises on a second differentiation, with its gap closed.

    It looks at the upstream gradient only: where that is a constant, as of `stats.logprob.sum()`, it returns gradients that
    pass for constants, and a gradient penalty on them would silently count for nothing.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            upstream = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in upstream)
        return once(ctx, *upstream)

    return guarded
