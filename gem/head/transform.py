"""The transform of a model's logits, found by experiment: known logits take the place of the lm_head's output.

What the model makes of them must be what its config names. Random weights would hide a softcap: their logits are all near 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gem.head.adapters import head_parts
from gem.head.rounding import narrowing, roundoff, transform_roundoff
from gem_kernels import LogitTransform

SPREAD = 60.0  # known logits lie in [-SPREAD, SPREAD]
# Config fields with the number that multiplies the logits (Cohere, Falcon-H1, Muse) or divides them (Granite). The same field
# multiplies in HyperCLOVA X, and divides the hidden states in MiniCPM: the config gives the number, the probe its use.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Found(NamedTuple):
    """What the known logits show about a model."""

    transform: LogitTransform
    vocab: int  # logits of a token
    rows: int  # rows of the head, of which the first `vocab` count
    roundoff: float  # u of the coarsest dtype that logits have between the head and the model's output
    stored: float  # u of the model's output where it is coarser than the head's; else 0


def known_logits(tokens: int, vocab: int) -> Tensor:
    """Return (tokens, vocab) logits in fp64, in four kinds of rows.

    A line from -SPREAD to SPREAD shows a bend, zeros show a shift; the line reversed and a short line follow.
    """
    line = torch.linspace(-SPREAD, SPREAD, vocab, dtype=torch.float64)
    kinds = torch.stack([line, torch.zeros_like(line), -line, line / 64])
    return kinds[torch.arange(tokens) % len(kinds)]


def find_transform(model: Any, temperature: float, logits_when: Callable[[Callable[..., Tensor]], Tensor]) -> Found:
    """Return the transform that the config names and the model applies, with our temperature.

    Args:
        logits_when: maps a replacement of the lm_head's forward to the model's logits (1, TOKENS, V).

    Raises:
        ValueError: the model does something else to its logits.
    """
    given: list[Tensor] = []

    def probe(head: nn.Module, hidden: Tensor) -> Tensor:
        parts = head_parts(head).local()
        z = known_logits(hidden.shape[:-1].numel(), parts.vocab).to(hidden.device, parts.weight.dtype)
        given.append(z.view(*hidden.shape[:-1], -1))
        return given[-1].clone()  # the model may scale it in place

    got = logits_when(probe)
    name = type(model).__name__
    if len(given) != 1:
        raise ValueError(
            f"{name} must call its lm_head (get_output_embeddings) once a forward, it called it {len(given)} times"
        )
    z = given[0]
    rows, vocab = z.shape[-1], got.shape[-1]
    if got.shape[:-1] != z.shape[:-1] or vocab > rows:
        raise ValueError(
            f"{name} turns logits of shape {tuple(z.shape)} into {tuple(got.shape)}: expected one row a token"
        )
    z, u = z[..., :vocab], max(roundoff(t.dtype) for t in (z, got))  # some models cut off their padding
    problems = []
    for transform in _candidates(model.config.get_text_config()):
        problem = describe_difference(transform, z, got, u)
        if problem is None:
            return Found(replace(transform, temperature=temperature), vocab, rows, u, narrowing(z.dtype, got.dtype))
        problems.append(problem)
    raise ValueError(f"{name} does something to its logits that its config does not name: {problems[0]}")


def _candidates(config: Any) -> list[LogitTransform]:
    """Return every transform that the numbers in the config allow, the likeliest first and the identity last."""
    numbers = [value for field in SCALES if (value := getattr(config, field, None))]
    scales = [*numbers, *(1.0 / value for value in numbers), 1.0]
    caps = [*(value for field in SOFTCAPS if (value := getattr(config, field, None))), None]
    return [LogitTransform(scale=float(s), softcap=None if c is None else float(c)) for s, c in product(scales, caps)]


def describe_difference(transform: LogitTransform, z: Tensor, got: Tensor, u: float) -> str | None:
    """Return words about the first entry where `got` is not transform(z) in arithmetic of unit roundoff u; None if all agree.

    z and got: any shapes that broadcast.
    """
    share = transform_roundoff(transform, u) + narrowing(z.dtype, got.dtype)
    subnormal = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in (z, got))
    expected, got = apply(transform, z.double()), got.double()
    wrong = ~((got - expected).abs() <= share * expected.abs() + 8 * subnormal * (share > 0))
    if not wrong.any():
        return None
    logit, own, named = (float(t.expand_as(wrong)[wrong][0]) for t in (z, got, expected))
    return (
        f"it turns a logit of {logit:.5g} into {own:.9g}, and its config (scale {transform.scale:g}, softcap "
        f"{transform.softcap}) into {named:.9g}"
    )


def apply(transform: LogitTransform, z: Tensor) -> Tensor:
    """Return cap tanh(scale z / cap) / temperature, in the dtype of z."""
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature
