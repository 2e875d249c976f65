"""Changes to a model after its check, which every fused call notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build
from head_cases import Bent, batch, entropy_weighted, from_logits

from gem.head import fuse_lm_head


def grow(model: Any) -> None:
    model.resize_token_embeddings(130)


def softcap(value: float | None) -> Any:
    return lambda model: setattr(model.config, "final_logit_softcapping", value)


def hook(function: Any, register: str = "register_forward_hook") -> Any:
    return lambda model: getattr(model.lm_head, register)(lambda module, arguments, out: function(out))


def own_forward(model: Any) -> None:
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * inner(hidden)


def subclass(model: Any) -> None:
    model.lm_head.__class__ = Bent


NO_LONGER = "no longer does to its logits what it did when fuse_lm_head checked it"


LATER = {
    "a larger vocabulary": ("llama", grow, "the lm_head has 130 rows, and had 97 when fuse_lm_head checked it"),
    "a larger vocabulary, tied": ("llama tied", grow, "the lm_head has 130 rows, and had 97"),
    "no softcap": (
        "gemma2",
        softcap(None),
        f"Gemma2ForCausalLM {NO_LONGER} .* it turns a logit of -48 into -48, and its",
    ),
    "another softcap": ("gemma2", softcap(4.0), NO_LONGER),
    "another scale": ("granite", lambda model: setattr(model.config, "logits_scaling", 3.0), NO_LONGER),
    "a hook that scales": ("llama", hook(lambda out: out * 0.5), NO_LONGER),
    "a hook that scales in place": ("llama", hook(lambda out: out.mul_(0.5)), NO_LONGER),
    "a hook that clamps": ("llama", hook(lambda out: out.clamp(-20, 20)), NO_LONGER),
    "another forward": ("llama", own_forward, "lm_head.forward was replaced after fuse_lm_head"),
    "another class": ("llama", subclass, "got Bent, whose forward is its own"),
}


@pytest.mark.parametrize("what", LATER)
def test_what_changes_later_is_noticed(what: str) -> None:
    name, change, message = LATER[what]
    model = fuse_lm_head(build(name))
    change(model)
    for grouped in ({}, {"loss_fn": entropy_weighted, "cu_groups": torch.tensor([0, 4, 20])}):
        with pytest.raises(ValueError, match=message):
            model(**batch(), fused_lm_head=True, **grouped)


def test_a_pre_hook_of_the_head_counts() -> None:
    model = fuse_lm_head(build("llama"))
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5,))
    z = model(batch()["input_ids"]).logits[:, :-1]
    out = model(**batch(), fused_lm_head=True)
    torch.testing.assert_close(out.lse.double(), from_logits(z, batch()["labels"][:, 1:])["lse"], atol=2e-5, rtol=1e-5)
