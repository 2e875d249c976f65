"""What fuse_lm_head refuses when it checks a model, and what a fused call notices later: nothing wrong gets through."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from architectures import TEXT, VOCAB, build
from peft import LoraConfig, get_peft_model
from planted_faults import TINY, refusal
from test_head import batch, entropy_weighted, from_logits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gem.head import fuse_lm_head, fused_head, unfuse

# --- the self-check -----------------------------------------------------------------------------------------------------


class Changed(LlamaForCausalLM):
    """Does something to its logits that its config does not name."""

    change = staticmethod(lambda z: z * 1.7)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
        return out


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


# --- known hidden states: the head's own forward ------------------------------------------------------------------------


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
    """However large the hidden states: known ones go through the head without a rounding."""
    model = (outliers(build("llama")) if name == "outliers" else build(name)).to(dtype)
    unfuse(fuse_lm_head(model))
    assert refusal(model, fault, SIZES[fault][dtype == torch.bfloat16])
    unfuse(fuse_lm_head(model))


def test_a_refusal_names_the_numbers_and_what_rounding_explains() -> None:
    told = refusal(build("llama"), "x added to one entry of its bias", 0.01)
    assert re.search(
        r"more than the product with its weight: it gives a logit .*, the product is .*, and rounding explains 1[.]4e-05",
        str(told),
    )
    told = refusal(build("llama"), "a z-loss, x lse²", 1e-3)
    assert re.search(r"its own is [\d.]+, ours [\d.]+, and rounding explains [\d.]+e-0[5-9]", str(told))


# --- what is not finite -------------------------------------------------------------------------------------------------


def spoil(get: Any, at: tuple[int, ...], value: float) -> Any:
    def plant(model: Any) -> None:
        with torch.no_grad():
            get(model)[at] = value

    return plant


OF_PHI = "the bias of the lm_head of PhiForCausalLM must"
NOT_FINITE = {
    "weight": (
        "llama",
        spoil(lambda m: m.lm_head.weight, (3, 3), torch.nan),
        "the weight of the lm_head of LlamaForCausalLM must be finite, got nan at [3, 3]",
    ),
    "infinite weight": ("llama", spoil(lambda m: m.lm_head.weight, (96, 0), -torch.inf), "got -inf at [96, 0]"),
    "bias": ("phi", spoil(lambda m: m.lm_head.bias, (7,), torch.nan), f"{OF_PHI} be finite, got nan at [7]"),
    "infinite bias": ("phi", spoil(lambda m: m.lm_head.bias, (7,), torch.inf), f"{OF_PHI} be finite, got inf at [7]"),
    "no token": (
        "phi",
        spoil(lambda m: m.lm_head.bias, (slice(None),), -torch.inf),
        f"{OF_PHI} leave a token that can occur, got -inf in every entry",
    ),
    "body": (
        "llama",
        spoil(lambda m: m.model.layers[1].mlp.up_proj.weight, (2, 5), torch.nan),
        "the hidden states that LlamaForCausalLM hands to its lm_head must be finite, got nan at [0, 0, 0]: "
        "model.layers.1.mlp.up_proj.weight holds nan at [2, 5]",
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
        ValueError,
        match=re.escape("the adapter's B of the lm_head of LlamaForCausalLM must be finite, got inf at [4, 1]"),
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


class Bent(nn.Linear):
    """Nearly a product while its logits are small."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 59 * torch.tanh(super().forward(hidden) / 59)


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


def test_a_model_that_needs_more_than_tokens_is_told_off() -> None:
    with pytest.raises(
        ValueError, match=r"Picky must run on token ids and labels alone .* TypeError\('pixels are missing'\)"
    ):
        fuse_lm_head(Picky(LlamaConfig(**TEXT)))


# --- a loss that counts otherwise ------------------------------------------------------------------------------------------


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


# --- right models that a bound must not refuse -----------------------------------------------------------------------------


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


# --- what changes after the check: noticed in every call ------------------------------------------------------------------


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
