"""Right models that the bounds of the check must not refuse."""

from __future__ import annotations

import pytest
import torch
from architectures import TEXT, build
from head_cases import Changed, batch, from_logits
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from gem.head import fuse_lm_head, fused_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [0, 90], ids=["the tokens that are tried", "others"])
def test_a_bias_of_minus_infinity_is_a_token_that_never_occurs(first: int, dtype: torch.dtype) -> None:
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[first : first + 7] = -torch.inf
    model, inputs = model.to(dtype), batch()
    inputs["labels"] = inputs["labels"].clamp(10, 89)
    fuse_lm_head(model)
    out = model(**inputs, fused_lm_head=True)
    z, tolerance = model(inputs["input_ids"]).logits[:, :-1], 2e-5 if dtype == torch.float32 else 0.1
    possible = z[..., z[0, 0].isfinite()]  # the distribution over them is the whole one
    entropy = torch.distributions.Categorical(logits=possible.double()).entropy() * out.label_mask
    torch.testing.assert_close(out.entropy.double(), entropy, atol=tolerance, rtol=1e-5)
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_that_scales_its_logits_in_place(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z.mul_(0.25)))
    config = LlamaConfig(**TEXT, initializer_range=0.5)
    config.logit_scale = 0.25
    model = Changed(config)
    if hooked:
        model.lm_head.register_forward_hook(lambda module, arguments, out: None)
    fuse_lm_head(model)
    z = model(batch()["input_ids"]).logits[:, :-1]
    out = model(**batch(), fused_lm_head=True)
    torch.testing.assert_close(out.lse.double(), from_logits(z, batch()["labels"][:, 1:])["lse"], atol=2e-5, rtol=1e-5)
    out.loss.backward()
    assert model.lm_head.weight.grad.any()


def test_a_vocabulary_whose_padding_the_model_cuts_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z[..., :90]))
    model, inputs = Changed(LlamaConfig(**TEXT, initializer_range=0.5)), batch()
    inputs["labels"] = inputs["labels"].clamp(max=89)
    fuse_lm_head(model)
    assert fused_head(model).vocab == 90
    z = model(inputs["input_ids"]).logits[:, :-1]
    out = model(**inputs, fused_lm_head=True)
    expected = from_logits(z, inputs["labels"][:, 1:])
    torch.testing.assert_close(out.log_probs.double(), expected["log_probs"], atol=2e-5, rtol=1e-5)
    out.loss.backward()
    assert not model.lm_head.weight.grad[90:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi", "mamba"])
def test_every_dtype_attaches(name: str, dtype: torch.dtype) -> None:
    fuse_lm_head(build(name).to(dtype))


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_banned_by_a_large_bias(value: float, dtype: torch.dtype) -> None:
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[90] = value
    seen, allowed = fused_head(fuse_lm_head(model.to(dtype))).largest_gap
    assert seen <= allowed < 1


@pytest.mark.parametrize("seed", range(4))
def test_a_gemm_that_begins_with_a_large_bias(seed: int) -> None:
    model = build("phi", hidden_size=512, num_attention_heads=4, num_key_value_heads=4, seed=seed)
    with torch.no_grad():
        nn.init.normal_(model.lm_head.weight, std=0.05 / 512**0.5)
        nn.init.normal_(model.lm_head.bias, std=100.0)
    fuse_lm_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_biases_of_adapters_that_cancel(adapters: int, dtype: torch.dtype) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True)
    model = get_peft_model(build("phi").to(dtype), config)
    if adapters == 2:
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    head = model.get_output_embeddings()
    with torch.no_grad():
        nn.init.normal_(head.base_layer.bias, std=10.0)
        for name in head.active_adapters:
            head.lora_B[name].bias.copy_(-0.999 * head.base_layer.bias / adapters / head.scaling[name])
            nn.init.normal_(head.lora_B[name].weight)
    fuse_lm_head(model)


def test_logits_that_the_model_stores_in_a_narrower_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z.bfloat16()))
    fuse_lm_head(Changed(LlamaConfig(**TEXT, initializer_range=0.5)))


def test_another_default_dtype() -> None:
    model = build("llama").bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = fuse_lm_head(model)(**batch(), fused_lm_head=True)
        out.loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.log_probs.dtype == torch.float32
