"""The product of a head: its own forward must be the product with its weight, bias and adapter, and all of it finite.

The hidden states of a few tokens go through it, and known ones, which are chosen so that little or nothing rounds.

T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gem.distributed import local_part
from gem.head.adapters import HeadParts
from gem.head.rounding import Arithmetic, Product, product_bounds

LARGEST = 60.0  # largest logit of a known hidden state
COLUMNS = 4  # columns of the weight that are checked one by one


def check_head(
    model: Any, own_forward: Callable[[Tensor], Tensor], hidden: Tensor, parts: HeadParts
) -> tuple[Tensor, Product]:
    """Return the head's own logits for hidden states (1, T, D), and the bounds on their errors and on ours.

    Raises:
        ValueError: an own logit is beyond its bound, or something is not finite.
    """
    local, name = local_part(hidden), type(model).__name__
    arithmetic = Arithmetic.of(local, parts.weight)
    check_finite(model, local, parts, arithmetic.dtype)
    own = own_forward(hidden)
    if not own.is_floating_point():
        raise ValueError(f"the lm_head of {name} must return floating-point logits, got {own.dtype}")
    if parts.shard is not None:  # this rank's forward may return its own columns or all of them: no known hidden states
        return own, _whole(product_bounds(local, parts, arithmetic, own.dtype), parts)
    if type(hidden) is not Tensor:  # a DTensor, whole on every rank
        of_tokens = product_bounds(local, parts, arithmetic, own.dtype)
        _check_product(name, local_part(own), of_tokens)
        return own, of_tokens
    probes = known_states(hidden, parts)
    expected = product_bounds(torch.cat([hidden, probes], 1), parts, arithmetic, own.dtype)  # one pass over the weight
    of_tokens, of_probes = (
        Product(*t) for t in zip(*(p.tensor_split([hidden.shape[1]], 1) for p in expected), strict=True)
    )
    _check_product(name, own, of_tokens)
    _check_product(name, own_forward(probes), of_probes)
    return own, of_tokens


def known_states(hidden: Tensor, parts: HeadParts) -> Tensor:
    """Return (1, 2 + COLUMNS, D) hidden states in the dtype of `hidden`; every entry is 0 or, up to its sign, one power of two.

    Zeros show the bias and a single entry shows a column of the weight, both without a rounding. Random signs cover the whole
    weight. The power of two makes the largest logit about LARGEST.
    """
    weight, d, g = parts.weight, hidden.shape[-1], torch.Generator().manual_seed(0)
    columns = torch.linspace(0, d - 1, COLUMNS).long().to(weight.device)
    states = hidden.new_zeros(2 + COLUMNS, d, dtype=torch.float64)
    states[torch.arange(COLUMNS) + 1, columns] = 1
    states[-1] = (torch.randint(0, 2, (d,), generator=g) * 2.0 - 1).to(hidden.device)
    largest = states.new_ones(2 + COLUMNS)
    largest[1:-1] = weight[:, columns].abs().amax(0)
    # The standard deviation of a sum with random signs is the length of the row.
    wide = torch.promote_types(weight.dtype, torch.float32)
    largest[-1] = 4 * torch.linalg.vector_norm(weight, dim=1, dtype=wide).max()
    exponent = (LARGEST / largest.clamp(min=2.0**-9)).log2().floor().clamp(-14, 15)  # the range of fp16
    return (states * 2.0 ** exponent[:, None])[None].to(hidden.dtype)


def check_finite(model: Any, hidden: Tensor, parts: HeadParts, dtype: torch.dtype) -> None:
    """Raise ValueError naming the part of the head, or the hidden states (1, T, D), that are not finite in `dtype`.

    A bias may be -inf: its token never occurs.
    """
    name, low = type(model).__name__, parts.low_rank
    parts_by_name = {"weight": parts.weight, "bias": parts.bias}
    parts_by_name |= {} if low is None else {"adapter's A": low.a, "adapter's B": low.b}
    for part, t in parts_by_name.items():
        allowed = -torch.inf if part == "bias" else None
        if t is not None and (problem := _not_finite(t, dtype, allowed)):
            raise ValueError(f"the {part} of the lm_head of {name} must be finite, got {problem}")
    if parts.bias is not None and not parts.bias.isfinite().any():
        raise ValueError(
            f"the bias of the lm_head of {name} must leave a token that can occur, got -inf in every entry"
        )
    if problem := _not_finite(hidden, dtype):
        every = (*model.named_parameters(), *model.named_buffers())
        culprit = next(
            (f"{n} holds {p}" for n, t in every if not t.is_meta and (p := _not_finite(local_part(t)))), None
        )
        advice = f"something overflows {dtype} on the way (a wider dtype may help) or makes it"
        raise ValueError(
            f"the hidden states that {name} hands to its lm_head must be finite, got {problem}: "
            f"{culprit or f'its parameters and buffers are finite, so {advice}'}"
        )


def _not_finite(t: Tensor, dtype: torch.dtype | None = None, allowed: float | None = None) -> str | None:
    """Return the first entry that is not finite in dtype, and its place; None if there is none.

    It goes by parts: a mask of the whole tensor would be large.
    """
    start = 0
    for rows in t.detach().split(4096) if t.ndim else [t.detach()[None]]:
        rows = rows if dtype is None else rows.to(dtype)
        wrong = ~rows.isfinite() if allowed is None else ~(rows.isfinite() | (rows == allowed))
        if wrong.any():
            first = wrong.nonzero()[0]
            value = float(rows[tuple(first)])
            first[0] += start
            return f"{value:g} at {first.tolist()}"
        start += len(rows)
    return None


def _check_product(name: str, got: Tensor, expected: Product) -> None:
    """Raise ValueError if the head's output (1, T, V) is further from the exact product than rounding explains."""
    largest = torch.finfo(got.dtype).max
    beyond = expected.exact[(expected.exact.abs() > largest) & expected.exact.isfinite()]
    if len(beyond):
        raise ValueError(
            f"the logits of {name} must be finite, got one of {float(beyond[0]):.6g}, beyond {got.dtype} "
            f"(largest {largest:g}): load the model in a wider dtype"
        )
    got = got.double()
    wrong = ~((got == expected.exact) | ((got - expected.exact).abs() <= expected.own))
    if wrong.any():
        own, exact, bound = (float(t.expand_as(wrong)[wrong][0]) for t in (got, expected.exact, expected.own))
        raise ValueError(
            f"the lm_head of {name} is more than the product with its weight: it gives a logit {own:.9g}, the product is "
            f"{exact:.9g}, and rounding explains {bound:.2g}"
        )


def _whole(of_rank: Product, parts: HeadParts) -> Product:
    """Return a product with the columns of all ranks."""
    import torch.distributed as dist

    shard, wholes = parts.shard, []
    assert shard is not None
    for mine in of_rank:
        whole = mine.new_zeros(*mine.shape[:-1], shard.total)
        whole[..., shard.start : shard.start + mine.shape[-1]] = mine
        dist.all_reduce(whole, group=shard.group)
        wholes.append(whole)
    return Product(*wholes)
