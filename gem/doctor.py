"""gem-kernels doctor: report how fuse_lm_head handles a model, and check our numbers against the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import nn

from gem.head import ensure_fused, fused_head, unwrapped
from gem.head.adapters import describe_adapter, head_parts, serving_module
from gem.launch import FSDP2, Launch
from gem.loading import loading
from gem.models import pick_device, placed
from gem.plan import Work as TrainingPlan
from gem.plan import alike, plan
from gem.plan_table import lines
from gem.sources import MODEL_SOURCES, adapted, adapter_base, check_config, gguf_file, pretrained
from gem_kernels import LogitTransform, choose_impl

GIB = 1 << 30


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. logit_bytes: memory for the logits of one training step with the model's own head."""

    model: str
    dtype: str
    device: str
    vocab: int  # V, rows of the weight
    hidden: int  # D
    logits: int  # logits per token: V, or fewer if padding is cut off
    bias: bool
    tied: bool
    trained: bool  # True if the head's weight gets a gradient
    transform: LogitTransform
    adapter: str
    impl: str
    largest_gap: float  # largest difference between our log-probs, entropies, lse and the model's, nats
    allowed_gap: float  # bound on that difference by rounding, nats
    batch_size: int
    seq_len: int
    logit_bytes: int

    def lines(self) -> list[str]:
        """Return the report as the lines of a table."""
        tokens = self.batch_size * (self.seq_len - 1)
        padding = "" if self.logits == self.vocab else f", of which the model uses {self.logits}"
        cost = "trained: 6 N D V FLOP for a group loss" if self.trained else "frozen: 4 N D V FLOP for a group loss"
        rows = {
            "model": f"{self.model}, {self.dtype}, on {self.device}",
            "lm_head": f"V={self.vocab}{padding}, D={self.hidden}, {'bias' if self.bias else 'no bias'}, "
            f"{'tied to' if self.tied else 'not tied to'} the input embeddings, {cost}",
            "logits": describe_transform(self.transform),
            "adapter": self.adapter,
            "implementation": self.impl,
            "self-check": f"passed: largest difference {self.largest_gap:.1e} nats, rounding allows {self.allowed_gap:.1e}",
            "memory": f"{self.batch_size} x {self.seq_len} tokens: {self.logit_bytes / GIB:.2f} GiB of logits are not made "
            f"({tokens} x {self.logits}, with what loss and gradient hold beside them); one tile of them is",
        }
        width = max(map(len, rows))
        return [f"{name:{width}}  {text}" for name, text in rows.items()]


def describe_transform(transform: LogitTransform) -> str:
    """Return z' as a function of z, as text."""
    z = "z" if transform.scale == 1 else f"{transform.scale:g} z"
    return f"z' = {z}" if transform.softcap is None else f"z' = {transform.softcap:g} tanh({z} / {transform.softcap:g})"


def diagnose(model: nn.Module, *, batch_size: int = 8, seq_len: int = 2048) -> Diagnosis:
    """Fuse the model's lm_head (it stays fused) and report the effect for batches of this size.

    Raises:
        TypeError, ValueError: the errors of fuse_lm_head, and a batch_size < 1 or seq_len < 2.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    ensure_fused(model)
    causal_lm, fused = unwrapped(model), fused_head(model)
    head = causal_lm.get_output_embeddings()
    assert isinstance(head, nn.Module)
    parts = head_parts(serving_module(head))
    # The model's own loss holds these at once: the logits, their fp32 copy if they are not fp32, the log-probs, the gradient.
    entry = sum({parts.weight.element_size(), 4}) + 8
    return Diagnosis(
        model=type(causal_lm).__name__,
        dtype=str(parts.weight.dtype).removeprefix("torch."),
        device=str(parts.weight.device),
        vocab=parts.weight.shape[0],
        hidden=parts.weight.shape[1],
        logits=fused.vocab,
        bias=parts.bias is not None,
        tied=parts.weight is getattr(causal_lm.get_input_embeddings(), "weight", None),
        trained=parts.weight.requires_grad,
        transform=fused.transform,
        adapter=describe_adapter(head),
        impl=choose_impl("linear_logprob_entropy", fused.impl, parts.weight),
        largest_gap=fused.largest_gap[0],
        allowed_gap=fused.largest_gap[1],
        batch_size=batch_size,
        seq_len=seq_len,
        logit_bytes=batch_size * (seq_len - 1) * fused.vocab * entry,
    )


def planned(
    model: nn.Module,
    *,
    batch_size: int = 8,
    seq_len: int = 2048,
    world_size: int = 1,
    optim: str = TrainingPlan.optim,
    bf16: bool = False,
    checkpointing: bool = False,
    lora_rank: int = 0,
) -> list[str]:
    """Return the plan of a training of this model as lines: memory of a device, and work of a step.

    Args:
        model: of transformers; adapters that it has are left out.
        batch_size, seq_len: sequences of a step on each device, and their tokens.
        world_size: devices; several share the model by FSDP2.
        optim, bf16, checkpointing, lora_rank: as in TrainingArguments and ModelArguments.

    Raises:
        ValueError: a number is out of range, or the memory of the optimizer or of the model is not known.
    """
    for name, value, least in (("world_size", world_size, 1), ("lora_rank", lora_rank, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    causal_lm: Any = unwrapped(model)
    work = TrainingPlan(
        build=partial(alike, causal_lm, lora_rank),
        launch=Launch(world_size, FSDP2 if world_size > 1 else {}),
        bf16=bf16,
        checkpointing=checkpointing,
        groups=batch_size,
        length=seq_len,
        labelled=seq_len,
        optim=optim,
        gpu=causal_lm.device.type != "cpu" or bf16,
    )
    return lines(plan(work))


def load(source: str, device: str | None = None) -> nn.Module:
    """Return the model of a folder, hub name, GGUF file or config .json (then from scratch), with adapters unmerged.

    Args:
        source: the path or name that the user gave.
        device: the device for the model; None: CUDA if available, else the CPU.

    Raises:
        ValueError: there is no such model or no such device.
    """
    if not source:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    place = pick_device(device)  # before the weights are read
    model = _load(source)
    try:
        unwrapped(model)
    except TypeError as error:
        raise ValueError(f"model must be a language model, got {source!r}: {error}") from None
    return cast(nn.Module, placed(model, place))


def _load(source: str) -> Any:
    if adapter_base(source) is not None:
        return adapted(source, dtype="auto")
    if not source.endswith(".json") and gguf_file(source) is not None:
        return pretrained(source, dtype="auto")
    check_config(source)
    with loading("model", source, MODEL_SOURCES):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    # Use the class that the checkpoint names: AutoModelForCausalLM does not know vision-language models.
    named = getattr(transformers, (config.architectures or [""])[0], None)
    model_class: Any = named or transformers.AutoModelForCausalLM
    if source.endswith(".json"):
        make = model_class._from_config if named else model_class.from_config
        with loading("model", source, "the config .json of a language model"):
            return make(config, dtype=torch.float32)
    return pretrained(source, model_class, dtype="auto")
