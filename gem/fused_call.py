"""A fused call: what `model(..., fused_lm_head=True)` does, from the labels to the output.

The lm_head of a fused model has a switch in front of its forward. In a fused call it passes the head's input to a question,
whose answer, the statistics of gem_kernels, travels on through the model in place of the logits.

B sequences, T tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from gem.adapters import HeadParts, head_parts, serving_module
from gem.extra_outputs import EXTRA_OUTPUTS, mean_logits
from gem.head_transform import what_differs
from gem.rounding import roundoff
from gem.router_loss import router_weight, routing
from gem_kernels import IGNORE_INDEX, Impl, LogitTransform, TokenStats, linear_group_loss, linear_logprob_entropy_max

LossFn = Callable[[TokenStats, int], Tensor]
Answer = Callable[[nn.Module, Tensor], Tensor]
PROBE = (-48.0, -1.5, 1.5, 48.0)  # logits that travel behind every answer; exact in any dtype


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What a fused call returns. Per-token fields are (B, T - 1), or (B, T) with shift_labels, fp32, 0 where ignored.

    What has the name of a field of TRL's means the same. With a loss_fn the loss alone has a gradient.
    """

    loss: Tensor | None = None
    """scalar: -sum(log_probs) / num_items_in_batch (default: the number of labels), smoothed if asked for, or the group loss;
    with router logits plus router_aux_loss_coef * aux_loss, as in the model's own loss"""
    log_probs: Tensor | None = None
    """log p of the next token, nats"""
    entropy: Tensor | None = None
    """of the next-token distribution, nats"""
    lse: Tensor | None = None
    """log sum exp of the transformed logits"""
    label_mask: Tensor | None = None
    """bool: whether there is a label"""
    aux_loss: Tensor | None = None
    """load-balancing loss of a mixture of experts, when the model returns one; of the tokens of this call"""
    router_usage: Tensor | None = None
    """(E,) how often a token of this call chooses each expert, on average, no gradient; None with a router loss of another
    form than gem/router_loss.py's"""
    mean_logits: Tensor | None = None
    """mean of the logits over the vocabulary, no gradient; None unless asked for, and so are the next two"""
    is_top1: Tensor | None = None
    """bool: whether no token is likelier than the label"""
    log_sum_sq_probs: Tensor | None = None
    """log sum_v p_v^2, no gradient"""

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.log_probs.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"something around the model rounded log_probs to {self.log_probs.dtype}: give FSDP2 a "
                "MixedPrecisionPolicy(output_dtype=torch.float32); accelerate's default is the dtype of the parameters"
            )
        super().__post_init__()


class HeadSwitch:
    """The forward of an lm_head: its own, or in a fused call `answer(head, hidden)`. The head's hooks fire as ever.

    It stays where it is between calls, as torch.compile cannot follow a method that comes and goes. Each thread has its own
    answer; and while that is computed none, so that a loss_fn may call the model.
    """

    def __init__(self, head: nn.Module, slot: str) -> None:
        self.head, self.slot, self.shadowed = head, slot, vars(head).get(slot)
        self.own_forward = getattr(head, slot)
        self.answers: dict[int, Answer] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.answers.pop(_thread(), None)
        if answer is None:
            return self.own_forward(*args, **kwargs)
        try:
            if len(args) != 1 or kwargs:
                extra = [*args[1:], *kwargs]
                raise ValueError(f"the lm_head must be called with the hidden states alone, got {extra} too")
            return answer(self.head, args[0])
        finally:
            self.answers[_thread()] = answer

    @staticmethod
    def of(causal_lm: Any, attach: bool = False) -> HeadSwitch:
        """That of the head that serves now: peft may have changed it since the last call.

        Raises:
            ValueError: the head's forward was replaced after fuse_lm_head (attach=False), which nobody has checked.
        """
        head = serving_module(causal_lm.get_output_embeddings())
        # accelerate stands in front of a head that it moves between devices: we stand behind it.
        slot = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        present = vars(head).get(slot)
        if isinstance(present, HeadSwitch):
            return present
        if present is not None and slot == "forward" and not attach:
            raise ValueError(
                "lm_head.forward was replaced after fuse_lm_head: call fuse_lm_head again, which checks it"
            )
        switch = HeadSwitch(head, slot)
        setattr(head, slot, switch)
        return switch

    @staticmethod
    def remove_all(model: nn.Module) -> None:
        for module in model.modules():
            for slot in ("forward", "_old_forward"):
                switch = vars(module).get(slot)
                if isinstance(switch, HeadSwitch):
                    delattr(module, slot)
                    if switch.shadowed is not None:
                        setattr(module, slot, switch.shadowed)


@torch.compiler.assume_constant_result
def _thread() -> int:
    return threading.get_ident()


@contextmanager
def answering(switch: HeadSwitch, answer: Answer) -> Iterator[None]:
    """Inside, the model's lm_head answers this thread with `answer(head, hidden)`."""
    before = switch.answers.get(_thread())
    switch.answers[_thread()] = answer
    try:
        yield
    finally:
        del switch.answers[_thread()]
        if before is not None:
            switch.answers[_thread()] = before


@dataclass(eq=False)
class FusedHead:
    """What fuse_lm_head was told and found out. Called, it is the forward of its model; a copy of the model gets its own."""

    transform: LogitTransform  # the model's, with the temperature asked for
    vocab: int  # logits of a token
    rows: int  # of the head, when it was checked
    outputs: tuple[str, ...]
    impl: Impl
    cache_bytes: int
    model: Any = field(repr=False)
    own_forward: Callable[..., Any] = field(repr=False)
    shadowed: dict[str, Any] = field(repr=False)  # what stood in the model's __dict__ under the names that we use
    largest_gap: tuple[float, float] = (0.0, 0.0)  # between the model's statistics and ours, and what was allowed, nats
    roundoff: float = 0.0  # u of the coarsest dtype between its head and its logits, then
    router_problem: str = ""  # why a loss with router logits would not be the model's own
    router_top_k: int = (
        0  # experts a token chooses; 0: no router loss, or one of another form than gem/router_loss.py's
    )

    def __post_init__(self) -> None:
        # generate() and Trainer read the signature: it stays the model's.
        self.__signature__ = inspect.signature(functools.partial(type(self.model).forward, self.model))
        known = self.__signature__.parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in known)
        options = {"use_cache": False, "return_dict": True}
        self.options = {name: value for name, value in options.items() if takes_all or name in {p.name for p in known}}

    def __call__(
        self,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_fn: LossFn | None = None,
        cu_groups: Tensor | None = None,
        temperature: float | None = None,
        label_smoothing: float = 0.0,
        router_share: Tensor | float = 1.0,
        router_usage: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if args and args[0] is self.model:  # accelerate binds what it unwraps to the model
            args = args[1:]
        if not fused_lm_head:
            ours = (loss_fn, cu_groups, temperature, label_smoothing or None, router_usage)
            if any(t is not None for t in ours) or isinstance(router_share, Tensor) or router_share != 1:
                raise ValueError(
                    "loss_fn, cu_groups, temperature, label_smoothing, router_share and router_usage need "
                    "fused_lm_head=True, got a call without it"
                )
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.own_forward(*args, **kwargs, **{name: t for name, t in given.items() if t is not None})
        targets, width = _targets(labels, shift_labels)
        if (loss_fn is None) != (cu_groups is None):
            raise ValueError("loss_fn and cu_groups go together, got one of them")
        if not 0 <= label_smoothing <= 1 or (label_smoothing and loss_fn is not None):
            with_loss = " and a loss_fn" if loss_fn is not None else ""
            raise ValueError(
                f"label_smoothing must be between 0 and 1, and 0 with a loss_fn, got {label_smoothing}{with_loss}"
            )
        for name in ("logits_to_keep", "num_logits_to_keep"):
            if not isinstance(keep := kwargs.get(name, 0), int) or keep:
                raise ValueError(f"{name} must be 0 in a fused call (labels of -100 cost nothing), got {keep}")
        if isinstance(num_items_in_batch, int) and num_items_in_batch < 1:
            raise ValueError(f"num_items_in_batch must be >= 1, got {num_items_in_batch}")
        transform = self.transform if temperature is None else replace(self.transform, temperature=temperature)
        question = Question(self, transform, targets, loss_fn, cu_groups, label_smoothing)
        with answering(HeadSwitch.of(self.model), question):
            own = self.own_forward(*args, **{**kwargs, **self.options})
        question.verify(own)
        output = question.output(width, num_items_in_batch)
        output.aux_loss = getattr(own, "aux_loss", None)
        if output.aux_loss is not None:
            if self.router_problem:
                raise ValueError(self.router_problem)
            mask = {**self.__signature__.bind_partial(*args).arguments, **kwargs}.get("attention_mask")
            router_loss = self._router_loss(own, output, mask, router_usage)
            output.loss = cast(Tensor, output.loss) + router_weight(self.model) * router_share * router_loss
        return output

    def _router_loss(
        self, own: Any, output: FusedCausalLMOutput, attention_mask: Tensor | None, usage: Tensor | None
    ) -> Tensor:
        """Of the model's output `own`, scalar; what the experts are used is noted in `output`."""
        of_call = None
        if self.router_top_k:
            of_call = routing(own.router_logits, attention_mask, self.router_top_k)
            output.router_usage = of_call.usage
        if usage is None:
            return cast(Tensor, own.aux_loss)
        if of_call is None or usage.shape != of_call.usage.shape:
            took = "a router loss of another form" if of_call is None else f"{len(of_call.usage)} experts"
            raise ValueError(
                f"router_usage must be the router_usage of other calls of this model, got a tensor {tuple(usage.shape)} "
                f"for {took}"
            )
        return of_call.loss(usage)


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> tuple[Tensor, slice]:
    """What each position has to predict (B, T), and which positions are asked about."""
    if (labels is None) == (shift_labels is None):
        raise ValueError(f"a fused call needs labels or shift_labels, got {'neither' if labels is None else 'both'}")
    given = labels if labels is not None else shift_labels
    if not isinstance(given, Tensor) or given.ndim != 2:
        came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"labels must be a tensor of token ids (batch, seq_len), got {came}")
    if labels is None:
        return given, slice(None)
    # The last position predicts nothing, and keeps its place: the lm_head sees a hidden state for each label.
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), slice(-1)


class Question:
    """One fused call: what is asked of the lm_head, and its answer.

    The answer passes through the model in place of the logits, (B, T, k) with k statistics where the logits have V entries: so
    it leaves the head through the head's own hooks, and FSDP and ZeRO-3 know when the backward will need the weight again. A
    few known logits go with it: what they come out as tells, in every call, whether the model still does what was checked.
    """

    def __init__(
        self,
        fused: FusedHead,
        transform: LogitTransform,
        targets: Tensor,
        loss_fn: LossFn | None,
        cu_groups: Tensor | None,
        label_smoothing: float,
    ) -> None:
        self.fused, self.transform, self.targets = fused, transform, targets
        self.loss_fn, self.cu_groups, self.label_smoothing = loss_fn, cu_groups, label_smoothing
        self.answer: Tensor | None = None
        self.stats: TokenStats | None = None  # of a group loss
        self.extra: dict[str, Tensor] = {}

    def __call__(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, T, k) fp32."""
        if self.answer is not None or hidden.shape[:-1] != self.targets.shape:
            came = "a second call" if self.answer is not None else f"hidden states {tuple(hidden.shape)}"
            raise ValueError(f"expected one call of the lm_head, for labels {tuple(self.targets.shape)}, got {came}")
        parts = head_parts(head).local()
        if parts.vocab != self.fused.rows:
            raise ValueError(
                f"the lm_head has {parts.vocab} rows, and had {self.fused.rows} when fuse_lm_head checked it: call it again"
            )
        parts = parts.columns(self.fused.vocab)
        # accelerate would move them between devices in the head's own forward, which we stand for.
        hidden, self.targets = hidden.to(parts.weight.device), self.targets.to(parts.weight.device)
        answer = self._statistics(hidden, parts) if self.loss_fn is None else self._group_loss(hidden, parts)
        self.probe = answer.new_tensor(PROBE)
        self.answer = torch.cat([answer, self.probe.expand(*answer.shape[:-1], -1)], -1)
        if not head._forward_hooks:
            return self.answer.clone()  # the model may scale its logits in place
        self.handle = head.register_forward_hook(self._left_the_head)  # after all others
        return self.answer

    def _left_the_head(self, head: nn.Module, arguments: Any, output: Any) -> Any:
        """Keep what the head's hooks made of the answer. ZeRO-3 hangs the gathering of the weight for the backward on a new
        tensor; FSDP2 on the one that it got, and may then round it to the dtype of its policy."""
        self.handle.remove()
        if not isinstance(output, Tensor) or output.dtype != cast(Tensor, self.answer).dtype:
            return output
        self.answer = output
        return output.clone()

    def verify(self, own: Any) -> None:
        """Raise ValueError where the model has made something else of the known logits than when it was checked."""
        if torch.compiler.is_compiling():  # a graph cannot look; the head was checked when it was attached
            return
        came, n = getattr(own, "logits", None), len(PROBE)
        if self.answer is None or not isinstance(came, Tensor) or came.shape != self.answer.shape:
            raise ValueError("the model's forward did not hand on what its lm_head (get_output_embeddings) gave it")
        u = max(self.fused.roundoff, roundoff(came.dtype))
        transform = replace(self.fused.transform, temperature=1.0)
        problem = what_differs(transform, self.probe, came.detach()[..., -n:], u)
        if problem is not None:
            raise ValueError(
                f"{type(self.fused.model).__name__} no longer does to its logits what it did when fuse_lm_head checked it (its "
                f"config, or a hook of the lm_head, was changed): {problem}; call fuse_lm_head again"
            )

    def output(self, width: slice, num_items_in_batch: Tensor | float | None) -> FusedCausalLMOutput:
        """What the fused call returns, of the positions in `width`."""
        answer = cast(Tensor, self.answer)
        label_mask = (self.targets != IGNORE_INDEX)[:, width]
        log_probs, entropy, lse = answer[..., :3].unbind(-1) if self.stats is None else self.stats
        if self.stats is None:
            items = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = -log_probs.sum() / items
            if self.label_smoothing:  # the mean of -log p over the vocabulary is lse - mean logit
                of_all = (lse - answer[..., 3]).sum() / items
                loss = (1 - self.label_smoothing) * loss + self.label_smoothing * of_all
        else:
            loss = answer[0, 0, 0]
        fields = {"log_probs": log_probs, "entropy": entropy, "lse": lse, **self.extra}
        return FusedCausalLMOutput(
            loss=loss, label_mask=label_mask, **{name: t[:, width] for name, t in fields.items()}
        )

    def _arguments(self, hidden: Tensor, parts: HeadParts) -> dict[str, Any]:
        """Of an op, but for the targets; in one dtype, which autocast sees to itself."""
        weight, bias, low = parts.weight, parts.bias, parts.low_rank
        if not torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            if low is not None and low.a.dtype != torch.float32:
                low = low._replace(a=low.a.to(dtype), b=low.b.to(dtype))
        own = {"hidden": hidden, "weight": weight, "bias": bias, "low_rank": low}
        return {**own, "shard": parts.shard, "impl": self.fused.impl}

    def _kept(self, hidden: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Hidden states (N, D) and targets (N,) of the tokens with a label, and what makes (B, T) of (N,), 0 elsewhere."""
        mask = self.targets != IGNORE_INDEX
        if torch.compiler.is_compiling() and self.loss_fn is None:
            # How many there are would split the graph. The ops leave ignored tokens out themselves.
            return hidden, self.targets, lambda t: t.masked_fill(~mask, 0)
        # The chunked op would compute them on CUDA. masked_scatter keeps the model in the graph where nothing has a label.
        return hidden[mask], self.targets[mask], lambda t: t.new_zeros(mask.shape).masked_scatter(mask, t)

    def _statistics(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        hidden, targets, put = self._kept(hidden)
        arguments = {**self._arguments(hidden, parts), "targets": targets, "transform": self.transform}
        stats = linear_logprob_entropy_max(**arguments)
        with torch.no_grad():
            for name in self.fused.outputs:
                self.extra[name] = put(EXTRA_OUTPUTS[name](stats, arguments))
        asked = [*stats[:3], mean_logits(stats, arguments)] if self.label_smoothing else stats[:3]
        return torch.stack([put(s) for s in asked], -1)

    def _group_loss(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        shape = hidden.shape[:-1]
        hidden, targets, put = self._kept(hidden)
        result = linear_group_loss(
            **self._arguments(hidden, parts),
            targets=targets,
            transform=self.transform,
            cu_groups=cast(Tensor, self.cu_groups),
            loss_fn=cast(LossFn, self.loss_fn),
            cache_bytes=self.fused.cache_bytes,
        )
        self.stats = TokenStats(*(put(s) for s in result.stats))
        return result.loss.expand(*shape, 1)
