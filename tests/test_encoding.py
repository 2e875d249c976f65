"""Training text equals the record: one text, cut where the prompt ends, of which only the assistant's part is trained on."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from chat_templates import TEMPLATES, byte_level, end_ids, sentencepiece, wordpiece
from tokenizers import normalizers, pre_tokenizers, processors

from gem.data import Example, encode_records
from gem.ends import Ends

CHATML, LLAMA_2, GEMMA = (TEMPLATES[name] for name in ("chatml", "llama-2", "gemma"))
R1, QWEN_3 = TEMPLATES["deepseek-r1"], TEMPLATES["qwen-3"]


def say(*turns: str) -> list[dict[str, Any]]:
    """Return the messages for "user: hi", ..."""
    return [{"role": role, "content": text} for role, text in (turn.split(": ", 1) for turn in turns)]


def encode(tokenizer: Any, record: dict[str, Any], spec: Any = None, **options: Any) -> Example:
    ends = None if spec is None else Ends(end_ids(spec, tokenizer) | {tokenizer.eos_token_id})
    (example,) = encode_records(
        [{**record, "_where": "row 0"}], tokenizer,
        **{"prompt_template": "{prompt}", "max_length": 4096, "ends": ends, **options},
    )  # fmt: skip
    return example


def whole(tokenizer: Any, prompt: list[int], ids: list[int], given: Any) -> str:
    """Return the text of a sequence with the other roles' text in its place."""
    for at, others in reversed(given):
        ids = [*ids[:at], *others, *ids[at:]]
    return str(tokenizer.decode([*prompt, *ids]))


# --- only the assistant's text is trained on --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-3", "zephyr", "phi-4", "gpt-oss", "generation", "granite"])
def test_the_users_turns_are_read_and_not_learnt(name: str) -> None:
    spec = TEMPLATES[name]
    tokenizer = byte_level(spec)
    turns = say("assistant: one", "user: and then?", "assistant: two", "user: and?", "assistant: three")
    example = encode(tokenizer, {"prompt": say("user: count"), "chosen": turns}, spec)
    said = tokenizer.decode(example.chosen_ids, skip_special_tokens=True)
    assert [said.index(word) for word in ("one", "two", "three")] == sorted(
        said.index(word) for word in ("one", "two", "three")
    )
    assert "and" not in said and "count" not in said
    text = whole(tokenizer, example.prompt_ids, example.chosen_ids, example.chosen_given)
    rendered = tokenizer.apply_chat_template([*say("user: count"), *turns], tokenize=False)
    assert rendered.startswith(text) and not rendered.removeprefix(text).strip()
    ends = end_ids(spec, tokenizer) | {tokenizer.eos_token_id}
    # Each turn ends with the model's stop token (gpt-oss: <|end|> between turns, which the model continues from).
    last = [at - 1 for at, _ in example.chosen_given] + [len(example.chosen_ids) - 1]
    if name != "gpt-oss":
        assert all(example.chosen_ids[i] in ends for i in last)


def test_a_tail_of_the_users_is_left_out() -> None:
    tokenizer = byte_level(CHATML)
    record = {"prompt": say("user: hi"), "chosen": say("assistant: yo", "user: bye")}
    example = encode(tokenizer, record, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "yo<|im_end|>" and example.chosen_given == []


def test_a_completion_that_begins_with_the_user() -> None:
    tokenizer = byte_level(CHATML)
    record = {"prompt": say("user: hi", "assistant: yo"), "chosen": say("user: why?", "assistant: so")}
    example = encode(tokenizer, record, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "so<|im_end|>"
    ((at, given),) = example.chosen_given
    assert at == 0 and "why?" in tokenizer.decode(given) and "yo" in example.prompt


def test_a_completion_without_the_assistant_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0: a completion must hold a turn of the assistant"):
        encode(byte_level(CHATML), {"prompt": say("user: hi"), "chosen": say("user: hi again")})


def test_calls_of_tools_are_learnt() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>' + c.function.name + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
    turns = [call, {"role": "tool", "content": "12:00"}, *say("assistant: noon")]
    example = encode(tokenizer, {"prompt": say("user: the time?"), "chosen": turns}, CHATML)
    said = tokenizer.decode(example.chosen_ids)
    assert said == "<tool_call>clock</tool_call><|im_end|>noon<|im_end|>"
    both = {**call, "content": "let me see"}
    example = encode(tokenizer, {"prompt": say("user: the time?"), "chosen": [both]}, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "let me see<tool_call>clock</tool_call><|im_end|>"


# --- text that a template drops, trims or brings ------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\n\n4", "<think>hm</think>4", "hm</think>4"])
def test_reasoning_that_the_template_drops_is_learnt(content: str) -> None:
    tokenizer = byte_level(R1)
    example = encode(tokenizer, {"prompt": say("user: 2+2?"), "chosen": say(f"assistant: {content}")}, R1)
    text = whole(tokenizer, example.prompt_ids, example.chosen_ids, [])
    # The generation prompt already opens the block.
    assert example.prompt.endswith("<think>\n") and text.count("<think>") == 1
    assert text.endswith(content.removeprefix("<think>").lstrip("\n") + R1.eos)


def test_a_pair_of_which_one_reasons_shares_a_prompt() -> None:
    tokenizer = byte_level(R1)
    record = {
        "prompt": say("user: 2+2?"),
        "chosen": say("assistant: <think>hm</think>4"),
        "rejected": say("assistant: 5"),
    }
    example = encode(tokenizer, record, R1)
    assert not example.prompt.endswith("<think>\n")
    assert tokenizer.decode(example.chosen_ids) == "<think>hm</think>4" + R1.eos
    assert tokenizer.decode(example.rejected_ids) == "5" + R1.eos


def test_one_block_of_reasoning() -> None:
    """The template puts an empty block before an answer without reasoning; a record with its own block has only that one."""
    tokenizer = byte_level(QWEN_3)
    chosen, rejected = say("assistant: <think>hm</think>4"), say("assistant: 5")
    example = encode(tokenizer, {"prompt": say("user: 2+2?"), "chosen": chosen, "rejected": rejected}, QWEN_3)
    assert tokenizer.decode(example.chosen_ids) == "<think>hm</think>4<|im_end|>"
    assert tokenizer.decode(example.rejected_ids) == "<think>\n\n</think>\n\n5<|im_end|>"


def test_reasoning_in_a_field_of_its_own() -> None:
    tokenizer = byte_level(QWEN_3)
    turn = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    example = encode(tokenizer, {"prompt": say("user: 2+2?"), "chosen": [turn]}, QWEN_3)
    assert tokenizer.decode(example.chosen_ids) == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    with pytest.raises(ValueError, match="row 0: the chat template must write the 'reasoning_content' of a turn"):
        encode(byte_level(CHATML), {"prompt": say("user: 2+2?"), "chosen": [turn]}, CHATML)


@pytest.mark.parametrize("name", ["gemma", "llama-3", "trims", "llama-2"])
@pytest.mark.parametrize("content", ["\n\n4", "4 \n", "  4  5  "])
def test_blanks_that_the_template_trims_are_learnt(name: str, content: str) -> None:
    spec = TEMPLATES[name]
    tokenizer = byte_level(spec)
    example = encode(tokenizer, {"prompt": say("user: 2+2?"), "chosen": say(f"assistant: {content}")}, spec)
    around = ("", "") if name != "llama-2" else (" ", " ")
    assert tokenizer.decode(example.chosen_ids, skip_special_tokens=True) == around[0] + content + around[1]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_a_turn_out_is_named(role: str) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = CHATML.template.replace("m.content", f"('' if m.role == '{role}' else m.content)")
    record = {"prompt": say("system: be kind", "user: hello"), "chosen": say("assistant: yo")}
    with pytest.raises(ValueError, match=f"row 0: the chat template must write the turns of the {role}"):
        encode(tokenizer, record)


def test_a_template_that_begins_turns_otherwise_than_it_prompts_for_them() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = CHATML.template.replace("<|im_start|>assistant", "<|im_start|>bot")
    with pytest.raises(ValueError, match="row 0: the chat template must render the prompt as a prefix"):
        encode(tokenizer, {"prompt": say("user: hi"), "chosen": say("assistant: yo")})


@pytest.mark.parametrize("words", ["no such role", "x" * 500, ""])
def test_what_a_template_raises_is_one_line_about_the_row(words: str) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = "{{ raise_exception('" + words + "') }}"
    with pytest.raises(ValueError, match="row 0: the chat template must take the conversation") as error:
        encode(tokenizer, {"prompt": say("user: hi"), "chosen": say("assistant: yo")})
    assert words in str(error.value)


@pytest.mark.parametrize("broken", ["{% for m in messages %}", "{{ messages[0].name.upper() }}", "{{ nothing() }}"])
def test_a_template_that_is_broken(broken: str) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = broken
    with pytest.raises(ValueError, match="row 0: the chat template must take the conversation"):
        encode(tokenizer, {"prompt": say("user: hi"), "chosen": say("assistant: yo")})


# --- the boundary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["\n\nyo", " yo", "\n", "\u00a0yo", "\n  - the cat"])
def test_tokens_that_would_merge_across_the_end_of_the_prompt(content: str) -> None:
    tokenizer = byte_level(CHATML)
    record = {"prompt": say("user: hi"), "chosen": say(f"assistant: {content}x")}
    example = encode(tokenizer, record, CHATML)
    assert tokenizer.decode(example.chosen_ids) == content + "x<|im_end|>"
    # The prompt is the input of generation.
    prompt = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
    assert example.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("prompt", "chosen"), [("a is ", "b"), ("a is\n", "\nb"), ("a is", " b"), ("a is ", " b")])
def test_plain_text_is_one_text(prompt: str, chosen: str) -> None:
    for tokenizer in (byte_level(CHATML), sentencepiece(LLAMA_2), sentencepiece(LLAMA_2, "first")):
        example = encode(tokenizer, {"prompt": prompt, "chosen": chosen})
        text = tokenizer.decode([*example.prompt_ids, *example.chosen_ids[:-1]], skip_special_tokens=True)
        assert text.removeprefix(" ") == prompt + chosen
        assert tokenizer.decode(example.chosen_ids[:-1]).endswith(chosen.lstrip())


@pytest.mark.parametrize("trim", [True, False])
def test_spans_that_leave_blanks_out(trim: bool) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    for prompt, chosen in (("the cat ", "is"), ("the cat", " is a tree"), ("the cat\n", "\n  is")):
        example = encode(tokenizer, {"prompt": prompt, "chosen": chosen})
        assert tokenizer.decode([*example.prompt_ids, *example.chosen_ids]) == prompt + chosen + tokenizer.eos_token


@pytest.mark.parametrize("text", ["<s>[INST] hi [/INST]", "<s> hi", "<s>"])
def test_one_beginning_of_sequence(text: str) -> None:
    tokenizer = byte_level(LLAMA_2)
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    example = encode(tokenizer, {"prompt": text, "chosen": " yo"})
    assert example.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, {"prompt": "hi", "chosen": " yo"}).prompt_ids.count(tokenizer.bos_token_id) == 1


def test_a_completion_with_a_beginning_of_sequence_is_refused() -> None:
    tokenizer = byte_level(LLAMA_2)
    with pytest.raises(ValueError, match="row 0: a completion must not hold a beginning of sequence, got '<s>'"):
        encode(tokenizer, {"prompt": "hi", "chosen": "<s> yo"})


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["a</s>b", "</s>b", "a </s> b </s>"])
def test_an_end_inside_a_completion_is_refused(content: str) -> None:
    tokenizer = byte_level(LLAMA_2)
    for record in ({"prompt": "hi", "chosen": content}, {"prompt": say("user: hi"), "chosen": content}):
        with pytest.raises(ValueError, match="row 0: a completion must not hold an end of sequence"):
            encode(tokenizer, record)


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "alpaca"])
def test_a_completion_that_brings_its_end_has_one(name: str) -> None:
    spec = TEMPLATES[name]
    tokenizer = byte_level(spec)
    end = tokenizer.apply_chat_template(say("user: a", "assistant: MARK"), tokenize=False).partition("MARK")[2].strip()
    assert end in {*spec.ends, spec.eos}
    example = encode(tokenizer, {"prompt": say("user: hi"), "chosen": say(f"assistant: yo{end}")}, spec)
    assert tokenizer.decode(example.chosen_ids) == f"yo{end}"
    example = encode(tokenizer, {"prompt": "hi", "chosen": f" yo{tokenizer.eos_token}"}, spec)
    assert tokenizer.decode(example.chosen_ids) == f" yo{tokenizer.eos_token}"


def test_an_end_that_only_the_generation_config_names() -> None:
    tokenizer = byte_level(GEMMA)
    record = {"prompt": say("user: hi"), "chosen": say("assistant: yo")}
    assert tokenizer.decode(encode(tokenizer, record, GEMMA).chosen_ids) == "yo<end_of_turn>"
    # If no config names it, the end of sequence is appended: an answer must end.
    assert tokenizer.decode(encode(tokenizer, record).chosen_ids) == "yo<end_of_turn><eos>"


# --- text that a tokenizer cannot represent -----------------------------------------------------------------------------


def test_words_that_a_tokenizer_does_not_know_are_refused() -> None:
    tokenizer = wordpiece(CHATML)
    with pytest.raises(ValueError, match=r"row 0: the tokenizer must give a completion back as it is, got .*UNK"):
        encode(tokenizer, {"prompt": "the cat", "chosen": "\u4eca\u5929"})
    with pytest.raises(ValueError, match="row 0: the tokenizer must give a completion back"):
        encode(wordpiece(CHATML, lowercase=True), {"prompt": "the cat", "chosen": "The Tree"})
    example = encode(tokenizer, {"prompt": "the cat ", "chosen": "is a tree"})
    assert tokenizer.decode(example.chosen_ids[:-1]) == "is a tree"


def test_a_tokenizer_that_composes_characters() -> None:
    """NFC is an equivalent form of the same text; NFKC is another text."""
    tokenizer = byte_level(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    example = encode(tokenizer, {"prompt": "a", "chosen": " cafe\u0301"})
    assert tokenizer.decode(example.chosen_ids[:-1]) == " caf\u00e9"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ValueError, match="row 0: the tokenizer must give a completion back"):
        encode(tokenizer, {"prompt": "a", "chosen": " x\u00b2"})


def test_a_tokenizer_without_a_word_for_the_unknown() -> None:
    tokenizer = wordpiece(CHATML)
    tokenizer.backend_tokenizer.model.unk_token = "[NOT THERE]"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="row 0: the tokenizer must take the text"):
        encode(tokenizer, {"prompt": "\u4eca", "chosen": "b"})


def test_a_prompt_that_a_tokenizer_changes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        encode(wordpiece(CHATML), {"prompt": "the \u4eca cat", "chosen": "is a tree"})
    assert [r.message for r in caplog.records] == [
        "1 of 1 records: the tokenizer changes the text of the prompt (row 0)"
    ]


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    example = encode(tokenizer, {"prompt": "the cat ", "chosen": "is\n a tree"})
    assert tokenizer.eos_token_id not in example.prompt_ids
    assert tokenizer.decode([*example.prompt_ids, *example.chosen_ids]) == "the cat is\n a tree</s>"
    tokenizer.chat_template = CHATML.template.replace("<|im_end|>", "</s>")
    turns = say("assistant: one", "user: and?", "assistant: two")
    example = encode(tokenizer, {"prompt": say("user: count"), "chosen": turns})
    assert tokenizer.decode(example.chosen_ids) == "one</s>two</s>"


# --- prompts whose last turn the completions continue, and templates that mark the text to train on ---------------------


@pytest.mark.parametrize("name", ["chatml", "llama-2", "gemma", "vicuna", "qwen-3", "deepseek-r1", "generation"])
def test_an_unfinished_turn(name: str) -> None:
    spec = TEMPLATES[name]
    tokenizer = byte_level(spec)
    record = {"prompt": say("user: 2+2?", "assistant: It is"), "chosen": say("assistant:  four"), "rejected": " five"}
    example = encode(tokenizer, record, spec)
    assert example.prompt.endswith("It is")
    assert tokenizer.decode(example.chosen_ids, skip_special_tokens=True).rstrip() == " four"
    assert tokenizer.decode(example.rejected_ids, skip_special_tokens=True).rstrip() == " five"
    assert encode(tokenizer, {"prompt": record["prompt"]}, spec).prompt_ids == example.prompt_ids


def test_an_unfinished_turn_of_reasoning() -> None:
    tokenizer = byte_level(R1)
    record = {"prompt": say("user: 2+2?", "assistant: <think>\nTwo"), "chosen": " and two</think>4"}
    example = encode(tokenizer, record, R1)
    assert example.prompt.endswith("<｜Assistant｜><think>\nTwo")
    assert tokenizer.decode(example.chosen_ids) == " and two</think>4" + R1.eos


def test_the_template_says_what_is_learnt() -> None:
    """The {% generation %} blocks leave out the first turn and the end token."""
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.index > 2 "
        "and loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = say("assistant: one", "user: and?", "assistant: two")
    example = encode(tokenizer, {"prompt": say("user: count"), "chosen": turns}, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "two<|im_end|>"
    text = whole(tokenizer, example.prompt_ids, example.chosen_ids, example.chosen_given)
    assert text == tokenizer.apply_chat_template([*say("user: count"), *turns], tokenize=False).rstrip()
    with pytest.raises(ValueError, match="row 0: the chat template must mark a turn of the completion"):
        encode(tokenizer, {"prompt": say("user: count"), "chosen": say("assistant: one")}, CHATML)


# --- where a turn ends, of templates that end turns in odd ways ---------------------------------------------------------

ROLES = ("<|user|>", "<|assistant|>", "<|tool|>")
LAST_ONLY = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + (eos_token if loop.last and m.role == 'assistant' "
    "else '\\n') }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize("special", [True, False])
def test_a_template_that_ends_the_last_turn_alone(special: bool) -> None:
    tokenizer = byte_level(CHATML)
    if special:
        tokenizer.add_tokens(list(ROLES), special_tokens=True)
    tokenizer.chat_template = LAST_ONLY
    turns = say("assistant: one", "user: OTHER <|im_end|>", "assistant: two", "user: THIRD", "assistant: three")
    example = encode(tokenizer, {"prompt": say("user: count"), "chosen": turns}, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "onetwothree<|im_end|>"
    text = whole(tokenizer, example.prompt_ids, example.chosen_ids, example.chosen_given)
    assert text == tokenizer.apply_chat_template([*say("user: count"), *turns], tokenize=False)


@pytest.mark.parametrize("end", ["<|eom|>", "<|im_end|>", ""])
def test_a_call_of_a_tool_ends_as_the_template_ends_it(end: str) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<|eom|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ '"
        + end
        + "' if m.tool_calls else '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = [
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "RESULT"},
        *say("assistant: two"),
    ]
    record = {"prompt": say("user: 1+1?"), "chosen": turns}
    ends = Ends(frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eom|>"])))
    for told in (None, ends):
        example = encode(tokenizer, record, ends=told)
        said = tokenizer.decode(example.chosen_ids)
        assert said == '{"name": "add", "arguments": {"a": 1}}' + end + "two<|im_end|>"
    example = encode(tokenizer, {"prompt": record["prompt"], "chosen": turns[:1]}, ends=ends)
    assert tokenizer.decode(example.chosen_ids).startswith('{"name": "add", "arguments": {"a": 1}}' + end)


def test_calls_that_the_template_does_not_write_are_told() -> None:
    tokenizer = byte_level(CHATML)
    call = {"role": "assistant", "content": "let me see", "tool_calls": CALL}
    record = {"prompt": say("user: 1+1?"), "chosen": [call]}
    with pytest.raises(ValueError, match="row 0: the chat template must write the calls of tools of a turn, got 'add'"):
        encode(tokenizer, record)
    history = [*say("user: 1+1?"), call, {"role": "tool", "content": "2"}, *say("user: so?")]
    with pytest.raises(ValueError, match="row 0: the chat template must write the calls of tools"):
        encode(tokenizer, {"prompt": history, "chosen": say("assistant: two")})
    with pytest.raises(ValueError, match="row 0: the chat template must write the tools, got 'add'"):
        encode(tokenizer, {"prompt": say("user: 1+1?"), "chosen": "2", "tools": CALL})
    tokenizer.chat_template = CHATML.template.replace("m.content", "(m.content if m.role != 'tool' else '')")
    with pytest.raises(ValueError, match="row 0: the chat template must write the turns of the tool"):
        encode(tokenizer, {"prompt": [*say("user: q"), {"role": "tool", "content": "RESULT"}], "chosen": "2"})


def test_a_template_that_takes_arguments_as_text() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = CHATML.template.replace(
        "m.content +",
        "m.content + (m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.tool_calls else '') +",
    )
    record = {"prompt": say("user: 1+1?"), "chosen": [{"role": "assistant", "content": "", "tool_calls": CALL}]}
    assert tokenizer.decode(encode(tokenizer, record, CHATML).chosen_ids) == 'add{"a": 1}<|im_end|>'


@pytest.mark.parametrize(("asked", "answer"), [("Write <html>", "<html>body</html>"), ("Fill [TODO]", "[TODO] is x")])
def test_a_tag_of_the_users_is_not_the_prompts(asked: str, answer: str) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    example = encode(tokenizer, {"prompt": say(f"user: {asked}"), "chosen": say(f"assistant: {answer}")})
    assert tokenizer.decode(example.chosen_ids) == answer + tokenizer.eos_token


def test_all_that_a_template_marks_in_a_turn_is_learnt() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ ' | ' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = say("assistant: one", "user: and?", "assistant: two")
    example = encode(tokenizer, {"prompt": say("user: count"), "chosen": turns}, CHATML)
    assert tokenizer.decode(example.chosen_ids) == "one<|im_end|>two<|im_end|>"
    assert " | " in tokenizer.decode(example.chosen_given[0][1])


def test_a_conversation_that_only_goes_on_is_refused() -> None:
    tokenizer = byte_level(CHATML)
    with pytest.raises(ValueError, match="row 0: a last turn of the prompt to go on with must be text behind another"):
        encode(tokenizer, {"prompt": say("assistant: Once upon"), "chosen": " a time"})
    call = {"role": "assistant", "content": "x", "tool_calls": CALL}
    with pytest.raises(ValueError, match="row 0: a last turn of the prompt to go on with must be text"):
        encode(tokenizer, {"prompt": [*say("user: hi"), call], "chosen": " a time"})


def test_a_pair_that_is_the_same_once_tokenised_is_refused() -> None:
    tokenizer = byte_level(CHATML)
    pair = {"chosen": say("assistant: yo"), "rejected": say("assistant: yo<|im_end|>")}
    with pytest.raises(ValueError, match="row 0: chosen and rejected must not be the same, got 'yo<|im_end|>'"):
        encode(tokenizer, {"prompt": say("user: hi"), **pair}, CHATML)


def test_what_a_template_says_over_several_lines_is_one_line() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = "{{ raise_exception('no\\nsuch\\nrole') }}"
    with pytest.raises(ValueError, match="got no such role$"):
        encode(tokenizer, {"prompt": say("user: hi"), "chosen": say("assistant: yo")})


def test_a_call_of_a_template_that_ends_the_last_turn_otherwise() -> None:
    """The common start of both ways to end the turn is no whole token, and not trained on."""
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<|more|>", "<|done|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{{ '<|done|>' if loop.last and m.role == 'assistant' else '<|more|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = [{"role": "assistant", "content": "so: ", "tool_calls": CALL}, *say("user: well?", "assistant: two")]
    ends = Ends(frozenset([tokenizer.convert_tokens_to_ids("<|done|>")]))
    example = encode(tokenizer, {"prompt": say("user: 1+1?"), "chosen": turns}, ends=ends)
    assert tokenizer.decode(example.chosen_ids) == "so: addtwo<|done|>"


@pytest.mark.parametrize("function", [{"name": "add"}, {"function": "add"}, {"function": {"description": "no name"}}])
def test_odd_calls_and_tools_do_not_end_in_other_errors(function: dict[str, Any]) -> None:
    tokenizer = byte_level(CHATML)
    call = {"role": "assistant", "content": "x", "tool_calls": [function]}
    for record in ({"chosen": [call]}, {"chosen": "x", "tools": [function]}):
        with contextlib.suppress(ValueError):  # no other type
            encode(tokenizer, {"prompt": say("user: hi"), **record}, CHATML)
