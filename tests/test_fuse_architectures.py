"""The fused head on many architectures: statistics and gradients of all parameters equal those of the model's own logits.

Rounding through a whole body has no tight bound, so the test cuts the computation at the lm_head. The body is the same code on
the same inputs: it hands the same bits to the head. The statistics, the gradient of the head's input and the gradients of the
head keep the rule of numerics.py, and so do the statistics of the model's own logits. From our gradient of the head's input,
the body computes the same bits as the model's own graph does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, available, build
from numerics import SEED, Case, assert_all_close, assert_close, generator, make_upstream, run_linear, weighted_sum
from op_bounds import linear_bounds
from torch import Tensor

from gem.head import fuse_lm_head, fused_head, unfuse
from gem.head.output import STATISTICS, HeadStats
from gem_kernels import LogitTransform, logprob_entropy

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
    # minicpm3 scales its hidden states, and the softcap in the config of "gemma3 with vision" is never applied: neither is here
}
MOE = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss")


def batch(masked: bool = True) -> dict[str, Tensor]:
    g = generator(1)
    ids = torch.randint(10, VOCAB, (B, T), generator=g)
    labels = ids.clone()
    if masked:
        labels[0, :5] = -100
        labels[1, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def head_inputs(model: Any) -> list[Tensor]:
    """Return a list that collects the inputs of the lm_head from now on, each with its gradient kept."""
    seen: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        seen.append(arguments[0])

    model.get_output_embeddings().register_forward_pre_hook(keep)
    return seen


def head_case(model: Any, hidden: Tensor, labels: Tensor, transform: LogitTransform) -> Case:
    """Return the problem that the lm_head of a model solves, for hidden (B, T, D) and labels (B, T)."""
    head = model.get_output_embeddings()
    bias = None if getattr(head, "bias", None) is None else head.bias.detach()
    states, targets = hidden.detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return Case(states, head.weight.detach()[:VOCAB], targets, bias, None, transform)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_and_gradients_are_the_models_own(name: str) -> None:
    if not available(name):
        pytest.skip("not in this transformers")
    model, inputs = build(name, seed=SEED), batch()
    ids, labels = inputs.values()
    fuse_lm_head(model)
    transform = fused_head(model).transform
    assert transform == TRANSFORMS.get(name, LogitTransform())
    seen = head_inputs(model)
    own_logits = model(input_ids=ids, use_cache=False).logits
    own_loss = model(**inputs).loss.detach()
    out = model(**inputs, fused_lm_head=True)
    own_hidden, _, hidden = seen
    assert torch.equal(hidden, own_hidden)

    case, upstream = head_case(model, hidden, labels, transform), make_upstream(B * (T - 1))
    gold, bounds = run_linear(case.double(), "reference", upstream), linear_bounds(case, upstream)
    of_own_logits = logprob_entropy(own_logits.detach()[:, :-1].double(), labels[:, 1:], impl="reference")
    for stat, value in of_own_logits._asdict().items():
        assert_close(f"the model's own {stat}", value.flatten(), gold[stat], replace(bounds[stat], dtype=torch.float64))  # type: ignore[arg-type]

    assert out.log_probs.shape == out.entropy.shape == out.lse.shape == (B, T - 1)
    assert torch.equal(out.label_mask, labels[:, 1:] != -100)
    assert all(not out[name][~out.label_mask].any() for name in STATISTICS)
    stats = HeadStats(*(out[name].flatten() for name in STATISTICS))
    weighted_sum(stats, upstream).backward()
    of_head = run_linear(case, "auto", upstream)  # the head's gradients alone: a tied weight has more
    assert all(torch.equal(value.detach(), of_head[stat]) for stat, value in stats._asdict().items())  # type: ignore[arg-type]
    assert hidden.grad is not None and not hidden.grad[:, -1].any()
    assert_all_close({**of_head, "dhidden": hidden.grad[:, :-1].flatten(0, 1)}, gold, bounds)

    got = gradients(model)
    own_hidden.backward(hidden.grad)
    for p, grad in zip(head_parameters(model), (of_head["dweight"], of_head["dbias"]), strict=True):
        if p is not None and grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad
    want = gradients(model)
    assert got.keys() == want.keys()
    for parameter, grad in want.items():
        assert torch.equal(got[parameter], grad), parameter

    error = float((bounds["logprob"].worst + 7 * bounds["logprob"].spread).sum()) / int(out.label_mask.sum())
    torch.testing.assert_close(out.loss, own_loss, rtol=1e-6, atol=2 * error)


def head_parameters(model: Any) -> tuple[Any, Any]:
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


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
    """The model reads its own attribute, not its config."""
    model, inputs = fuse_lm_head(build("mixtral", router_aux_loss_coef=0.5)), batch()
    model.router_aux_loss_coef = 0.25
    own, out = (model(**inputs, output_router_logits=True, **f) for f in ({}, {"fused_lm_head": True}))
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-6, atol=1e-6)


def test_a_router_loss_of_another_weight_is_refused_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("mixtral", router_aux_loss_coef=0.5), batch()
    monkeypatch.setattr("gem.head.router.WEIGHTS", ("a_name_that_it_has_not",))
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
