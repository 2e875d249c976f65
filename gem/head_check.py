"""What a model does to its logits, found by trying, and the proof that our head gives the model's own numbers.

A probe: the lm_head answers with known numbers from -60 to 60, and what the model makes of them must be what its config names;
random weights, whose logits are all near 0, would hide a softcap. The head's own forward against the product with its parts.
Then a few tokens, once through the model's own logits and loss and once through ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gem.adapters import HeadParts, head_parts, product_of
from gem_kernels import LogitTransform, TokenStats

TOKENS = 8  # that go through the model
SPREAD = 60.0  # logits of the probe lie in [-SPREAD, SPREAD]
# What configs call the number that multiplies (Cohere, Falcon-H1, Muse) or divides (Granite; HyperCLOVA X multiplies by it, and
# MiniCPM divides its hidden states instead): the config gives the number, the probe says what the model does with it.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and afterwards every module in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside, a model whose weights ZeRO-3 has partitioned, and that has no engine yet, gathers them module by module."""
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


def trial_tokens(model: Any) -> Tensor:
    """(1, TOKENS) token ids that mean nothing special to the model (no image, no padding)."""
    configs = (model.config, model.config.get_text_config())
    special: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    ids = [i for i in range(min(model.config.get_text_config().vocab_size, 1000)) if i not in special][:TOKENS]
    if len(ids) < 2:
        raise ValueError(
            f"a check of the lm_head needs 2 ordinary tokens, the vocabulary of {type(model).__name__} has {len(ids)}"
        )
    device = model.get_input_embeddings().weight.device
    return torch.tensor([ids], device="cpu" if device.type == "meta" else device)  # accelerate moves what it offloads


class Found(NamedTuple):
    """What the probe found."""

    transform: LogitTransform
    vocab: int  # logits of a token
    rows: int  # of the head, of which the first `vocab` count
    resolution: float  # eps of the coarsest arithmetic between hidden states and logits


def find_transform(model: Any, temperature: float, logits_when: Callable[[Callable[..., Tensor]], Tensor]) -> Found:
    """The transform that the config names and the model applies, with our temperature, and in what arithmetic.

    Args:
        logits_when: what the lm_head answers -> the model's logits (1, TOKENS, V).

    Raises:
        ValueError: the model does something else to its logits.
    """
    asked: list[Tensor] = []
    coarsest = 0.0

    def probe(head: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal coarsest
        parts = head_parts(head).local()
        coarsest = resolution(hidden, parts)
        z = torch.linspace(-SPREAD, SPREAD, parts.vocab, dtype=torch.float64, device=hidden.device)
        asked.append(z.to(parts.weight.dtype).expand(*hidden.shape[:-1], -1))
        return asked[-1].contiguous()

    got = logits_when(probe)
    name = type(model).__name__
    if len(asked) != 1:
        raise ValueError(
            f"{name} must call its lm_head (get_output_embeddings) once a forward, it called it {len(asked)} times"
        )
    z = asked[0].double()
    rows, vocab = z.shape[-1], got.shape[-1]
    if got.shape[:-1] != z.shape[:-1] or vocab > rows:
        raise ValueError(
            f"{name} turns logits of shape {tuple(z.shape)} into {tuple(got.shape)}: expected one row a token"
        )
    z, eps = z[..., :vocab], max(torch.finfo(t.dtype).eps for t in (asked[0], got))  # some cut off their padding
    config = model.config.get_text_config()
    numbers = [value for field in SCALES if (value := getattr(config, field, None))]
    scales = [*numbers, *(1.0 / value for value in numbers), 1.0]
    caps = [*(value for field in SOFTCAPS if (value := getattr(config, field, None))), None]
    problems = []
    for scale, softcap in product(scales, caps):
        transform = LogitTransform(scale=float(scale), softcap=None if softcap is None else float(softcap))
        problem = what_differs(transform, z, got, eps)
        if problem is None:
            return Found(replace(transform, temperature=temperature), vocab, rows, max(coarsest, eps))
        problems.append(problem)
    raise ValueError(f"{name} does something to its logits that its config does not name: {problems[0]}")


def what_differs(transform: LogitTransform, z: Tensor, got: Tensor, eps: float) -> str | None:
    """In words, where `got` is not what the transform makes of z; None: nowhere. Any shape; eps: of their dtype."""
    expected, got = apply(transform, z.double()), got.double()
    # At most four operations, each rounded by eps / 2 of its result.
    wrong = ~((got - expected).abs() <= 2 * eps * expected.abs() + 1e-30)
    if not wrong.any():
        return None
    at, came, due = (float(t.expand_as(wrong)[wrong][0]) for t in (z, got, expected))
    return (
        f"it turns a logit of {at:.5g} into {came:.5g}, and its config (scale {transform.scale:g}, softcap "
        f"{transform.softcap}) into {due:.5g}"
    )


def apply(transform: LogitTransform, z: Tensor) -> Tensor:
    """z' of the definition, in the dtype of z."""
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def check_product(
    name: str, own_forward: Callable[[Tensor], Tensor], hidden: Tensor, parts: HeadParts, eps: float
) -> None:
    """Raise ValueError where the head's own forward is not the product that its parts say, for hidden states (1, T, D) as they
    are and so large that a bend of its own would show."""
    z = product_of(hidden, parts.weight, None, parts.low_rank, torch.float64)
    bias = 0.0 if parts.bias is None else parts.bias.double()
    for factor in (1.0, SPREAD / max(float(z.nan_to_num().abs().max()), 1e-30)):
        got, expected = own_forward(hidden * factor).double(), factor * z + bias
        wrong = ~((got - expected).abs() <= 4 * eps * (float(expected.nan_to_num().abs().max()) + 10.0))
        if wrong.any():
            raise ValueError(
                f"the lm_head of {name} is more than the product with its weight: it gives a logit {float(got[wrong][0]):.6g}, "
                f"the product is {float(expected[wrong][0]):.6g}"
            )


def check_losses(name: str, own: Any, ours: Any, eps: float) -> None:
    """Raise ValueError unless the loss of a fused call is the model's own, for what carries both."""
    a, b = float(own.loss), float(ours.loss)
    eps = max(eps, torch.finfo(torch.float32).eps)  # in which transformers computes the loss of any model
    if not abs(a - b) <= 4 * eps * (abs(a) + 10.0):
        raise ValueError(
            f"the loss of {name} is another than the mean of -log p of the next token (it shifts its labels otherwise, or adds "
            f"a term that its config weighs): its own is {a:.6g}, ours {b:.6g}"
        )


def check_against_logits(name: str, logits: Tensor, ids: Tensor, ours: TokenStats, resolution: float) -> float:
    """The largest difference, in nats, between our statistics (1, T - 1) and those of the model's logits (1, T, V).

    Args:
        logits: temperature included.
        resolution: of the arithmetic in which the model multiplies; it rounds its logits to that, we do not.

    Raises:
        ValueError: a difference that this rounding does not explain.
    """
    z = logits[:, :-1].double()
    log_p = z.log_softmax(-1)
    theirs = TokenStats(
        log_p.gather(-1, ids[:, 1:, None])[..., 0],
        -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1),
        z.logsumexp(-1),
    )
    # Half a resolution of the largest logit for z_y, for lse, and, weighted by log p, for the entropy; as much for our side.
    size = float(z[z.isfinite()].abs().max()) + 10.0 if z.isfinite().any() else 10.0
    tolerance, largest = 4 * resolution * size, 0.0
    for what, a, b in zip(TokenStats._fields, theirs, ours, strict=True):
        wrong = ~((a - b).abs() <= tolerance)
        if wrong.any():
            raise ValueError(
                f"{name} does something to its logits that its config does not name: the {what} of its own logits is "
                f"{float(a[wrong][0]):.6g}, ours {float(b[wrong][0]):.6g}, expected to agree within {tolerance:.3g}"
            )
        largest = max(largest, float((a - b).abs().max()))
    return largest


def resolution(hidden: Tensor, parts: HeadParts) -> float:
    """eps of the arithmetic that the head's product really has, as seen from inside the model's forward."""
    device = hidden.device.type
    tensors = [hidden, parts.weight, *([] if parts.low_rank is None else parts.low_rank[:2])]
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        dtypes.add(torch.get_autocast_dtype(device))
    eps = max(float(torch.finfo(dtype).eps) for dtype in dtypes)
    if device == "cuda" and torch.float32 in dtypes and torch.get_float32_matmul_precision() != "highest":
        return max(eps, 2.0**-10)  # TF32
    return eps
