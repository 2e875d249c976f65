"""Adapters of peft on or around the lm_head: losses and gradients equal those of peft's own forward, or the head is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from peft import IA3Config, LoraConfig, get_peft_model
from test_fuse_architectures import batch
from torch import Tensor, nn

from gem.head import fuse_lm_head, fused_head, unfuse
from gem.head.adapters import describe_adapter, head_parts
from gem.head.output import STATISTICS, HeadStats
from gem_kernels import TokenStats

R = 4


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": R, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "lm_head"], **changes}
    return LoraConfig(**settings)


def with_adapter(config: Any, name: str = "llama") -> Any:
    """Return a peft model whose adapters change its logits: peft starts B at 0."""
    return stirred(get_peft_model(build(name), config))


def stirred(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n or "modules_to_save" in n:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def own_statistics(model: Any, ids: Tensor, labels: Tensor) -> HeadStats:
    """Return statistics (B, T - 1) of the logits of the model's own forward; 0 where the label is -100."""
    z = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    keep = targets != -100
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy, lse = -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)
    return HeadStats(*(s * keep for s in (logprob, entropy, lse)))


def statistics(model: Any) -> HeadStats:
    out = model(**batch(), fused_lm_head=True)
    return HeadStats(*(out[name] for name in STATISTICS))


def gradients(model: Any, stats: HeadStats) -> dict[str, Tensor]:
    model.zero_grad()
    (stats.logprob.sum() + 0.3 * stats.entropy.sum() + 0.1 * stats.lse.sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_against_peft(model: Any) -> None:
    """Compare statistics and all gradients with those of the logits of peft's own forward, both in fp32."""
    inputs = batch()
    own = own_statistics(model, inputs["input_ids"], inputs["labels"])
    expected = gradients(model, own)
    got = statistics(model)
    for a, b in zip(got, own, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    grads = gradients(model, got)
    assert grads.keys() == expected.keys()
    for n, g in expected.items():
        torch.testing.assert_close(grads[n], g, atol=2e-6 * float(g.abs().max()) + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])  # plain, softcap, bias
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"r": 3, "lora_alpha": 1}], ids=["lora", "rslora", "r3"])
def test_lora_on_the_head(changes: dict[str, Any], name: str, attach: str) -> None:
    model = build(name)
    if attach == "before":
        fuse_lm_head(model)
    model = stirred(get_peft_model(model, lora(**changes)))
    if attach == "after":
        fuse_lm_head(model)
    check_against_peft(model)
    assert "lm_head.lora_A" in " ".join(n for n, p in model.named_parameters() if p.grad is not None)
    weight = model.get_base_model().lm_head.base_layer.weight
    assert weight.grad is None  # frozen: no dweight


def test_lora_bias_is_part_of_the_bias() -> None:
    model = with_adapter(lora(lora_bias=True))
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].bias.normal_()
    fuse_lm_head(model)
    check_against_peft(model)


def test_a_tied_head() -> None:
    model = with_adapter(lora(), "llama tied")
    fuse_lm_head(model)
    check_against_peft(model)


def test_switching_disabling_and_merging_adapters() -> None:
    model = with_adapter(lora())
    model.add_adapter("other", lora(r=2, use_rslora=True))
    stirred(model)
    fuse_lm_head(model)
    seen = []

    def check(what: str) -> None:
        check_against_peft(model)
        seen.append((what, float(statistics(model).logprob.sum().detach())))

    check("default")
    model.set_adapter("other")
    check("other")
    model.base_model.set_adapter(["default", "other"])
    check("both")
    with model.disable_adapter():
        out = statistics(model)
        own = own_statistics(model, *batch().values())
        torch.testing.assert_close(out.logprob, own.logprob, atol=1e-5, rtol=1e-5)
        seen.append(("none", float(out.logprob.sum())))
    assert len({round(value, 3) for _, value in seen}) == 4, seen  # each is another model
    both = statistics(model)
    model.merge_adapter()
    assert head_parts(model.get_base_model().lm_head).low_rank is None
    merged = statistics(model)
    torch.testing.assert_close(merged.logprob, both.logprob, atol=2e-5, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(statistics(model).logprob, out.logprob, atol=2e-5, rtol=1e-5)
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(statistics(unloaded).logprob, both.logprob, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attach", ["before", "after"])
def test_a_head_in_modules_to_save(attach: str) -> None:
    model = build("llama")
    if attach == "before":
        fuse_lm_head(model)
    config = LoraConfig(r=R, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = stirred(get_peft_model(model, config))
    if attach == "after":
        fuse_lm_head(model)
    check_against_peft(model)
    wrapper = model.get_base_model().lm_head
    assert wrapper.modules_to_save["default"].weight.grad is not None and wrapper.original_module.weight.grad is None
    changed = statistics(model).logprob
    with model.disable_adapter():
        own = own_statistics(model, *batch().values())
        original = statistics(model).logprob
    torch.testing.assert_close(original, own.logprob, atol=1e-5, rtol=1e-5)
    assert float((original - changed).detach().abs().max()) > 0.1
    unfuse(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_lora_elsewhere_leaves_the_head_alone() -> None:
    model = with_adapter(LoraConfig(r=R, target_modules=["q_proj", "v_proj"]))
    fuse_lm_head(model)
    check_against_peft(model)


@pytest.mark.parametrize("grouped", [False, True])
def test_twenty_steps_of_training_are_pefts_own(grouped: bool) -> None:
    """LoRA on the lm_head among others, AdamW: the same losses to 1e-5, step by step."""
    inputs, losses = batch(), {}
    labels = inputs["labels"][:, 1:]
    count = int((labels != -100).sum())
    for fused in (False, True):
        model = with_adapter(lora()).train()
        if fused:
            fuse_lm_head(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[fused] = []
        for _ in range(20):
            if not fused:
                loss = model(**inputs).loss
            elif grouped:

                def nll(stats: TokenStats, _: int) -> Tensor:
                    return -stats.logprob.sum() / count

                loss = model(**inputs, fused_lm_head=True, loss_fn=nll, cu_groups=torch.tensor([0, 5, count])).loss
            else:
                loss = model(**inputs, fused_lm_head=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fused].append(float(loss.detach()))
    torch.testing.assert_close(losses[True], losses[False], atol=1e-5, rtol=0)
    assert losses[True][0] - losses[True][-1] > 0.1  # it trains


def test_adapters_in_fp32_on_a_model_in_bf16() -> None:
    """peft leaves adapters in fp32. Our product with them is in fp32 too, and nearer to the exact logits than peft's own."""
    model = stirred(get_peft_model(build("llama").bfloat16(), lora()))
    fuse_lm_head(model)
    inputs = batch()
    head = model.get_base_model().lm_head
    hidden = model.get_base_model().model(inputs["input_ids"]).last_hidden_state[:, :-1].double()
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    assert a.dtype == torch.float32
    z = hidden @ head.base_layer.weight.double().T + head.scaling["default"] * (hidden @ a.double().T) @ b.double().T
    exact = z.logsumexp(-1)[inputs["labels"][:, 1:] != -100]
    got = model(**inputs, fused_lm_head=True)
    peft = model(inputs["input_ids"]).logits[:, :-1].double().logsumexp(-1)[inputs["labels"][:, 1:] != -100]
    assert float((got.lse[got.label_mask] - exact).detach().abs().max()) < 1e-4
    assert float((peft - exact).detach().abs().max()) > 1e-3


# --- what is refused ------------------------------------------------------------------------------------------------------


def quantised() -> Any:
    """Return a model whose head is packed as bitsandbytes packs 4 bits: uint8, two entries a byte."""
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB * 16, 1, dtype=torch.uint8), requires_grad=False)
    return model


class Rescaled(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


def wrapped() -> Any:
    model = build("llama")
    model.lm_head = Rescaled(model.lm_head)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (
        lambda: with_adapter(lora(use_dora=True)),
        "must be plain LoRA, got Dora .* leave lm_head out of target_modules",
    ),
    "dropout": (
        lambda: with_adapter(lora(lora_dropout=0.1)).train(),
        r"adapter 'default' on the lm_head must have lora_dropout=0 in training, got 0.1",
    ),
    "ia3": (
        lambda: get_peft_model(build("llama"), IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
        r"an adapter on the lm_head must be LoRA on a plain nn.Linear, got peft.tuners.ia3",
    ),
    "4 bits": (quantised, r"with a Parameter .* torch.uint8: a quantised head is not supported"),
    "another module": (wrapped, "must be an nn.Linear with a floating-point weight .*, got Rescaled"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_on_attach(kind: str) -> None:
    make, message = REFUSED[kind]
    model = make()
    with pytest.raises(ValueError, match=message):
        fuse_lm_head(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("kind", ["dora", "dropout", "ia3"])
def test_refused_when_the_adapter_comes_later(kind: str) -> None:
    """TRL and peft may wrap a model that is fused already."""
    make, message = REFUSED[kind]
    model = fuse_lm_head(build("llama"))
    config = make().peft_config["default"]
    adapted = get_peft_model(model, config).train()
    with pytest.raises(ValueError, match=message):
        adapted(**batch(), fused_lm_head=True)
    if kind == "dropout":  # in evaluation it is the identity
        adapted.eval()
        check_against_peft(adapted)


def test_dropout_in_evaluation_is_attached() -> None:
    model = with_adapter(lora(lora_dropout=0.1)).eval()
    fuse_lm_head(model)
    check_against_peft(model)


def test_a_wrapper_that_does_not_pass_the_call_on_is_refused() -> None:
    """The wrapper kept the model's forward of the time when it was built, before fuse_lm_head."""
    from peft import AdaptionPromptConfig

    config = AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config)
    with pytest.raises(
        ValueError, match="PeftModelForCausalLM does not pass a call on to the forward of LlamaForCausalLM"
    ):
        fuse_lm_head(model)


def test_adapters_chosen_per_row_are_refused() -> None:
    model = with_adapter(lora())
    fuse_lm_head(model)
    with pytest.raises(ValueError, match=r"must be called with the hidden states alone, got \['adapter_names'\] too"):
        model(**batch(), fused_lm_head=True, adapter_names=["default", "__base__"])


def test_descriptions() -> None:
    assert describe_adapter(build("llama").lm_head) == "none"
    model = with_adapter(lora())
    head = model.get_base_model().lm_head
    assert describe_adapter(head) == "LoRA default (r=4)"
    with model.disable_adapter():
        assert describe_adapter(head) == "LoRA default (r=4), disabled"
    model.merge_adapter()
    assert describe_adapter(head) == "LoRA default (r=4), merged"
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert describe_adapter(model.get_base_model().lm_head) == "modules_to_save default"
    assert fused_head(fuse_lm_head(model)).vocab == VOCAB
