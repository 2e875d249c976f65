"""The head that gem computes against the logits of the model itself: accepted where they agree, refused where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from gem.data import Layout, pack
from gem.head import check_head, hidden_states, lm_head
from gem_kernels import LogitTransform, linear_logprob_entropy

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}, LogitTransform()),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, LogitTransform()),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 4},
        LogitTransform(softcap=3.0),
    ),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}, LogitTransform(scale=0.25)),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}, LogitTransform(scale=0.25)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose logits are a few nats wide, so that a forgotten transform shows."""
    model_class, config_class, changes, _ = MODELS[name]
    model: Any = model_class(config_class(**{**SIZES, **changes}))
    return widened(model).to(dtype)


def widened(model: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.5)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_accepts(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype).train()
    head = check_head(model)
    assert head.transform == MODELS[name][3] and head.bias is None
    assert head.weight is model.get_output_embeddings().weight and head.weight.shape == (40, 16)
    assert model.training  # as it was
    if name == "llama tied":
        assert head.weight is model.get_input_embeddings().weight
    check_head(model.eval())
    assert not model.training


@pytest.mark.parametrize("layout", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_the_models_own(name: str, layout: Layout) -> None:
    model = build(name)
    groups = [[([1, 9, 11], [8, 7, 2]), ([1, 9, 11], [12, 2])], [([1], [5, 30, 31, 32, 2])]]
    batch = pack(groups, layout=layout, pad_id=0)
    head = check_head(model)
    stats = linear_logprob_entropy(
        hidden_states(model, batch), head.weight, batch["targets"], bias=head.bias, transform=head.transform
    )
    expected, entropy = [], []
    for prompt, completion in (pair for group in groups for pair in group):  # alone, unpadded
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = logits.double().log_softmax(-1)
        expected.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropy.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(stats.logprob.double(), torch.cat(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), torch.cat(entropy), atol=2e-5, rtol=1e-5)


def test_bias_of_the_head_is_found() -> None:
    model = build("llama")
    model.lm_head = nn.Linear(16, 40)
    nn.init.normal_(model.lm_head.bias)
    assert check_head(model).bias is model.lm_head.bias


class Scaled(LlamaForCausalLM):
    """Multiplies its logits, and its config does not say so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.7
        return out


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_refuses_logits_that_the_config_does_not_explain(std: float, training: bool) -> None:
    model: Any = Scaled(LlamaConfig(**SIZES, initializer_range=std)).train(training)
    with pytest.raises(ValueError, match="Scaled does something to its logits that its config does not name"):
        check_head(model)
    assert model.training is training  # a refusal, too, leaves the model as it was


def test_refuses_the_same_in_bf16() -> None:
    model: Any = widened(Scaled(LlamaConfig(**SIZES))).bfloat16()
    with pytest.raises(ValueError, match="does something to its logits"):
        check_head(model)


def test_refuses_a_model_whose_softcap_config_is_gone() -> None:
    model = build("gemma2")
    forward = model.forward

    def uncapped_config(*args: Any, **kwargs: Any) -> Any:
        model.config.final_logit_softcapping = 3.0
        out = forward(*args, **kwargs)
        model.config.final_logit_softcapping = None
        return out

    model.forward = uncapped_config
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="does something to its logits"):
        check_head(model)


def test_refuses_nan() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="does something to its logits"):
        check_head(model)


def test_refuses_an_adapter_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for function in (lm_head, check_head):
        with pytest.raises(ValueError, match=r"the lm_head must be a plain nn.Linear, got Linear \(no adapter on it"):
            function(model)


def test_leaves_no_gradient_and_the_random_numbers_alone() -> None:
    model = build("llama")
    before = torch.random.get_rng_state()
    check_head(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
