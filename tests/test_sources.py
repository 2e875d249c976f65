"""GGUF files as models: what is loaded, what is saved, adapters on them, and the message of every file that is none."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem import cli
from gem.config import ModelArguments
from gem.demo import build_tokenizer
from gem.doctor import load
from gem.models import load_model, load_tokenizer
from gem.sources import gguf_file

V, D, F, HEADS = 40, 32, 64, 2
SHAPES = {
    "token_embd": (V, D), "output": (V, D), "output_norm": (D,), "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,),
    "blk.0.attn_q": (D, D), "blk.0.attn_k": (D, D), "blk.0.attn_v": (D, D), "blk.0.attn_output": (D, D),
    "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A tiny Llama whose matrices are in blocks of 8 bits, with a tokenizer of single letters. Returns what was rounded."""
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_vocab_size(V)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "ba", *(f"<{i}>" for i in range(9))]
    assert len(tokens) == V
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") else 1 for t in tokens])
    writer.add_token_merges(["a b", "b a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng, weights = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        weight = rng.normal(size=shape, scale=0.3).astype(np.float32)
        weights[name] = weight
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_weights_are_dequantised(named: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    source = tmp_path / "tiny.gguf" if named == "file" else tmp_path
    arguments = ModelArguments(model=str(source), dtype=dtype)
    with caplog.at_level(logging.INFO, logger="gem.sources"):
        model: Any = load_model(arguments, load_tokenizer(arguments))
    assert f"{tmp_path / 'tiny.gguf'} is a GGUF file: its weights are de-quantised to {dtype}" in caplog.text
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert type(model.lm_head) is nn.Linear
    for name, weight in (("output", model.lm_head.weight), ("token_embd", model.get_input_embeddings().weight)):
        due = torch.from_numpy(weights[name])
        assert (weight.float() - due).abs().max() < 0.02  # half a step of 8 bits of the largest
        assert not torch.equal(weight.float(), due)


def test_it_is_saved_as_an_ordinary_checkpoint(file: Path, tmp_path: Path) -> None:
    arguments = ModelArguments(model=str(file))
    tokenizer = load_tokenizer(arguments)
    model: Any = load_model(arguments, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    read = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert read.chat_template == tokenizer.chat_template == TEMPLATE
    assert (
        read("abba<s>").input_ids == tokenizer("abba<s>").input_ids and read.eos_token == tokenizer.eos_token == "</s>"
    )


def test_training_and_adapters(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and with LoRA, whose adapters then are a model of their own, for training on and for doctor."""
    monkeypatch.chdir(tmp_path)
    Path("sft.jsonl").write_text('{"prompt": "ab", "completion": "ba"}\n' * 4)
    common = ["sft", "--data", "sft.jsonl", "--max_steps", "2", "--learning_rate", "0.1", "--use_cpu", "true"]
    assert cli.main([*common, "--model", file.name, "--output_dir", "full"]) == 0
    assert cli.main([*common, "--model", file.name, "--output_dir", "adapters", "--lora_rank", "2"]) == 0
    settings = json.loads(Path("adapters/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(file)  # whatever folder one is in
    ids = torch.tensor([[1, 5, 6, 7]])
    merged: Any = load_model(ModelArguments(model="adapters"), build_tokenizer())
    adapted: Any = load("adapters")
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits)
    before: Any = load(str(file))
    assert (merged(ids).logits - before(ids).logits).abs().max() > 1e-3
    assert cli.main([*common, "--model", "adapters", "--output_dir", "second", "--lora_rank", "2"]) == 0
    stacked: Any = load("second")  # their base are the first adapters, merged
    torch.testing.assert_close(
        stacked.eval()(ids).logits, load_model(ModelArguments(model="second"), build_tokenizer())(ids).logits
    )


def test_adapters_that_brought_tokens(file: Path, tmp_path: Path) -> None:
    """Their embeddings have more rows than those of their base."""
    arguments = ModelArguments(model=str(file))
    tokenizer = load_tokenizer(arguments)
    model: Any = load_model(arguments, tokenizer)
    tokenizer.add_tokens(["new", "newer"])
    model.resize_token_embeddings(len(tokenizer))
    adapters = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, adapters).save_pretrained(tmp_path / "adapters")
    tokenizer.save_pretrained(tmp_path / "adapters")
    arguments = ModelArguments(model=str(tmp_path / "adapters"))
    assert load_model(arguments, load_tokenizer(arguments)).get_input_embeddings().weight.shape == (V + 2, D)  # type: ignore[operator]


def test_an_ordinary_checkpoint_beside_it_comes_first(file: Path, tmp_path: Path) -> None:
    arguments = ModelArguments(model=str(file))
    model: Any = load_model(arguments, load_tokenizer(arguments))
    nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    assert gguf_file(str(tmp_path)) is None and gguf_file(str(file)) == file
    assert not load(str(tmp_path)).lm_head.weight.any()  # type: ignore[union-attr]


def test_a_tokenizer_beside_it_comes_first(file: Path, tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    for source in (tmp_path, file):
        assert len(load_tokenizer(ModelArguments(model=str(source)))) == len(build_tokenizer())


def test_a_tokenizer_has_the_tokens_of_its_file(file: Path) -> None:
    """transformers may add one more, <|endoftext|>, for which the model has no row."""
    tokenizer = load_tokenizer(ModelArguments(model=str(file)))
    assert len(tokenizer) == V and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.decode(tokenizer("<s>abba</s>").input_ids, skip_special_tokens=True) == "abba"


# --- what is none ---------------------------------------------------------------------------------------------------------


def refused(source: Path) -> str:
    """The message, the same for a model, its tokenizer and doctor's model."""
    messages = set()
    for attempt in (
        lambda: load_tokenizer(ModelArguments(model=str(source))),
        lambda: load_model(ModelArguments(model=str(source)), build_tokenizer()),
        lambda: load(str(source)),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith("model ") and str(source) in message
    return message


def test_a_file_of_something_else(tmp_path: Path) -> None:
    for name in ("notes.gguf", "model.safetensors"):
        (tmp_path / name).write_bytes(b"gguf, more or less")
        assert "a GGUF file or a config .json, got" in (message := refused(tmp_path / name))
        assert message.endswith("a file that does not begin with GGUF")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.gguf") == f"model must be an existing file, got {str(tmp_path / 'no.gguf')!r}"


@pytest.mark.parametrize("kept", [4, 100, 900, -700])
def test_a_file_that_was_cut_off(kept: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    for attempt in (lambda: load(str(file)), lambda: load_model(ModelArguments(str(file)), build_tokenizer())):
        with pytest.raises(
            ValueError, match="model must be a whole GGUF file of an architecture that .*, got .*tiny.gguf"
        ):
            attempt()


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "perceptron")
    assert "model must be a whole GGUF file of an architecture that transformers reads, got" in refused(
        tmp_path / "a.gguf"
    )


def test_a_folder_of_several(file: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "b.GGUF")
    assert refused(tmp_path).endswith("with b.GGUF, tiny.gguf")


def test_a_bad_tokenizer_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer must be an existing file, got '/no\.gguf'"):
        load_tokenizer(ModelArguments(model="x", tokenizer="/no.gguf"))


def test_the_package_that_reads_them_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.setattr(reader, "is_gguf_available", lambda *_: False)
    assert "is a GGUF file, which needs pip install 'gem-kernels[gguf]' (" in refused(file)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for argv in (("doctor", str(tmp_path)), ("eval", "--model", str(tmp_path), "--data", "x.jsonl")):
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and f"{tmp_path / 'a.gguf'}" in err
