"""The fused head on many architectures: statistics and gradients of all parameters are those of the model's own logits.

The rule is that of tests/numerics.py, with the model's own logits through log_softmax in fp64 as gold and in fp32 as eager.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, available, build
from numerics import assert_all_close, make_upstream, weighted_sum
from torch import Tensor

from gem.head import fuse_lm_head, fused_head, unfuse
from gem_kernels import LogitTransform, TokenStats

B, T = 2, 11
TRANSFORMS = {
    "gemma2": LogitTransform(softcap=5.0),
    "gemma3": LogitTransform(softcap=5.0),
    "nanochat": LogitTransform(softcap=4.0),
    "recurrent-gemma": LogitTransform(softcap=5.0),
    "granite": LogitTransform(scale=0.25),  # divides by 4
    "granite-moe": LogitTransform(scale=0.25),
    "hyperclovax": LogitTransform(scale=0.25),  # multiplies by 0.25
    "cohere": LogitTransform(scale=0.25),
    "cohere2": LogitTransform(scale=0.25),
    "falcon-h1": LogitTransform(scale=0.3),
    # Not minicpm3, which scales its hidden states; nor "gemma3 with vision", whose config names a softcap that is never applied
}
MOE = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss")


def batch(masked: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCAB, (B, T), generator=g)
    labels = ids.clone()
    if masked:
        labels[0, :5] = -100
        labels[1, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def own_statistics(model: Any, ids: Tensor, labels: Tensor) -> TokenStats:
    """(B, T - 1) from the model's own logits, in its dtype; 0 where the label is -100."""
    z = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    keep = targets != -100
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return TokenStats(*(s * keep for s in (logprob, -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1))))


def results(model: Any, stats: TokenStats) -> dict[str, Any]:
    """The statistics, and the gradients of all parameters for a random upstream of all three."""
    flat = TokenStats(*(s.flatten() for s in stats))
    weighted_sum(flat, make_upstream(flat.logprob.numel())).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**{n: s.detach() for n, s in flat._asdict().items()}, **grads}


def scaled(grads: dict[str, Any], gold: dict[str, Any]) -> dict[str, Tensor]:
    """The same with all gradients in one vector, each in units of its largest entry.

    What fp32 does to a gradient on its way through the body is the noise of the body; in eight numbers a matter of chance.
    """
    names = [name for name in gold if name not in TokenStats._fields]
    assert [name for name in grads if name not in TokenStats._fields] == names
    largest = max(float(gold[name].abs().max()) for name in names)
    # A bias of attention keys has the gradient 0, whatever rounding makes of it.
    size = {name: max(float(gold[name].abs().max()), 1e-3 * largest) for name in names}
    vector = torch.cat([grads[name].flatten() / size[name] for name in names])
    return {**{name: grads[name] for name in TokenStats._fields}, "gradients": vector}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_and_gradients_are_the_models_own(name: str) -> None:
    if not available(name):
        pytest.skip("not in this transformers")
    model, inputs = build(name), batch()
    ids, labels = inputs.values()
    gold_model = copy.deepcopy(model).double()
    gold = results(gold_model, own_statistics(gold_model, ids, labels))
    eager = results(model, own_statistics(model, ids, labels))
    own_loss = model(**inputs).loss.detach()

    fuse_lm_head(model)
    assert fused_head(model).transform == TRANSFORMS.get(name, LogitTransform())
    out = model(**inputs, fused_lm_head=True)
    assert out.log_probs.shape == out.entropy.shape == out.lse.shape == (B, T - 1)
    assert torch.equal(out.label_mask, labels[:, 1:] != -100)
    assert all(not s[~out.label_mask].any() for s in (out.log_probs, out.entropy, out.lse))
    loss = out.loss.detach()
    got = results(model, TokenStats(out.log_probs, out.entropy, out.lse))
    exact, own = scaled(gold, gold), scaled(eager, gold)
    assert float((own["gradients"].double() - exact["gradients"]).abs().max()) < 1e-5  # or the rule would say nothing
    assert_all_close(scaled(got, gold), own, exact)
    torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MOE)
def test_the_router_loss_is_kept(name: str) -> None:
    model, inputs = build(name, router_aux_loss_coef=0.5), batch()
    own = model(**inputs, output_router_logits=True)
    own.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = fuse_lm_head(model)(**inputs, output_router_logits=True, fused_lm_head=True)
    assert torch.equal(out.aux_loss, own.aux_loss) and bool(out.aux_loss > 0)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6 * float(expected[n].abs().max() + 1))
    assert model(**inputs, fused_lm_head=True).aux_loss is None


def test_the_weight_of_the_router_loss_is_the_models_of_this_moment() -> None:
    """It reads its own attribute, not its config."""
    model, inputs = fuse_lm_head(build("mixtral", router_aux_loss_coef=0.5)), batch()
    model.router_aux_loss_coef = 0.25
    own, out = (model(**inputs, output_router_logits=True, **f) for f in ({}, {"fused_lm_head": True}))
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-6, atol=1e-6)


def test_a_router_loss_of_another_weight_is_refused_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("mixtral", router_aux_loss_coef=0.5), batch()
    monkeypatch.setattr("gem.fused_call.ROUTER_WEIGHTS", ("a_name_that_it_has_not",))
    fuse_lm_head(model)
    assert model(**inputs, fused_lm_head=True).aux_loss is None
    with pytest.raises(
        ValueError, match="the router loss of MixtralForCausalLM cannot be reproduced: the loss of .* ours"
    ):
        model(**inputs, fused_lm_head=True, output_router_logits=True)


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "gpt2", "mamba", "gpt-oss", "llava"])
def test_without_the_flag_the_model_is_what_it_was(name: str) -> None:
    model, inputs = build(name), batch()
    before = model(**inputs)
    ids = inputs["input_ids"][:, :4]
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    generated = model.generate(ids, **settings)
    fuse_lm_head(model)
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(generated, model.generate(ids, **settings))
    unfuse(model)
    assert "forward" not in vars(model)
    assert torch.equal(before.logits, model(**inputs).logits)


def test_a_vision_language_model_reads_its_image() -> None:
    model = build("llava")
    image = 3  # its token; 16 x 16 pixels in patches of 8 are 4 of them
    ids = torch.tensor([[1, image, image, image, image, 9, 20, 31, 2]])
    labels = ids.masked_fill(ids == image, -100)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "labels": labels}
    own = model(**inputs)
    out = fuse_lm_head(model)(**inputs, fused_lm_head=True)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert (
        float((model(input_ids=ids, pixel_values=-inputs["pixel_values"], labels=labels).loss - own.loss).abs()) > 1e-4
    )
