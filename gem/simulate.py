"""Run a model's forward and backward on tensors without memory, and count the bytes that a device would hold.

The model runs for real, in its own code, with checkpointing and autocast as in training; only its tensors are fake. So whatever
an architecture saves for its backward is counted, and no formula of ours knows a layer. Two calls are replaced by stand-ins
that hold what the kernels hold: attention, and the fused lm_head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

Held = Callable[[Tensor, Tensor], list[Tensor]]
"""(hidden (N, D), weight (V, D)) -> the buffers that a head holds while it computes."""


@dataclass(frozen=True)
class Cost:
    """What a pass holds and does.

    peak: most bytes at a time beside the parameters, gradients of parameters included unless they are given away.
    kept: bytes that its result holds afterwards, such as a cache of keys and values.
    flop: floating point operations, a multiplication and an addition counted as two; those of the head are not among them.
    """

    peak: int
    kept: int
    flop: int


class Live(TorchDispatchMode):
    """Mode that follows the storages that operators make, until they are freed.

    padded: the answer to the one question that models ask numbers, whether a mask of the attention is needed.
    """

    def __init__(self, padded: bool = True) -> None:
        super().__init__()
        self.bytes, self.peak, self.flop, self.padded = 0, 0, 0, padded
        self._known: dict[int, tuple[Any, int]] = {}  # storage -> (reference that sees its end, bytes)

    def overlook(self, tensor: Tensor) -> None:
        """Do not count a tensor, whose memory the plan counts elsewhere."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            self._forget(storage._cdata)
        self._known[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata)), 0

    def _forget(self, key: int, _: Any = None) -> None:
        self.bytes -= self._known.pop(key)[1]

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, partial(self._forget, key)), size
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self.padded  # of `padding_mask.all()`
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif str(packet).startswith("transformers.grouped_mm"):  # (S, I) by one (I, O) of each token's expert
            product = 2 * args[0].shape[0] * args[1][0].numel()
            self.flop += 2 * product if "backward" in str(packet) else product
        return out


class _Attention(torch.autograd.Function):
    """What flash and memory-efficient attention hold: q, k, v, the output and a log-sum-exp a row; no T x T scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, live: Live, causal: bool) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=q.dtype, device=q.device)  # each call makes its own additive mask
        heads, rows = q.shape[-3:-1]
        out = q.new_empty(*q.shape[:-3], rows, heads, v.shape[-1]).transpose(
            -3, -2
        )  # the order that the next layer reads
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *([] if mask is None else [mask]))
        pairs = math.prod(q.shape[:-1]) * k.shape[-2] // (2 if causal else 1)
        ctx.live, ctx.flop = live, 2 * pairs * (q.shape[-1] + v.shape[-1])
        live.flop += ctx.flop
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, v, out, lse, *_ = ctx.saved_tensors
        delta = torch.empty_like(lse)  # sum of out * grad of each row
        narrow = q.element_size() < 4
        wide = q.new_empty(q.shape, dtype=torch.float32) if narrow else None  # dq is summed over the blocks of k
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        ctx.live.flop += 5 * ctx.flop // 2  # the scores once more, then dv, dp, dq and dk
        del delta, wide, out
        return *gradients, None, None, None


class _Head(torch.autograd.Function):
    """What the fused lm_head holds: its gradients are there when its forward returns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: int, held: Held) -> Tensor:
        rows = hidden.new_empty(tokens, hidden.shape[-1])  # those with a label
        working = held(rows, weight)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        ctx.gradients = [
            torch.empty_like(hidden) if needs_hidden else None,
            torch.empty_like(weight) if needs_weight else None,
        ]
        del working
        return hidden.new_empty(*hidden.shape[:-1], 8, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients, None, None


@contextmanager
def _attention_by(live: Live) -> Iterator[None]:
    """Replace attention by its stand-in for the block. A mode would not do: the recomputation of checkpoints leaves modes."""
    own = F.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")

    def attention(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given[name] for name in names[:3])
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        mask = given.get("attn_mask")
        return _Attention.apply(q, k, v, mask, live, mask is not None or given.get("is_causal", False))

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def _masks_as_in_a_run() -> Iterator[None]:
    """Let transformers ask whether there is padding, for the block: it does not ask tensors without numbers."""
    import transformers.masking_utils

    masks: Any = transformers.masking_utils
    own = masks.is_tracing
    masks.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masks.is_tracing = own


@contextmanager
def _experts_grouped() -> Iterator[None]:
    """Let a mixture of experts take one product a matrix for all experts, by the operator that any dtype has, for the block."""
    try:
        from transformers.integrations import moe
    except ImportError:  # a transformers without this module
        yield
        return
    own = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = own


@contextmanager
def _unobserved() -> Iterator[None]:
    """Keep hooks on all modules of the process, such as a profiler's, from seeing a model that is not there."""
    hooks = (torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks)
    before = [dict(of_kind) for of_kind in hooks]
    for of_kind in hooks:
        of_kind.clear()
    try:
        yield
    finally:
        for of_kind, own in zip(hooks, before, strict=True):
            of_kind.update(own)


def _with_fake_memory(model: nn.Module) -> nn.Module:
    """Return a model on the meta device with memory of the mode around the call."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)  # a fake tensor takes no real one's place
    try:
        return model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def _running(model: nn.Module, autocast: torch.dtype | None, masked: bool = True) -> Iterator[Live]:
    """Give the model fake memory for the block, in which what is made is counted."""
    live = Live(masked)
    casting: AbstractContextManager[Any] = torch.autocast("cpu", autocast) if autocast else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _with_fake_memory(model) if next(model.parameters()).is_meta else model
        for tensor in (*fake.parameters(), *fake.buffers()):
            live.overlook(tensor)
        with _unobserved(), _attention_by(live), _experts_grouped(), _masks_as_in_a_run(), live, casting:
            yield live


@contextmanager
def _headless(model: Any, tokens: int, held: Held) -> Iterator[None]:
    """Put the stand-in in the place of the model's lm_head for the block."""
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Any:
        return _Head.apply(hidden, head.weight, min(tokens, hidden.shape[:-1].numel()), held)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _inputs(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def training_pass(
    model: Any,
    rows: int,
    length: int,
    tokens: int,
    held: Held,
    *,
    autocast: torch.dtype | None = None,
    masked: bool = True,
    gradients: str = "grow",
) -> Cost:
    """Return the cost of the forward and backward of one micro-batch.

    Args:
        model: a transformers model on the meta device, in the dtypes in which it computes; its memory becomes fake.
            Checkpointing is that of the model.
        rows, length: sequences of the micro-batch, and tokens of each.
        tokens: those with a label, at most rows * length.
        held: what the head holds while it computes.
        autocast: dtype of autocast; None: there is none.
        masked: True if some sequence may be padded, so that the attention has a mask.
        gradients: "grow": they are made in this backward, and counted | "present": they are there already, and not counted |
            "leave": each leaves when it is whole, as FSDP reduces it and keeps a part.
    """
    model.train()
    with _running(model, autocast, masked) as live, _headless(model, tokens, held):
        hooks = []
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if gradients == "present":
                parameter.grad = torch.empty_like(parameter)
                live.overlook(parameter.grad)
            elif gradients == "leave":
                hooks.append(parameter.register_post_accumulate_grad_hook(_leave))
        live.peak = live.bytes
        model(**_inputs(rows, length), use_cache=False).logits.sum().backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return Cost(live.peak, 0, live.flop)


def _leave(parameter: Tensor) -> None:
    parameter.grad = None


def forward_pass(
    model: Any, rows: int, length: int, held: Held, *, autocast: torch.dtype | None = None, cached: bool = False
) -> Cost:
    """Return the cost of a forward without gradients; `cached` keeps keys and values, as the prefill of a generation does."""
    model.eval()
    with torch.no_grad(), _running(model, autocast) as live, _headless(model, rows * length, held):
        out = model(**_inputs(rows, length), use_cache=cached)
        cache = (getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)) if cached else None
        del out
        kept = live.bytes if cache is not None else 0
    return Cost(live.peak, kept, live.flop)
