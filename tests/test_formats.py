"""Each public format by a row of its public shape (the words are ours): recognised, converted, and logged in one line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gem.formats import FORMATS, recognise
from gem.problems import BadRecord
from gem.records import load_records
from gem.shapes import shape

Row = dict[str, Any]


def u(text: str) -> Row:
    return {"role": "user", "content": text}


def a(text: str) -> Row:
    return {"role": "assistant", "content": text}


def s(text: str) -> Row:
    return {"role": "system", "content": text}


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def jsonl(path: Path, *rows: Row) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ASK, GOOD, BAD = "Name a prime.", "Seven is a prime.", "Eight is a prime."
TEXTS = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
TURNS = {"prompt": [u(ASK)], "chosen": [a(GOOD)], "rejected": [a(BAD)]}
HH = "\n\nHuman: Hello\n\nAssistant: Hi! \n\nHuman: Name a prime.\n\nAssistant:"
HH_PROMPT = [u("Hello"), a("Hi!"), u(ASK)]
ULTRAFEEDBACK = {
    "prompt": ASK, "prompt_id": "f0e37e9f", "chosen": [u(ASK), a(GOOD)], "rejected": [u(ASK), a(BAD)],
    "messages": [u(ASK), a(GOOD)], "score_chosen": 8.5, "score_rejected": 6.0,
}  # fmt: skip
PKU = {
    "prompt": ASK, "response_0": BAD, "response_1": GOOD, "prompt_source": "Alpaca3-8B", "is_response_0_safe": True,
    "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0,
}  # fmt: skip
ARENA = {"question_id": "58210e", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "arena_user_973",
         "conversation_a": [u(ASK), a(BAD)], "conversation_b": [u(ASK), a(GOOD)], "turn": 1}  # fmt: skip
COLUMNS = {"id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps([ASK]), "response_a": json.dumps([BAD]),
           "response_b": json.dumps([GOOD]), "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}  # fmt: skip
HELPSTEER2 = {"split": "train", "prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2,
              "preference_statement": "Response 2 is better."}  # fmt: skip
HELPSTEER3 = {"domain": "general", "language": "english", "context": [u(ASK)], "response1": GOOD, "response2": BAD,
              "overall_preference": -1}  # fmt: skip
SHP = {"post_id": "qt3nxl", "domain": "askmath_train", "history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD,
       "labels": 1, "score_A": 340, "score_B": 166}  # fmt: skip
WEBGPT = {"question": {"dataset": "eli5", "id": "7", "full_text": ASK}, "answer_0": BAD, "answer_1": GOOD,
          "score_0": -0.5, "score_1": 0.5, "quotes_0": {"title": [], "extract": []}}  # fmt: skip
NECTAR = {"prompt": f"\n\nHuman: {ASK}\n\nAssistant: ", "num_responses": 3, "turns": 1, "source": ["lmsys-chat-1m"],
          "answers": [{"answer": "Six.", "model": "x", "rank": 2.0}, {"answer": BAD, "model": "y", "rank": 3.0},
                      {"answer": GOOD, "model": "z", "rank": 1.0}]}  # fmt: skip
RAW = {"source": "evol_instruct", "instruction": ASK, "models": ["x", "y", "z"],
       "completions": [{"model": "x", "response": "Six.", "overall_score": 5.0},
                       {"model": "y", "response": GOOD, "overall_score": 8.0},
                       {"model": "z", "response": BAD, "overall_score": 2.0}]}  # fmt: skip
ARGILLA = {"source": "evol_instruct", "instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD,
           "chosen_avg_rating": 4.75, "rejected_avg_rating": 3.5, "chosen_model": "x"}  # fmt: skip

# Name, rows, and the expected records.
CASES: list[tuple[str, Row, Row]] = [
    ("ultrafeedback-binarized", ULTRAFEEDBACK, TURNS),
    (
        "anthropic-hh",
        {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        {"prompt": HH_PROMPT, "chosen": [a(GOOD)], "rejected": [a(BAD)]},
    ),
    (
        "anthropic-hh",  # the shape of some copies: separate prompt, answers alone
        {"prompt": HH, "response": f" {GOOD}", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": HH_PROMPT, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "anthropic-hh",  # stripped, and with different earlier turns
        {"chosen": f"Human: {ASK}\n\nAssistant: {GOOD}",
         "rejected": f"Human: {ASK}\n\nAssistant: {BAD}\n\nHuman: No.\n\nAssistant: 2"},
        {**TURNS, "rejected": [a(BAD), u("No."), a("2")]},
    ),
    ("pku-saferlhf", PKU, TEXTS),
    ("pku-saferlhf", {**PKU, "response_0": GOOD, "response_1": BAD, "better_response_id": 0}, TEXTS),
    (
        "rewardbench",
        {**TEXTS, "chosen_model": "gpt-4", "rejected_model": "llama", "subset": "alpacaeval-easy", "id": 0},
        TEXTS,
    ),
    ("orca-dpo", {"system": "", "question": ASK, "chosen": GOOD, "rejected": BAD}, TEXTS),
    ("orca-dpo", {"system": "Be brief.", "question": ASK, "chosen": GOOD, "rejected": BAD}, {**TEXTS, "system": "Be brief."}),
    (
        "orca-dpo",  # Argilla's
        {"system": "Be brief.", "input": ASK, "chosen": GOOD, "rejected": BAD, "status": "swapped", "chosen_score": 9.0},
        {**TEXTS, "system": "Be brief."},
    ),
    ("helpsteer2", HELPSTEER2, TEXTS),
    ("helpsteer2", {**HELPSTEER2, "response_1": GOOD, "response_2": BAD, "preference_strength": -3}, TEXTS),
    ("helpsteer3", HELPSTEER3, {**TEXTS, "prompt": [u(ASK)]}),
    ("helpsteer3", {**HELPSTEER3, "response1": BAD, "response2": GOOD, "overall_preference": 1}, {**TEXTS, "prompt": [u(ASK)]}),
    ("shp", SHP, TEXTS),
    ("shp", {**SHP, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, TEXTS),
    ("webgpt", WEBGPT, TEXTS),
    ("webgpt", {**WEBGPT, "answer_0": GOOD, "answer_1": BAD, "score_0": 1, "score_1": -1, "question": ASK}, TEXTS),
    ("arena", ARENA, TURNS),
    ("arena", {**ARENA, "conversation_a": [u(ASK), a(GOOD)], "conversation_b": [u(ASK), a(BAD)], "winner": "model_a"}, TURNS),
    ("arena-columns", COLUMNS, TEXTS),
    (
        "arena-columns",
        {**COLUMNS, "prompt": json.dumps([ASK, "Sure?"]), "response_a": json.dumps([BAD, "Yes."]),
         "response_b": json.dumps([GOOD, "Yes!"])},
        {"prompt": [u(ASK)], "chosen": [a(GOOD), u("Sure?"), a("Yes!")], "rejected": [a(BAD), u("Sure?"), a("Yes.")]},
    ),
    ("nectar", NECTAR, {**TEXTS, "prompt": [u(ASK)]}),
    ("nectar", {**NECTAR, "prompt": ASK}, TEXTS),
    ("ultrafeedback", RAW, TEXTS),
    ("ultrafeedback", {**RAW, "completions": {"response": ["Six.", BAD, GOOD], "overall_score": [5, 1, 9]}}, TEXTS),
    (
        "distilabel",
        {"instruction": ASK, "generations": [BAD, "Six.", GOOD], "ratings": ["1", "3", "5"], "generation_models": ["x"] * 3},
        TEXTS,
    ),
    ("argilla", ARGILLA, TEXTS),
    (
        "openai",
        {"input": {"messages": [u(ASK)], "tools": [{"type": "function"}], "parallel_tool_calls": True},
         "preferred_output": [a(GOOD)], "non_preferred_output": [a(BAD)]},
        {**TURNS, "tools": [{"type": "function"}]},
    ),
    ("icliniq", {"input": ASK, "answer_icliniq": GOOD, "answer_chatgpt": BAD, "answer_chatdoctor": "Six."}, TEXTS),
    ("standard", TEXTS, TEXTS),
    ("standard", TURNS, TURNS),
    ("standard", {"prompt": ASK, "candidates": [GOOD, BAD]}, {"prompt": ASK, "candidates": [GOOD, BAD]}),
    ("standard", {**TEXTS, "source": "x", "prompt": ASK, "chosen": [u(ASK), a(GOOD)], "rejected": [u(ASK), a(BAD)]}, TURNS),
    (
        "conversation-pairs",
        {"conversations": [human("Hello"), gpt("Hi!"), human(ASK)], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
        {**TURNS, "prompt": HH_PROMPT},
    ),
    (
        "conversation-pairs",  # UltraInteract
        {"task": "Math", "trajectory": [human(ASK)], "chosen": GOOD, "rejected": BAD, "id": "1", "parent_id": "0"},
        {**TEXTS, "prompt": [u(ASK)]},
    ),
    ("conversation-pairs", {"messages": [u(ASK)], "chosen": [a(GOOD)], "rejected": [a(BAD)]}, TURNS),
    (
        "conversation-pairs",  # with messages that copy chosen
        {"messages": [u(ASK), a(GOOD)], "chosen": [u(ASK), a(GOOD)], "rejected": [u(ASK), a(BAD)]},
        TURNS,
    ),
    (
        "alpaca-pairs",
        {"instruction": "Name", "input": "a prime.", "chosen": GOOD, "rejected": BAD},
        {**TEXTS, "prompt": "Name\na prime."},
    ),
    (
        "alpaca-pairs",
        {"instruction": ASK, "system": "Be brief.", "history": [["Hello", "Hi!"]], "chosen": GOOD, "rejected": BAD},
        {**TEXTS, "prompt": [s("Be brief."), *HH_PROMPT]},
    ),
    ("implicit-prompt", {"source": "x", "chosen": [u(ASK), a(GOOD)], "rejected": [u(ASK), a(BAD)]}, TURNS),
    ("implicit-prompt", {"chosen": [human(ASK), gpt(GOOD)], "rejected": [human(ASK), gpt(BAD)], "chosen-rating": 5.0}, TURNS),
    (
        "implicit-prompt",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    ("unpaired", {"prompt": ASK, "completion": GOOD, "label": True}, {"prompt": ASK, "chosen": GOOD}),
    ("safe-answers", {"prompt": ASK, "response": GOOD, "is_safe": True}, {"prompt": ASK, "chosen": GOOD}),
    ("labelled-answers", {"prompt": ASK, "response": GOOD, "label": 1}, {"prompt": ASK, "chosen": GOOD}),
    ("unpaired-alpaca", {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": True}, {"prompt": ASK, "chosen": GOOD}),
    ("prompt-completion", {"prompt": ASK, "completion": GOOD}, {"prompt": ASK, "chosen": GOOD}),
    ("prompt-completion", {"prompt": [u(ASK)], "completion": [a(GOOD)]}, {"prompt": [u(ASK)], "chosen": [a(GOOD)]}),
    (
        "messages",
        {"prompt_id": "1", "messages": [u("Hello"), a("Hi!"), u(ASK), a(GOOD)]},
        {"prompt": [u("Hello")], "chosen": [a("Hi!"), u(ASK), a(GOOD)]},
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be brief."}, human(ASK), gpt(GOOD)]},
        {"prompt": [s("Be brief."), u(ASK)], "chosen": [a(GOOD)]},
    ),
    ("alpaca", {"instruction": "Name", "input": "a prime.", "output": GOOD}, {"prompt": "Name\na prime.", "chosen": GOOD}),
    ("alpaca", {"instruction": ASK, "context": "", "response": GOOD, "category": "qa"}, {"prompt": ASK, "chosen": GOOD}),
    ("alpaca", {"instruction": ASK, "input": "", "output": [GOOD, BAD]}, TEXTS),
    (
        "alpaca",
        {"instruction": ASK, "output": GOOD, "history": [["Hello", "Hi!"]]},
        {"prompt": HH_PROMPT, "chosen": GOOD},
    ),
    ("question-answer", {"question": ASK, "answer": GOOD}, {"prompt": ASK, "chosen": GOOD}),
    (
        "question-answer",
        {"id": "1", "system_prompt": "Be brief.", "question": ASK, "response": GOOD},
        {"prompt": ASK, "chosen": GOOD, "system": "Be brief."},
    ),
    ("prompt", {"prompt": ASK, "id": 7}, {"prompt": ASK}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "record"), CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_a_row_of_each_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, row: Row, record: Row
) -> None:
    source = jsonl(tmp_path / "d.jsonl", row)
    need = [field for field in ("chosen", "rejected") if field in record]
    with caplog.at_level(logging.INFO):
        (loaded,) = load_records(source, need=need)
    assert loaded == {**record, "_where": f"{source}, line 1"}
    format = recognise([row])
    assert format.name == name
    assert caplog.records[0].message.startswith(f"{source}: 1 records, read as {format.title}: {format.read_as}")
    assert load_records(source, need=need, data_format=name) == [loaded]


def test_every_format_has_a_row_here_and_a_line_in_the_documentation() -> None:
    names = [format.name for format in FORMATS]
    assert len(set(names)) == len(names)
    assert {name for name, _, _ in CASES} == {format.name for format in FORMATS if not format.on_request}
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    for format in FORMATS:
        row = next((line for line in page.splitlines() if line.startswith(f"| `{format.name}` |")), "")
        assert row, format.name
        for column in format.columns:
            assert f"`{column.split('|')[0]}`" in row, (format.name, column)


@pytest.mark.parametrize(("name", "row", "record"), CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_a_table_of_text_holds_each_format(tmp_path: Path, name: str, row: Row, record: Row) -> None:
    """csv holds numbers, booleans and lists as text."""
    if isinstance(row.get("output"), list):
        pytest.skip("in a table, a list of texts as output is a text")
    cells = {k: str(v) if isinstance(v, str | bool) else json.dumps(v) for k, v in row.items()}
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(cells), list(cells.values())])
    (loaded,) = load_records(str(tmp_path / "d.csv"), need=())
    assert {k: v for k, v in loaded.items() if k != "_where"} == record


@pytest.mark.parametrize(("one", "other"), [(5, 4), (None, None), ("n/a", "n/a"), ([1], [1]), (5, None)])
def test_ratings_that_are_no_numbers_make_no_tie(tmp_path: Path, one: Any, other: Any) -> None:
    source = jsonl(tmp_path / "d.jsonl", {**TEXTS, "chosen_score": one, "rejected_score": other})
    assert len(load_records(source, need=("rejected",))) == 1


def test_safer_is_read_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = jsonl(tmp_path / "d.jsonl", PKU)
    with caplog.at_level(logging.INFO):
        (safer,) = load_records(source, need=("rejected",), data_format="pku-saferlhf-safer")
        (better,) = load_records(source, need=("rejected",))
    assert safer["chosen"] == better["rejected"] == BAD
    safer_line, better_line = (record.message for record in caplog.records)
    assert safer_line.endswith("safer_response_id decides")
    assert "better_response_id decides (data_format pku-saferlhf-safer" in better_line


def test_transcripts_stay_text_on_request(tmp_path: Path) -> None:
    row = {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}
    (record,) = load_records(jsonl(tmp_path / "d.jsonl", row), need=("rejected",), data_format="implicit-prompt")
    assert record["prompt"] == HH and record["chosen"] == f" {GOOD}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ULTRAFEEDBACK, "score_rejected": 8.5}, "score_chosen = score_rejected = 8.5"),
        ({**ARGILLA, "rejected_avg_rating": 4.75}, "chosen_avg_rating = rejected_avg_rating"),
        ({**TEXTS, "chosen-rating": 4, "rejected-rating": 4.0}, "chosen-rating = rejected-rating = 4"),
        ({**HELPSTEER2, "preference_strength": 0}, "preference_strength = 0"),
        ({**HELPSTEER3, "overall_preference": 0}, "overall_preference = 0"),
        ({**WEBGPT, "score_0": 0, "score_1": 0}, "score_0 = score_1 = 0"),
        ({**ARENA, "winner": "tie"}, "winner = 'tie'"),
        ({**ARENA, "winner": "tie (bothbad)"}, r"winner = 'tie \(bothbad\)'"),
        ({**COLUMNS, "winner_model_b": 0, "winner_tie": 1}, "winner_tie"),
        ({**NECTAR, "answers": [{**answer, "rank": 1.0} for answer in NECTAR["answers"]]}, "all of the same rank"),
        ({**RAW, "completions": [{**c, "overall_score": 5} for c in RAW["completions"]]}, "same overall_score"),
        ({"instruction": ASK, "generations": [GOOD, BAD], "ratings": [3, 3]}, "all of the same rating"),
        ({"system": "x", "input": ASK, "chosen": GOOD, "rejected": BAD, "status": "tie"}, "status = tie"),
    ],
)  # fmt: skip
def test_a_tie_is_a_bad_record_by_name(tmp_path: Path, row: Row, reason: str) -> None:
    source = jsonl(tmp_path / "d.jsonl", row)
    with pytest.raises(ValueError, match=f"1 x a tie: neither answer is the better one .*line 1, got .*{reason}"):
        load_records(source, need=("chosen", "rejected"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PKU, "better_response_id": 2}, "'better_response_id' must be 0 or 1, got 2"),
        ({**PKU, "better_response_id": float("nan")}, "'better_response_id' must be a number, got nan"),
        ({**PKU, "better_response_id": "x"}, "'better_response_id' must be a number, got 'x'"),
        ({**PKU, "response_0": GOOD}, "chosen and rejected must not be the same"),
        ({**PKU, "response_0": None}, "expected a record with 'response_0', got the fields"),
        ({**PKU, "prompt": None}, "expected a record with 'prompt', got the fields .*'better_response_id'"),
        ({**SHP, "labels": -1}, "'labels' must be 0 or 1, got -1"),
        ({**ARENA, "winner": "model_c"}, "'winner' must be model_a, model_b or a tie, got 'model_c'"),
        ({**ARENA, "conversation_b": [u("Another?"), a(GOOD)]}, "the completions must answer the same prompt"),
        ({**COLUMNS, "response_a": json.dumps([None])}, "expected a record with 'rejected'"),
        ({**NECTAR, "answers": NECTAR["answers"][:1]}, "expected at least two answers, got 1"),
        ({**NECTAR, "answers": "six"}, "'answers' must be a list or object, or JSON text of one, got 'six'"),
        ({**NECTAR, "answers": [1]}, "'answers' must be a list of objects"),
        ({**RAW, "completions": [{"response": "x"}] * 2}, "expected a record with 'overall_score'"),
        ({"instruction": ASK, "generations": [GOOD, BAD], "ratings": [3]}, "must be as many, got 2 and 1"),
        ({"instruction": ASK, "generations": [GOOD, BAD], "ratings": ["good", "bad"]}, "'ratings' must be a number"),
        ({"instruction": [ASK], "chosen": GOOD, "rejected": BAD}, "'instruction' and 'input' must be text"),
        ({"instruction": ASK, "chosen": GOOD, "rejected": BAD, "history": ["a"]}, "'history' must be a list of pairs"),
        ({"input": ASK, "preferred_output": [a(GOOD)], "non_preferred_output": [a(BAD)]}, "'input' must be"),
        ({"chosen": f"{HH} ", "rejected": f"{HH} {BAD}"}, "'chosen' must be text or chat messages, not empty"),
        ({"chosen": "yes", "rejected": "no"}, "chosen and rejected must begin with the same prompt, got 'yes' and 'no'"),
        ({"chosen": "The sky", "rejected": "The sky"}, "chosen and rejected must not be the same"),
        ({"prompt": ASK, "completion": BAD, "label": False}, "labelled as bad, and stands alone, got label = False"),
        ({"instruction": ASK, "output": BAD, "kto_tag": False}, "labelled as bad, and stands alone, got kto_tag = False"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_say_what_its_format_says(tmp_path: Path, row: Row, message: str) -> None:
    good = {field: "x" if value is None else value for field, value in row.items()}
    source = jsonl(tmp_path / "d.jsonl", row)
    format = recognise([good]).name
    need = ("chosen",) if {"completion", "output"} & row.keys() else ("chosen", "rejected")
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        load_records(source, need=need, data_format=format)


ODD = [
    *(
        7,
        0,
        True,
        float("nan"),
        10**400,
        "",
        " ",
        "x",
        "\ud800",
        "[1",
        "[]",
        "{}",
        "null",
        '["x"]',
        [],
        {},
        [None],
        [[]],
        [1],
    ),
    *(
        [["a", "b"]],
        [["a"]],
        [{}],
        [{"role": 1}],
        [{"role": "user"}],
        [{"from": "gpt", "value": None}],
        {"role": []},
        {"a": 1},
    ),
    *([{"role": "assistant", "content": [{"type": ["x"]}], "tool_calls": {}}], {"content": [1], "role": [2]}, b"x", ()),
]


@pytest.mark.parametrize(("name", "row", "record"), CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_whatever_a_field_holds_is_read_or_a_bad_record(name: str, row: Row, record: Row) -> None:
    format = next(format for format in FORMATS if format.name == name)
    for field in [*row, "system", "tools", "chat_template_kwargs", "candidates", "history", "images"]:
        for odd in (*ODD, None):
            try:
                shape(format.read({**row, field: odd}), ("chosen",))
            except BadRecord as error:
                str(error).encode()


def test_columns_that_are_left_aside_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for extra in (
            {"messages": [u(ASK), a(GOOD)]},
            {"question": ASK, "answer": BAD},
            {"completion": GOOD},
            {"id": 7},
        ):
            load_records(jsonl(tmp_path / "d.jsonl", {**TEXTS, **extra}), need=())
    endings = [record.message.split("as they are")[1] for record in caplog.records]
    assert endings == [" (messages left aside)", " (answer, question left aside)", "", ""]


@pytest.mark.parametrize("columns", [["text"], ["question_id", "turns"], ["chosen"], ["text", "label"]])
def test_columns_that_no_format_has_are_refused_with_what_there_is(tmp_path: Path, columns: list[str]) -> None:
    source = jsonl(tmp_path / "d.jsonl", dict.fromkeys(columns, "x"))
    with pytest.raises(
        ValueError, match=rf"data must have 'prompt' with .*docs/data.md, got the columns .*{columns[0]}"
    ):
        load_records(source, need=("chosen",))


def test_the_format_is_told_by_the_first_rows_together(tmp_path: Path) -> None:
    """Each row of a source may have only some of its columns."""
    rows = [{"prompt": "1", "completion": "2", "chosen": None}, TEXTS, {**TEXTS, "prompt": "x", "rejected": None}]
    records = load_records(jsonl(tmp_path / "d.jsonl", *rows), need=("chosen",))
    assert [r["chosen"] for r in records] == ["2", GOOD, GOOD] and "rejected" not in records[2]
    late = [{"prompt": str(i), "completion": "2"} for i in range(100)]
    with pytest.raises(ValueError, match="line 101: expected a record with 'prompt', got the fields"):
        load_records(jsonl(tmp_path / "e.jsonl", *late, {"question": "1", "chosen": "2"}), need=("chosen",))


def test_a_groups_file_is_told_from_records(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "g.jsonl", {"prompt": "q", "prompt_ids": [1], "members": [], "kept": True})
    with pytest.raises(ValueError, match="data must hold records, got a groups file .* `train --groups` takes it"):
        load_records(source, need=())
