"""A fused call: `model(..., fused_lm_head=True)`, from the labels to the output.

The model's own forward runs as always. Where it calls its lm_head, a FusedCall computes statistics with gem_kernels, and they
travel on through the model in place of the logits.

B sequences, T tokens of a sequence, N tokens with a label, D hidden size, V vocabulary, k columns in place of V logits.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gem.head.adapters import HeadParts, head_parts
from gem.head.extra import EXTRA_OUTPUTS, mean_logits
from gem.head.output import STATISTICS, FusedCausalLMOutput, HeadStats
from gem.head.rounding import roundoff
from gem.head.router import router_weight, routing
from gem.head.switch import HeadSwitch, replaced_head
from gem.head.transform import describe_difference
from gem_kernels import IGNORE_INDEX, Impl, LogitTransform, TokenStats, linear_group_loss, linear_logprob_entropy

LossFn = Callable[[TokenStats, int], Tensor]
PROBE = (-48.0, -1.5, 1.5, 48.0)  # known logits behind the statistics of every token; exact in any dtype


@dataclass(eq=False)
class FusedHead:
    """Settings of fuse_lm_head and results of its check. Calling it is the forward of its model; a copied model has its own."""

    transform: LogitTransform  # the model's own, with the temperature given to fuse_lm_head
    vocab: int  # logits of a token
    rows: int  # rows of the head when it was checked
    outputs: tuple[str, ...]
    impl: Impl
    cache_bytes: int
    model: Any = field(repr=False)
    own_forward: Callable[..., Any] = field(repr=False)
    shadowed: dict[str, Any] = field(repr=False)  # entries of the model's __dict__ that ours replace, by name
    largest_gap: tuple[float, float] = (0.0, 0.0)  # between the model's statistics and ours, and its bound, nats
    roundoff: float = 0.0  # u of the coarsest dtype between head and logits, when it was checked
    router_problem: str = ""  # why a loss with router logits would differ from the model's own
    router_top_k: int = 0  # experts a token chooses; 0: no router loss, or not of the form in gem/head/router.py

    def __post_init__(self) -> None:
        # generate() and Trainer read the signature, so it stays the model's.
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
        router_usage: Tensor | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Any:
        if args and args[0] is self.model:  # accelerate binds what it unwraps to the model
            args = args[1:]
        if not fused_lm_head:
            _refuse_without_flag(loss_fn, cu_groups, temperature, label_smoothing, router_share, router_usage)
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.own_forward(*args, **kwargs, **{name: t for name, t in given.items() if t is not None})
        targets, positions = _targets(labels, shift_labels)
        _check_arguments(loss_fn, cu_groups, label_smoothing, num_items_in_batch, kwargs)
        call = self._new_call(targets, temperature, loss_fn, cu_groups, label_smoothing)
        with replaced_head(HeadSwitch.of(self.model), call):
            own = self.own_forward(*args, **{**kwargs, **self.options})
        call.verify(own)
        output = call.output(positions, num_items_in_batch)
        output.aux_loss = getattr(own, "aux_loss", None)
        if output.aux_loss is not None:
            mask = {**self.__signature__.bind_partial(*args).arguments, **kwargs}.get("attention_mask")
            usage = router_usage if router_usage is None else torch.as_tensor(router_usage)
            router_loss = self._router_loss(own, output, mask, usage)
            output.loss = cast(Tensor, output.loss) + router_weight(self.model) * router_share * router_loss
        return output

    def _new_call(
        self,
        targets: Tensor,
        temperature: float | None,
        loss_fn: LossFn | None,
        cu_groups: Tensor | None,
        label_smoothing: float,
    ) -> FusedCall:
        transform = self.transform if temperature is None else replace(self.transform, temperature=temperature)
        if loss_fn is None:
            return StatisticsCall(self, transform, targets, label_smoothing)
        return GroupLossCall(self, transform, targets, loss_fn, cast(Tensor, cu_groups))

    def _router_loss(
        self, own: Any, output: FusedCausalLMOutput, attention_mask: Tensor | None, usage: Tensor | None
    ) -> Tensor:
        """Return the router loss (scalar) of the model's output `own`, and set output.router_usage."""
        if self.router_problem:
            raise ValueError(self.router_problem)
        of_call = None
        if self.router_top_k:
            of_call = routing(own.router_logits, attention_mask, self.router_top_k)
            output.router_usage = of_call.usage
        if usage is None:
            return cast(Tensor, own.aux_loss)
        if of_call is None or usage.shape != of_call.usage.shape:
            kind = "a router loss of another form" if of_call is None else f"{len(of_call.usage)} experts"
            raise ValueError(
                f"router_usage must be the router_usage of other calls of this model, got a tensor {tuple(usage.shape)} "
                f"for {kind}"
            )
        return of_call.loss(usage)


def _refuse_without_flag(
    loss_fn: LossFn | None,
    cu_groups: Tensor | None,
    temperature: float | None,
    label_smoothing: float,
    router_share: Tensor | float,
    router_usage: Tensor | Sequence[float] | None,
) -> None:
    """Raise ValueError if a keyword that only a fused call understands is set."""
    no_default = any(t is not None for t in (loss_fn, cu_groups, temperature, router_usage))
    if no_default or label_smoothing or isinstance(router_share, Tensor) or router_share != 1:
        raise ValueError(
            "loss_fn, cu_groups, temperature, label_smoothing, router_share and router_usage need "
            "fused_lm_head=True, got a call without it"
        )


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> tuple[Tensor, slice]:
    """Return the token that each position has to predict (B, T), and the positions that the output covers."""
    if (labels is None) == (shift_labels is None):
        raise ValueError(f"a fused call needs labels or shift_labels, got {'neither' if labels is None else 'both'}")
    given = labels if labels is not None else shift_labels
    if not isinstance(given, Tensor) or given.ndim != 2:
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"labels must be a tensor of token ids (batch, seq_len), got {got}")
    if labels is None:
        return given, slice(None)
    # The last position predicts nothing but keeps its place: the lm_head gets a hidden state for each label.
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), slice(-1)


def _check_arguments(
    loss_fn: LossFn | None,
    cu_groups: Tensor | None,
    label_smoothing: float,
    num_items_in_batch: Tensor | float | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for keywords that contradict one another or are out of range."""
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


class Tokens(NamedTuple):
    """The tokens that an op of gem_kernels gets."""

    hidden: Tensor  # (N, D), or (B, T, D)
    targets: Tensor  # (N,), or (B, T)
    ignore_index: int | None  # None: all of them have a label
    scatter: Callable[[Tensor], Tensor]  # a statistic of these tokens -> (B, T), 0 where there is no label


class FusedCall(ABC):
    """One fused call: the forward of the lm_head while it runs, then the check of what comes out of the model, and the output.

    The head returns columns (B, T, k) in place of logits (B, T, V). They leave it through its own hooks, so FSDP and ZeRO-3
    know when the backward needs the weight again. PROBE, a few known logits, forms the last columns: what the model turns them
    into shows, in every call, whether the model still does what was checked.
    """

    def __init__(self, fused: FusedHead, transform: LogitTransform, targets: Tensor) -> None:
        self.fused, self.transform, self.targets = fused, transform, targets
        self.columns: Tensor | None = None  # (B, T, k)
        self.fields: dict[str, Tensor] = {}  # fields of the output that have no gradient, (B, T)

    @abstractmethod
    def compute(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        """Return the columns that have a gradient, fp32, for hidden (B, T, D), and fill in `fields`."""

    @abstractmethod
    def loss(self, columns: Tensor, items: Tensor | float) -> Tensor:
        """Return the loss (scalar), and fill in the fields that have a gradient.

        items: the number of tokens by which a mean is taken.
        """

    def __call__(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, T, k) fp32."""
        if self.columns is not None or hidden.shape[:-1] != self.targets.shape:
            got = "a second call" if self.columns is not None else f"hidden states {tuple(hidden.shape)}"
            raise ValueError(f"expected one call of the lm_head, for labels {tuple(self.targets.shape)}, got {got}")
        parts = head_parts(head).local()
        if parts.vocab != self.fused.rows:
            raise ValueError(
                f"the lm_head has {parts.vocab} rows, and had {self.fused.rows} when fuse_lm_head checked it: call it again"
            )
        parts = parts.columns(self.fused.vocab)
        # In the head's own forward, which this replaces, accelerate would move them between devices.
        hidden, self.targets = hidden.to(parts.weight.device), self.targets.to(parts.weight.device)
        columns = self.compute(hidden, parts)
        self.probe = columns.new_tensor(PROBE)
        self.columns = torch.cat([columns, self.probe.expand(*columns.shape[:-1], -1)], -1)
        if not head._forward_hooks:
            return self.columns.clone()  # the model may scale its logits in place
        self.handle = head.register_forward_hook(self._keep_columns)  # after all others
        return self.columns

    def _keep_columns(self, head: nn.Module, arguments: Any, output: Any) -> Any:
        """Keep the columns as the head's other hooks return them.

        ZeRO-3 attaches the gathering of the weight for the backward to a new tensor. FSDP2 attaches it to the tensor that it
        gets, and may then round that to the dtype of its policy.
        """
        self.handle.remove()
        if not isinstance(output, Tensor) or output.dtype != cast(Tensor, self.columns).dtype:
            return output
        self.columns = output
        return output.clone()

    def verify(self, own: Any) -> None:
        """Raise ValueError if the model treats the known logits otherwise than when it was checked."""
        if torch.compiler.is_compiling():  # a graph cannot compare values; the head was checked on attach
            return
        got, n = getattr(own, "logits", None), len(PROBE)
        if self.columns is None or not isinstance(got, Tensor) or got.shape != self.columns.shape:
            raise ValueError("the model's forward did not hand on what its lm_head (get_output_embeddings) gave it")
        u = max(self.fused.roundoff, roundoff(got.dtype))
        transform = replace(self.fused.transform, temperature=1.0)
        problem = describe_difference(transform, self.probe, got.detach()[..., -n:], u)
        if problem is not None:
            raise ValueError(
                f"{type(self.fused.model).__name__} no longer does to its logits what it did when fuse_lm_head checked it (its "
                f"config, or a hook of the lm_head, was changed): {problem}; call fuse_lm_head again"
            )

    def output(self, positions: slice, num_items_in_batch: Tensor | float | None) -> FusedCausalLMOutput:
        """Return the output of the call; its per-token fields cover `positions`."""
        label_mask = (self.targets != IGNORE_INDEX)[:, positions]
        items = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = self.loss(cast(Tensor, self.columns), items)
        fields = {name: t[:, positions] for name, t in self.fields.items()}
        return FusedCausalLMOutput(loss=loss, label_mask=label_mask, **fields)

    def labelled_tokens(self, hidden: Tensor) -> Tokens:
        """Return the tokens with a label: the chunked op would compute the others too on CUDA.

        Their number is read back from the device here, and nowhere else in the forward and backward.
        """
        targets = self.targets.flatten()
        at = (targets != IGNORE_INDEX).nonzero().squeeze(1)

        def scatter(t: Tensor) -> Tensor:
            # This keeps the model in the autograd graph when nothing has a label.
            return t.new_zeros(targets.shape).index_copy(0, at, t).view_as(self.targets)

        return Tokens(hidden.flatten(0, 1).index_select(0, at), targets[at], None, scatter)

    def op_arguments(self, tokens: Tokens, parts: HeadParts) -> dict[str, Any]:
        """Return the arguments that the ops of gem_kernels share, in one dtype unless autocast converts them."""
        hidden, weight, bias, low = tokens.hidden, parts.weight, parts.bias, parts.low_rank
        if not torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            if low is not None and low.a.dtype != torch.float32:
                low = low._replace(a=low.a.to(dtype), b=low.b.to(dtype))
        operands = {"hidden": hidden, "weight": weight, "bias": bias, "low_rank": low, "shard": parts.shard}
        of_tokens = {"targets": tokens.targets, "ignore_index": tokens.ignore_index}
        return {**operands, **of_tokens, "transform": self.transform, "impl": self.fused.impl}


class StatisticsCall(FusedCall):
    """A fused call without a loss_fn: the statistics have gradients, the loss is -log p, smoothed or not."""

    def __init__(self, fused: FusedHead, transform: LogitTransform, targets: Tensor, label_smoothing: float) -> None:
        super().__init__(fused, transform, targets)
        self.label_smoothing = label_smoothing

    def compute(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        tokens = self._all_tokens(hidden) if torch.compiler.is_compiling() else self.labelled_tokens(hidden)
        arguments = self.op_arguments(tokens, parts)
        stats = linear_logprob_entropy(**arguments)
        with torch.no_grad():
            for name in self.fused.outputs:
                self.fields[name] = tokens.scatter(EXTRA_OUTPUTS[name](stats, arguments))
        columns = [stats.logprob, stats.entropy, stats.lse]
        if self.label_smoothing:
            columns.append(mean_logits(stats, arguments))
        return torch.stack([tokens.scatter(column) for column in columns], -1)

    def loss(self, columns: Tensor, items: Tensor | float) -> Tensor:
        log_probs, entropy, lse = columns[..., :3].unbind(-1)
        self.fields.update({"log_probs": log_probs, "entropy": entropy, "lse": lse})
        loss = -log_probs.sum() / items
        if self.label_smoothing:  # the mean of -log p over the vocabulary is lse - mean logit
            uniform = (lse - columns[..., 3]).sum() / items
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        return loss

    def _all_tokens(self, hidden: Tensor) -> Tokens:
        """Return every token: the number of labels would split the compiled graph. The op leaves out ignored tokens itself."""
        mask = self.targets != IGNORE_INDEX
        return Tokens(hidden, self.targets, IGNORE_INDEX, lambda t: t.masked_fill(~mask, 0))


class GroupLossCall(FusedCall):
    """A fused call with a loss_fn: the group loss alone has a gradient."""

    def __init__(
        self, fused: FusedHead, transform: LogitTransform, targets: Tensor, loss_fn: LossFn, cu_groups: Tensor
    ) -> None:
        super().__init__(fused, transform, targets)
        self.loss_fn, self.cu_groups = loss_fn, cu_groups

    def compute(self, hidden: Tensor, parts: HeadParts) -> Tensor:
        tokens = self.labelled_tokens(hidden)
        result = linear_group_loss(
            **self.op_arguments(tokens, parts),
            cu_groups=self.cu_groups,
            loss_fn=self.loss_fn,
            cache_bytes=self.fused.cache_bytes,
        )
        stats = (getattr(result.stats, name) for name in HeadStats._fields)
        self.fields.update({name: tokens.scatter(s) for name, s in zip(STATISTICS, stats, strict=True)})
        return result.loss.expand(*hidden.shape[:-1], 1)

    def loss(self, columns: Tensor, items: Tensor | float) -> Tensor:
        return columns[0, 0, 0]
