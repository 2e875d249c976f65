"""Models that fuse_lm_head refuses: unexplained logits, faulty heads, numbers that are not finite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from architectures import TEXT, VOCAB, build
from head_cases import Bent, Changed
from peft import LoraConfig, get_peft_model
from planted_faults import TINY, refusal
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gem.head import fuse_lm_head, unfuse

CHANGES = {
    "scaled": lambda z: z * 1.7,
    "shifted": lambda z: z + 0.3,  # the same log-probs, another lse
    "softcap": lambda z: 30 * torch.tanh(z / 30),
    "softcap far above any logit of random weights": lambda z: 59 * torch.tanh(z / 59),
    "one column": lambda z: torch.cat([z[..., :-1], z[..., -1:] + 1], -1),
    "masked column": lambda z: z.masked_fill(torch.arange(z.shape[-1]) == 5, -torch.inf),
    "reversed": lambda z: z.flip(-1),
    "nan": lambda z: z * torch.nan,
    "in place": lambda z: z.mul_(1.7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("change", CHANGES)
def test_refuses_logits_that_the_config_does_not_explain(
    change: str, std: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Changed, "change", staticmethod(CHANGES[change]))
    model = Changed(LlamaConfig(**TEXT, initializer_range=std)).to(dtype).train()
    with pytest.raises(
        ValueError, match="Changed does something to its logits that its config does not name: it turns a logit"
    ):
        fuse_lm_head(model)
    assert model.training and "forward" not in vars(model)  # a refusal leaves the model as it was


def test_the_refusal_names_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"it turns a logit of -60 into -102, and its config \(scale 1, softcap None\) into -60"
    ):
        fuse_lm_head(Changed(LlamaConfig(**TEXT)))


class Hidden(LlamaForCausalLM):
    """Its head is called as it should be, and its logits come from elsewhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits.shape[-1] == VOCAB and out.logits.requires_grad is False and out.logits.flatten()[0] != -60:
            out.logits = out.logits.roll(1, 1)
        return out


def test_the_second_check_compares_real_tokens() -> None:
    with pytest.raises(
        ValueError, match=r"the (logprob|entropy|lse) of its own logits is -?[\d.]+, ours -?[\d.]+, expected"
    ):
        fuse_lm_head(Hidden(LlamaConfig(**TEXT)))


def test_refuses_a_softcap_that_the_config_does_not_show() -> None:
    model = build("gemma2")
    forward = model.forward

    def shown_only_inside(*args: Any, **kwargs: Any) -> Any:
        model.config.final_logit_softcapping = 3.0
        out = forward(*args, **kwargs)
        model.config.final_logit_softcapping = None
        return out

    model.forward = shown_only_inside
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="does something to its logits"):
        fuse_lm_head(model)
    assert model.forward is shown_only_inside


def outliers(model: Any) -> Any:
    """Hidden states as real models have them: two entries hundreds of times the others, whose products cancel."""
    model.model.norm.register_forward_hook(
        lambda module, arguments, h: torch.cat([torch.full_like(h[..., :2], 300.0), h[..., 2:]], -1)
    )
    with torch.no_grad():
        model.lm_head.weight[:, 1] = -model.lm_head.weight[:, 0]
    return model


# fault: the size refused in fp32, in bf16
SIZES = {
    "logits times 1 + x": (1e-3, 2**-5),
    "a softcap of 1 / x": (1 / 50, 1 / 4),
    "x added to one logit": (0.01, 0.01),
    "the head's product times 1 + x": (1e-3, 2**-7),
    "a softcap of 1 / x in the head": (1 / 50, 1 / 50),
    "x added to one entry of its bias": (0.01, 0.01),
    "a z-loss, x lse²": (1e-3, 1e-3),
    "the loss times 1 + x": (1e-3, 1e-3),
    "labels that are not shifted": (1.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", SIZES)
@pytest.mark.parametrize("name", [*TINY, "outliers"])
def test_refuses_planted_faults(name: str, fault: str, dtype: torch.dtype) -> None:
    """Known hidden states go through the head without a rounding, so large ones hide nothing."""
    model = (outliers(build("llama")) if name == "outliers" else build(name)).to(dtype)
    unfuse(fuse_lm_head(model))
    assert refusal(model, fault, SIZES[fault][dtype == torch.bfloat16])
    unfuse(fuse_lm_head(model))


def test_a_refusal_names_the_numbers_and_what_rounding_explains() -> None:
    message = refusal(build("llama"), "x added to one entry of its bias", 0.01)
    assert re.search(
        r"more than the product with its weight: it gives a logit .*, the product is .*, and rounding explains 1[.]4e-05",
        str(message),
    )
    message = refusal(build("llama"), "a z-loss, x lse²", 1e-3)
    assert re.search(r"its own is [\d.]+, ours [\d.]+, and rounding explains [\d.]+e-0[5-9]", str(message))


def spoil(get: Any, at: tuple[int, ...], value: float) -> Any:
    def plant(model: Any) -> None:
        with torch.no_grad():
            get(model)[at] = value

    return plant


WEIGHTS = "the weights of {} must be finite, got {} ({} entries)"

NOT_FINITE = {
    "head": (
        "llama",
        spoil(lambda m: m.lm_head.weight, (3, 3), torch.nan),
        WEIGHTS.format("LlamaForCausalLM", "nan in lm_head.weight", "1 of 3104"),
    ),
    "infinite head": (
        "llama",
        spoil(lambda m: m.lm_head.weight, (96, slice(2)), -torch.inf),
        WEIGHTS.format("LlamaForCausalLM", "inf in lm_head.weight", "2 of 3104"),
    ),
    "bias": (
        "phi",
        spoil(lambda m: m.lm_head.bias, (7,), torch.nan),
        WEIGHTS.format("PhiForCausalLM", "nan in lm_head.bias", "1 of 97"),
    ),
    "infinite bias": (
        "phi",
        spoil(lambda m: m.lm_head.bias, (7,), torch.inf),
        WEIGHTS.format("PhiForCausalLM", "inf in lm_head.bias", "1 of 97"),
    ),
    "no token": (
        "phi",
        spoil(lambda m: m.lm_head.bias, (slice(None),), -torch.inf),
        "the bias of the lm_head of PhiForCausalLM must leave a token that can occur, got -inf in every entry",
    ),
    "body": (
        "llama",
        spoil(lambda m: m.model.layers[1].mlp.up_proj.weight, (2, 5), torch.nan),
        WEIGHTS.format("LlamaForCausalLM", "nan in model.layers.1.mlp.up_proj.weight", "1 of 1536"),
    ),
    "a token's embedding, which no trial token has": (
        "llama",
        spoil(lambda m: m.model.embed_tokens.weight, (0, 0), torch.nan),
        WEIGHTS.format("LlamaForCausalLM", "nan in model.embed_tokens.weight", "1 of 3104"),
    ),
    "buffer": (
        "llama",
        spoil(lambda m: m.model.rotary_emb.inv_freq, (1,), torch.nan),
        "hands to its lm_head must be finite, got nan at [0, 0, 0]: model.rotary_emb.inv_freq holds nan at [1]",
    ),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_refuses_what_is_not_finite_by_its_name(what: str) -> None:
    name, plant, message = NOT_FINITE[what]
    model = build(name)
    plant(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        fuse_lm_head(model)


def test_refuses_an_adapter_that_is_not_finite() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight[4, 1] = torch.inf
    with pytest.raises(
        ValueError, match=r"must be finite, got inf in lm_head.lora_B.default.weight \(1 of 194 entries\)"
    ):
        fuse_lm_head(model)


def test_refuses_what_overflows_by_its_name() -> None:
    """In fp16 numbers end at 65504."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
    with pytest.raises(
        ValueError, match=r"the logits of LlamaForCausalLM must be finite, got one of -?[\d.e+]+, beyond torch.float16"
    ):
        fuse_lm_head(model.half())
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    message = (
        r"to its lm_head must be finite, got -?inf at .*: its parameters and buffers are finite, so something overflows"
    )
    with pytest.raises(ValueError, match=message):
        fuse_lm_head(model.half())


class Twice(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        self.lm_head(torch.zeros(1, 1, self.config.hidden_size))
        return out


class Never(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **{k: v for k, v in kwargs.items() if k != "return_dict"})
        out.logits = out.last_hidden_state @ self.lm_head.weight.T
        return out


@pytest.mark.parametrize(("kind", "times"), [(Twice, 2), (Never, 0)])
def test_refuses_a_head_that_is_not_called_once(kind: Any, times: int) -> None:
    with pytest.raises(ValueError, match=rf"must call its lm_head .* once a forward, it called it {times} times"):
        fuse_lm_head(kind(LlamaConfig(**TEXT)))


def with_head(head: nn.Module) -> Any:
    model = build("llama")
    model.lm_head = head
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_refuses_a_head_of_another_class(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="got Bent, whose forward is its own"):
        fuse_lm_head(with_head(Bent(32, VOCAB)).to(dtype))


def test_refuses_a_vocabulary_without_ordinary_tokens() -> None:
    with pytest.raises(ValueError, match="needs 2 ordinary tokens, the vocabulary of LlamaForCausalLM has 1"):
        fuse_lm_head(LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": 4})))


class Picky(LlamaForCausalLM):
    def forward(self, *args: Any, pixels: Tensor | None = None, **kwargs: Any) -> Any:
        if pixels is None:
            raise TypeError("pixels are missing")
        return super().forward(*args, **kwargs)


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Picky must run on token ids and labels alone .* TypeError\('pixels are missing'\)"
    ):
        fuse_lm_head(Picky(LlamaConfig(**TEXT)))
