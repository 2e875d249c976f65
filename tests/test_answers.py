"""The final answer of a completion: where it is read, and what counts as the same."""

from __future__ import annotations

import random

import pytest
from test_spans import MARKERS, byte_tokenizer

from gem.answers import final_answer, normalise, read_answer
from gem.config import LAST_TOKENS, ScoreArguments
from gem.ends import Ends
from gem.group import Group, Member
from gem.group_lines import parse_group, write_group
from gem.score import read_members
from gem.spans import find_spans

TOKENIZER = byte_tokenizer()
END: int = TOKENIZER.eos_token_id
ENDS = Ends(frozenset([END]))


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


# --- where it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 is 5, no.\n#### 4", "4"),
        ("So \\boxed{ 1,000.0 } it is.", "1000"),
        ("First this.\nThen  The END.", "then the end"),
        ("a single line without a marker", "a single line without a marker"),  # longer than LAST_TOKENS
        ("the answer is 123456789012", "123456789012"),
        ("####", ""),
        ("#### .", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("end", [[END], []])
def test_final_answer(text: str, expected: str, end: list[int]) -> None:
    assert final_answer([*ids_of(text), *end], TOKENIZER, ENDS, MARKERS) == expected


def test_a_stop_text_is_no_part_of_the_answer() -> None:
    stops = Ends(frozenset([END]), ("STOP",))
    assert final_answer(ids_of("#### four STOP"), TOKENIZER, stops, MARKERS) == "four"
    assert final_answer(ids_of("#### four STOP"), TOKENIZER, ENDS, MARKERS) == "four stop"


def test_it_is_that_of_the_span_without_a_limit_on_its_length() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choice(["a", "12", " ", "\n", "####", ".", "B", "\\boxed{", "}"]) for _ in range(rng.randrange(20))
        )
        ids = ids_of(text)
        start, end = find_spans(ids, TOKENIZER, markers=MARKERS, last_tokens=max(1, len(ids))).answer
        expected = normalise(TOKENIZER.decode(ids[start:end]))
        known = find_spans(ids, TOKENIZER, markers=MARKERS, last_tokens=LAST_TOKENS)
        assert final_answer(ids, TOKENIZER, ENDS, MARKERS) == read_answer(ids, known, TOKENIZER) == expected


# --- the answers of a group -------------------------------------------------------------------------------------------


def spoken(*texts: str) -> Group:
    """Return a group of candidates with these texts, "..." at the end: cut off; then a human pair."""
    members = [
        Member("candidate", ids_of(text[:-3]) if text.endswith("...") else [*ids_of(text), END]) for text in texts
    ]
    pair = [Member("chosen", [*ids_of("#### 4"), END]), Member("rejected", [*ids_of("#### 5"), END])]
    group = Group("", [1], [*members, *pair], question="2 + 2?")
    read_members([group], TOKENIZER, ENDS, ScoreArguments())
    return group


def test_members_know_their_answers() -> None:
    group = spoken("So\n#### 4", "#### 5...", "no marker, but all of this", "2 + 2", "####", "")
    assert [m.answer for m in group.members] == ["4", "5", "no marker, but all of this", "2", "", "", "4", "5"]
    assert group.members[3].flaw == "repeats the prompt" and group.members[5].flaw == "empty"
    # Humans, what was cut off, what has a flaw and what gives no answer do not vote.
    assert group.votes == ["4", "", "no marker, but all of this", "", "", "", "", ""]
    assert group.has_pair and not Group("", [1], group.members[:-1]).has_pair


def test_the_last_turn_has_the_answer() -> None:
    first, last = [*ids_of("#### 1"), END], [*ids_of("#### 2"), END]
    group = Group("", [1], [Member("chosen", [*first, *last], given=[(len(first), ids_of("And?"))])])
    read_members([group], TOKENIZER, ENDS, ScoreArguments())
    assert group.members[0].answer == "2"


def test_the_answer_is_not_in_the_file() -> None:
    group = spoken("#### 4")
    for member in group.members:
        member.logprobs = [-1.0] * len(member.ids)
    line = write_group(group)
    assert b'"answer"' not in line
    read = parse_group(line)
    assert [m.answer for m in read.members] == ["", "", ""]
    assert write_group(read) == line


# --- what counts as the same answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("$1,234.50", "1234.5"),
        ("18", "18"),
        ("A: 18.", "18"),
        ("18,", "18"),
        ("the answer is x", "the answer is x"),
        ("  The  Answer\nis X. ", "the answer is x"),
        ("-3", "-3"),
        ("x = -3.00", "-3"),
        ("5 - 2 = 3", "3"),
        ("007", "7"),
        ("100", "100"),
        ("1,000,000", "1000000"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("0", "0"),
        ("-0", "0"),
        ("0.000", "0"),
        ("0.00001", "0.00001"),
        ("12%", "12"),
        ("1234567", "1234567"),
        ("1234567.25", "1234567.25"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("", ""),
        (" . ", ""),
        ("No.", "no"),
    ],
)
def test_normalise(answer: str, expected: str) -> None:
    assert normalise(answer) == expected
    assert normalise(normalise(answer)) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [("1234567", "1234568"), ("1,000,000", "1,000,001"), ("0.1234567", "0.1234568"), (".5", "5"), ("-3", "3"),
     ("12345678901234567", "12345678901234568"), ("10", "1"), ("x", "y")],
)  # fmt: skip
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
