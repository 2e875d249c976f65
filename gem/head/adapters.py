"""The weight and bias of a head module, and the adapters that peft has put on it.

They are looked up in every call: FSDP gathers the weight, peft switches adapters, and a wrapper may come after fuse_lm_head.
r rank of an adapter, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gem.distributed import local_part
from gem_kernels import LowRank, VocabShard

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class HeadParts(NamedTuple):
    """logits = hidden weight^T + bias + the adapters' part, before the model's own transform."""

    weight: Tensor  # (V, D); this rank's rows of a vocabulary-parallel head
    bias: Tensor | None  # (V,)
    low_rank: LowRank | None
    shard: VocabShard | None = None  # set for a vocabulary-parallel head
    biases: tuple[Tensor, ...] = ()  # the terms of the bias, where adapters add some

    @property
    def vocab(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.total

    def local(self) -> HeadParts:
        """Return plain tensors: this rank's rows of a head placed Shard(0), all rows of a replicated one.

        Call it inside the head's own forward. There FSDP has gathered what it sharded, and a remaining DTensor is tensor
        parallel.
        """
        weight: Any = self.weight
        if not _is_dtensor(weight):
            return self
        if self.low_rank is not None:
            raise ValueError(
                "LoRA on a vocabulary-parallel lm_head is not supported: leave lm_head out of target_modules, or put it into "
                "modules_to_save"
            )
        whole = all(placement.is_replicate() for placement in weight.placements)
        shard = None if whole else VocabShard.of(weight)
        bias: Any = self.bias
        return HeadParts(local_part(weight), None if bias is None else local_part(bias), None, shard)

    def columns(self, vocab: int) -> HeadParts:
        """Return the parts of the first `vocab` entries: some models cut off the padding of their vocabulary."""
        if vocab == self.vocab:
            return self
        start = 0 if self.shard is None else self.shard.start
        rows, low = slice(max(0, vocab - start)), self.low_rank
        return HeadParts(
            self.weight[rows],
            None if self.bias is None else self.bias[rows],
            None if low is None else low._replace(b=low.b[rows]),
            None if self.shard is None else self.shard._replace(start=min(start, vocab), total=vocab),
        )


def serving_module(head: nn.Module) -> nn.Module:
    """Return the module whose forward makes the logits: the active copy in peft's modules_to_save, else the head itself."""
    if type(head).__name__ != "ModulesToSaveWrapper":
        return head
    wrapper = cast(Any, head)
    if (
        wrapper.disable_adapters
        or not wrapper.active_adapters
        or wrapper.active_adapters[0] not in wrapper.modules_to_save
    ):
        return cast(nn.Module, wrapper.original_module)
    return cast(nn.Module, wrapper.modules_to_save[wrapper.active_adapters[0]])


def head_parts(module: nn.Module) -> HeadParts:
    """Return weight, bias and adapters of a module from `serving_module`.

    Raises:
        ValueError: our product would be wrong for this head; the message says what to do. Cases are a quantised weight, an
            adapter other than plain LoRA (DoRA and the like), dropout on the adapter's input, a weight that is not in memory.
    """
    lora = _lora_layer(module)
    linear = module if lora is None else lora.get_base_layer()
    weight, bias = _dense(linear)
    if lora is None:
        return HeadParts(weight, bias, None)
    adapter_biases, low_rank = _lora_parts(lora)
    biases = adapter_biases if bias is None else [bias, *adapter_biases]
    return HeadParts(weight, sum(biases[1:], biases[0]) if biases else None, low_rank, biases=tuple(biases))


def product_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, dtype: torch.dtype
) -> Tensor:
    """Return hidden W^T + scale (hidden a^T) b^T + bias in `dtype`, (..., V). It makes all logits: use it for a few tokens.

    The weight is converted by parts: all of it in a wider dtype may be gigabytes.
    """
    h = hidden.to(dtype)
    z = torch.cat([h @ rows.to(dtype).T for rows in weight.split(4096)], -1)
    if low_rank is not None:
        z += low_rank.scale * (h @ low_rank.a.to(dtype).T) @ low_rank.b.to(dtype).T
    return z if bias is None else z.add_(bias.to(dtype))


def describe_adapter(head: nn.Module) -> str:
    """Return a name of the adapter for reports: "none", "LoRA default (r=8)", "modules_to_save default"."""
    if serving_module(head) is not head:
        return f"modules_to_save {cast(Any, head).active_adapter}"
    lora = _lora_layer(head)
    if lora is None:
        return "none"
    state = ", disabled" if lora.disable_adapters else ", merged" if lora.merged else ""
    return "LoRA " + ", ".join(f"{name} (r={lora.r[name]})" for name in lora.active_adapters if name in lora.r) + state


def _lora_layer(module: nn.Module) -> Any:
    """Return `module` if it is a LoraLayer of peft, else None. peft need not be installed."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, Linear):
        return module
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            f"an adapter on the lm_head must be LoRA on a plain nn.Linear, got {type(module).__module__}."
            f"{type(module).__name__}: leave lm_head out of target_modules, or put it into modules_to_save"
        )
    return None


def _dense(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a plain nn.Linear in memory, or raise ValueError."""
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    expected = f"the lm_head must be an nn.Linear with a floating-point weight (V, D), got {type(linear).__name__}"
    if not isinstance(linear, nn.Linear) or not isinstance(weight, Tensor):
        raise ValueError(f"{expected} (any adapter on it but LoRA and modules_to_save is refused)")
    if hasattr(weight, "ds_status") and weight.numel() == 0:
        raise ValueError(
            "the lm_head's weight is partitioned by ZeRO-3 and was not gathered by the head's own hooks (LoRA on the lm_head "
            "hides it from them): use modules_to_save for the lm_head, or ZeRO-2"
        )
    if type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{expected}, whose forward is its own: anything it does beside the product would be left out")
    plain = type(weight) in (Tensor, nn.Parameter) or _is_dtensor(weight)
    if not plain or weight.dtype not in _FLOATS or weight.ndim != 2:
        raise ValueError(
            f"{expected} with a {type(weight).__name__} {tuple(weight.shape)} {weight.dtype}: a quantised head is not "
            "supported, leave it out of the quantisation (bitsandbytes: llm_int8_skip_modules=['lm_head'])"
        )
    if weight.is_meta:
        raise ValueError("the lm_head's weight is on the meta device: load or materialise the model's weights first")
    return weight, bias


def _lora_parts(lora: Any) -> tuple[list[Tensor], LowRank | None]:
    """Return biases and low-rank part of the active adapters i, as peft's own forward adds scale_i (h A_i^T) B_i^T."""
    biases: list[Tensor] = []
    if lora.disable_adapters:
        if lora.merged:
            lora.unmerge()  # peft's own forward does the same
        return biases, None
    active = [name for name in lora.active_adapters if name in lora.lora_A]
    if lora.merged or not active:
        return biases, None
    for name in active:
        if name in lora.lora_variant:
            variant = type(lora.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise ValueError(
                f"adapter {name!r} on the lm_head must be plain LoRA, got {variant} (DoRA and its like rescale the whole "
                "weight): leave lm_head out of target_modules, merge it, or put it into modules_to_save"
            )
        p = getattr(lora.lora_dropout[name], "p", 0.0)
        if p and lora.training:
            raise ValueError(
                f"adapter {name!r} on the lm_head must have lora_dropout=0 in training, got {p}: its input would be another "
                "than the head's"
            )
        if lora.lora_B[name].bias is not None:
            biases.append(lora.scaling[name] * lora.lora_B[name].bias)
    a, b = ([side[name].weight for name in active] for side in (lora.lora_A, lora.lora_B))
    if len(active) == 1:
        return biases, LowRank(a[0], b[0], float(lora.scaling[active[0]]))
    dtype = torch.float32 if any(t.dtype == torch.float32 for t in (*a, *b)) else a[0].dtype
    scaled = [lora.scaling[name] * t.to(dtype) for name, t in zip(active, a, strict=True)]
    return biases, LowRank(torch.cat(scaled), torch.cat([t.to(dtype) for t in b], 1), 1.0)


def _is_dtensor(t: object) -> bool:
    """True for a DTensor, without the half second that importing its module takes."""
    return hasattr(t, "device_mesh") and hasattr(t, "placements")
