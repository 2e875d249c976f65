"""Find tensors that hold NaN or infinity, and say how many entries."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gem.distributed import local_part


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return what the first tensor with NaN or infinity holds: "nan in lm_head.weight (3 of 1024 entries)"; "" if none has.

    Args:
        named: names and tensors of any shape and device; those that are not floating point are passed over.
    """
    for name, tensor in named:
        if not tensor.is_floating_point() or not tensor.numel() or is_finite(tensor):
            continue
        flat = tensor.detach()
        nan = int(flat.isnan().sum())
        infinite = int(flat.isinf().sum())
        return f"{'nan' if nan else 'inf'} in {name} ({nan or infinite} of {flat.numel()} entries)"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Return True if no entry is NaN or infinite. One pass, no copy: both ends of the range tell."""
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


def not_finite_weights(model: Any) -> str:
    """Return what `not_finite` says of a model's parameters, of this process's part of those that are spread over several.

    A bias of the lm_head may be -inf, for a token that never occurs. Parameters on the meta device and quantised ones are
    passed over.
    """
    head = model.get_output_embeddings()
    biases = [p for name, p in head.named_parameters() if name.endswith("bias")] if head is not None else []
    return not_finite(
        (name, p.masked_fill(p == -math.inf, 0) if any(parameter is bias for bias in biases) else p)
        for name, parameter in model.named_parameters()
        if (p := _local(parameter.detach())) is not None
    )


def _local(tensor: Tensor) -> Tensor | None:
    """Return this process's part of a tensor; None if it has no numbers to look at."""
    tensor = local_part(tensor)
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    return tensor if plain and tensor.is_floating_point() and tensor.element_size() > 1 else None
