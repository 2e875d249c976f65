"""The ends of a completion, the ends that are saved with a model, and templates whose turns do not end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from gem.config import GuardArguments, LossArguments, ModelArguments
from gem.ends import Ends, ends_of, model_ends, own_ends, warn_if_turns_do_not_end
from gem.groups import Group, Member
from gem.models import load_model, load_tokenizer
from gem.trainer import GEMTrainer

SPECIAL = ("<eos>", "<bos>", "<pad>", "<eot>", "<eom>")  # ids 256 to 260, behind the bytes
EOS, BOS, PAD, EOT, EOM = range(256, 261)


def byte_tokenizer(template: str | None = None, **roles: str | None) -> Any:
    """Return a tokenizer with one token a byte, so that a character may be several, and the special tokens above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    for role, token in {"eos_token": "<eos>", **roles}.items():
        if token is not None:
            tokenizer.add_special_tokens({role: token})
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**{**defaults, "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": EOS, **changes})
    )


# --- which ids end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, {EOS}),
        (EOT, {EOS, EOT}),
        ([EOT, EOM], {EOS, EOT, EOM}),
        ([EOS], {EOS}),
        ([], {EOS}),
        (torch.tensor([EOT, EOS]), {EOS, EOT}),
        (0, {EOS, 0}),
    ],
)
def test_all_ids_of_a_generation_config(named: Any, expected: set[int]) -> None:
    config = GenerationConfig()
    config.eos_token_id = named
    assert ends_of(byte_tokenizer(), config) == Ends(frozenset(expected))


def test_a_tokenizer_alone_and_texts() -> None:
    assert ends_of(byte_tokenizer(), stop=["\n\n", "User:"]) == Ends(frozenset({EOS}), ("\n\n", "User:"))
    assert ends_of(byte_tokenizer(eos_token="<eot>")).ids == {EOT}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([EOT, EOM], EOS, {EOT, EOM, EOS}),
        (None, [EOT, EOM], {EOS, EOT, EOM}),  # transformers' fallback
        (None, 7, {EOS, 7}),
        (EOT, 2, {EOS, EOT}),  # the class's default, here an ordinary letter
        (EOT, [2, EOM], {EOS, EOT, EOM}),
    ],
)
def test_a_models_ends(generation: Any, config: Any, expected: set[int]) -> None:
    model = tiny()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    tokenizer = byte_tokenizer()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    wrapped = torch.nn.Module()
    wrapped.module = adapted  # as in torch's wrappers
    for m in (model, adapted, wrapped):
        assert model_ends(m, tokenizer).ids == expected
    assert model_ends(model, tokenizer, ["x"]).texts == ("x",)


def test_the_ends_of_a_text_part() -> None:
    """A multimodal model names its ends in its text config."""

    class Outer:
        eos_token_id = None

        def get_text_config(self) -> Any:
            return LlamaConfig(eos_token_id=[EOT, EOM])

    model = torch.nn.Module()
    model.config, model.generation_config = Outer(), GenerationConfig()  # type: ignore[assignment]
    assert own_ends(model) == {EOT, EOM}


@pytest.mark.parametrize("wrong", ["<eos>", [1.5], ["1"]])
def test_ends_that_are_no_ids(wrong: Any) -> None:
    model = tiny()
    model.generation_config.eos_token_id = wrong
    with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them in a model's configs, got"):
        own_ends(model)


# --- what has ended ---------------------------------------------------------------------------------------------------


def test_ended_by_any_id() -> None:
    ends, tokenizer = Ends(frozenset({EOS, EOT})), byte_tokenizer()
    assert ends.has_ended([1, EOS], tokenizer) and ends.has_ended([EOT], tokenizer)
    assert not ends.has_ended([], tokenizer) and not ends.has_ended([EOS, 1], tokenizer)
    assert not ends.has_ended([1, EOM], tokenizer)
    assert ends.cut([1, EOT, 2, EOS, PAD]) == [1, EOT] and ends.cut([1, 2]) == [1, 2] and ends.cut([]) == []
    assert ends.content([1, 2, EOT], tokenizer) == [1, 2] and ends.content([1, 2], tokenizer) == [1, 2]


@pytest.mark.parametrize(
    ("said", "stop", "kept", "content"),
    [
        ("a\n\nb", ("\n\n",), "a\n\n", "a"),
        ("7 User: 8 User:", ("User:",), "7 User:", "7 "),
        ("été fini là", ("fini",), "été fini", "été "),
        ("答え。次", ("。",), "答え。", "答え"),  # three bytes, so three tokens
        ("ab cd", ("cd", "b"), "ab", "a"),  # the text that is completed first
        ("abc", ("abc", "b"), "ab", "a"),
        ("END", ("END",), "END", ""),
        ("going on", ("stop",), "going on", "going on"),
    ],
)
def test_cut_where_a_text_is_complete(said: str, stop: tuple[str, ...], kept: str, content: str) -> None:
    ends, tokenizer = Ends(frozenset({EOS}), stop), byte_tokenizer()
    cut = ends.cut([*ids_of(said), PAD, PAD], tokenizer)
    assert cut[: len(ids_of(kept))] == ids_of(kept)
    assert cut == ids_of(kept) or not ends.has_ended(cut, tokenizer)
    assert ends.has_ended(cut, tokenizer) == (kept != "going on")
    assert ends.content(ids_of(kept), tokenizer) == ids_of(content)


def test_a_text_behind_the_end_is_nobodys() -> None:
    ends, tokenizer = Ends(frozenset({EOS}), ("stop",)), byte_tokenizer()
    assert ends.cut([*ids_of("a"), EOS, *ids_of("stop")], tokenizer) == [*ids_of("a"), EOS]
    # A record's completion that contains the text and ends with its own end is whole.
    whole = [*ids_of("do not stop here"), EOS]
    assert ends.content(whole, tokenizer) == whole[:-1]


def test_a_special_token_as_text() -> None:
    ends, tokenizer = Ends(frozenset({EOS}), ("<eot>",)), byte_tokenizer()
    assert ends.cut([*ids_of("a"), EOT, 5], tokenizer) == [*ids_of("a"), EOT]
    assert ends.has_ended([EOT], tokenizer) and not ends.has_ended([EOM], tokenizer)


# --- templates --------------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eot>\n' }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n###\n' }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
PARTS = "{% for m in messages %}{{ m['role'] + m['content'][0]['text'] + '<eot>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "stop", "told"),
    [
        (CHATML, (), "ends a turn with <eot>, which is no end of this model: give --eos_token '<eot>'"),
        (PARTS, (), "ends a turn with <eot>, which is no end of this model: give --eos_token '<eot>'"),
        (CHATML.replace("<eot>", "<|im_end|>"), (), "with the text '<|im_end|>', which is no end: give --stop"),
        (PLAIN, (), "with the text '###', which is no end: give --stop '###'"),
        (PLAIN, ("###",), None),
        (CHATML.replace("<eot>", "<eos>"), (), None),
        (CHATML.replace("<eot>", "<eot><eos>"), (), None),
        (NO_END, (), None),  # the encoder adds the end of sequence
        ("{{ raise_exception('no') }}", (), None),
        ("{{ messages[0]['content'] }}", (), None),
        (None, (), None),
    ],
)
def test_a_template_whose_turns_do_not_end(
    template: str | None, stop: tuple[str, ...], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer(template)
    warn_if_turns_do_not_end(tokenizer, ends_of(tokenizer, stop=stop))
    assert len(caplog.records) == (told is not None) and (told or "") in caplog.text


def test_turns_that_end_by_the_models_list(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, config = byte_tokenizer(CHATML), GenerationConfig()
    config.eos_token_id = [EOS, EOT]
    warn_if_turns_do_not_end(tokenizer, ends_of(tokenizer, config))
    assert not caplog.records


# --- what is saved ----------------------------------------------------------------------------------------------------

# Name of the publisher: eos of config.json, generation_config.json, and the tokenizer's roles.
PUBLISHED: dict[str, tuple[Any, dict[str, Any], dict[str, str | None]]] = {
    "two ends": ([EOS, EOT], {"eos_token_id": [EOS, EOT], "bos_token_id": BOS, "top_k": 64}, {"bos_token": "<bos>"}),
    "three ends": (EOS, {"eos_token_id": [EOS, EOM, EOT], "bos_token_id": BOS, "do_sample": True, "temperature": 0.6,
                         "top_p": 0.9}, {"eos_token": "<eot>", "pad_token": "<pad>"}),
    "no beginning": (EOT, {"eos_token_id": [EOT, EOS], "pad_token_id": EOS, "repetition_penalty": 1.1}, {}),
    "ends of the config alone": ([EOS, EOT], {"max_length": 99}, {"bos_token": "<bos>", "pad_token": "<pad>"}),
    "another end than the config's": (EOS, {"eos_token_id": EOT}, {"eos_token": "<eom>"}),
    "sampling not switched on": (EOS, {"eos_token_id": [EOS, EOT], "temperature": 0.6, "top_p": 0.9}, {}),
}  # fmt: skip


def publish(folder: Path, name: str) -> Path:
    of_config, generation, roles = PUBLISHED[name]
    tiny(eos_token_id=of_config, bos_token_id=BOS).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    byte_tokenizer(**roles).save_pretrained(folder)
    return folder


def settings_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of generation_config.json, and the special tokens of config.json."""
    generation, config = (json.loads((folder / f"{n}.json").read_text()) for n in ("generation_config", "config"))
    said = {k: v for k, v in generation.items() if k not in ("transformers_version", "_from_model_config")}
    return said, {k: config.get(k) for k in ("eos_token_id", "bos_token_id", "pad_token_id")}


def trained(folder: Path, output: Path, **changes: Any) -> Path:
    """Run one step of supervised training and save as the command line does; return the folder."""
    arguments = ModelArguments(model=str(folder), **changes)
    tokenizer = load_tokenizer(arguments)
    model = load_model(arguments, tokenizer)
    options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(str(output), max_steps=1, save_steps=1, **options)
    groups = [Group("a", ids_of("a"), [Member("chosen", [*ids_of("b"), EOS])])]
    loss = LossArguments(loss="sft")
    trainer = GEMTrainer(
        model, args, loss=loss, guard=GuardArguments(), train_dataset=groups, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return output


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_trained_model_says_what_it_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = publish(tmp_path / "published", name)
    output = trained(folder, tmp_path / "trained")
    for saved in (output, output / "checkpoint-1"):
        (was, was_config), (is_, is_config) = settings_of(folder), settings_of(saved)
        assert is_config == was_config
        assert {k: v for k, v in is_.items() if k in was} == was
        assert "eos_token_id" in was or is_.get("eos_token_id") is None
    # Trainer's warning that it has changed them would be wrong.
    assert "PAD/BOS/EOS" not in caplog.text


def test_adapters_leave_their_base_as_it_is(tmp_path: Path) -> None:
    folder = publish(tmp_path / "published", "three ends")
    adapters = trained(folder, tmp_path / "adapters", lora_rank=2)
    merged = trained(adapters, tmp_path / "merged")  # full training on adapters saves the whole
    (was, was_config), (is_, is_config) = settings_of(folder), settings_of(merged)
    assert is_config == was_config and {k: v for k, v in is_.items() if k in was} == was


def test_an_end_that_was_asked_for_is_added(tmp_path: Path) -> None:
    folder = publish(tmp_path / "published", "two ends")
    generation, config = settings_of(trained(folder, tmp_path / "trained", eos_token="<eom>"))
    assert generation["eos_token_id"] == config["eos_token_id"] == [EOM, EOS, EOT]
    assert generation["bos_token_id"] == config["bos_token_id"] == BOS and generation["top_k"] == 64
    folder = publish(tmp_path / "other", "three ends")
    generation, config = settings_of(trained(folder, tmp_path / "again", eos_token="<eom>"))
    assert generation["eos_token_id"] == [EOS, EOM, EOT] and config["eos_token_id"] == EOM


def test_an_end_that_the_model_does_not_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(publish(tmp_path, "another end than the config's"))
    model = load_model(ModelArguments(model=folder), tokenizer := load_tokenizer(ModelArguments(model=folder)))
    assert (
        "end of sequence <eom> is none of the model's ['<eot>']" in caplog.text and "--eos_token '<eom>'" in caplog.text
    )
    assert model_ends(model, tokenizer).ids == {EOS, EOT, EOM}


def test_a_generation_config_that_is_refused_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = publish(tmp_path / "published", "sampling not switched on")
    changed = trained(folder, tmp_path / "trained", eos_token="<eom>")  # transformers saves it only with do_sample
    said, _ = settings_of(changed)
    assert said["do_sample"] is True and said["temperature"] == 0.6 and said["eos_token_id"] == [EOM, EOS, EOT]
    assert "do_sample" in caplog.text

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("GenerationConfig is invalid:\n- `x`: is wrong")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(
        ValueError, match=r"model must have a generation_config.json that .* got GenerationConfig is inv"
    ):
        load_model(ModelArguments(model=str(folder)), load_tokenizer(ModelArguments(model=str(folder))))
