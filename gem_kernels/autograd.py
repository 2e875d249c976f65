"""Registration of an op with torch: a dispatcher operator, which torch.compile keeps in its graph, differentiated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# torch.library.custom_op would do the same, and import torch._dynamo (four seconds) on the first call.
_NAMESPACE = "gem_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def define_operator(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Define torch.ops.gem_kernels.<name> and return it.

    `fake` gives shapes and dtypes without computing; without a `backward`, differentiation raises.
    """
    # Inductor must not change strides: the kernels are launched with those that they were given.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _LIBRARY.define(f"{name}{schema}", tags=tags)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"gem_kernels::{name} cannot be differentiated: second-order gradients are not implemented")

    if "!" not in schema:  # what writes over its arguments has no derivative to register
        torch.library.register_autograd(
            f"{_NAMESPACE}::{name}", backward or refuse, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(getattr(torch.ops, _NAMESPACE), name)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Raise when the backward is differentiated, as torch's once_differentiable does, and close its gap.

    once_differentiable looks at the upstream gradient only. Where that is a constant, as for `stats.logprob.sum()`, it returns
    gradients that look like constants, and a gradient penalty on them would silently be zero.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def guarded(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            upstream = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in upstream)
        return once(ctx, *upstream)

    return guarded
