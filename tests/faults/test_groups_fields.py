"""Each field of a groups file wrong in five ways: refused with file and line before the run claims its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gem.cli import main

LINE = 4  # of the file; the header is line 1
GONE = object()  # the field is left out
NO_TEXT: tuple[Any, ...] = (3, None, ["x"], True, {})
NO_FLAG: tuple[Any, ...] = ("no", 0, 1, None, [])
NO_NUMBER: tuple[Any, ...] = (math.nan, -math.inf, "0.5", True, [0.5])
NO_SPAN: tuple[Any, ...] = ([0], [2, 1], [0, 99], [-1, 1], ["0", "1"], 5, None)
NO_IDS: tuple[Any, ...] = ([-1], [1.5], [True], ["7"], "7", None, [[7]])

GROUP: dict[str, Sequence[Any]] = {
    "prompt": (*NO_TEXT, GONE),
    "prompt_ids": (*NO_IDS, [], GONE),
    "members": ([], None, 5, "x", [5], GONE),
    "kept": NO_FLAG,
    "question": NO_TEXT,
    "sampling_prompt_ids": NO_IDS,
}
MEMBER: dict[str, Sequence[Any]] = {
    "role": ("judge", "", None, 3, ["chosen"], GONE),
    "ids": (*NO_IDS, [], GONE),
    "completion": NO_TEXT,
    "truncated": NO_FLAG,
    "logprobs": ([], None, "x", GONE, lambda xs: xs[:-1], lambda xs: [*xs, -1.0], lambda xs: [0.7, *xs[1:]],
                 lambda xs: [math.nan, *xs[1:]], lambda xs: [None, *xs[1:]], lambda xs: ["-1", *xs[1:]],
                 lambda xs: [True, *xs[1:]], lambda xs: [-math.inf, *xs[1:]]),
    "entropies": (None, "x", lambda xs: xs[:-1], lambda xs: [-0.5, *xs[1:]], lambda xs: [25.0, *xs[1:]],
                  lambda xs: [math.nan, *xs[1:]], lambda xs: ["1", *xs[1:]], lambda xs: [math.inf, *xs[1:]]),
    "branch_span": NO_SPAN,
    "answer_span": NO_SPAN,
    "span_rule": NO_TEXT,
    "score": NO_NUMBER,
    "final_entropy": NO_NUMBER,
    "branch_entropy": NO_NUMBER,
    "rank_mean": NO_NUMBER,
    "rank_sd": NO_NUMBER,
    "weight": (*NO_NUMBER, 1e6, -1e6),
    "sampled": NO_FLAG,
    "flaw": NO_TEXT,
    "given": (5, "x", [[1]], [["0", [3]]], [[0, [-1]]], [[99, [3]]], [[-1, [3]]], [[0, "x"]], None),
}  # fmt: skip
HEADER: dict[str, Sequence[Any]] = {
    "gem_groups": (2, "1", None, True, []),
    "complete": ("true", 1, None, [], GONE),
    "groups": (-1, "16", 1.5, True, None),
    "shard": ("1/1", 3, None, "x", "0/0", "0/1/2"),
    "settings": (3, None, "x", [], True),
    "model": (3, None, [], "x", True),
    "tokenizer": (3, None, [], "x", {"name": "warm", "hash": 7}),
    "data": (3, None, [], "x", True),
}
LINES: dict[str, str] = {
    "is cut off": '{"prompt": "1+1=", "prompt_ids": [1, 8',
    "is a list": "[1, 2]",
    "is a number": "7",
    "is no JSON": "prompt: 1+1=",
    "has a field of no group": '{"prompt": "a", "prompt_ids": [1], "members": [], "wieght": 1}',
}


def spoil(fields: dict[str, Any], name: str, wrong: Any) -> None:
    """Put a wrong value into a field."""
    if wrong is GONE:
        del fields[name]
    else:
        fields[name] = wrong(fields[name]) if callable(wrong) else wrong


def refused(path: Path, lines: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which `train` refuses a groups file of these lines, before it claims its folder."""
    path.write_text("".join(f"{line}\n" for line in lines))
    status = main(["train", "--config", "groups.yaml"])
    err = capsys.readouterr().err
    assert status == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert not Path("runs/groups").exists()
    return err.strip()


@pytest.fixture
def lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of a good groups file, in its folder."""
    monkeypatch.chdir(folder)
    return Path("groups.jsonl").read_text().splitlines()


def member_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the member of a group that is spoilt: a candidate."""
    return next(member for member in group["members"] if member["role"] == "candidate")


@pytest.mark.fault("groups file: `{field}` of a group is wrong in five ways")
@pytest.mark.parametrize("field", GROUP)
def test_a_field_of_a_group(
    field: str, lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    for wrong in GROUP[field]:
        group = json.loads(lines[LINE - 1])
        spoil(group, field, wrong)
        line = refused(Path("groups.jsonl"), [*lines[: LINE - 1], json.dumps(group), *lines[LINE:]], capsys)
        assert f"groups.jsonl, line {LINE}: " in line and (field.removesuffix("s") in line or wrong is GONE), line
        row(line, "everything; no folder is claimed")


@pytest.mark.fault("groups file: `{field}` of a member is wrong in five ways")
@pytest.mark.parametrize("field", MEMBER)
def test_a_field_of_a_member(
    field: str, lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    for wrong in MEMBER[field]:
        group = json.loads(lines[LINE - 1])
        spoil(member_of(group), field, wrong)
        line = refused(Path("groups.jsonl"), [*lines[: LINE - 1], json.dumps(group), *lines[LINE:]], capsys)
        assert f"groups.jsonl, line {LINE}: " in line and (field in line or wrong is GONE), line
        row(line, "everything; no folder is claimed")


@pytest.mark.fault("groups file: `{field}` of the header is wrong in five ways")
@pytest.mark.parametrize("field", HEADER)
def test_a_field_of_the_header(
    field: str, lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    for wrong in HEADER[field]:
        header = json.loads(lines[0])
        spoil(header, field, wrong)
        line = refused(Path("groups.jsonl"), [json.dumps(header), *lines[1:]], capsys)
        assert "groups.jsonl" in line and field in line, line
        row(line, "everything; no folder is claimed")


@pytest.mark.fault("groups file: a line {what}")
@pytest.mark.parametrize("what", LINES)
def test_a_line(
    what: str, lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    line = refused(Path("groups.jsonl"), [*lines[: LINE - 1], LINES[what], *lines[LINE:]], capsys)
    assert f"groups.jsonl, line {LINE}: " in line, line
    row(line, "everything; no folder is claimed")


@pytest.mark.fault("groups file: a token is not in the vocabulary")
def test_a_token_of_another_vocabulary(
    lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    group = json.loads(lines[LINE - 1])
    member_of(group)["ids"][0] = 17
    path = Path("groups.jsonl")
    path.write_text("".join(f"{line}\n" for line in [*lines[: LINE - 1], json.dumps(group), *lines[LINE:]]))
    assert main(["train", "--config", "groups.yaml"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "got token 17 in groups.jsonl" in line and not Path("runs/groups").exists()
    row(line, "everything; no folder is claimed")


@pytest.mark.fault("groups file: `score` was cut off, and its file is trained on")
def test_a_file_that_is_not_complete(
    lines: list[str], capsys: pytest.CaptureFixture[str], row: Callable[[str, str], None]
) -> None:
    header = lines[0].replace('"complete": true ', '"complete": false')
    assert header != lines[0]
    line = refused(Path("groups.jsonl"), [header, *lines[1:LINE]], capsys)
    assert "gem-kernels score" in line
    row(line, "everything; no folder is claimed")
