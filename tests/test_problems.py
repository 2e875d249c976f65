"""The records left out of a source and the reasons: three ways to act, one message each, which lists every reason."""

from __future__ import annotations

import logging

import pytest

from gem.problems import ON_BAD_ROW, BadRecord, Minor, Problems, shown

BLANK = BadRecord("'chosen' must not be blank", "''")
ROLE = BadRecord("'prompt' must have roles of user, assistant", "'narrator'")
LONG = Minor("longer than max_length=64", "70 tokens")


def problems(on_bad_row: str, *errors: BadRecord) -> Problems:
    found = Problems(on_bad_row)
    for i, error in enumerate(errors, 1):
        found.add(f"d.jsonl, line {i}", error)
    return found


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BLANK, "'chosen' must not be blank, got ''"),
        (LONG, "longer than max_length=64, got 70 tokens"),
        (BadRecord("a duplicate of an earlier record"), "a duplicate of an earlier record"),
    ],
)
def test_a_bad_record_reads_well_after_its_place(error: BadRecord, text: str) -> None:
    assert str(error) == text and isinstance(error, ValueError)


def test_one_that_stops_reads_like_any_error_of_a_row() -> None:
    with pytest.raises(ValueError) as error:
        problems("auto", BLANK).settle(10)
    assert str(error.value) == "d.jsonl, line 1: 'chosen' must not be blank, got '' (on_bad_row=skip leaves it out)"
    with pytest.raises(ValueError, match="^d.jsonl, line 1: 'chosen' must not be blank, got ''$"):
        problems("auto", BLANK).settle(1)


def test_several_that_stop_are_all_listed_by_reason_with_the_way_out() -> None:
    with pytest.raises(ValueError) as error:
        problems("auto", ROLE, BLANK, LONG, BLANK).settle(10)
    assert str(error.value) == (
        "3 of 10 records cannot be used (on_bad_row=skip leaves them out): "
        "2 x 'chosen' must not be blank, got '' (d.jsonl, line 2; d.jsonl, line 4), "
        "1 x 'prompt' must have roles of user, assistant (d.jsonl, line 1, got 'narrator')"
    )


def test_no_way_out_is_offered_where_nothing_would_be_left() -> None:
    with pytest.raises(ValueError, match=r"^2 of 2 records cannot be used: 2 x"):
        problems("stop", BLANK, BLANK).settle(2)
    with pytest.raises(ValueError, match=r"^at least one record must be usable, got none of 2: 1 x .*1 x"):
        problems("skip", BLANK, LONG).settle(2)


@pytest.mark.parametrize(
    ("on_bad_row", "error", "stops"),
    [
        ("auto", BLANK, True), ("auto", LONG, False),
        ("skip", BLANK, False), ("skip", LONG, False),
        ("stop", BLANK, True), ("stop", LONG, True),
    ],
)  # fmt: skip
def test_three_ways_to_act(on_bad_row: str, error: BadRecord, stops: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = problems(on_bad_row, error)
    assert found.count == 1
    if stops:
        with pytest.raises(ValueError, match=f"line 1: {error.kind}"):
            found.settle(10)
        assert not caplog.records
    else:
        found.settle(10)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.message.startswith(f"1 of 10 records are left out: 1 x {error.kind} (d.jsonl, line 1")


def test_the_first_five_rows_of_a_reason_are_named(caplog: pytest.LogCaptureFixture) -> None:
    problems("skip", *[BLANK] * 7, ROLE).settle(100)
    assert "7 x" in caplog.text and "line 5; and 2 more)" in caplog.text and "line 6" not in caplog.text
    assert "1 x 'prompt' must have roles" in caplog.text and "line 8" in caplog.text


def test_notes_are_told_once_and_stop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = Problems("stop")
    for i in range(3):
        found.note(f"row {i}", "the last turn is the user's: it is not learnt")
    with caplog.at_level(logging.INFO):
        found.settle(9)
    (record,) = caplog.records
    assert record.message == "3 of 9 records: the last turn is the user's: it is not learnt (row 0; row 1; row 2)"
    assert record.levelno == logging.INFO and found.count == 0


def test_nothing_found_is_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    for on_bad_row in ON_BAD_ROW:
        Problems(on_bad_row).settle(0)
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["", "Skip", "raise"])
def test_another_word_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"on_bad_row must be one of auto, skip, stop, got {wrong!r}"):
        Problems(wrong)


def test_what_came_is_shown_in_brief_and_can_be_printed() -> None:
    assert shown("short") == "'short'" and shown(7) == "7"
    assert len(shown("x" * 1000)) == 60 and shown("x" * 1000).endswith("...")
    shown("\ud800").encode()  # half a surrogate pair, escaped
