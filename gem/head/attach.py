"""Attach the fused head to a model, and detach it.

Two methods are patched, the forward of the model and that of its lm_head (switch.py). In a fused call the model's own forward
runs, and only its lm_head returns something else. So whatever the model does before its head still happens, the hooks of FSDP,
ZeRO-3 and accelerate on model and head fire, and the router loss of a mixture of experts is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from gem.head.adapters import head_parts, serving_module
from gem.head.call import FusedHead
from gem.head.check import examine
from gem.head.extra import EXTRA_OUTPUTS
from gem.head.switch import HeadSwitch
from gem_kernels import Impl, LogitTransform

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
    - For a group loss: `loss_fn` and `cu_groups` as in gem_kernels.linear_group_loss. cu_groups (G + 1,) holds offsets into the
      tokens that have a label, row by row.
    - For a mixture of experts that returns router logits: `router_share`, this call's share of the tokens of the whole batch,
      and `router_usage` (E,), the mean of output.router_usage over the calls of the batch, weighted by their shares. With both,
      the router losses of the calls add up to that of the whole batch; with the share alone they nearly do
      (gem/head/router.py gives the difference).

    Calls without fused_lm_head=True do what they did before.

    Args:
        model: a transformers causal language model, or a peft, DDP or compiled model around one. Wrappers may be applied
            before or after.
        temperature: divides the logits, > 0.
        outputs: more per-token fields: "is_top1" costs nothing, "mean_logits" a pass over the weight (under a softcap over the
            logits), "log_sum_sq_probs" a second forward of the head.
        impl, cache_bytes: as in gem_kernels.

    Returns:
        The same model, patched; `unfuse(model)` undoes it. Fusing again replaces the settings.

    Raises:
        TypeError, ValueError: naming what was expected and what came; with both numbers if the model does something to its
            logits that its config does not name. Before this returns, known logits go through what the model does to them, and
            a few tokens through the model's own logits and through ours.
    """
    causal_lm: Any = unwrapped(model)
    unknown = sorted(set(outputs) - set(EXTRA_OUTPUTS))
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(EXTRA_OUTPUTS)}, got {', '.join(unknown)}")
    transform = LogitTransform(temperature=temperature)
    if causal_lm.config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder-only language model, got {type(causal_lm).__name__}")
    head = serving_module(causal_lm.get_output_embeddings())
    # Refuse a head before anything is patched, and in the model's present mode. Under ZeRO-3 and accelerate the weight may be
    # visible only inside a forward.
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
        examine(fused, model)
    except BaseException:
        unfuse(causal_lm)
        raise
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Restore the model's own forward.

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
    """Call fuse_lm_head(model) unless the model is fused; a fused model keeps its settings."""
    if _FUSED not in vars(unwrapped(model)):
        fuse_lm_head(model)


def fused_head(model: nn.Module) -> FusedHead:
    """Return the settings of fuse_lm_head and the results of its check for this model.

    Raises:
        ValueError: the model is not fused.
    """
    causal_lm = unwrapped(model)
    if _FUSED not in vars(causal_lm):
        raise ValueError(f"model must have gone through fuse_lm_head, got a plain {type(causal_lm).__name__}")
    return cast(FusedHead, vars(causal_lm)[_FUSED])


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers of peft, DistributedDataParallel, FSDP and torch.compile.

    Raises:
        TypeError: there is none, it has no lm_head, or it is in a DataParallel, whose copies all run the first one's forward.
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
    """True if nothing has replaced the model's forward since fuse_lm_head."""
    return vars(causal_lm).get("forward") is vars(causal_lm)[_FUSED]
