"""fuse_lm_head(model): a Hugging Face language model whose own forward gives log-probs and losses, without its logits.

It patches two methods, the forward of the model and of its lm_head. `model(..., fused_lm_head=True)` runs the model's own
forward; where that calls its lm_head, the head answers with the statistics of gem_kernels instead of logits (fused_call.py). So
whatever the model does before its head is done, the hooks of FSDP, ZeRO-3 and accelerate on model and head fire as ever, and
the router loss of a mixture of experts is the model's own.

B sequences, T tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem.adapters import head_parts, serving_module
from gem.extra_outputs import EXTRA_OUTPUTS
from gem.fused_call import Answer, FusedCausalLMOutput, FusedHead, HeadSwitch, answering
from gem.head_check import (
    check_against_logits,
    check_loss,
    full_sums,
    gathering,
    repeating,
    trial_labels,
    trial_tokens,
    undisturbed,
)
from gem.head_product import check_head
from gem.head_transform import find_transform
from gem.rounding import Product
from gem.router_loss import find_top_k, router_weight
from gem_kernels import IGNORE_INDEX, Impl, LogitTransform, TokenStats

__all__ = ["FusedCausalLMOutput", "FusedHead", "ensure_fused", "fuse_lm_head", "fused_head", "unfuse"]

_FUSED = "_gem_fused_lm_head"  # the attribute of a model that holds its FusedHead


def fuse_lm_head(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    impl: Impl = "auto",
    cache_bytes: int = 1 << 30,
) -> nn.Module:
    """Let `model(input_ids, ..., labels=labels, fused_lm_head=True)` return log-probs, entropies and losses, without logits.

    Equivalent to, for labels of the shape of input_ids::

        logits = model(input_ids, ...).logits[:, :-1].float() / temperature
        log_p = logits.log_softmax(-1)
        log_probs = log_p.gather(-1, labels[:, 1:, None])[..., 0]             # 0 where the label is -100
        entropy, lse = -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)
        loss = -((1 - label_smoothing) * log_probs + label_smoothing * log_p.mean(-1)).sum()  # 0 where the label is -100
        loss = loss / (num_items_in_batch or number of labels) + router_share * router_aux_loss_coef * aux_loss

    Keywords of a fused call, beside those of the model:

    - `labels` (B, T) or, already shifted, `shift_labels` (B, T), -100 where ignored.
    - `num_items_in_batch`; `temperature`, for this call; `label_smoothing`, 0 to 1, as in torch's cross_entropy.
    - for a group loss `loss_fn` and `cu_groups` as in gem_kernels.linear_group_loss, cu_groups (G + 1,) being offsets into the
      tokens that have a label, row by row.
    - of a mixture of experts that returns router logits: `router_share`, this call's share of the tokens of the whole batch,
      and `router_usage` (E,), the mean of the calls' own output.router_usage weighted by it. With both, the router loss of
      the calls adds up to that of the whole batch; with the share alone, nearly (gem/router_loss.py says by how much).

    Without fused_lm_head=True the model does what it did.

    Args:
        model: a transformers causal language model, or a peft, DDP or compiled model around one. What comes around it may
            come before or after.
        temperature: divides the logits, > 0.
        outputs: further per-token fields: "is_top1" costs nothing, "mean_logits" a pass over the weight (under a softcap
            over the logits), "log_sum_sq_probs" a second forward of the head.
        impl, cache_bytes: as in gem_kernels.

    Returns:
        The same model, patched; `unfuse(model)` undoes it. Fused again, the new settings hold.

    Raises:
        TypeError, ValueError: naming what was expected and what came; with both numbers where the model does something to its
            logits that its config does not name. Before this returns, known logits go through what the model does to them,
            and a few tokens through the model's own logits and through ours.
    """
    causal_lm: Any = unwrapped(model)
    unknown = sorted(set(outputs) - set(EXTRA_OUTPUTS))
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(EXTRA_OUTPUTS)}, got {', '.join(unknown)}")
    transform = LogitTransform(temperature=temperature)
    if causal_lm.config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder-only language model, got {type(causal_lm).__name__}")
    head = serving_module(causal_lm.get_output_embeddings())
    # What it refuses, before anything is patched, and in the mode in which the model is. ZeRO-3 and accelerate may show the
    # weight inside a forward alone.
    if not hasattr(head, "_hf_hook") and not any(hasattr(p, "ds_status") for p in head.parameters()):
        head_parts(head)
    if _FUSED in vars(causal_lm) and _on_top(causal_lm):
        unfuse(causal_lm)
    fused = FusedHead(
        transform=transform,
        vocab=0,
        rows=0,
        outputs=tuple(outputs),
        impl=impl,
        cache_bytes=cache_bytes,
        model=causal_lm,
        own_forward=causal_lm.forward,
        shadowed={name: vars(causal_lm)[name] for name in ("forward", _FUSED) if name in vars(causal_lm)},
    )
    causal_lm.forward = fused
    setattr(causal_lm, _FUSED, fused)
    try:
        _examine(fused, model)
    except BaseException:
        unfuse(causal_lm)
        raise
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give the model its own forward back.

    Raises:
        ValueError: the model is not fused, or its forward was replaced since.
    """
    causal_lm, fused = unwrapped(model), fused_head(model)
    if not _on_top(causal_lm):
        raise ValueError("model.forward was replaced after fuse_lm_head: undo that first")
    for name in ("forward", _FUSED):
        delattr(causal_lm, name)
        if name in fused.shadowed:
            setattr(causal_lm, name, fused.shadowed[name])
    if _FUSED not in vars(causal_lm):
        HeadSwitch.remove_all(causal_lm)
    return model


def ensure_fused(model: nn.Module) -> None:
    """fuse_lm_head(model) unless it is fused: then its settings stay."""
    if _FUSED not in vars(unwrapped(model)):
        fuse_lm_head(model)


def fused_head(model: nn.Module) -> FusedHead:
    """What fuse_lm_head was told and found out about this model.

    Raises:
        ValueError: the model is not fused.
    """
    causal_lm = unwrapped(model)
    if _FUSED not in vars(causal_lm):
        raise ValueError(f"model must have gone through fuse_lm_head, got a plain {type(causal_lm).__name__}")
    return cast(FusedHead, vars(causal_lm)[_FUSED])


def completion_stats(model: nn.Module, batch: dict[str, Any], **asked: Any) -> tuple[Tensor, TokenStats]:
    """Loss and statistics (N,) of the completion tokens of a batch from gem.data.pack, untempered; model: fused.

    asked: further keywords of the fused call (loss_fn, cu_groups, num_items_in_batch, label_smoothing, router_share, ...).
    """
    out = _fused_call(model, batch, **asked)
    kept = cast(Tensor, out.label_mask)
    stats = TokenStats(*(cast(Tensor, s)[kept] for s in (out.log_probs, out.entropy, out.lse)))
    return cast(Tensor, out.loss), stats


def router_usage(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """(E,) how often a token of a batch from gem.data.pack chooses each expert, on average; no gradient; model: fused.

    It takes the forward of the body alone: no token has a label. None: the model returns no router loss, or one of another
    form than gem/router_loss.py's.
    """
    with torch.no_grad():
        return _fused_call(
            model, {**batch, "shift_labels": torch.full_like(batch["shift_labels"], IGNORE_INDEX)}
        ).router_usage


def _fused_call(model: nn.Module, batch: dict[str, Any], **asked: Any) -> FusedCausalLMOutput:
    names = ("input_ids", "position_ids", "attention_mask", "shift_labels")
    inputs = {name: batch[name] for name in names if name in batch}
    out = model(**inputs, fused_lm_head=True, temperature=1.0, **asked)
    if not isinstance(out, FusedCausalLMOutput) or out.loss is None:
        raise ValueError("the model's forward was replaced after fuse_lm_head: call fuse_lm_head again")
    return out


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of peft, DistributedDataParallel, FSDP and torch.compile.

    Raises:
        TypeError: there is none, it has no lm_head, or DataParallel is around it, whose copies all run the first one's forward.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.DataParallel):
            raise TypeError("model must not be in nn.DataParallel: use a process per device (DistributedDataParallel)")
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.Module) and (hasattr(inner, "_orig_mod") or hasattr(inner, "module")):
            inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
        else:
            raise TypeError(f"model must be a transformers causal language model, got {type(inner).__name__}")
    if inner.get_output_embeddings() is None:
        raise TypeError(f"model must have an lm_head (get_output_embeddings), {type(inner).__name__} has none")
    return inner


def _on_top(causal_lm: PreTrainedModel) -> bool:
    return vars(causal_lm).get("forward") is vars(causal_lm)[_FUSED]


def _examine(fused: FusedHead, wrapped: nn.Module) -> None:
    """Find out what the model does to its logits, and raise ValueError unless our numbers are its own."""
    model, name, temperature = fused.model, type(fused.model).__name__, fused.transform.temperature
    switch = HeadSwitch.of(model, attach=True)
    with undisturbed(model), gathering(model), full_sums():
        ids = trial_tokens(model)[:1]

        def logits_of(tokens: Tensor) -> Tensor:
            out = model(input_ids=tokens, **fused.options)
            if not isinstance(getattr(out, "logits", None), Tensor):
                raise ValueError(f"{name} must return an output with its logits, got {type(out).__name__} without")
            return cast(Tensor, out.logits)

        def logits_when(answer: Answer) -> Tensor:
            with answering(switch, answer):
                return logits_of(ids)

        try:
            model(input_ids=ids, labels=ids, **fused.options)
        except Exception as error:
            raise ValueError(
                f"{name} must run on token ids and labels alone for its lm_head to be checked, it raised {error!r}"
            ) from error
        found = find_transform(model, temperature, logits_when)
        fused.transform, fused.vocab, fused.rows, fused.roundoff, _ = found
        seen: list[tuple[Tensor, Product]] = []

        def own_product(head: nn.Module, hidden: Tensor) -> Tensor:
            own, bounds = check_head(model, switch.own_forward, hidden, head_parts(head).local())
            seen.append((hidden, bounds))
            return own

        logits = logits_when(own_product)
        ((hidden, bounds),) = seen
        with repeating(name, switch.head, hidden):
            ours = model(input_ids=ids, labels=ids, fused_lm_head=True)
        stats = TokenStats(ours.log_probs, ours.entropy, ours.lse)
        fused.largest_gap = check_against_logits(name, logits, ids, stats, found, bounds)
        rows = trial_tokens(model, found.vocab)
        labels = trial_labels(rows)
        own = model(input_ids=rows, labels=labels, **fused.options)
        own_logits = getattr(own, "logits", None)  # some leave them out beside a loss
        own_logits = logits_of(rows) if own_logits is None else own_logits
        check_loss(name, own, own_logits, labels, router_weight(model))
        if "output_router_logits" in inspect.signature(fused).parameters or hasattr(
            model.config.get_text_config(), "output_router_logits"
        ):
            _examine_router(fused, rows, labels, own_logits)
        if hasattr(wrapped, "get_base_model"):
            out = cast(Any, wrapped)(input_ids=ids, labels=ids, fused_lm_head=True)
            if not isinstance(out, FusedCausalLMOutput):
                raise ValueError(
                    f"{type(wrapped).__name__} does not pass a call on to the forward of {name}: fuse that alone"
                )


def _examine_router(fused: FusedHead, ids: Tensor, labels: Tensor, own_logits: Tensor) -> None:
    """Find out whether the model's loss with router logits is ours, and whether its router loss is gem/router_loss.py's."""
    model: Any = fused.model
    try:
        own = model(input_ids=ids, labels=labels, output_router_logits=True, **fused.options)
        check_loss(type(model).__name__, own, own_logits, labels, router_weight(model))
        model(input_ids=ids, labels=labels, output_router_logits=True, fused_lm_head=True)
    except Exception as error:  # of the model itself, too: some cannot
        fused.router_problem = f"the router loss of {type(model).__name__} cannot be reproduced: {error}"
        return
    mask = torch.ones_like(ids)
    mask[1, mask.shape[1] // 2 :] = 0
    try:
        own = model(input_ids=ids, attention_mask=mask, output_router_logits=True, **fused.options)
        fused.router_top_k = find_top_k(own.router_logits, mask, own.aux_loss)
    # One that does not come as it does elsewhere.
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        fused.router_top_k = 0
