"""How an op becomes part of torch: a dispatcher operator (torch.compile keeps its graph whole), differentiated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# torch.library.custom_op would do the same, and import torch._dynamo (four seconds) on the first call.
_LIBRARY = torch.library.Library("gem_kernels", "FRAGMENT")


def define_operator(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """torch.ops.gem_kernels.<name>: `fake` gives shapes and dtypes; without a `backward`, differentiating it raises."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _LIBRARY.define(f"{name}{schema}", tags=tags)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gem_kernels::{name}", fake, lib=_LIBRARY)

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"gem_kernels::{name} cannot be differentiated: second-order gradients are not implemented")

    if "!" not in schema:  # what writes over its arguments has no derivative to register
        torch.library.register_autograd(
            f"gem_kernels::{name}", backward or refuse, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.gem_kernels, name)


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
