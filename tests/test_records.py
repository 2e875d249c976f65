"""Every shape of public records gives the same prompt and completions as in TRL, or is refused with a reason."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from gem.problems import BadRecord, Problems
from gem.records import load_records
from gem.shapes import shape

PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def u(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def s(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def t(text: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shaped(need: tuple[str, ...] = ("chosen", "rejected"), **raw: Any) -> dict[str, Any]:
    return shape(raw, need)[0]


def notes(**raw: Any) -> list[str]:
    return shape(raw, ())[1]


def refused(message: str, need: tuple[str, ...] = (), **raw: Any) -> None:
    with pytest.raises(BadRecord, match=message):
        shape(raw, need)


# --- where the prompt ends --------------------------------------------------------------------------------------------

WHOLE = {"chosen": [u("1"), a("2")], "rejected": [u("1"), a("3")]}
PARTS = {"prompt": [u("1")], "chosen": [a("2")], "rejected": [a("3")]}
LONG = [u("1"), a("2"), u("3")]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        # Unchanged.
        (PAIR, PAIR),
        (PARTS, PARTS),
        ({**PARTS, "chosen": "2", "rejected": "3"}, {**PARTS, "chosen": "2", "rejected": "3"}),  # text stays text
        ({**PARTS, "rejected": "3"}, {**PARTS, "rejected": "3"}),
        # An implicit prompt: the common start of conversations.
        (WHOLE, PARTS),
        (
            {"chosen": [s("be brief"), *LONG, a("4")], "rejected": [s("be brief"), *LONG, a("5")]},
            {"prompt": [s("be brief"), *LONG], "chosen": [a("4")], "rejected": [a("5")]},
        ),
        (  # the sides differ at an earlier turn: the rest is a completion of several turns
            {"chosen": [*LONG, a("4")], "rejected": [u("1"), a("0"), u("3"), a("4")]},
            {"prompt": [u("1")], "chosen": [a("2"), u("3"), a("4")], "rejected": [a("0"), u("3"), a("4")]},
        ),
        (  # the sides differ at a user's turn: both still answer the common start
            {"chosen": [u("1"), a("2"), u("x"), a("4")], "rejected": [u("1"), a("2"), u("y"), a("4")]},
            {"prompt": [u("1")], "chosen": [a("2"), u("x"), a("4")], "rejected": [a("2"), u("y"), a("4")]},
        ),
        (  # one is longer
            {"chosen": [u("1"), a("2")], "rejected": [*LONG, a("4")]},
            {"prompt": [u("1")], "chosen": [a("2")], "rejected": [a("2"), u("3"), a("4")]},
        ),
        (  # a tool's answer is part of the prompt too
            {"chosen": [u("1"), a("", tool_calls=[CALL]), t("2"), a("3")],
             "rejected": [u("1"), a("", tool_calls=[CALL]), t("2"), a("4")]},
            {"prompt": [u("1"), a("", tool_calls=[CALL]), t("2")], "chosen": [a("3")], "rejected": [a("4")]},
        ),
        # Plain text beside conversations: the conversations' prompt is used, as in TRL; without one, the text becomes a turn.
        ({"prompt": "1", **WHOLE}, PARTS),
        ({"prompt": "1", "chosen": [a("2")], "rejected": [a("3")]}, PARTS),
        ({"prompt": "1", "chosen": a("2"), "rejected": a("3")}, PARTS),  # a message alone
        ({"prompt": "1", "chosen": [u("1"), a("2")], "rejected": [a("3")]}, PARTS),
        ({"prompt": "1", "chosen": [u("1"), a("2")], "rejected": "3"}, {**PARTS, "rejected": "3"}),
        (
            {"prompt": "1", "chosen": [s("be brief"), a("2")], "rejected": [s("be brief"), a("3")]},
            {**PARTS, "prompt": [s("be brief"), u("1")]},
        ),
        # A prompt of messages that is repeated, whole or its last turns only.
        ({**PARTS, **WHOLE}, PARTS),
        ({"prompt": LONG, "chosen": [*LONG, a("4")], "rejected": [*LONG, a("5")]},
         {"prompt": LONG, "chosen": [a("4")], "rejected": [a("5")]}),
        ({**PARTS, **WHOLE, "prompt": [s("be brief"), u("1")]}, {**PARTS, "prompt": [s("be brief"), u("1")]}),
        ({**WHOLE, "prompt": [s("be brief")]}, {**PARTS, "prompt": [s("be brief"), u("1")]}),
        ({**PARTS, "chosen": [u("1"), a("2")]}, PARTS),  # repeated by one of the two
        (
            {"prompt": [u("1")], "chosen": [s("be brief"), u("1"), a("2")], "rejected": [s("be brief"), u("1"), a("3")]},
            {**PARTS, "prompt": [s("be brief"), u("1")]},
        ),
        ({"prompt": [u("1"), a("2")], "chosen": [u("3"), a("4")], "rejected": [u("3"), a("5")]},
         {"prompt": LONG, "chosen": [a("4")], "rejected": [a("5")]}),
        # Fields that only describe a message do not make prompts different.
        ({"chosen": [{**u("1"), "num_tokens": 1}, a("2")], "rejected": [{**u("1"), "num_tokens": 9}, a("3")]},
         {**PARTS, "prompt": [{**u("1"), "num_tokens": 1}]}),
        # The system column.
        ({**PARTS, "system": "be brief"}, {**PARTS, "prompt": [s("be brief"), u("1")]}),
        ({**WHOLE, "system": "be brief"}, {**PARTS, "prompt": [s("be brief"), u("1")]}),
        ({**PAIR, "system": "be brief"}, {**PAIR, "system": "be brief"}),
        ({**PAIR, "system": " "}, PAIR),
        ({**PARTS, "prompt": [s("be brief"), u("1")], "system": "be brief"}, {**PARTS, "prompt": [s("be brief"), u("1")]}),
        # Candidates continue the prompt like the others.
        ({**PAIR, "candidates": ["5", "6"]}, {**PAIR, "candidates": ["5", "6"]}),
        ({**WHOLE, "candidates": ["5", [a("6")], [u("1"), a("7")]]}, {**PARTS, "candidates": ["5", [a("6")], [a("7")]]}),
        ({**PAIR, "candidates": '["5", "6"]'}, {**PAIR, "candidates": ["5", "6"]}),
    ],
)  # fmt: skip
def test_where_the_prompt_ends(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    assert shaped(**raw) == expected


@pytest.mark.parametrize(
    ("turns", "prompt", "rest"),
    [
        ([u("1"), a("2")], [u("1")], [a("2")]),
        ([*LONG, a("4")], [u("1")], [a("2"), u("3"), a("4")]),  # every answer is trained on
        ([s("be brief"), u("1"), a("2")], [s("be brief"), u("1")], [a("2")]),
        ([u("1"), a("", tool_calls=[CALL]), t("2"), a("3")], [u("1")], [a("", tool_calls=[CALL]), t("2"), a("3")]),
    ],
)
def test_a_conversation_alone_is_learnt_from_its_first_answer_on(turns: Any, prompt: Any, rest: Any) -> None:
    assert shaped(("chosen",), chosen=turns) == {"prompt": prompt, "chosen": rest}


def test_as_trl_does() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    from gem.converters import implicit

    for chosen, rejected in (
        ("The sky is blue.", "The sky is green."),
        ("1 + 1 = 2", "1 + 1 = 3"),
        ("one two three", "one two"),
        ("a b", "a b c"),
    ):
        expected = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
        assert implicit({"chosen": chosen, "rejected": rejected}) == expected
    for raw in (WHOLE, {"prompt": "1", **WHOLE}, {"chosen": [*LONG, a("4")], "rejected": [*LONG, a("5")]}):
        assert shaped(**raw) == data_utils.maybe_extract_prompt(raw)


def test_what_is_worth_a_note() -> None:
    assert notes(**PAIR) == notes(**WHOLE) == notes(prompt="1", **WHOLE) == []
    tail = {"chosen": [u("1"), a("2"), u("thanks")], "rejected": [u("1"), a("3")]}
    assert shaped(**tail) == PARTS and notes(**tail) == ["the last turn is the user's: it is not learnt"]
    tail["rejected"] = [u("1"), a("3"), t("4")]
    assert shaped(**tail) == PARTS and len(notes(**tail)) == 2
    assert "another prompt than the text" in notes(prompt="something else", **WHOLE)[0]
    assert "system message of its own" in notes(**{**PARTS, "prompt": [s("be brief"), u("1")]}, system="be long")[0]
    assert "begin with the text of the prompt" in notes(prompt="1+", chosen="1+2", rejected="1+3")[0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        # Different questions.
        ({"chosen": [u("1"), a("2")], "rejected": [u("9"), a("3")]}, "must answer the same prompt.*user's '1'; the user's '9'"),
        (
            {"chosen": [s("x"), u("1"), a("2")], "rejected": [s("x"), u("9"), a("3")]},
            "the completions must answer the same prompt",
        ),
        ({**PARTS, "rejected": [u("9"), a("3")]}, "the completions must answer the same prompt.*user's '9'"),
        ({**PARTS, "prompt": [s("x"), u("1")], "chosen": [s("y"), u("1"), a("2")]}, "the same prompt.*system's 'y'"),
        ({"chosen": [a("2")], "rejected": [a("3")]}, "must begin with a turn before the assistant's, got the assistant's '2'"),
        # Nothing to train on.
        ({**PAIR, "chosen": ""}, "'chosen' must be text or chat messages, not empty, got ''"),
        ({**PAIR, "rejected": " \n"}, r"'rejected' must be text or chat messages, not empty, got ' \\n'"),
        ({**PARTS, "rejected": [a("")]}, "'rejected' must be text or chat messages, not empty"),
        ({**WHOLE, "chosen": [u("1"), a(" ")]}, "'chosen' must be text or chat messages, not empty"),
        ({**PAIR, "prompt": "\t"}, "'prompt' must be text or chat messages, not empty"),
        ({**PARTS, "prompt": [u(" ")]}, "'prompt' must be text or chat messages, not empty"),
        ({**PARTS, "prompt": [s("be brief"), u("")]}, "'prompt' must be text or chat messages, not empty"),
        ({**PARTS, "chosen": []}, "'chosen' must be text or chat messages, not empty"),
        ({**PARTS, "chosen": [u("1")]}, r"'chosen' must have a turn of the assistant, got turns of \['user'\]"),
        ({**PAIR, "candidates": ["5", ""]}, "'candidates' must be text or chat messages, not empty"),
        # The same answer twice.
        ({**PAIR, "rejected": "3"}, "chosen and rejected must not be the same, got '3'"),
        ({"chosen": [u("1"), a("2")], "rejected": [u("1"), a("2")]}, "chosen and rejected must not be the same"),
        ({**PARTS, "chosen": "3"}, "chosen and rejected must not be the same"),
        ({"chosen": [u("1"), a("2"), u("x")], "rejected": [u("1"), a("2"), u("y")]}, "must not be the same"),
        # Missing fields.
        ({**PAIR, "rejected": None}, r"expected a record with 'rejected', got the fields \['chosen', 'prompt'\]"),
        ({"chosen": "1", "rejected": "2"}, "expected a record with 'prompt'"),
        # Wrong kinds.
        ({**PAIR, "chosen": 7}, "'chosen' must be text or chat messages, not empty, got 7"),
        ({**PAIR, "chosen": True}, "'chosen' must be text or chat messages, not empty, got True"),
        ({**PAIR, "chosen": ["3"]}, r"'chosen' must be text or chat messages, not empty, got \['3'\]"),
        ({**PARTS, "chosen": [[a("2")], [a("3")]]}, "'chosen' must be one conversation, got a list of 2"),
        ({**PAIR, "candidates": "5"}, "'candidates' must be a list"),
        ({**PAIR, "candidates": [5]}, "'candidates' must be a list"),
        ({**PAIR, "candidates": {"a": "5"}}, "'candidates' must be a list"),
        ({**PAIR, "system": 7}, "'system' must be text, got 7"),
        # Half a surrogate pair.
        ({**PAIR, "chosen": "a\ud800"}, "'chosen' must be text without half a surrogate pair"),
        ({**PARTS, "prompt": [u("\udfff")]}, "'prompt' must be text without half a surrogate pair"),
        ({**PAIR, "system": "\ud800"}, "'system' must be text without half a surrogate pair"),
        # Media, and turns that must not be trained on.
        ({**PAIR, "images": ["x.png"]}, "'images' must be absent: only text is learnt"),
        ({**PAIR, "audio": {"path": "x.wav"}}, "'audio' must be absent: only text is learnt"),
        ({**PARTS, "chosen": [a("2", weight=0)]}, "left out of learning: each is learnt, got weight=0"),
    ],
)  # fmt: skip
def test_what_nobody_can_learn_from_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    refused(message, ("chosen", "rejected") if "rejected" in raw else (), **raw)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human", "value": "1"}, u("1")),
        ({"from": "gpt", "value": "1", "weight": 1}, a("1", weight=1)),
        ({"author": "prompter", "text": "1"}, u("1")),
        ({"author": {"role": "assistant"}, "content": "1"}, a("1")),
        ({"role": "Assistant", "content": "1"}, a("1")),
        ({"role": "model", "content": "1"}, a("1")),
        ({"role": "ipython", "content": "1"}, t("1")),
        ({"from": "observation", "value": "1"}, t("1")),
        ({"role": "developer", "content": "1"}, {"role": "developer", "content": "1"}),
        ({"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}, u("12")),
        ({"role": "user", "content": [{"type": "input_text", "text": "1", "image": None}]}, u("1")),
        ({"role": "user", "content": {"type": "text", "text": "1"}}, u("1")),
        ({"role": "user", "content": ["1", "2"]}, u("12")),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, a("", tool_calls=[CALL])),
        ({"role": "assistant", "tool_calls": [CALL]}, a("", tool_calls=[CALL])),
        ({"role": "assistant", "content": "1", "tool_calls": json.dumps([CALL])}, a("1", tool_calls=[CALL])),
        ({"role": "assistant", "content": "1", "tool_calls": None, "name": None}, a("1")),
        ({"role": "assistant", "content": "1", "tool_calls": []}, a("1")),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
            a("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}]),
        ),
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            a("", tool_calls=[CALL]),
        ),
        (  # a null is kept as an argument
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": None, "function": {
                "name": "add", "arguments": {"a": None}, "strict": None}}]},
            a("", tool_calls=[{**CALL, "function": {"name": "add", "arguments": {"a": None}}}]),
        ),
        ({"role": "assistant", "content": "1", "reasoning_content": "hm"}, a("1", reasoning_content="hm")),
        ({"role": "assistant", "content": "1", "thinking": None}, a("1")),
        ({"role": "tool", "content": "1", "tool_call_id": "x", "name": "add"},
         {"role": "tool", "content": "1", "tool_call_id": "x", "name": "add"}),
    ],
)  # fmt: skip
def test_messages_as_others_write_them(message: dict[str, Any], expected: dict[str, Any]) -> None:
    turns = [u("0"), a("0"), u("0"), message] if expected["role"] == "assistant" else [u("0"), message, a("0")]
    record = shaped(("chosen",), chosen=turns)
    assert [*record["prompt"], *record["chosen"]][turns.index(message)] == expected


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "narrator", "content": "1"}, "'chosen' must have roles of .*, got 'narrator'"),
        ({"from": "critic", "value": "1"}, "'chosen' must have roles of .*, got 'critic'"),
        ({"role": "", "content": "1"}, "'chosen' must have roles of .*, got ''"),
        ({"content": "1"}, "'chosen' must be chat messages with role and content"),
        ({"role": 7, "content": "1"}, "'chosen' must be chat messages with role and content"),
        ({"role": "user"}, "'chosen' must be chat messages with role and content"),
        ({"role": "assistant", "content": None}, "'chosen' must be chat messages with role and content"),
        ({"role": "user", "content": 7}, "'chosen' must be chat messages with text as content"),
        ({"role": "user", "content": [7]}, "'chosen' must be chat messages with text as content"),
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "only text is learnt, got a part of type 'image'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "got a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}, {"type": "text", "text": "1"}]}, "type 'input_audio'"),
        ({"role": "assistant", "content": "", "tool_calls": "add(1)"}, "'chosen' must be a list or object, or JSON text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": "add"}]}, "must have tool_calls that are a list"),
    ],
)  # fmt: skip
def test_messages_that_nobody_knows(message: dict[str, Any], error: str) -> None:
    refused(error, chosen=[u("0"), message, a("0")])


@pytest.mark.parametrize(
    "turns",
    [
        [u("1"), a("2")],
        json.dumps([u("1"), a("2")]),  # as a table of text holds them
        json.dumps([{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]),
        {"role": ["user", "assistant"], "content": ["1", "2"]},  # a sequence of structs
        (u("1"), a("2")),
    ],
)
def test_conversations_as_tables_hold_them(turns: Any) -> None:
    assert shaped(("chosen",), chosen=turns) == {"prompt": [u("1")], "chosen": [a("2")]}


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]", '["a", "b"]', '{"answer": 42}', '{"role": "user", "content": "1"}', '[{"role": "user"}]',
        '[{"role": "admin", "content": "1"}]', '[{"role": "user", "content": "1"}, 2]', "[not json", "[]", "[" * 9999,
    ],
)  # fmt: skip
def test_answers_that_are_json_stay_text(text: str) -> None:
    assert shaped(**{**PAIR, "chosen": text})["chosen"] == text


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL])
def test_tools(tools: Any) -> None:
    assert shaped(**PARTS, tools=tools)["tools"] == [TOOL]


@pytest.mark.parametrize("options", [{"enable_thinking": False}, '{"enable_thinking": false, "x": null}'])
def test_options_of_the_template(options: Any) -> None:
    assert shaped(**PARTS, chat_template_kwargs=options)["chat_template_kwargs"] == {"enable_thinking": False}


def test_no_tools_and_no_options_are_absent_and_others_refused() -> None:
    for nothing in ([], "", "[]", None):
        assert "tools" not in shaped(**PARTS, tools=nothing)
    for nothing in ({}, "", "{}", {"enable_thinking": None}):
        assert "chat_template_kwargs" not in shaped(**PARTS, chat_template_kwargs=nothing)
    for wrong in ("add", ["add"], [7], 7):
        refused("'tools' must be a list", **PARTS, tools=wrong)
    for wrong in ("x", [1], 7):
        refused("'chat_template_kwargs' must be", **PARTS, chat_template_kwargs=wrong)


# --- from the file to the records -------------------------------------------------------------------------------------


def test_a_record_has_what_is_learnt_from_and_its_place(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {**PAIR, "id": 7, "source": "us"}, {**PAIR, "chosen": "5", "tools": [TOOL]})
    assert load_records(source, need=("chosen", "rejected")) == [
        {**PAIR, "_where": f"{source}, line 1"},
        {**PAIR, "chosen": "5", "tools": [TOOL], "_where": f"{source}, line 2"},
    ]


def test_messages_in_a_table_of_text(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        cells = [json.dumps(value) for value in ([u("1")], [a("2")], [a("3")], [TOOL])]
        header = ["prompt", "chosen", "rejected", "tools", "system"]
        csv.writer(file).writerows([header, [*cells, "be brief"], ["1", "[2]", "[3]", "", ""]])
    first, second = load_records(str(tmp_path / "d.csv"), need=("chosen", "rejected"))
    assert first["prompt"] == [s("be brief"), u("1")] and first["chosen"] == [a("2")] and first["tools"] == [TOOL]
    assert (second["prompt"], second["chosen"], second["rejected"]) == ("1", "[2]", "[3]") and "tools" not in second


def test_limit_is_the_first_rows(tmp_path: Path) -> None:
    rows = [{**PAIR, "chosen": str(i)} for i in range(5, 15)]
    source = jsonl(tmp_path / "d.jsonl", rows[0], {**PAIR, "chosen": ""}, *rows[1:])
    records = load_records(source, need=("chosen",), limit=3, on_bad_row="skip")
    assert [r["chosen"] for r in records] == ["5", "6"]
    assert len(load_records(jsonl(tmp_path / "e.jsonl", *rows), need=(), limit=0)) == 10


BAD = [
    PAIR,
    {**PAIR, "chosen": ""},
    {**PAIR, "prompt": "2+2="},
    {**PAIR, "rejected": "  "},
    PAIR,
    {"prompt": "x", "chosen": "y"},
    {**PAIR, "chosen": " "},
    {**PAIR, "chosen": "4"},
    "torn",
]


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "d.jsonl"
    path.write_text("".join((json.dumps(row) if isinstance(row, dict) else "{") + "\n" for row in BAD))
    return str(path)


def test_auto_stops_at_what_is_wrong_with_every_reason(bad: str) -> None:
    with pytest.raises(ValueError) as error:
        load_records(bad, need=("chosen", "rejected"))
    text = str(error.value)
    assert text.startswith(
        "6 of 9 records cannot be used (on_bad_row=skip leaves them out): 2 x 'chosen' must be text or"
    )
    assert f"({bad}, line 2, got ''; {bad}, line 7, got ' ')" in text
    for reason in ("1 x 'rejected' must be text", "1 x expected a record with 'rejected' (", "1 x chosen and rejected must",
                   "1 x expected one JSON object a line"):  # fmt: skip
        assert reason in text
    assert "duplicate" not in text


def test_skip_leaves_all_out_and_counts_them(bad: str, caplog: pytest.LogCaptureFixture) -> None:
    records = load_records(bad, need=("chosen", "rejected"), on_bad_row="skip")
    assert [r["_where"] for r in records] == [f"{bad}, line 1", f"{bad}, line 3"]
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("7 of 9 records are left out: 2 x 'chosen' must be")
    assert f"1 x a duplicate of an earlier record ({bad}, line 5, got that of {bad}, line 1)" in warning


def test_stop_stops_at_duplicates_too(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="7 of 9 records cannot be used .*1 x a duplicate of an earlier record"):
        load_records(bad, need=("chosen", "rejected"), on_bad_row="stop")
    source = jsonl(tmp_path / "e.jsonl", PAIR, PAIR)
    with pytest.raises(ValueError, match="line 2: a duplicate of an earlier record, got that of .*line 1"):
        load_records(source, need=("chosen",), on_bad_row="stop")


def test_auto_keeps_duplicates_and_tells_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows may be repeated on purpose."""
    source = jsonl(tmp_path / "e.jsonl", PAIR, PAIR)
    with caplog.at_level(logging.INFO):
        assert len(load_records(source, need=("chosen",))) == 2
    assert f"1 of 2 records: a duplicate of an earlier record, which counts again ({source}, line 2)" in caplog.text


@pytest.mark.parametrize(
    "other",
    [{"rejected": "5"}, {"candidates": ["6"]}, {"system": "be brief"}, {"prompt": [u("1+2=")]}, {"prompt": " 1+2="}],
)
def test_what_differs_in_anything_learnt_is_no_duplicate(tmp_path: Path, other: dict[str, Any]) -> None:
    differs, same = (
        jsonl(tmp_path / f"{i}.jsonl", PAIR, {**PAIR, **more}) for i, more in enumerate((other, {"id": 2}))
    )
    assert len(load_records(differs, need=("chosen",), on_bad_row="skip")) == 2
    assert len(load_records(same, need=("chosen",), on_bad_row="skip")) == 1


def test_given_problems_are_added_to_and_not_settled(bad: str) -> None:
    problems = Problems("auto")
    assert len(load_records(bad, need=("chosen", "rejected"), problems=problems)) == 3
    assert problems.count == 6
    with pytest.raises(ValueError, match="6 of 9 records cannot be used"):
        problems.settle(9)


def test_a_file_of_torn_lines_only(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("{\n{\n")
    with pytest.raises(ValueError, match="2 of 2 records cannot be used: 2 x expected one JSON object a line"):
        load_records(str(tmp_path / "d.jsonl"), need=("chosen",))
    with pytest.raises(ValueError, match="at least one record must be usable, got none of 2"):
        load_records(str(tmp_path / "d.jsonl"), need=("chosen",), on_bad_row="skip")


def test_an_empty_source_and_wrong_words(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="data must hold at least one record, got none in"):
        load_records(str(tmp_path / "d.jsonl"), need=())
    source = jsonl(tmp_path / "e.jsonl", PAIR)
    with pytest.raises(ValueError, match="on_bad_row must be one of auto, skip, stop, got 'no'"):
        load_records(source, need=(), on_bad_row="no")
    with pytest.raises(ValueError, match="data_format must be auto or one of .*standard.*, got 'mine'"):
        load_records(source, need=(), data_format="mine")


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"mask": True}])
def test_turns_that_others_leave_out_of_learning_are_refused(tmp_path: Path, mask: dict[str, Any]) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"messages": [u("1"), {**a("2"), **mask}, u("3"), a("4")]})
    (name,) = mask
    with pytest.raises(ValueError, match=f"line 1: 'chosen' must not have turns .* left out of learning.*{name}="):
        load_records(source, need=("chosen",))


def test_what_a_table_filled_up_with_none_is_not_there(tmp_path: Path) -> None:
    """A table has every argument of every call in each of its rows."""
    calls = [{"type": "function", "function": {"name": "add", "arguments": {name: 1}}} for name in ("a", "b")]
    rows = [{"prompt": [u("1")], "chosen": [a("x", tool_calls=[call])]} for call in calls]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    read = load_records(str(tmp_path / "d"), need=("chosen",))
    assert [r["chosen"][0]["tool_calls"][0]["function"]["arguments"] for r in read] == [{"a": 1}, {"b": 1}]
