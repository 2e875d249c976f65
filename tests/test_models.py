"""Models and tokenizers from every source that ModelArguments names, and the messages for missing ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gem import cli
from gem.config import ModelArguments
from gem.data import pack
from gem.doctor import load
from gem.ends import Ends, model_ends
from gem.finite import not_finite_weights
from gem.head import completion_stats, fuse_lm_head
from gem.models import load_model, load_tokenizer, source_ends
from gem.tasks import build_tokenizer


def config(**changes: Any) -> LlamaConfig:
    defaults = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaConfig(**{**defaults, "num_attention_heads": 2, "num_key_value_heads": 2, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write config.json, tok/ (whole) and plain.json: a bare tokenizer whose <eos> is an ordinary word."""
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
    assert {p.dtype for p in saved.parameters()} == {torch.float32}  # the requested dtype, not the saved one
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
    # It is special for the decoder too, else it would appear in every final answer.
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
    """Write a pretrained folder: weights, config and tokenizer."""
    arguments = ModelArguments(model=str(folder / "config.json"), tokenizer=str(folder / "tok"))
    tokenizer = load_tokenizer(arguments)
    load_model(arguments, tokenizer).save_pretrained(folder / "base")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def lora(source: Path) -> Any:
    """Return a peft model whose adapters have an effect, as after some training."""
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
    """In sft with LoRA, train with LoRA, then eval, each stage reads the folder of the one before."""
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


# --- adapters that brought tokens -------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "projection": {"target_modules": ["q_proj"]},
    "embeddings saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 18]},
    "on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
IDS = torch.tensor([[1, 5, 6, 7, 16, 3]])


def with_adapters(folder: Path, settings: dict[str, Any], *, rows: int, tied: bool, tokenizer: Any = None) -> Any:
    """Write base/ of 40 tokens and adapters/ trained with `rows` of them, as peft saves them; return the peft model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config(tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=1))
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    adapted.save_pretrained(folder / "adapters")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "adapters")
    return adapted.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [19, 42, 64])  # vocabularies: cut, with two new tokens, padded
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_loaded_with_their_vocabulary(name: str, rows: int, tied: bool, tmp_path: Path) -> None:
    """The adapted, the merged and the saved model have the same logits."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    expected = with_adapters(tmp_path, ADAPTERS[name], rows=rows, tied=tied, tokenizer=tokenizer)(IDS).logits
    arguments = ModelArguments(model=str(tmp_path / "adapters"))
    assert len(load_tokenizer(arguments)) == 19
    merged: Any = load_model(arguments, load_tokenizer(arguments))
    merged.save_pretrained(tmp_path / "merged")
    saved: Any = load_model(ModelArguments(model=str(tmp_path / "merged")), tokenizer)
    for model in (load(str(tmp_path / "adapters"), "cpu"), merged, saved):
        torch.testing.assert_close(cast(Any, model).eval()(IDS).logits, expected, atol=2e-3, rtol=1e-3)
    assert merged.get_input_embeddings().weight.shape == (rows, 16)
    assert merged.config.tie_word_embeddings == torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_tokens_in_spare_rows_and_a_narrower_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    expected = with_adapters(tmp_path, ADAPTERS["projection"], rows=40, tied=False, tokenizer=tokenizer)(IDS).logits
    arguments = ModelArguments(model=str(tmp_path / "adapters"))
    torch.testing.assert_close(load_model(arguments, load_tokenizer(arguments)).eval()(IDS).logits, expected)


def test_adapters_saved_without_a_tokenizer_have_their_bases(tmp_path: Path) -> None:
    with_adapters(tmp_path, ADAPTERS["projection"], rows=43, tied=False)
    arguments = ModelArguments(model=str(tmp_path / "adapters"))
    tokenizer = load_tokenizer(arguments)
    assert len(tokenizer) == 17 and tokenizer.eos_token == "<eos>"
    assert load_model(arguments, tokenizer).get_input_embeddings().weight.shape == (43, 16)  # type: ignore[operator]


def test_new_tokens_whose_embeddings_were_not_saved_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(30)])
    with_adapters(tmp_path, ADAPTERS["projection"], rows=40, tied=False, tokenizer=tokenizer)
    arguments = ModelArguments(model=str(tmp_path / "adapters"))
    assert load_model(arguments, load_tokenizer(arguments)).get_input_embeddings().weight.shape == (47, 16)  # type: ignore[operator]
    assert "7 new tokens without their embeddings, which are made anew" in caplog.text


def test_adapters_of_adapters_with_tokens(tmp_path: Path) -> None:
    """The second adapters have the first as their base; each adds rows."""
    tokenizer = build_tokenizer()
    with_adapters(tmp_path, ADAPTERS["on both"], rows=42, tied=True, tokenizer=tokenizer)
    first = str(tmp_path / "adapters")
    model: Any = load_model(ModelArguments(model=first), tokenizer)
    model.resize_token_embeddings(45)
    second = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
    second.save_pretrained(tmp_path / "second", save_embedding_layers=True)
    again: Any = load_model(ModelArguments(model=str(tmp_path / "second")), tokenizer)
    torch.testing.assert_close(again.eval()(IDS).logits, second.eval()(IDS).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("command", ["eval", "score", "sft"])
def test_commands_on_adapters_that_brought_tokens(command: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(25)])  # one more than the base's rows hold
    tokenizer.add_tokens(["<tool>"])
    with_adapters(tmp_path, ADAPTERS["projection"], rows=len(tokenizer), tied=False, tokenizer=tokenizer)
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "1+2=", "chosen": "<tool> #### 3", "rejected": "#### 4"}\n' * 2)
    options = {
        "eval": ["--max_new_tokens", "2", "--device", "cpu"],
        "score": ["--max_new_tokens", "2", "--device", "cpu", "--output", str(tmp_path / "groups.jsonl")],
        "sft": ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "true"],
    }
    assert cli.main([command, "--model", str(tmp_path / "adapters"), "--data", str(data), *options[command]]) == 0


def test_a_padding_token_beyond_the_model(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(23)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 40  # as in Alpaca's recipe without
    load_model(ModelArguments(model=str(base)), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "no embedding for [PAD], which pads: the end of sequence pads" in caplog.text
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="model must have at least the 42 tokens of the tokenizer, got 40"):
        load_model(ModelArguments(model=str(base)), tokenizer)


@pytest.mark.parametrize("eos", [2, [2, 5], None])
def test_ends_before_the_weights_are_read_are_those_of_the_model(folder: Path, eos: Any) -> None:
    tokenizer = load_tokenizer(ModelArguments(tokenizer=str(folder / "tok")))
    assert source_ends(ModelArguments(str(folder / "config.json")), tokenizer, ["Q:"]) == Ends(frozenset([2]), ("Q:",))
    model: Any = load_model(ModelArguments(str(folder / "config.json")), tokenizer)
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, eos
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    arguments = ModelArguments(str(folder / "saved"))
    expected = model_ends(load_model(arguments, tokenizer), tokenizer)
    assert source_ends(arguments, tokenizer) == expected
    for file in (folder / "saved").glob("*.safetensors"):
        file.unlink()
    assert source_ends(arguments, tokenizer) == expected
    (folder / "saved" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model must be .*config\.json"):
        source_ends(arguments, tokenizer)


# --- weights that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(base: Path, value: float) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][3, :2] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    message = (
        rf"model must have finite weights, got {value} in model.embed_tokens.weight \(2 of 640 entries\) in '{base}'"
    )
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(model=str(base)), build_tokenizer())


def test_adapters_that_are_not_finite_are_named(base: Path, tmp_path: Path) -> None:
    adapters = lora(base)
    with torch.no_grad():
        adapters.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.nan
    adapters.save_pretrained(tmp_path / "adapters")
    with pytest.raises(
        ValueError, match=r"finite weights, got nan in model.layers.0.mlp.up_proj.weight \(16 of 384 entries\)"
    ):
        load_model(ModelArguments(model=str(tmp_path / "adapters")), build_tokenizer())


def test_weights_that_cannot_be_looked_into_are_passed_over() -> None:
    model = LlamaForCausalLM(config())
    assert not_finite_weights(model) == not_finite_weights(LlamaForCausalLM(config()).to("meta")) == ""
    model.lm_head.bias = torch.nn.Parameter(torch.tensor([-torch.inf] + 39 * [0.0]))  # its first token never occurs
    assert not_finite_weights(model) == ""
    with torch.no_grad():
        model.lm_head.bias[1] = torch.inf
    assert not_finite_weights(model) == "inf in lm_head.bias (1 of 40 entries)"
