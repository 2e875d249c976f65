"""GGUF files as models: loading, saving, adapters on them; and the message for every damaged or wrong file."""

from __future__ import annotations

import gzip
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gem import cli
from gem.config import ModelArguments
from gem.doctor import load
from gem.models import load_model, load_tokenizer
from gem.sources import gguf_file
from gem.tasks import build_tokenizer

V, D, F, HEADS = 40, 32, 64, 2
SHAPES = {
    "token_embd": (V, D), "output": (V, D), "output_norm": (D,), "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,),
    "blk.0.attn_q": (D, D), "blk.0.attn_k": (D, D), "blk.0.attn_v": (D, D), "blk.0.attn_output": (D, D),
    "blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write a tiny Llama with matrices in blocks of 8 bits and a tokenizer of single letters; return the rounded weights."""
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
        assert (weight.float() - due).abs().max() < 0.02  # half a step of 8 bits for the largest entry
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
    """Train fully and with LoRA; the adapters load as a model for more training and for doctor."""
    monkeypatch.chdir(tmp_path)
    Path("sft.jsonl").write_text('{"prompt": "ab", "completion": "ba"}\n' * 4)
    common = ["sft", "--data", "sft.jsonl", "--max_steps", "2", "--learning_rate", "0.1", "--use_cpu", "true"]
    assert cli.main([*common, "--model", file.name, "--output_dir", "full"]) == 0
    assert cli.main([*common, "--model", file.name, "--output_dir", "adapters", "--lora_rank", "2"]) == 0
    settings = json.loads(Path("adapters/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(file)  # independent of the working directory
    ids = torch.tensor([[1, 5, 6, 7]])
    merged: Any = load_model(ModelArguments(model="adapters"), build_tokenizer())
    adapted: Any = load("adapters")
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits)
    before: Any = load(str(file))
    assert (merged(ids).logits - before(ids).logits).abs().max() > 1e-3
    assert cli.main([*common, "--model", "adapters", "--output_dir", "second", "--lora_rank", "2"]) == 0
    stacked: Any = load("second")  # their base is the first adapters, merged
    torch.testing.assert_close(
        stacked.eval()(ids).logits, load_model(ModelArguments(model="second"), build_tokenizer())(ids).logits
    )


def test_adapters_that_brought_tokens(file: Path, tmp_path: Path) -> None:
    """The embeddings of the adapters have more rows than those of their base."""
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
    """transformers may add <|endoftext|>, for which the model has no row."""
    tokenizer = load_tokenizer(ModelArguments(model=str(file)))
    assert len(tokenizer) == V and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.decode(tokenizer("<s>abba</s>").input_ids, skip_special_tokens=True) == "abba"


# --- what is none ---------------------------------------------------------------------------------------------------------


def refused(source: Path) -> str:
    """Return the message, which is the same for a model, its tokenizer and doctor's model."""
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


# --- folders that are damaged -----------------------------------------------------------------------------------------


class Running:
    """A pickle that runs code when loaded."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def cut(file: Path, to: int) -> None:
    file.write_bytes(file.read_bytes()[:to])


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def pickled(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def llama(folder: Path, **options: Any) -> Path:
    """Write a tiny checkpoint with its tokenizer."""
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=2, num_key_value_heads=2, eos_token_id=2))
    model.save_pretrained(folder, **options)
    build_tokenizer().save_pretrained(folder)
    return folder


REMOTE = {"AutoConfig": "configuration_zorg.Zorg", "AutoModelForCausalLM": "modeling_zorg.Zorg"}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut off": (lambda d: cut(d / "model.safetensors", -50), r"model.safetensors is cut off or no saf"),
    "header cut off": (lambda d: cut(d / "model.safetensors", 20), r"model.safetensors is cut off or no saf"),
    "empty weights": (lambda d: cut(d / "model.safetensors", 0), r"model.safetensors is cut off or no saf"),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 999), r"model.safetensors is cut off or"),
    "packed weights": (lambda d: (d / "model.safetensors").write_bytes(b"PK\3\4" * 99), r"it seems to be zip, as torch.sav"),
    "fewer weights": (lambda d: change(d / "config.json", num_hidden_layers=2),
                      r"its weights lack model.layers.1.input_layernorm.weight and 8 more, which its config.json asks"),
    "a pointer": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
                  r"model.safetensors is a pointer of git-lfs"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"no file named model.safetensors"),
    "config": (lambda d: (d / "config.json").write_text("{"), r"config.json is not JSON"),
    "config in UTF-16": (lambda d: (d / "config.json").write_text("{}", encoding="utf-16"), r"not text but UTF-16: fetch"),
    "packed config": (lambda d: (d / "config.json").write_bytes(gzip.compress(b"{}")), r"config.json is not text but gzip"),
    "deep config": (lambda d: (d / "config.json").write_text("[" * 99999), r"config.json is not JSON \(maximum recursion"),
    "no folder's file": (lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()), r"cannot be read \(Is a dir"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), r"config.json must hold a JSON object"),
    "config of nothing": (lambda d: (d / "config.json").write_text("{}"), r"Should have a `model_type` key"),
    "no heads": (lambda d: change(d / "config.json", num_attention_heads=0), r"config.json transformers reads"),
    "wrong type": (lambda d: change(d / "config.json", hidden_size="x"), r"hidden_size"),
    "other sizes": (lambda d: change(d / "config.json", hidden_size=32), r"other sizes than its config.json says"),
    "unknown architecture": (lambda d: change(d / "config.json", model_type="zorg"), r"model type `zorg` but Transf"),
    "own code": (lambda d: change(d / "config.json", model_type="zorg", auto_map=REMOTE), r"needs code of its own"),
    "ends": (lambda d: (d / "generation_config.json").write_text("{"), r"generation_config.json is not JSON"),
    "template": (lambda d: (d / "chat_template.jinja").write_bytes("é".encode("utf-16")), r"template.jinja is not text but UT"),
    "latin-1": (lambda d: (d / "chat_template.jinja").write_bytes(b"a" * 99 + b"\xe9"), r"is not UTF-8 text \('utf-8' codec"),
    "package": (lambda d: change(d / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
                r"needs a package that is not installed"),
    "running pickle": (lambda d: pickled(d, Running()), r"weights are a pickle that torch does not load"),
    "garbage pickle": (lambda d: (pickled(d, 1), (d / "pytorch_model.bin").write_bytes(b"\0" * 99)), r"a pickle that"),
    "pickle cut off": (lambda d: (pickled(d, {"a": torch.ones(9)}), cut(d / "pytorch_model.bin", -99)),
                       r"pytorch_model.bin is cut off"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, told = DAMAGE[name]
    damage(llama(tmp_path))
    capsys.readouterr()
    arguments = ModelArguments(model=str(tmp_path))
    for attempt in (lambda: load_model(arguments, build_tokenizer()), lambda: load(str(tmp_path), "cpu")):
        with pytest.raises(ValueError, match=told) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith("model must ") and str(tmp_path) in message and "\n" not in message
        assert len(message) < 450 + len(str(tmp_path))
    assert "run" not in capsys.readouterr().out


SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda d: sorted(d.glob("*-of-*"))[1].unlink(), r"index.json names model-00002-of-0000\d.safe.*, not there"),
    "cut off": (lambda d: cut(sorted(d.glob("*-of-*"))[1], -9), r"model-00002-of-0000\d.safetensors is cut off"),
    "index": (lambda d: (d / "model.safetensors.index.json").write_text("{"), r"index.json is not JSON"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"index.json must hold a weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_shards(name: str, tmp_path: Path) -> None:
    damage, told = SHARDS[name]
    damage(llama(tmp_path, max_shard_size="5KB"))
    for attempt in (lambda: load_model(ModelArguments(str(tmp_path)), build_tokenizer()), lambda: load(str(tmp_path))):
        with pytest.raises(ValueError, match=told):
            attempt()


def other_class(name: str, vocabulary: str, **settings: Any) -> Callable[[Path], None]:
    """Return a damage: a tokenizer of that class, whose vocabulary file another package reads."""

    def damage(folder: Path) -> None:
        change(folder / "tokenizer_config.json", tokenizer_class=name, **settings)
        (folder / "tokenizer.json").unlink()
        (folder / vocabulary).write_bytes(b"xx")

    return damage


REMOTE_TOKENIZER = {"AutoTokenizer": ["tokenization_zorg.Zorg", None]}
TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "garbage": (lambda d: (d / "tokenizer.json").write_text("{"), r"tokenizer.json is not JSON"),
    "something else": (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), r"tokenizer.json is not of the tokenizers"),
    "settings": (lambda d: (d / "tokenizer_config.json").write_text("no"), r"tokenizer_config.json is not JSON"),
    "none": (lambda d: (d / "tokenizer.json").unlink(), r"instantiate the backend tokenizer"),
    "own code": (lambda d: change(d / "tokenizer_config.json", tokenizer_class="Zorg", auto_map=REMOTE_TOKENIZER),
                 r"needs code of its own"),
    "sentencepiece": (other_class("LlamaTokenizer", "tokenizer.model"), r"(?i)sentencepiece|tiktoken|protobuf"),
    "an old class": (other_class("BartphoTokenizer", "sentencepiece.bpe.model"), r"(?i)sentencepiece|monolingual"),
    "a dictionary": (other_class("BertJapaneseTokenizer", "vocab.txt", word_tokenizer_type="mecab"), r"fugashi"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_one_line(name: str, tmp_path: Path) -> None:
    damage, told = TOKENIZERS[name]
    damage(llama(tmp_path))
    for arguments, what in (
        (ModelArguments(model=str(tmp_path)), "model"),
        (ModelArguments(model="x", tokenizer=str(tmp_path)), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            load_tokenizer(arguments)
        assert str(caught.value).startswith(f"{what} must be ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"model": {"type": "Zorg"}, "added_tokens": []}'])
def test_a_damaged_tokenizer_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer.json of tokenizers, got .*t.json': "):
        load_tokenizer(ModelArguments(model="x", tokenizer=str(tmp_path / "t.json")))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "zorg"}', '{"model_type": "t5"}'])
def test_a_damaged_config_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"model must be the config .json of a causal language model, got .*c.json': "):
        load_model(ModelArguments(model=str(tmp_path / "c.json"), tokenizer="x"), build_tokenizer())
    with pytest.raises(ValueError, match=r"model must be .*, got .*c.json'") as caught:
        load(str(tmp_path / "c.json"))
    assert "\n" not in str(caught.value)


CONFIG = "adapter_config.json"
OF_ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "settings": (lambda d: (d / CONFIG).write_text("{"), r"adapters whose config is JSON, got .*adapter_config.json"),
    "settings of bytes": (lambda d: (d / CONFIG).write_bytes(b"\xff"), r"adapters whose config is JSON"),
    "a base that is no name": (lambda d: change(d / CONFIG, base_model_name_or_path=3), r"must name the base"),
    "a base that is gone": (lambda d: change(d / CONFIG, base_model_name_or_path="/no/such/base"),
                            r"got '/no/such/base': no such folder, .*\(the base that .*adapter_config.json names\)"),
    "its own base": (lambda d: change(d / CONFIG, base_model_name_or_path=str(d)), r"adapters that come to a base"),
    "unknown kind": (lambda d: change(d / CONFIG, peft_type="ZORG"), r"a folder of adapters of .*KeyError: 'ZORG'"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), r"without adapter_model"),
    "weights cut off": (lambda d: cut(d / "adapter_model.safetensors", -9), r"adapter_model.safetensors is cut off"),
    "another rank": (lambda d: change(d / CONFIG, r=4), r"size mismatch"),
    "other layers": (lambda d: change(d / CONFIG, target_modules=["k_proj"]), r"missing adapter keys"),
    "no such layers": (lambda d: change(d / CONFIG, target_modules=["zorg"]), r"not found in the base model"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_damaged_adapters_are_one_line(name: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base"))
    folder = tmp_path / "adapters"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    damage, told = OF_ADAPTERS[name]
    damage(folder)
    for attempt in (lambda: load_model(ModelArguments(str(folder)), build_tokenizer()), lambda: load(str(folder))):
        with pytest.raises(ValueError, match=told) as caught:
            attempt()
        assert str(caught.value).startswith("model must ") and "\n" not in str(caught.value)


def test_adapters_that_are_no_part_of_a_weight(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base"))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompts).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"adapters that merge into its weights, got .* with .*PROMPT_TUNING"):
        load_model(ModelArguments(str(tmp_path / "adapters")), build_tokenizer())


def test_a_device_that_does_not_take_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 MiB")

    llama(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(ValueError, match=r"device must take the model in its dtype .*, got 'cpu': CUDA out of memory"):
        load_model(ModelArguments(str(tmp_path)), build_tokenizer())
