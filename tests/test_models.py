"""Models and tokenizers from every place that ModelArguments names, and the messages when they are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig

from gem.config import ModelArguments
from gem.data import pack
from gem.demo import build_tokenizer
from gem.head import completion_stats, fuse_lm_head
from gem.models import load_model, load_tokenizer


def config(**changes: Any) -> LlamaConfig:
    defaults = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaConfig(**{**defaults, "num_attention_heads": 2, "num_key_value_heads": 2, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """config.json, tok/ (whole) and plain.json: a bare tokenizer whose <eos> is a word like any other."""
    config().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path / "tok")
    plain = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<eos>": 3}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    plain.save(str(tmp_path / "plain.json"))
    return tmp_path


def test_from_scratch(folder: Path) -> None:
    arguments = ModelArguments(model=str(folder / "config.json"), tokenizer=str(folder / "tok"))
    tokenizer = load_tokenizer(arguments)
    torch.manual_seed(3)
    model: Any = load_model(arguments, tokenizer)
    torch.manual_seed(3)
    again: Any = load_model(arguments, tokenizer)
    assert model.get_input_embeddings().weight.shape == (40, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    for c in (model.config, model.generation_config):
        assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (1, 2, 0)


def test_dtype_attention_and_a_saved_folder(folder: Path) -> None:
    arguments = ModelArguments(
        model=str(folder / "config.json"),
        tokenizer=str(folder / "tok"),
        dtype="bfloat16",
        attn_implementation="eager",
    )
    model: Any = load_model(arguments, load_tokenizer(arguments))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(folder / "saved")
    load_tokenizer(arguments).save_pretrained(folder / "saved")
    arguments = ModelArguments(model=str(folder / "saved"))
    saved: Any = load_model(arguments, load_tokenizer(arguments))
    assert {p.dtype for p in saved.parameters()} == {torch.float32}  # what was asked for, not what was saved
    for a, b in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.float(), b)


def test_bare_tokenizer_needs_its_end_of_sequence(folder: Path) -> None:
    bare = str(folder / "plain.json")
    with pytest.raises(ValueError, match="eos_token must be given for this tokenizer"):
        load_tokenizer(ModelArguments(tokenizer=bare))
    with pytest.raises(ValueError, match="eos_token must be a token of the tokenizer, got '<end>'"):
        load_tokenizer(ModelArguments(tokenizer=bare, eos_token="<end>"))
    tokenizer = load_tokenizer(ModelArguments(tokenizer=bare, eos_token="<eos>"))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 3 and len(tokenizer) == 4
    # Special from now on, for the decoder too: else it would show up in every final answer.
    assert tokenizer.decode([1, 3], skip_special_tokens=True) == "a"


def test_tokenizer_file_that_lists_special_tokens(folder: Path) -> None:
    file = str(folder / "tok" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"it names none; its special tokens: .*<eos>"):
        load_tokenizer(ModelArguments(tokenizer=file))
    tokenizer = load_tokenizer(ModelArguments(tokenizer=file, eos_token="<eos>"))
    assert tokenizer.eos_token_id == 2 and tokenizer("1")["input_ids"] == [1, build_tokenizer()("1")["input_ids"][1]]


def test_padding_token_of_the_tokenizer_is_kept(folder: Path) -> None:
    assert load_tokenizer(ModelArguments(tokenizer=str(folder / "tok"))).pad_token == "<pad>"


def test_vocabulary_smaller_than_the_tokenizer(folder: Path) -> None:
    config(vocab_size=16).save_pretrained(folder)
    arguments = ModelArguments(model=str(folder / "config.json"), tokenizer=str(folder / "tok"))
    with pytest.raises(ValueError, match="model must have at least the 17 tokens of the tokenizer, got 16"):
        load_model(arguments, load_tokenizer(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ModelArguments(), "model must be a folder, a hub name, a GGUF file or a config .json, got nothing"),
        (ModelArguments(model="x.json"), "tokenizer must be given with a model from a config file"),
        (ModelArguments(model="x", tokenizer="no.json"), "tokenizer must be an existing file, got 'no.json'"),
        (ModelArguments(model="/no/such/folder"), "model must be .* with a tokenizer, got '/no/such/folder'"),
        (ModelArguments(model="x", tokenizer="/no/such/folder"), "tokenizer must be .*, got '/no/such/folder'"),
    ],
)
def test_tokenizer_that_is_not_there(arguments: ModelArguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "model must be a folder, a hub name, a GGUF file or a config .json, got nothing"),
        ("no.json", "model must be an existing file, got 'no.json'"),
        ("/no/such/folder", "model must be a folder, a hub name, a GGUF file or a config .json, got '/no/such/folder'"),
    ],
)
def test_model_that_is_not_there(model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(model=model), build_tokenizer())


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(folder: Path) -> Path:
    """A pretrained folder: weights, config and tokenizer."""
    arguments = ModelArguments(model=str(folder / "config.json"), tokenizer=str(folder / "tok"))
    tokenizer = load_tokenizer(arguments)
    load_model(arguments, tokenizer).save_pretrained(folder / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def lora(source: Path) -> Any:
    """A peft model whose adapters do something, as after some training."""
    model: Any = load_model(ModelArguments(model=str(source), lora_rank=2), build_tokenizer())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_lora_trains_adapters_only(base: Path) -> None:
    model = lora(base)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trainable) == 2 * len(modules) and all(any(m in name for name in trainable) for m in modules)
    assert not any("lm_head" in name or "embed" in name for name in trainable)


def test_the_head_through_the_peft_wrapper(base: Path) -> None:
    model = lora(base)
    batch = pack([[([1, 9], [8, 7, 2])], [([1], [5, 2])]], layout="right", pad_id=0)
    labels = batch["shift_labels"]
    log_p = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    expected = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    fuse_lm_head(model)
    _, stats = completion_stats(model, batch)
    torch.testing.assert_close(stats.logprob, expected)
    stats.logprob.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_training_goes_on_from_saved_adapters(base: Path, tmp_path: Path) -> None:
    """sft with LoRA, then train with LoRA, then eval: each stage reads the folder that the one before wrote."""
    ids = torch.tensor([[1, 5, 6, 7]])
    first = lora(base)
    first.save_pretrained(tmp_path / "first")
    full: Any = load_model(ModelArguments(model=str(tmp_path / "first")), build_tokenizer())
    torch.testing.assert_close(full(ids).logits, first.eval()(ids).logits)
    assert all(p.requires_grad for p in full.parameters())  # full fine-tuning from there
    second = lora(tmp_path / "first")
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        n for n, p in first.named_parameters() if p.requires_grad
    }
    second.save_pretrained(tmp_path / "second")
    reloaded: Any = load_model(ModelArguments(model=str(tmp_path / "second")), build_tokenizer())
    torch.testing.assert_close(reloaded(ids).logits, second.eval()(ids).logits)
    assert (reloaded(ids).logits - full(ids).logits).abs().max() > 1e-3


def test_adapters_without_a_base_are_refused(base: Path, tmp_path: Path) -> None:
    lora(base).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(
        ValueError,
        match=r"model must name the base of its adapters and their peft_type, got .*adapter_config.json without",
    ):
        load_model(ModelArguments(model=str(tmp_path / "a")), build_tokenizer())
