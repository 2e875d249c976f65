"""fuse_lm_head and unfuse: what they accept, refuse and restore."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT, VOCAB, build
from head_cases import batch, from_logits
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

import gem
from gem.head import fuse_lm_head, fused_head, unfuse
from gem_kernels import LogitTransform


def test_public_names() -> None:
    assert gem.fuse_lm_head is fuse_lm_head and gem.unfuse is unfuse
    with pytest.raises(AttributeError, match="module 'gem' has no attribute 'fuse'"):
        gem.fuse  # noqa: B018


def test_unfuse_restores_what_stood_there() -> None:
    model = build("llama")
    fuse_lm_head(model)
    assert inspect.signature(model.forward) == inspect.signature(LlamaForCausalLM.forward.__get__(model))
    unfuse(model)
    assert "forward" not in vars(model) and not [name for name in vars(model) if "gem" in name]
    with pytest.raises(ValueError, match="model must have gone through fuse_lm_head, got a plain LlamaForCausalLM"):
        unfuse(model)

    own = model.forward
    model.forward = watched = lambda *args, **kwargs: own(*args, **kwargs)  # somebody else's patch
    fuse_lm_head(model)
    assert model(**batch(), fused_lm_head=True).log_probs is not None
    unfuse(model)
    assert model.forward is watched


def test_fused_again_the_new_settings_hold() -> None:
    model = fuse_lm_head(fuse_lm_head(build("llama"), temperature=2.0), impl="reference")
    assert fused_head(model).transform == LogitTransform() and fused_head(model).impl == "reference"
    unfuse(model)
    assert "forward" not in vars(model)


def test_a_patch_on_top_of_ours_works_and_is_not_undone() -> None:
    model = fuse_lm_head(build("llama"))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert model(**batch(), fused_lm_head=True).log_probs is not None
    with pytest.raises(ValueError, match="forward was replaced after fuse_lm_head"):
        unfuse(model)
    fuse_lm_head(model, temperature=2.0)  # over it
    assert fused_head(model).transform.temperature == 2.0
    unfuse(model)
    assert fused_head(model).transform.temperature == 1.0


def test_a_copy_computes_with_its_own_weights() -> None:
    model = fuse_lm_head(build("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    z = twin(batch()["input_ids"]).logits[:, :-1]
    out = twin(**batch(), fused_lm_head=True)
    torch.testing.assert_close(out.lse.double(), from_logits(z, batch()["labels"][:, 1:])["lse"], atol=2e-5, rtol=1e-5)
    unfuse(twin)
    assert fused_head(model)


def test_a_head_that_is_replaced_later_is_used() -> None:
    model = fuse_lm_head(build("llama"))
    model.lm_head = nn.Linear(32, VOCAB)
    z = model(batch()["input_ids"]).logits[:, :-1]
    out = model(**batch(), fused_lm_head=True)
    expected = from_logits(z, batch()["labels"][:, 1:])["lse"]
    torch.testing.assert_close(out.lse.double(), expected, atol=2e-5, rtol=1e-5)


def test_attaching_leaves_modes_gradients_and_random_numbers_alone() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()  # frozen by its owner
    before = torch.random.get_rng_state()
    fuse_lm_head(model)
    assert model.training and not model.model.layers[0].training and not model.model.layers[0].mlp.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"outputs": ("is_top1", "logits")}, ValueError, "outputs must be among is_top1, .*, got logits"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, chunked, triton, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        fuse_lm_head(model, **arguments)
    assert "forward" not in vars(model)


def test_models_that_are_refused() -> None:
    for model, error, message in (
        (nn.Linear(3, 4), TypeError, "must be a transformers causal language model, got Linear"),
        (
            LlamaModel(LlamaConfig(**TEXT)),
            TypeError,
            r"must have an lm_head \(get_output_embeddings\), LlamaModel has none",
        ),
        (nn.DataParallel(build("llama")), TypeError, "must not be in nn.DataParallel"),
        (
            T5ForConditionalGeneration(
                T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            ValueError,
            "must be a decoder-only language model, got T5ForConditionalGeneration",
        ),
        (LlamaForCausalLM(LlamaConfig(**TEXT)).to("meta"), ValueError, "on the meta device: load or materialise"),
    ):
        with pytest.raises(error, match=message):
            fuse_lm_head(model)


def test_a_fused_model_can_be_saved_whole(tmp_path: Path) -> None:
    model = fuse_lm_head(build("llama"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    out = again(**batch(), fused_lm_head=True)
    assert torch.equal(out.log_probs, model(**batch(), fused_lm_head=True).log_probs)
    model.save_pretrained(tmp_path / "folder")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(plain(**batch()).logits, model(**batch()).logits)


def test_a_model_with_a_config_of_conv1d_heads() -> None:
    """GPT-2's layers are Conv1D, its head is not."""
    assert isinstance(fuse_lm_head(build("gpt2")).config, GPT2Config)
