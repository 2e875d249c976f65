"""What a run needs on each device: bytes by part and phase, floating point operations, bytes sent. No memory is allocated.

The parameters are those of a model that accelerate has sharded (gem.sharding); activations are counted while the model's own
code runs on tensors without memory (gem.simulate). The rest is arithmetic, below. Where two maxima need not come at the same
time, their sum is taken: a plan is an upper bound, but for what the allocator loses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from transformers import AutoModelForCausalLM

from gem.launch import Launch
from gem.sharding import Shards, shards_of
from gem.simulate import Cost, forward_pass, training_pass
from gem.sources import with_new_adapters

GIB = 1 << 30

# Bytes of state as multiples of those of the parameters: adamw keeps two means, the others one or none.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}

# On a GPU: fp32 logits that a product makes at a time (gem_kernels/tiles.py), and on a CPU.
_TILE_GPU, _TILE_CPU = 66 << 20, 16 << 20
_BLOCKS_CPU = 3 << 20  # what the row functions hold of a tile: six blocks of 2^17 entries
_SHARED_CPU = 256 << 20  # small groups share so much of the cache on a CPU


@dataclass(frozen=True)
class Work:
    """What is planned.

    Attributes:
        build: returns the model on the meta device, in the dtype in which it is loaded, with its adapters.
        launch: processes and FSDP.
        bf16: mixed precision.
        checkpointing: activations are computed again in the backward.
        groups: of a micro-batch; each has `members` sequences of at most `length` tokens, of which `labelled` have a label.
        accumulation: micro-batches of a step.
        cache_bytes: loss.cache_mib.
        optim: name of the optimizer.
        masked: sequences are padded; False: they are packed, for flash attention.
        rollouts: candidates generated at once, if training samples online; 0: it does not.
        prompt, new_tokens: their lengths.
        score_tokens: of a forward without gradients, if there are any; 0: there is none.
        frozen: True if a second model is the reference. average: True if an averaged model scores.
        gpu: False for a CPU, whose head keeps fp32 logits.
    """

    build: Callable[[], Any]
    launch: Launch = field(default_factory=Launch)
    bf16: bool = False
    checkpointing: bool = False
    groups: int = 1
    members: int = 1
    length: int = 2048
    labelled: int = 2048
    accumulation: int = 1
    cache_bytes: int = 1 << 30
    optim: str = "adamw_torch_fused"
    masked: bool = True
    rollouts: int = 0
    prompt: int = 0
    new_tokens: int = 0
    top_p: float = 1.0
    score_tokens: int = 0
    frozen: bool = False
    average: bool = False
    gpu: bool = True

    @property
    def sharded(self) -> bool:
        return bool(self.launch.fsdp)

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.groups * self.members


@dataclass(frozen=True)
class Phase:
    """What is held at the same time, by part, in bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The plan of a run, for the device that holds most.

    flop, sent, received: per step and device; a multiplication and an addition are two, and sent are bytes of collectives.
    unfused: bytes that the logits of a micro-batch would take without the fused head.
    """

    work: Work
    shards: Shards
    phases: tuple[Phase, ...]
    flop: int
    sent: dict[str, int]
    unfused: int
    vocabulary: int

    @property
    def total(self) -> int:
        return max(phase.total for phase in self.phases)


def plan(work: Work) -> Plan:
    """Return the plan.

    Raises:
        ValueError: an optimizer whose state is not known here, or a model that does what depends on numbers.
    """
    if work.optim not in STATES:
        raise ValueError(f"optim must be one whose memory is known ({', '.join(STATES)}), got {work.optim!r}")
    try:
        return _planned(work)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(f"model must run on tensors without numbers to be planned, got {error!r}") from None


def _planned(work: Work) -> Plan:
    # Mixed precision under FSDP2: fp32 masters, from which each unit is gathered in bf16. Without FSDP autocast alone casts.
    masters = work.sharded and work.bf16
    shards = shards_of(work.build(), work.launch.processes, work.launch.fsdp, masters=masters)
    model = _computing(work)
    head: Tensor = model.get_output_embeddings().weight
    training, held = _training(work, model, shards)
    phases = [_update(work, shards), training]
    if work.rollouts:
        phases.append(_generation(work, shards))
    if work.score_tokens:
        phases.append(_scoring(work, shards))
    narrow = 2 if work.bf16 else head.element_size()
    labelled, vocabulary = work.rows * work.labelled, head.shape[0]
    # Forward, and two products backward; one of them is for the weight.
    products = 3 if head.requires_grad else 2
    flop = work.accumulation * (held.flop + 2 * products * labelled * head.numel())
    # The logits, their fp32 copy, the log-probs and the gradient.
    unfused = labelled * vocabulary * (sum({narrow, 4}) + 8)
    return Plan(work, shards, tuple(phases), flop, _sent(work, shards), unfused, vocabulary)


def _computing(work: Work) -> Any:
    """Return the model in the dtype in which it computes: under FSDP2 its gathered units are bf16, inside autocast."""
    model = work.build()
    if work.sharded and work.bf16:
        model.to(torch.bfloat16)
    if work.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        if hasattr(model, "enable_input_require_grads") and not model.get_input_embeddings().weight.requires_grad:
            model.enable_input_require_grads()  # as Trainer does for adapters: else nothing would reach the first checkpoint
    return model


def on_meta(config: Any, dtype: str, lora_rank: int = 0) -> Any:
    """Return a model without memory, with adapters on request, as gem.models.load_model makes one.

    Args:
        config: of transformers.
        dtype: of the weights, by its name in torch.
        lora_rank: as in ModelArguments.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    return with_new_adapters(model, lora_rank)


def alike(model: Any, lora_rank: int = 0) -> Any:
    """Return a model without memory of the class, config and dtype of a transformers model, with new adapters on request."""
    with torch.device("meta"):
        return with_new_adapters(type(model)(copy.deepcopy(model.config)).to(model.dtype), lora_rank)


# --- the head ---------------------------------------------------------------------------------------------------------


def head_buffers(hidden: Tensor, weight: Tensor, *, groups: int, cache_bytes: int, gpu: bool) -> list[Tensor]:
    """Return what linear_group_loss (`chunked`) holds beside its results, for tokens (N, D) of so many equal groups.

    The logits of a slab of groups stay from its forward to its backward: in bf16 on a GPU, else in fp32. Groups share the
    cache; one that does not fit is computed twice, in tiles. dhidden is summed in fp32, and so is dweight over several slabs.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    narrow, trained = weight.dtype != torch.float32, weight.requires_grad
    row = v * (2 if gpu and weight.dtype == torch.bfloat16 else 4)
    spare = 4 * d * v if narrow and trained else 0  # what several slabs need for dweight, and one may use for logits
    shared, of_group = (cache_bytes if gpu else min(cache_bytes, _SHARED_CPU)), -(-n // groups)
    if n * row <= (shared if groups > 1 else cache_bytes) + spare:
        slabs, cached = 1, n
    else:
        together = max(1, shared // (row * of_group))
        slabs = -(-groups // together)
        cached = together * of_group if together * of_group * row <= cache_bytes else 0
    tile = _TILE_GPU if gpu else _TILE_CPU
    blocks = 0 if gpu else min(_BLOCKS_CPU, 24 * n * v)
    tiled = tile if row < 4 * v or not cached else 0  # fp32 logits that become bf16, or that nothing keeps
    wide = 4 * n * d + (4 * v * d if slabs > 1 and narrow and trained else tile if narrow and trained else 0)
    return [hidden.new_empty(size, dtype=torch.uint8) for size in (cached * row, min(tiled, 4 * n * v), blocks, wide)]


# --- the phases -------------------------------------------------------------------------------------------------------


def _standing(work: Work, shards: Shards) -> dict[str, int]:
    """Return what is always there."""
    parts = {"parameters": shards.local, "optimizer state": STATES[work.optim] * shards.trained}
    share = work.launch.processes if work.sharded else 1
    if work.frozen:  # in the dtype in which it is loaded, and sharded as the policy
        loaded = work.build()
        parts["reference"] = sum(p.numel() * p.element_size() for p in loaded.parameters()) // share
    if work.average:
        parts["averaged scorer"] = shards.local
    return parts


def _with_gradients(work: Work, shards: Shards) -> dict[str, int]:
    """Return what is there once the gradients are."""
    parts = {**_standing(work, shards), "gradients": shards.trained}
    if work.launch.processes > 1 and not work.sharded:
        parts["gradient buckets"] = shards.trained  # DistributedDataParallel copies gradients into its buckets
    return parts


def _training(work: Work, model: Any, shards: Shards) -> tuple[Phase, Cost]:
    """Return the phase of forward and backward, and the cost of one micro-batch."""
    grow = "grow" if work.accumulation == 1 else "present"
    cost = training_pass(
        model,
        work.rows,
        work.length,
        work.rows * work.labelled,
        partial(head_buffers, groups=work.groups, cache_bytes=work.cache_bytes, gpu=work.gpu),
        autocast=torch.bfloat16 if work.bf16 else None,
        masked=work.masked,
        gradients="leave" if work.sharded else grow,
    )
    # Gradients that grow while activations go never meet all of them: what the peak has beyond them is activations.
    activations = cost.peak - (shards.trained if not work.sharded and grow == "grow" else 0)
    parts = _with_gradients(work, shards)
    if work.sharded:
        parts["gathered units"] = _gathered(work, shards, activations)
    parts["activations and head"] = max(0, activations)
    return Phase("training", parts), cost


def _width(work: Work, numel: int, shards: Shards) -> int:
    """Return the bytes of so many parameters in the dtype in which they are gathered."""
    return 2 * numel if work.bf16 else numel * shards.local * work.launch.processes // max(1, shards.numel)


def _gathered(work: Work, shards: Shards, activations: int) -> int:
    """Return the working set of FSDP2 in a forward and backward: what is whole beside the shards.

    Units that stay (the tail: last norm and lm_head) are whole until their backward. Of the layers the one that computes is
    whole, and the next one is fetched meanwhile. A unit's gradient is whole, in the compute dtype, until its reduction has
    copied it into an fp32 buffer; that buffer stays until the next reduction begins. The embeddings come last, when the
    activations are gone: they count for what they take beyond these.
    """
    width = partial(_width, work, shards=shards)
    tail = sum(width(u.numel) for u in shards.units if u.kept)
    tail_trained = max((u.trained for u in shards.units if u.kept), default=0)
    layers = [u for u in shards.units if not u.kept and not u.embedding]
    layer, trained = max((width(u.numel) for u in layers), default=0), max((u.trained for u in layers), default=0)
    at_tail = tail + layer + 4 * tail_trained  # the gradient of the tail is among the activations: the head has made it
    behind = 2 * layer + width(trained) + 4 * max(tail_trained, trained)
    in_forward = 3 * layer + tail  # the buffer of a gather stays until the next one is copied out
    first = max((width(u.numel) + width(u.trained) + 4 * u.trained for u in shards.units if u.embedding), default=0)
    return max(at_tail, behind, in_forward, first - activations)


def _update(work: Work, shards: Shards) -> Phase:
    """Return the phase of the optimizer's step."""
    parts = _with_gradients(work, shards)
    if work.optim != "adamw_torch_fused" and STATES[work.optim]:
        # Roots of the second means: of all on a GPU, or one by one.
        parts["temporaries"] = shards.trained if work.gpu else shards.largest
    return Phase("update", parts)


def _generation(work: Work, shards: Shards) -> Phase:
    """Return the phase in which the policy samples: whole weights, keys and values of all rows, the logits of one step."""
    model = _computing(work)
    head: Tensor = model.get_output_embeddings().weight
    autocast = torch.bfloat16 if work.bf16 else None
    one = forward_pass(model, 1, work.prompt + work.new_tokens, _no_buffers, autocast=autocast, cached=True)
    prefill = forward_pass(_computing(work), work.rollouts, work.prompt, _no_buffers, autocast=autocast)
    # Logits, their fp32 copy, the one of the step before, scaled, probabilities; top_p sorts them beside their places.
    sampling = work.rollouts * head.shape[0] * (18 + (24 if work.top_p < 1 else 0))
    parts = _standing(work, shards)
    if work.sharded:
        parts["whole weights"] = _width(work, shards.numel, shards)
    parts["keys and values"] = work.rollouts * one.kept
    parts["activations and head"] = max(prefill.peak, sampling)
    return Phase("generation", parts)


def _no_buffers(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return []


def _scoring(work: Work, shards: Shards) -> Phase:
    """Return the phase of forwards without gradients: scores, or log-probs of a reference."""
    rows = max(1, work.score_tokens // work.length)
    held = partial(head_buffers, groups=1, cache_bytes=0, gpu=work.gpu)
    cost = forward_pass(_computing(work), rows, work.length, held, autocast=torch.bfloat16 if work.bf16 else None)
    parts = _standing(work, shards)
    if work.sharded:
        others = max((_width(work, u.numel, shards) for u in shards.units if not u.kept), default=0)
        parts["gathered units"] = 3 * others + sum(_width(work, u.numel, shards) for u in shards.units if u.kept)
    parts["activations and head"] = cost.peak
    return Phase("scoring", parts)


def _sent(work: Work, shards: Shards) -> dict[str, int]:
    """Return the bytes that a device sends in a step, by collective, in rings."""
    n = work.launch.processes
    if n == 1:
        return {}
    if not work.sharded:
        return {"all-reduce": 2 * shards.trained * (n - 1) // n}
    # Each micro-batch gathers what was freed twice, and reduces in fp32.
    gathers = sum(_width(work, u.numel, shards) * (1 if u.kept else 2) for u in shards.units)
    sent = {
        "all-gather": work.accumulation * gathers * (n - 1) // n,
        "reduce-scatter": work.accumulation * 4 * shards.numel_trained * (n - 1) // n,
    }
    if work.rollouts:
        sent["whole weights"] = _width(work, shards.numel, shards) * (n - 1) // n
    return sent
