"""Models that fuse_lm_head refuses because their own loss is another than ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import TEXT, VOCAB
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gem.head import fuse_lm_head


class Unshifted(LlamaForCausalLM):
    """Its labels are those of the positions themselves, as a decoder of BART has them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        if labels is not None:
            out.loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        return out


def test_refuses_a_loss_that_is_another() -> None:
    with pytest.raises(ValueError, match=r"the loss of Unshifted is another than .* its own is [\d.]+, ours [\d.]+"):
        fuse_lm_head(Unshifted(LlamaConfig(**TEXT, initializer_range=0.5)))


def with_loss(loss_of: Any) -> Any:
    """loss_of(logits (B, T, V), labels (B, T)) is what it returns."""

    class Counting(LlamaForCausalLM):
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = None if labels is None else loss_of(out.logits, labels)
            return out

    return Counting(LlamaConfig(**TEXT, initializer_range=0.5))


def nll(z: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **settings)


HALF = torch.ones(VOCAB).index_fill(0, torch.arange(50, VOCAB), 0.5)


COUNTS = {
    "ignored ones in the mean": lambda z, y: nll(z, y, reduction="sum") / y[:, 1:].numel(),
    "ignored ones as token 0": lambda z, y: nll(z, y.clamp(min=0)),
    "mean of the means of rows": lambda z, y: torch.stack(
        [nll(a[None], b[None]) for a, b in zip(z, y, strict=True)]
    ).mean(),
    "a sum": lambda z, y: nll(z, y, reduction="sum"),
    "smoothed labels": lambda z, y: nll(z, y, label_smoothing=0.01),
    "half weight for some tokens": lambda z, y: nll(z, y, weight=HALF),
    "the last token left out": lambda z, y: nll(z[:, :-1], y[:, :-1]),
}


@pytest.mark.parametrize("count", COUNTS)
def test_refuses_a_loss_that_counts_otherwise(count: str) -> None:
    fuse_lm_head(with_loss(nll))
    with pytest.raises(ValueError, match="the loss of Counting is another than the mean of -log p of the next token"):
        fuse_lm_head(with_loss(COUNTS[count]))


@pytest.mark.parametrize(
    ("returned", "kind"),
    [(None, "NoneType"), (1.5, "float"), (torch.ones(3), r"a tensor \(3,\)")],
    ids=["nothing", "a number", "a vector"],
)
def test_refuses_what_is_no_loss(returned: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"Counting must return a scalar tensor as its loss .*, got {kind}"):
        fuse_lm_head(with_loss(lambda z, y: returned))
