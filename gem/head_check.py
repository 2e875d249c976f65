"""What a model does to its logits, found by trying, and the proof that our head gives the model's own numbers.

Two checks. A probe: the lm_head answers with known numbers from -60 to 60, and what the model makes of them must be what its
config names; random weights, whose logits are all near 0, would hide a softcap. Then a few tokens, once through the model's own
logits and once through ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from gem.adapters import head_parts
from gem_kernels import LogitTransform, TokenStats

TOKENS = 8  # that go through the model
SPREAD = 60.0  # logits of the probe lie in [-SPREAD, SPREAD]
# What configs call the number that multiplies (Cohere, Falcon-H1, Muse) or divides (Granite; HyperCLOVA X multiplies by it, and
# MiniCPM divides its hidden states instead): the config gives the number, the probe says what the model does with it.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAPS = ("final_logit_softcapping",)


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
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


def find_transform(
    model: Any, temperature: float, logits_when: Callable[[Callable[..., Tensor]], Tensor]
) -> tuple[LogitTransform, int]:
    """The transform that the config names and the model applies, with our temperature; and how many logits a token has.

    Args:
        logits_when: what the lm_head answers -> the model's logits (1, TOKENS, V).

    Raises:
        ValueError: the model does something else to its logits.
    """
    asked: list[Tensor] = []

    def probe(head: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        parts = head_parts(head).local()
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
    vocab = got.shape[-1]
    if got.shape[:-1] != z.shape[:-1] or vocab > z.shape[-1]:
        raise ValueError(
            f"{name} turns logits of shape {tuple(z.shape)} into {tuple(got.shape)}: expected one row a token"
        )
    z, got = z[..., :vocab], got.double()  # some cut off the padding of their vocabulary
    config = model.config.get_text_config()
    numbers = [value for field in SCALES if (value := getattr(config, field, None))]
    scales = [*numbers, *(1.0 / value for value in numbers), 1.0]
    caps = [*(value for field in SOFTCAPS if (value := getattr(config, field, None))), None]
    eps = torch.finfo(asked[0].dtype).eps
    first_guess = None
    for scale, softcap in product(scales, caps):
        transform = LogitTransform(scale=float(scale), softcap=None if softcap is None else float(softcap))
        expected = apply(transform, z)
        # At most four operations, each rounded by eps / 2 of its result.
        wrong = ~((got - expected).abs() <= 2 * eps * expected.abs() + 1e-30)
        if not wrong.any():
            return LogitTransform(transform.scale, transform.softcap, temperature), vocab
        first_guess = first_guess or (transform, float(z[wrong][0]), float(got[wrong][0]), float(expected[wrong][0]))
    assert first_guess is not None
    transform, at, came, due = first_guess
    raise ValueError(
        f"{name} does something to its logits that its config does not name: it turns a logit of {at:.5g} into {came:.5g}, "
        f"and its config (scale {transform.scale:g}, softcap {transform.softcap}) into {due:.5g}"
    )


def apply(transform: LogitTransform, z: Tensor) -> Tensor:
    """z' of the definition, in the dtype of z."""
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


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


def resolution(weight: Tensor) -> float:
    """eps of the arithmetic that a matrix product with this weight really has."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return float(torch.finfo(torch.get_autocast_dtype(device)).eps)
    if device == "cuda" and weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10  # TF32
    return float(torch.finfo(weight.dtype).eps)
