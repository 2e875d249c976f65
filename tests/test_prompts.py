"""The prompt of a model: plain prompts on chat models, the system message, and the request for a chain of thought."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import TEMPLATES, byte_level

from gem.config import COT_PROMPT, MARKERS, DataArguments, RolloutArguments
from gem.data import Example, encode_records, read_examples
from gem.groups import Group, Member
from gem.tasks import build_tokenizer

CHATML, GEMMA, MISTRAL = (TEMPLATES[name] for name in ("chatml", "gemma", "mistral-v1"))
PLAIN = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def encode(tokenizer: Any, record: dict[str, Any], **options: Any) -> Example:
    options = {"prompt_template": "{prompt}", "max_length": 512, **options}
    (example,) = encode_records([{**record, "_where": "row 0"}], tokenizer, **options)
    return example


def asked(tokenizer: Any, *messages: tuple[str, str]) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral-v1", "llama-3", "vicuna"])
def test_a_plain_prompt_is_the_users_turn_of_a_chat_model(name: str) -> None:
    tokenizer = byte_level(TEMPLATES[name])
    expected = asked(tokenizer, ("user", "2+2?"))
    for prompt_format in ("auto", "chat"):
        example = encode(tokenizer, PLAIN, prompt_format=prompt_format)
        assert example.prompt == expected
        assert tokenizer.decode(example.chosen_ids, skip_special_tokens=True).strip() == "4"
    bare = encode(tokenizer, PLAIN, prompt_format="text")
    assert bare.prompt == "2+2?" and tokenizer.decode(bare.chosen_ids[:-1]) == "4"
    framed = encode(tokenizer, PLAIN, prompt_format="auto", prompt_template="Sum: {prompt}")
    assert framed.prompt == asked(tokenizer, ("user", "Sum: 2+2?")) and framed.question == "2+2?"


def test_without_a_chat_template_a_plain_prompt_stays_text() -> None:
    tokenizer = build_tokenizer()
    record = {"prompt": "2+2=", "chosen": "4"}
    assert encode(tokenizer, record, prompt_format="auto").prompt == "2+2="
    with pytest.raises(ValueError, match="row 0: chat messages need a tokenizer with a chat template"):
        encode(tokenizer, record, prompt_format="chat")
    with pytest.raises(ValueError, match="prompt_format must be one of auto, chat, text, got 'chatml'"):
        encode(tokenizer, record, prompt_format="chatml")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("mistral-v1", "<s>[INST] hi [/INST]"),
        ("gemma", "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_a_prompt_that_is_rendered_already_is_not_wrapped_again(name: str, prompt: str) -> None:
    tokenizer = byte_level(TEMPLATES[name])
    example = encode(tokenizer, {"prompt": prompt, "chosen": "yo"}, prompt_format="auto")
    assert example.prompt == prompt and example.prompt_ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", ["zephyr", "llama-2", "mistral-v3", "chatml"])
def test_a_prompt_that_only_speaks_of_tokens_is_wrapped(name: str) -> None:
    tokenizer = byte_level(TEMPLATES[name])
    prompt = "What does the HTML <s> tag do, and what <|im_start|>?"
    example = encode(tokenizer, {"prompt": prompt, "chosen": "nothing"}, prompt_format="auto")
    assert example.prompt == asked(tokenizer, ("user", prompt))


def test_nothing_is_put_behind_a_prompt_that_is_rendered() -> None:
    tokenizer = byte_level(CHATML)
    record = {"prompt": asked(tokenizer, ("user", "hi")), "chosen": "yo"}
    for more in ({"cot_prompt": "Think."}, {"prompt_template": "Q: {prompt}"}, {"cot_prompt": "T.", "cot_pairs": True}):
        with pytest.raises(
            ValueError, match="row 0: prompt_template and cot_prompt need a prompt that is not rendered yet"
        ):
            encode(tokenizer, record, prompt_format="auto", **more)


def test_what_auto_does_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        encode(byte_level(CHATML), PLAIN, prompt_format="auto")
    assert "1 of 1 records: a plain prompt is the user's turn of a chat" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        encode(byte_level(CHATML), PLAIN, prompt_format="text")
    assert not caplog.text


def test_system_message() -> None:
    tokenizer = byte_level(CHATML)
    expected = asked(tokenizer, ("system", "Be brief."), ("user", "2+2?"))
    assert encode(tokenizer, PLAIN, prompt_format="auto", system="Be brief.").prompt == expected
    chat = {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4"}
    assert encode(tokenizer, chat, system="Be brief.").prompt == expected
    own = {"prompt": [{"role": "system", "content": "Be kind."}, *chat["prompt"]], "chosen": "4"}  # type: ignore[misc]
    assert "Be kind." in (prompt := encode(tokenizer, own, system="Be brief.").prompt) and "brief" not in prompt
    assert encode(tokenizer, {**PLAIN, "system": "Be brief."}, prompt_format="chat").prompt == expected
    with pytest.raises(ValueError, match="row 0: a system message needs a prompt of chat messages"):
        encode(tokenizer, PLAIN, prompt_format="text", system="Be brief.")
    with pytest.raises(ValueError, match="row 0: the chat template must take the conversation, got there is no system"):
        encode(byte_level(GEMMA), PLAIN, prompt_format="auto", system="Be brief.")


def test_chain_of_thought_is_asked_of_candidates_alone() -> None:
    tokenizer = byte_level(CHATML)
    example = encode(tokenizer, PLAIN, prompt_format="auto", cot_prompt="Think.")
    assert example.prompt == asked(tokenizer, ("user", "2+2?")) and example.question == "2+2?"
    assert tokenizer.decode(example.sampling_prompt_ids) == asked(tokenizer, ("user", "2+2?\n\nThink."))
    both = encode(tokenizer, PLAIN, prompt_format="auto", cot_prompt="Think.", cot_pairs=True)
    assert both.prompt == asked(tokenizer, ("user", "2+2?\n\nThink.")) and not both.sampling_prompt_ids
    # A record's own candidates were sampled elsewhere.
    brought = encode(tokenizer, {**PLAIN, "candidates": ["4"]}, prompt_format="auto", cot_prompt="Think.")
    assert not brought.sampling_prompt_ids
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "2+2?"},
    ]
    chat = encode(tokenizer, {"prompt": turns, "chosen": "4"}, cot_prompt="Think.")
    assert tokenizer.decode(chat.sampling_prompt_ids).endswith("2+2?\n\nThink.<|im_end|>\n<|im_start|>assistant\n")
    text = encode(tokenizer, PLAIN, cot_prompt="Think.", prompt_template="Q: {prompt}\nA: ")
    assert tokenizer.decode(text.sampling_prompt_ids) == "Q: 2+2?\n\nThink.\nA: "


def test_a_long_sampling_prompt_counts() -> None:
    tokenizer = byte_level(CHATML)
    longest = len(encode(tokenizer, PLAIN, cot_prompt="Think. " * 40).sampling_prompt_ids)
    with pytest.raises(ValueError, match=f"1 x longer than max_length={longest - 1} tokens"):
        encode(tokenizer, PLAIN, cot_prompt="Think. " * 40, max_length=longest - 1)


def test_a_sampled_member_has_the_prompt_that_it_was_sampled_from() -> None:
    given = [(1, [7, 7])]
    group = Group("q", [1, 2], [], sampling_prompt_ids=[1, 2, 3])
    assert group.sequence(Member("candidate", [5], sampled=True)) == ([1, 2, 3], [5], [])
    assert group.sequence(Member("candidate", [5])) == ([1, 2], [5], [])
    assert group.sequence(Member("chosen", [5, 6], given=given)) == ([1, 2], [5, 6], given)
    assert Group("q", [1, 2], []).sequence(Member("candidate", [5], sampled=True))[0] == [1, 2]


def test_the_default_text_announces_an_answer_where_spans_look_for_it() -> None:
    assert any(marker in COT_PROMPT for marker in MARKERS)


def test_settings_of_a_command(tmp_path: Any) -> None:
    tokenizer = byte_level(CHATML)
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n')
    arguments = DataArguments(str(file), system="Be brief.")
    (example,) = read_examples(arguments, tokenizer, need=("chosen",), rollout=RolloutArguments(cot_prompt="Think."))
    assert example.prompt == asked(tokenizer, ("system", "Be brief."), ("user", "2+2?"))
    assert "Think." in tokenizer.decode(example.sampling_prompt_ids)
    with pytest.raises(ValueError, match="data must be a file, a folder or a hub dataset, got nothing"):
        read_examples(DataArguments(), tokenizer, need=())


def test_settings_of_plain_prompts_that_change_nothing_are_told(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4"}\n')
    for more in ({"prompt_template": "Q: {prompt}"}, {"prompt_format": "text"}):
        caplog.clear()
        read_examples(DataArguments(str(file), **more), byte_level(CHATML), need=("chosen",))
        assert "they change nothing" in caplog.text


def test_a_split_goes_with_its_source(tmp_path: Any) -> None:
    (tmp_path / "both").mkdir()
    for name in ("both/train_prefs", "both/test_prefs", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name.split("/")[-1], "chosen": "4"}) + "\n")
    other = str(tmp_path / "held_out.jsonl")
    arguments, tokenizer = DataArguments(str(tmp_path / "both"), split="train_prefs"), byte_level(CHATML)

    def questions(**more: Any) -> list[str]:
        return [e.question for e in read_examples(arguments, tokenizer, need=(), **more)]

    assert questions() == questions(source=arguments.data) == ["train_prefs"]
    assert questions(source=arguments.data, split="test_prefs") == ["test_prefs"]
    assert questions(source=other) == ["held_out"]
