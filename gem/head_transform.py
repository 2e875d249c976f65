"""What a model does to its logits, found by trying: its lm_head answers with known ones.

What the model makes of them must be what its config names; random weights, whose logits are all near 0, would hide a softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gem.adapters import head_parts
from gem.rounding import narrowing, roundoff, transform_roundoff
from gem_kernels import LogitTransform

SPREAD = 60.0  # known logits lie in [-SPREAD, SPREAD]
# What configs call the number that multiplies (Cohere, Falcon-H1, Muse) or divides (Granite; HyperCLOVA X multiplies by it, and
# MiniCPM divides its hidden states instead): the config gives the number, the probe says what the model does with it.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Found(NamedTuple):
    """What the known logits found."""

    transform: LogitTransform
    vocab: int  # logits of a token
    rows: int  # of the head, of which the first `vocab` count
    roundoff: float  # u of the coarsest dtype that logits have between the head and the model's output
    stored: float  # u of the model's output, where that is coarser than the head's; else 0


def known_logits(tokens: int, vocab: int) -> Tensor:
    """(tokens, vocab) fp64: a line from -SPREAD to SPREAD, which shows a bend; zeros, which show any shift; the line reversed;
    and a short one."""
    line = torch.linspace(-SPREAD, SPREAD, vocab, dtype=torch.float64)
    kinds = torch.stack([line, torch.zeros_like(line), -line, line / 64])
    return kinds[torch.arange(tokens) % len(kinds)]


def find_transform(model: Any, temperature: float, logits_when: Callable[[Callable[..., Tensor]], Tensor]) -> Found:
    """The transform that the config names and the model applies, with our temperature.

    Args:
        logits_when: what the lm_head answers -> the model's logits (1, TOKENS, V).

    Raises:
        ValueError: the model does something else to its logits.
    """
    asked: list[Tensor] = []

    def probe(head: nn.Module, hidden: Tensor) -> Tensor:
        parts = head_parts(head).local()
        z = known_logits(hidden.shape[:-1].numel(), parts.vocab).to(hidden.device, parts.weight.dtype)
        asked.append(z.view(*hidden.shape[:-1], -1))
        return asked[-1].clone()  # the model may scale it in place

    got = logits_when(probe)
    name = type(model).__name__
    if len(asked) != 1:
        raise ValueError(
            f"{name} must call its lm_head (get_output_embeddings) once a forward, it called it {len(asked)} times"
        )
    z = asked[0]
    rows, vocab = z.shape[-1], got.shape[-1]
    if got.shape[:-1] != z.shape[:-1] or vocab > rows:
        raise ValueError(
            f"{name} turns logits of shape {tuple(z.shape)} into {tuple(got.shape)}: expected one row a token"
        )
    z, u = z[..., :vocab], max(roundoff(t.dtype) for t in (z, got))  # some cut off their padding
    config = model.config.get_text_config()
    numbers = [value for field in SCALES if (value := getattr(config, field, None))]
    scales = [*numbers, *(1.0 / value for value in numbers), 1.0]
    caps = [*(value for field in SOFTCAPS if (value := getattr(config, field, None))), None]
    problems = []
    for scale, softcap in product(scales, caps):
        transform = LogitTransform(scale=float(scale), softcap=None if softcap is None else float(softcap))
        problem = what_differs(transform, z, got, u)
        if problem is None:
            return Found(replace(transform, temperature=temperature), vocab, rows, u, narrowing(z.dtype, got.dtype))
        problems.append(problem)
    raise ValueError(f"{name} does something to its logits that its config does not name: {problems[0]}")


def what_differs(transform: LogitTransform, z: Tensor, got: Tensor, u: float) -> str | None:
    """In words, where `got` is not what the transform makes of z in arithmetic of unit roundoff u; None: nowhere. Any shape."""
    share = transform_roundoff(transform, u) + narrowing(z.dtype, got.dtype)
    subnormal = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in (z, got))
    expected, got = apply(transform, z.double()), got.double()
    wrong = ~((got - expected).abs() <= share * expected.abs() + 8 * subnormal * (share > 0))
    if not wrong.any():
        return None
    at, came, due = (float(t.expand_as(wrong)[wrong][0]) for t in (z, got, expected))
    return (
        f"it turns a logit of {at:.5g} into {came:.9g}, and its config (scale {transform.scale:g}, softcap "
        f"{transform.softcap}) into {due:.9g}"
    )


def apply(transform: LogitTransform, z: Tensor) -> Tensor:
    """z' of the definition, in the dtype of z."""
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature
