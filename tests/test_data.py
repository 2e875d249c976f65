"""Records from files and folders, chat templates, and label shifting; every bad input has its message."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from gem.data import Layout, encode_records, load_records, pack
from gem.tasks import build_tokenizer

EOS = 2
# One token a character: a turn is "+content=", the assistant's begins with "#### " and ends with <eos> and a blank.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '####' + m.content + '<eos> ' }}"
    "{% else %}{{ '+' + m.content + '=' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '####' }}{% endif %}"
)
PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encode(tokenizer: Any, *rows: dict[str, Any], template: str = "{prompt}", max_length: int = 64) -> Any:
    records = [{**row, "_where": f"row {i}"} for i, row in enumerate(rows)]
    return encode_records(records, tokenizer, prompt_template=template, max_length=max_length)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- where records come from ------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", PAIR, {**PAIR, "chosen": "5"}, PAIR)
    records = load_records(source, need=("chosen", "rejected"))
    assert [r["chosen"] for r in records] == ["3", "5", "3"]
    assert records[1]["_where"] == f"{source}, line 2"
    assert len(load_records(source, need=(), limit=2)) == 2


def test_saved_datasets_folder_reads_like_the_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    rows = [PAIR, {**PAIR, "chosen": "5"}]
    source = jsonl(tmp_path / "d.jsonl", *rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    expected = encode(tokenizer, *load_records(source, need=("chosen", "rejected")))
    for folder in ("one", "splits"):
        records = load_records(str(tmp_path / folder), need=("chosen", "rejected"))
        assert encode(tokenizer, *records) == expected
    assert records[1]["_where"].endswith("splits, row 1")


def test_datasets_folder_of_chat_messages(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    row = {"prompt": user("1"), "chosen": assistant("2"), "rejected": assistant("3")}
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "d"))
    assert encode(tokenizer, *load_records(str(tmp_path / "d"), need=("chosen", "rejected"))) == encode(tokenizer, row)


def test_completion_is_read_as_chosen(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"prompt": "1=", "completion": "2"})
    (example,) = encode(tokenizer, *load_records(source, need=("chosen",)))
    assert tokenizer.decode(example.chosen_ids) == "2<eos>" and example.rejected_ids == []


def test_null_is_absent(tmp_path: Path, tokenizer: Any) -> None:
    """A table fills the columns that a row lacks with nulls."""
    rows = [{"prompt": "1=", "completion": "2", "chosen": None, "rejected": None, "candidates": None}, PAIR]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    first, second = encode(tokenizer, *load_records(str(tmp_path / "d"), need=("chosen",)))
    assert first.chosen_ids and not first.rejected_ids and not first.candidate_ids and second.rejected_ids
    with pytest.raises(ValueError, match="row 0: expected a record with 'rejected'"):
        load_records(str(tmp_path / "d"), need=("chosen", "rejected"))


def test_line_separators_of_unicode_are_text(tmp_path: Path) -> None:
    strange = "a\u2028b\u2029c\x85d\x0be"
    source = jsonl(tmp_path / "d.jsonl", {**PAIR, "prompt": strange}, PAIR)
    records = load_records(source, need=("chosen",))
    assert [r["prompt"] for r in records] == [strange, "1+2="]


def test_byte_order_mark_windows_lines_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join([json.dumps(PAIR).encode()] * 2) + b"\r\n\r\n")
    records = load_records(str(path), need=("chosen",))
    assert len(records) == 2 and records[1]["_where"].endswith("line 3")


# --- bad input: what, where, and what came ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: expected one JSON object a line, got 'not json'"),
        (
            '{"prompt": "1=", "chosen": "2',
            "line 2: expected one JSON object a line",
        ),  # the last line of a killed writer
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        ('{"prompt": "1=", "rejected": "2"}', "line 2: expected a record with 'chosen', got the fields .*'rejected'"),
        ('{"chosen": "2"}', "line 2: expected a record with 'prompt'"),
        ('{"prompt": "1=", "chosen": ""}', "line 2: 'chosen' must be text or chat messages, not empty, got ''"),
        ('{"prompt": "1=", "chosen": 7}', "line 2: 'chosen' must be text or chat messages, not empty, got 7"),
        ('{"prompt": [], "chosen": "1"}', "line 2: 'prompt' must be text or chat messages"),
        ('{"prompt": "1=", "chosen": "2", "rejected": 7}', "line 2: 'rejected' must be"),
        ('{"prompt": ["hi"], "chosen": "2"}', "line 2: 'prompt' must be text or chat messages"),
        ('{"prompt": [{"role": "user"}], "chosen": "2"}', "line 2: 'prompt' must be"),
        ('{"prompt": [{"role": "user", "content": null}], "chosen": "2"}', "line 2: 'prompt' must be"),
        (
            '{"prompt": "\\ud800", "chosen": "2"}',
            "line 2: 'prompt' must be",
        ),  # half a surrogate pair: no tokenizer takes it
        ('{"prompt": "1=", "chosen": "2", "candidates": "3"}', "line 2: 'candidates' must be a list"),
        ('{"prompt": "1=", "chosen": "2", "candidates": [3]}', "line 2: 'candidates' must be a list"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + line)
    with pytest.raises(ValueError, match=message) as error:
        load_records(str(path), need=("chosen",))
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9", "chosen": "1"}\n')
    with pytest.raises(ValueError, match="line 2: expected UTF-8 text"):
        load_records(str(path), need=("chosen",))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data must be an existing file.*missing\.jsonl.*no such file"):
        load_records(str(tmp_path / "missing.jsonl"), need=())
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(ValueError, match="at least one record, got none"):
            load_records(str(tmp_path / "empty.jsonl"), need=())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="data must be an existing file, folder or hub dataset.*folder"):
        load_records(str(tmp_path / "folder"), need=())
    datasets.DatasetDict({"test": datasets.Dataset.from_list([PAIR])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"train split, got \['test'\]"):
        load_records(str(tmp_path / "splits"), need=())


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError(f"cannot reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="data must be .* got 'some/where': cannot reach"):
        load_records("some/where", need=())


# --- text and chat ----------------------------------------------------------------------------------------------------


def test_text_record(tokenizer: Any) -> None:
    (example,) = encode(tokenizer, {**PAIR, "candidates": ["5", "6 "]}, template="0{prompt}0")
    assert example.prompt == "01+2=0"
    assert tokenizer.decode(example.prompt_ids) == "<bos>01+2=0"
    texts = [tokenizer.decode(ids) for ids in (example.chosen_ids, example.rejected_ids, *example.candidate_ids)]
    assert texts == ["3<eos>", "4<eos>", "5<eos>", "6 <eos>"]  # no second <bos>, one <eos>


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", EOS)]
    )
    (example,) = encode(tokenizer, PAIR)
    assert EOS not in example.prompt_ids and example.chosen_ids.count(EOS) == 1


@pytest.mark.parametrize("as_messages", [True, False])
def test_chat_record(tokenizer: Any, as_messages: bool) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    wrap = assistant if as_messages else str
    row = {"prompt": user("12"), "chosen": wrap("3"), "rejected": wrap("4 5")}
    (example,) = encode(tokenizer, row, template="not for chat {prompt}")
    assert example.prompt == tokenizer.decode(example.prompt_ids) == "+12=####"
    # The template's text behind the end of sequence is never generated, so it is not trained on either.
    assert tokenizer.decode(example.chosen_ids) == "3<eos>" and tokenizer.decode(example.rejected_ids) == "4 5<eos>"


def test_chat_needs_a_template_that_continues_the_prompt(tokenizer: Any) -> None:
    row = {"prompt": user("1"), "chosen": "2"}
    with pytest.raises(ValueError, match="row 0: chat messages need a tokenizer with a chat template"):
        encode(tokenizer, row)
    with pytest.raises(ValueError, match="row 0: a completion of chat messages needs a prompt of chat messages"):
        encode(tokenizer, {"prompt": "1=", "chosen": assistant("2")})
    tokenizer.chat_template = "{% if add_generation_prompt %}1{% else %}2{% endif %}3"
    with pytest.raises(ValueError, match="row 0: the chat template must render the prompt as a prefix"):
        encode(tokenizer, row)


@pytest.mark.parametrize("empty", [" ", "\n"])
def test_empty_completion(tokenizer: Any, empty: str) -> None:
    with pytest.raises(ValueError, match="row 1: a completion must not be empty"):
        encode(tokenizer, PAIR, {**PAIR, "rejected": empty})
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match="row 0: a completion must not be empty"):
        encode(tokenizer, {"prompt": user("1"), "chosen": assistant(empty)})


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        ("{prompt}", "\\boxed{1} {} {0} {prompt} {{", "\\boxed{1} {} {0} {prompt} {{"),
        ("{x} \\boxed{} {{y}} {prompt}", "1", "{x} \\boxed{} {{y}} 1"),
        ('{"q": "{prompt}"}', "1", '{"q": "1"}'),
        ("{prompt}{prompt}", "{prompt}", "{prompt}{prompt}"),
    ],
)
def test_braces_are_text(tokenizer: Any, template: str, prompt: str, expected: str) -> None:
    (example,) = encode(tokenizer, {**PAIR, "prompt": prompt}, template=template)
    assert example.prompt == expected


def test_template_without_prompt_and_tokenizer_without_eos(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt_template must contain \{prompt\}, got 'Q: '"):
        encode(tokenizer, PAIR, template="Q: ")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode(tokenizer, PAIR)


def test_too_long_records_are_counted(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [PAIR, {**PAIR, "rejected": "4" * 10}, {**PAIR, "candidates": ["5" * 10]}, {**PAIR, "chosen": "33"}]
    with caplog.at_level(logging.WARNING):
        kept = encode(tokenizer, *rows, max_length=8)  # <bos> and 4 of the prompt, 2 and <eos>
    assert [tokenizer.decode(e.chosen_ids) for e in kept] == ["3<eos>", "33<eos>"]
    assert [r.message for r in caplog.records] == [
        "2 of 4 records are left out: 2 x longer than max_length=8 tokens, got 16 (row 1; row 2)"
    ]
    with pytest.raises(
        ValueError, match="at least one record must be usable, got none of 4: 4 x longer than max_length=6"
    ):
        encode(tokenizer, *rows, max_length=6)


# --- pack -------------------------------------------------------------------------------------------------------------

GROUPS = [[([1, 5], [7, 8, EOS]), ([1, 5], [EOS])], [([1, 6, 9, 4], [3, EOS])]]
LAYOUTS: tuple[Layout, ...] = ("packed", "right", "left")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_shifts_once(layout: Layout) -> None:
    batch = pack(GROUPS, layout=layout, pad_id=0)
    flat_ids, flat_positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    labels = batch["shift_labels"].flatten()
    at = (labels != -100).nonzero().squeeze(1)
    assert labels[at].tolist() == [7, 8, EOS, EOS, 3, EOS]
    # A completion token is predicted by the hidden state of the token before it in its sequence.
    assert torch.equal(flat_ids[at + 1], labels[at])
    assert flat_ids[at].tolist() == [5, 7, 8, 5, 4, 3]
    assert flat_positions[at].tolist() == [1, 2, 3, 1, 3, 4]
    assert torch.equal(flat_positions[at + 1], flat_positions[at] + 1)
    assert batch["sequence"].tolist() == [0, 0, 0, 1, 0, 0]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6] and batch["cu_groups"].tolist() == [0, 4, 6]
    for name in ("cu_seqlens", "cu_groups"):
        assert batch[name].dtype == torch.int32
    for name in ("input_ids", "position_ids", "shift_labels", "sequence"):
        assert batch[name].dtype == torch.int64


def test_pack_layouts() -> None:
    packed, right, left = (pack(GROUPS, layout=layout, pad_id=16) for layout in LAYOUTS)
    assert packed["input_ids"].tolist() == [[1, 5, 7, 8, EOS, 1, 5, EOS, 1, 6, 9, 4, 3, EOS]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert "attention_mask" not in packed  # with one, transformers would not find the starts of the sequences
    assert right["input_ids"][1].tolist() == [1, 5, EOS, 16, 16, 16]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    assert right["position_ids"][1, :3].tolist() == [0, 1, 2]
    assert left["input_ids"][1].tolist() == [16, 16, 16, 1, 5, EOS]
    assert left["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1] * 6]
    assert left["position_ids"][1, 3:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_refuses_what_is_empty(layout: Layout) -> None:
    for groups, message in (
        ([], "groups must not be empty, got none"),
        ([GROUPS[0], []], "groups must not be empty, got group 1"),
        ([[([1], [2]), ([1], [])]], "got 1 and 0 in sequence 1 of group 0"),
        ([[([], [2])]], "got 0 and 1 in sequence 0 of group 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(groups, layout=layout, pad_id=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_others_say_is_read_and_not_learnt(layout: Layout) -> None:
    groups: Any = [[([1, 5], [7, EOS, 8, EOS], [(2, [3, 4])]), ([1, 5], [9, EOS], [(0, [6])])]]
    batch = pack(groups, layout=layout, pad_id=0)
    ids, labels = batch["input_ids"].flatten(), batch["shift_labels"].flatten()
    at = (labels != -100).nonzero().squeeze(1)
    assert labels[at].tolist() == [7, EOS, 8, EOS, 9, EOS] and torch.equal(ids[at + 1], labels[at])
    assert ids[at].tolist() == [5, 7, 4, 8, 6, 9]  # each label follows the token before it in the text, of any role
    assert batch["cu_seqlens"].tolist() == [0, 4, 6] and batch["sequence"].tolist() == [0] * 4 + [1] * 2
    text = [i for i in ids.tolist() if i]
    assert text == [1, 5, 7, EOS, 3, 4, 8, EOS, 1, 5, 6, 9, EOS]
