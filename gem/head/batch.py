"""Fused calls on a packed batch of gem.data.

N completion tokens, E experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gem.head.output import STATISTICS, FusedCausalLMOutput, HeadStats
from gem_kernels import IGNORE_INDEX


def completion_stats(model: nn.Module, batch: dict[str, Any], **keywords: Any) -> tuple[Tensor, HeadStats]:
    """Return the loss and the untempered statistics (N,) of the completion tokens of a batch from gem.data.pack.

    Args:
        model: fused by fuse_lm_head.
        batch: from gem.data.pack.
        keywords: more keywords of the fused call (loss_fn, cu_groups, num_items_in_batch, label_smoothing, router_share, ...).
    """
    out = _fused_call(model, batch, **keywords)
    # Indexing with the mask would read its number back from the device for each of them.
    kept = cast(Tensor, out.label_mask).flatten().nonzero().squeeze(1)
    stats = (cast(Tensor, out[name]).flatten().index_select(0, kept) for name in STATISTICS)
    return cast(Tensor, out.loss), HeadStats(*stats)


def router_usage(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """Return (E,) the mean number of times that a token of a batch from gem.data.pack chooses each expert; no gradient.

    It costs a forward of the body and nothing of the head: no token has a label. None if the fused model returns no router
    loss, or one of another form than that of gem/head/router.py.
    """
    unlabelled = {**batch, "shift_labels": torch.full_like(batch["shift_labels"], IGNORE_INDEX)}
    with torch.no_grad():
        return _fused_call(model, unlabelled).router_usage


def _fused_call(model: nn.Module, batch: dict[str, Any], **keywords: Any) -> FusedCausalLMOutput:
    names = ("input_ids", "position_ids", "attention_mask", "shift_labels")
    inputs = {name: batch[name] for name in names if name in batch}
    out = model(**inputs, fused_lm_head=True, temperature=1.0, **keywords)
    if not isinstance(out, FusedCausalLMOutput) or out.loss is None:
        raise ValueError("the model's forward was replaced after fuse_lm_head: call fuse_lm_head again")
    return out
