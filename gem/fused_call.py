"""A fused call: what `model(..., fused_lm_head=True)` does, from the labels to the output.

The lm_head of a fused model has a switch in front of its forward. In a fused call it passes the head's input to a question,
whose answer, the statistics of gem_kernels, travels on through the model in place of the logits.

B sequences, T tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from gem.adapters import HeadParts, head_parts, serving_module
from gem.extra_outputs import EXTRA_OUTPUTS
from gem_kernels import IGNORE_INDEX, Impl, LogitTransform, TokenStats, linear_group_loss, linear_logprob_entropy_max

LossFn = Callable[[TokenStats, int], Tensor]
Answer = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What a fused call returns. Per-token fields are (B, T - 1), or (B, T) with shift_labels, fp32, 0 where ignored.

    What has the name of a field of TRL's means the same. With a loss_fn the loss alone has a gradient.
    """

    loss: Tensor | None = None
    """scalar: -sum(log_probs) / num_items_in_batch (default: the number of labels), or the group loss; with router logits
    plus router_aux_loss_coef * aux_loss, as in the model's own loss"""
    log_probs: Tensor | None = None
    """log p of the next token, nats"""
    entropy: Tensor | None = None
    """of the next-token distribution, nats"""
    lse: Tensor | None = None
    """log sum exp of the transformed logits"""
    label_mask: Tensor | None = None
    """bool: whether there is a label"""
    aux_loss: Tensor | None = None
    """load-balancing loss of a mixture of experts, when the model returns one"""
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
    """The forward of an lm_head: its own, or while `answer` is set, `answer(head, hidden)`. The head's hooks fire as ever.

    It stays where it is between calls, as torch.compile cannot follow a method that comes and goes.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head, self.own_forward, self.answer = head, head.forward, cast(Answer | None, None)
        self.shadowed = vars(head).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.answer is None:
            return self.own_forward(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise ValueError(f"the lm_head must be called with the hidden states alone, got {[*args[1:], *kwargs]} too")
        return self.answer(self.head, args[0])

    @staticmethod
    def of(causal_lm: Any) -> HeadSwitch:
        """That of the head that serves now: peft may have changed it since the last call."""
        head = serving_module(causal_lm.get_output_embeddings())
        if not isinstance(vars(head).get("forward"), HeadSwitch):
            head.forward = HeadSwitch(head)  # type: ignore[method-assign]
        return cast(HeadSwitch, head.forward)

    @staticmethod
    def remove_all(model: nn.Module) -> None:
        for module in model.modules():
            switch = vars(module).get("forward")
            if isinstance(switch, HeadSwitch):
                del module.forward
                if switch.shadowed is not None:
                    module.forward = switch.shadowed


@contextmanager
def answering(causal_lm: Any, answer: Answer) -> Iterator[None]:
    """Inside, the model's lm_head answers with `answer(head, hidden)`."""
    switch = HeadSwitch.of(causal_lm)
    switch.answer = answer
    try:
        yield
    finally:
        switch.answer = None


@dataclass(eq=False)
class FusedHead:
    """What fuse_lm_head was told and found out. Called, it is the forward of its model; a copy of the model gets its own."""

    transform: LogitTransform  # the model's, with the temperature asked for
    vocab: int  # logits of a token
    outputs: tuple[str, ...]
    impl: Impl
    cache_bytes: int
    model: Any = field(repr=False)
    own_forward: Callable[..., Any] = field(repr=False)
    shadowed: dict[str, Any] = field(repr=False)  # what stood in the model's __dict__ under the names that we use
    largest_gap: float = 0.0  # between the model's statistics and ours when it was checked, nats

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
        num_items_in_batch: Tensor | int | None = None,
        loss_fn: LossFn | None = None,
        cu_groups: Tensor | None = None,
        temperature: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if args and args[0] is self.model:  # accelerate binds what it unwraps to the model
            args = args[1:]
        if not fused_lm_head:
            if loss_fn is not None or cu_groups is not None or temperature is not None:
                raise ValueError("loss_fn, cu_groups and temperature need fused_lm_head=True, got a call without it")
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.own_forward(*args, **kwargs, **{name: t for name, t in given.items() if t is not None})
        if (labels is None) == (shift_labels is None):
            raise ValueError(
                f"a fused call needs labels or shift_labels, got {'neither' if labels is None else 'both'}"
            )
        if (loss_fn is None) != (cu_groups is None):
            raise ValueError("loss_fn and cu_groups go together, got one of them")
        width = slice(None)
        if labels is not None:
            # The last position predicts nothing. It keeps its place until the end, so that no hidden state is copied.
            shift_labels, width = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), slice(-1)
        transform = self.transform if temperature is None else replace(self.transform, temperature=temperature)
        question = Question(self, transform, cast(Tensor, shift_labels), loss_fn, cu_groups)
        with answering(self.model, question):
            own = self.own_forward(*args, **{**kwargs, **self.options})
        output = question.output(width, num_items_in_batch)
        output.aux_loss = getattr(own, "aux_loss", None)
        if output.aux_loss is not None:
            weight = getattr(self.model.config.get_text_config(), "router_aux_loss_coef", 0.0)
            output.loss = cast(Tensor, output.loss) + weight * output.aux_loss
        return output


class Question:
    """One fused call: what is asked of the lm_head, and its answer.

    The answer passes through the model in place of the logits, (B, T, k) with k statistics where the logits have V entries: so
    it leaves the head through the head's own hooks, and FSDP and ZeRO-3 know when the backward will need the weight again.
    """

    def __init__(
        self,
        fused: FusedHead,
        transform: LogitTransform,
        targets: Tensor,
        loss_fn: LossFn | None,
        cu_groups: Tensor | None,
    ) -> None:
        self.fused, self.transform, self.targets = fused, transform, targets
        self.loss_fn, self.cu_groups = loss_fn, cu_groups
        self.answer: Tensor | None = None
        self.stats: TokenStats | None = None  # of a group loss
        self.extra: dict[str, Tensor] = {}

    def __call__(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, T, k) fp32."""
        if self.answer is not None or hidden.shape[:-1] != self.targets.shape:
            came = "a second call" if self.answer is not None else f"hidden states {tuple(hidden.shape)}"
            raise ValueError(f"expected one call of the lm_head, for labels {tuple(self.targets.shape)}, got {came}")
        parts = head_parts(head).local().columns(self.fused.vocab)
        # accelerate would move them between devices in the head's own forward, which we stand for.
        hidden, self.targets = hidden.to(parts.weight.device), self.targets.to(parts.weight.device)
        self.answer = self._statistics(hidden, parts) if self.loss_fn is None else self._group_loss(hidden, parts)
        if head._forward_hooks:
            self.handle = head.register_forward_hook(self._left_the_head)  # after all others
        return self.answer

    def _left_the_head(self, head: nn.Module, arguments: Any, output: object) -> None:
        """What the head's hooks made of the answer. ZeRO-3 hangs the gathering of the weight for the backward on a new tensor;
        FSDP2 on the one that it got, and may then round it to the dtype of its policy."""
        self.handle.remove()
        if isinstance(output, Tensor) and output.dtype == cast(Tensor, self.answer).dtype:
            self.answer = output

    def output(self, width: slice, num_items_in_batch: Tensor | int | None) -> FusedCausalLMOutput:
        """What the fused call returns, of the positions in `width`."""
        if self.answer is None:
            raise ValueError("the model's forward did not call its lm_head (get_output_embeddings)")
        label_mask = (self.targets != IGNORE_INDEX)[:, width]
        log_probs, entropy, lse = self.answer.unbind(-1) if self.stats is None else self.stats
        if self.stats is None:
            items = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = -log_probs.sum() / items
        else:
            loss = self.answer[0, 0, 0]
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
        # masked_scatter keeps the model in the graph where nothing has a label: a zero that can be differentiated.
        return hidden[mask], self.targets[mask], lambda t: t.new_zeros(mask.shape).masked_scatter(mask, t)

    def _statistics(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        hidden, targets, put = self._kept(hidden)
        arguments = {**self._arguments(hidden, parts), "targets": targets, "transform": self.transform}
        stats = linear_logprob_entropy_max(**arguments)
        with torch.no_grad():
            for name in self.fused.outputs:
                self.extra[name] = put(EXTRA_OUTPUTS[name](stats, arguments))
        return torch.stack([put(s) for s in stats[:3]], -1)

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
