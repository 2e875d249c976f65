"""The groups file: a round trip, every field checked with file and line, its header, and what cannot be learnt from."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gem.files import replacing, write_lines
from gem.fingerprint import tokenizer_hash
from gem.groups import (
    Group,
    Header,
    Member,
    check_header,
    check_learnable,
    header_line,
    load_groups,
    read_header,
    save_groups,
)
from gem.tasks import build_tokenizer


def groups() -> list[Group]:
    scored = Member(
        "candidate", [5, 6, 2], "größer \u2028 als 3", False, [-1.5, -0.25, -1e-7], [0.5, 1.25, 0.0], (0, 1), (1, 2),
        "marker", -0.75, 1.25, 0.5, 0.1, 0.2, 0.3, True, "", [(1, [7, 8]), (1, [9]), (3, [])],
    )  # fmt: skip
    cut_off = Member("candidate", [5, 5], truncated=True, logprobs=[-1.0, -2.0], entropies=[1e-9, 0.1], flaw="empty")
    human = Member("chosen", [3, 2], "日本語 \\boxed{1}\n\t\"'", logprobs=[-2.0, -0.0])
    return [
        Group('1+2=\r\n"', [1, 4], [scored, cut_off], question="what?", sampling_prompt_ids=[1, 2]),
        Group("é", [1], [human], kept=False),
    ]


def header(**changed: Any) -> Header:
    inputs = {name: {"name": f"the {name}", "hash": "ab12"} for name in ("model", "tokenizer", "data")}
    return {"shard": "0/1", "groups": 2, "settings": {"seed": 0}, **inputs, **changed}


def same(a: Any, b: Any) -> bool:
    """Return True if a and b are equal, with NaN equal to itself and types compared."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (Group, Member)):
        return all(same(getattr(a, name), getattr(b, name)) for name in vars(a) if name != "where")
    return bool(a == b)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "g.jsonl"
    save_groups(path, groups())
    loaded = load_groups(path)
    assert same(loaded, groups()) and gc.isenabled()
    assert loaded[0].members[0].branch_span == (0, 1) and math.isnan(loaded[0].members[1].score)
    assert [group.where for group in loaded] == [f"{path}, line 1", f"{path}, line 2"]
    assert "NaN" not in path.read_text(encoding="utf-8")  # not valid JSON
    assert path.read_bytes().count(b"\n") == 2 and b"where" not in path.read_bytes()


def test_an_editor_may_leave_a_mark_and_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    save_groups(path, groups())
    for first in (b"", header_line(header(), complete=True)):
        text = first + path.read_bytes()
        (tmp_path / "edited").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b" \n\n")
        assert same(load_groups(tmp_path / "edited"), groups())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"

    def failing() -> Iterator[Group]:
        yield from groups()
        assert not path.exists() or path.read_text() == "old"  # absent until complete
        raise KeyboardInterrupt

    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(KeyboardInterrupt):
            save_groups(path, failing())
        assert (path.read_text() if path.exists() else None) == before
        assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["g.jsonl"])
    save_groups(path, groups())
    assert len(load_groups(path)) == 2 and [p.name for p in tmp_path.iterdir()] == ["g.jsonl"]


def test_replacing_overwrites_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_text("half a li")
    write_lines(tmp_path / "f", ["whole"])
    with replacing(tmp_path / "f") as out:
        out.write("x")
        assert (tmp_path / "f").read_text() == "whole\n"
    assert (tmp_path / "f").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_fields_of_an_older_release_may_be_absent(tmp_path: Path) -> None:
    row = {
        "prompt": "q",
        "prompt_ids": [1],
        "kept": True,
        "members": [{"role": "chosen", "ids": [3], "logprobs": [-1]}],
    }
    (tmp_path / "g.jsonl").write_text(json.dumps(row))
    assert same(load_groups(tmp_path / "g.jsonl"), [Group("q", [1], [Member("chosen", [3], logprobs=[-1.0])])])


def test_nothing_to_load(tmp_path: Path) -> None:
    for path in (tmp_path / "g.jsonl", tmp_path):
        with pytest.raises(
            ValueError, match=r"groups must be a file written by `gem-kernels score`, got .*no such file"
        ):
            load_groups(path)
    for text in ("", "\n", header_line(header(groups=0), complete=True).decode()):
        (tmp_path / "g.jsonl").write_text(text)
        with pytest.raises(ValueError, match="at least one group, got none"):
            load_groups(tmp_path / "g.jsonl")


@pytest.mark.parametrize(
    ("start", "kind"), [(b"\x1f\x8b\x08\0", "gzip"), ("{}".encode("utf-16"), "UTF-16"), (b"\x80\x04\x95\0", "a pickle")]
)
def test_what_is_no_text_is_named(start: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(start)
    with pytest.raises(ValueError, match=f"g.jsonl, which seems to be {kind}"):
        load_groups(tmp_path / "g.jsonl")


# --- every field, wrong in every way ----------------------------------------------------------------------------------


def row() -> dict[str, Any]:
    """Return a group as it stands in a file, with every field of a member in the second one."""
    whole = {
        "role": "candidate", "ids": [3, 2, 4], "completion": "a", "truncated": False, "logprobs": [-1.0, -1.0, 0.0],
        "entropies": [0.5, 0.5, 0.0], "branch_span": [0, 1], "answer_span": [1, 3], "span_rule": "marker", "score": 0.1,
        "final_entropy": 0.2, "branch_entropy": 0.3, "rank_mean": 0.4, "rank_sd": 0.5, "weight": 0.6, "sampled": True,
        "flaw": "", "given": [[1, [5]], [2, [6, 7]]],
    }  # fmt: skip
    minimal = {"role": "chosen", "ids": [3, 2], "logprobs": [-1.0, -1]}
    return {
        "prompt": "p", "prompt_ids": [1], "members": [minimal, whole], "kept": True, "question": "q",
        "sampling_prompt_ids": [],
    }  # fmt: skip


NAN, INF = math.nan, math.inf
WRONG_TYPES = ["x", [1], {"a": 1}, True]  # of a number
NUMBER = "must be a number"
IDS: list[Any] = [None, "x", 3, [1, -1], [1, 2.0], [1, True], [1, "2"], [[1]], {"0": 1}, [1, None], [NAN]]
SPANS: list[Any] = [None, 1, [], [1], [0, 1, 2], [2, 1], [-1, 1], [0, 4], [0.0, 1], [False, True], ["0", "1"], "01"]
OF_A_GROUP: dict[str, tuple[str, list[Any]]] = {
    "prompt": ("prompt must be a text", [None, 1, ["p"], True, {}]),
    "question": ("question must be a text", [None, 1, ["p"], True, {}]),
    "kept": ("kept must be true or false", [None, 1, "true", [], 0.0]),
    "prompt_ids": ("prompt_ids must", [*IDS, []]),
    "sampling_prompt_ids": ("sampling_prompt_ids must be lists of integers >= 0", IDS),
    "members": ("members must be a list of at least one member", [None, [], {}, "x", 3]),
}
OF_A_MEMBER: dict[str, tuple[str, list[Any]]] = {
    "role": ("role must be one of candidate, chosen, rejected", ["human", None, 1, ["chosen"], "", {}]),
    "ids": ("(ids must be lists of integers|every member needs ids and as many logprobs)", [*IDS, [], [1, 2]]),
    "completion": ("completion must be a text", [None, 1, ["a"], True, {}]),
    "span_rule": ("span_rule must be a text", [None, 1, ["a"], True, {}]),
    "flaw": ("flaw must be a text", [None, 1, ["a"], True, {}]),
    "truncated": ("truncated must be true or false", [None, 0, 1, "false", []]),
    "sampled": ("sampled must be true or false", [None, 0, 1, "false", []]),
    "logprobs": (
        "(logprobs must be|every member needs ids and as many logprobs)",
        [None, "x", -1.0, [-1.0] * 2, [-1.0] * 4, [],
         *([-1.0, -1.0, v] for v in (0.7, NAN, INF, -INF, None, -1e300, -(10**400), *WRONG_TYPES))],
    ),
    "entropies": (
        "entropies must be",
        [None, "x", 1.0, [1.0] * 2, [1.0] * 4,
         *([1.0, 1.0, v] for v in (-0.1, 20.1, NAN, INF, None, 10**400, *WRONG_TYPES))],
    ),
    "branch_span": (r"branch_span must be \[start, end\) within the 3 tokens", SPANS),
    "answer_span": (r"answer_span must be \[start, end\) within the 3 tokens", SPANS),
    "score": (f"score {NUMBER}", [NAN, INF, -1e7, 10**400, *WRONG_TYPES]),
    "final_entropy": (f"final_entropy {NUMBER}", [NAN, INF, -0.1, 21, *WRONG_TYPES]),
    "branch_entropy": (f"branch_entropy {NUMBER}", [NAN, INF, -0.1, 21, *WRONG_TYPES]),
    "rank_mean": (f"rank_mean {NUMBER}", [NAN, INF, 1e7, -(10**400), *WRONG_TYPES]),
    "rank_sd": (f"rank_sd {NUMBER}", [NAN, INF, -1e-9, *WRONG_TYPES]),
    "weight": (f"weight {NUMBER}", [None, NAN, -INF, 1001, -1e4, *WRONG_TYPES]),
    "given": (
        "(given must hold|ids of given must be)",
        [None, 1, {}, [1], [[1]], [[1, [5], 2]], [["1", [5]]], [[1, 5]], [[True, [5]]], [[1, [-5]]], [[4, [5]]],
         [[-1, [5]]], [[2, [5]], [1, [5]]], "x"],
    ),
}  # fmt: skip


def refused(path: Path, line: str) -> str:
    """Return the message that refuses a file whose second line is `line`."""
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(ValueError) as raised:
        load_groups(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 2: ") and "\n" not in message and len(message) < 400, message
    return message.removeprefix(f"{path}, line 2: ")


@pytest.mark.parametrize("name", OF_A_GROUP)
def test_a_field_of_a_group(name: str, tmp_path: Path) -> None:
    expected, wrong = OF_A_GROUP[name]
    assert len(wrong) >= 5
    for value in wrong:
        message = refused(tmp_path / "g.jsonl", json.dumps({**row(), name: value}))
        assert re.match(expected, message), (value, message)


@pytest.mark.parametrize("name", OF_A_MEMBER)
def test_a_field_of_a_member(name: str, tmp_path: Path) -> None:
    expected, wrong = OF_A_MEMBER[name]
    assert len(wrong) >= 5
    for value in wrong:
        spoiled = row()
        spoiled["members"][1][name] = value
        message = refused(tmp_path / "g.jsonl", json.dumps(spoiled))
        assert re.match("member 1: " + expected, message), (value, message)


def member(i: int = 1, **changed: Any) -> str:
    """Return a line whose member `i` has other fields; None takes a field away."""
    spoiled = row()
    spoiled["members"][i] = {k: v for k, v in {**spoiled["members"][i], **changed}.items() if v is not None}
    return json.dumps(spoiled)


def group(**changed: Any) -> str:
    return json.dumps({k: v for k, v in {**row(), **changed}.items() if v is not None})


JSON, GROUP = "expected one JSON object a line, got ", "expected a group written by `gem-kernels score`, got "
TURNS = "[at, ids] of other roles' turns, in order and within the 3 tokens"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "tru', JSON + '\'{"prompt": "tru\' (Unterminated string starting at: line 1 column 12 (char 11))'),
        ('{"prompt": 1} {}', JSON),
        ("[" * 100_000, JSON),
        ('{"prompt": ' + "9" * 5000, JSON),
        ("[]", GROUP + "[]"),
        ("3", GROUP + "3"),
        (group(members=None), GROUP + "one without members"),
        (group(where="x"), GROUP + "the unknown field where"),
        (member(reward=1), "member 1: " + GROUP + "the unknown field reward"),
        (member(0, ids=None), "member 0: " + GROUP + "one without ids"),
        (group(members=[7]), "member 0: " + GROUP + "7"),
        (group(prompt_ids=[]), "prompt_ids must not be empty"),
        (member(0, ids=[]), "member 0: every member needs ids and as many logprobs, got 0 and 2"),
        (member(ids=[1, 2, -7]), "member 1: ids must be lists of integers >= 0, got -7 (token 2)"),
        (member(logprobs=[-1, -1, 0.7]), "member 1: logprobs must be numbers <= 0, got 0.7 (token 2)"),
        (member(logprobs=[-1, NAN, 0]), "member 1: logprobs must be numbers, got NaN (token 1)"),
        (member(logprobs=[-1e9, 0]), "member 1: logprobs must be numbers >= -1000000, got -1000000000.0 (token 0)"),
        (member(entropies=[23.5]), "member 1: entropies must be numbers <= 20, got 23.5 (token 0)"),
        (member(entropies=[1, 2]), "member 1: entropies must be as many as ids or none, got 2 for 3"),
        (member(weight="null"), 'member 1: weight must be a number, got "null"'),
        (member(weight=2000), "member 1: weight must be a number <= 1000, got 2000"),
        (member(score="x" * 90), 'member 1: score must be a number, got "' + "x" * 56 + "..."),
        (member(given=[{"at": NAN}]), f'member 1: given must hold {TURNS}, got {{"at": "NaN"}}'),
        (member(role="chosen"), "role must be chosen for one member at most, got several"),
        (group(kept=False), "weight must be 0 for every member of a group that is not kept"),
        (
            header_line(header()).decode(),
            "expected a group, got the header of another file: `gem-kernels merge` joins shards",
        ),
    ],
    ids=range(26),
)
def test_the_message(line: str, message: str, tmp_path: Path) -> None:
    found = refused(tmp_path / "g.jsonl", line.rstrip())
    assert found.startswith(message) if message == JSON else found == message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: expected UTF-8 text, got byte 0xff at 12$"):
        load_groups(tmp_path / "g.jsonl")


def test_rounding_is_no_mistake_and_null_is_nan(tmp_path: Path) -> None:
    good = row()
    good["members"][1] |= {"logprobs": [9e-4, 0, -1e5], "entropies": [-9e-4, 1, 20], "weight": 1}
    good["members"][1] |= dict.fromkeys(("score", "final_entropy", "branch_entropy", "rank_mean", "rank_sd"))
    (tmp_path / "g.jsonl").write_text(json.dumps(good))
    (group,) = load_groups(tmp_path / "g.jsonl")
    member = group.members[1]
    assert member.logprobs == [9e-4, 0, -1e5] and set(map(type, [*member.logprobs, *member.entropies])) == {float}
    assert math.isnan(member.score) and math.isnan(member.rank_sd) and type(member.weight) is float
    assert member.given == [(1, [5]), (2, [6, 7])] and group.members[0].given == []


def test_all_wrong_lines_are_counted(tmp_path: Path) -> None:
    lines = [json.dumps(row())] * 3 + ["x"] * 15 + ["", json.dumps(row())]
    (tmp_path / "g.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"g.jsonl, line 4: expected one JSON .* \(and 14 more lines\)$"):
        load_groups(tmp_path / "g.jsonl")
    assert gc.isenabled()


def test_reading_a_big_file_shows_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_groups(tmp_path / "g.jsonl", groups())
    load_groups(tmp_path / "g.jsonl")
    assert not capsys.readouterr().err
    monkeypatch.setattr("gem.groups.BIG", 1)
    load_groups(tmp_path / "g.jsonl")
    assert "reading g.jsonl" in capsys.readouterr().err


# --- the header -------------------------------------------------------------------------------------------------------


def write(path: Path, first: Header, *, complete: bool = True) -> None:
    save_groups(path, groups())
    path.write_bytes(header_line(first, complete=complete) + path.read_bytes())


def test_a_header_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "g.jsonl"
    write(path, header())
    assert read_header(path) == {"gem_groups": 1, "complete": True, **header()}
    assert same(load_groups(path), groups()) and not caplog.records
    (tmp_path / "spaced").write_text("\n".join(json.dumps(json.loads(line)) for line in path.read_bytes().splitlines()))
    assert same(load_groups(tmp_path / "spaced"), groups())
    save_groups(path, groups())
    assert read_header(path) is None


def test_groups_taken_out_by_hand_and_one_shard_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write(tmp_path / "g.jsonl", header(groups=5, shard="2/3"))
    load_groups(tmp_path / "g.jsonl")
    assert "g.jsonl holds 2 groups, and 5 by its header" in caplog.text
    assert "g.jsonl is shard 2/3 of a run: `gem-kernels merge` joins them" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gem_groups": 2}, "gem_groups: 2, and this release reads 1"),
        ({"complete": 1}, "complete: 1"),
        ({"groups": "2"}, 'groups: "2"'),
        ({"groups": True}, "groups: true"),
        ({"shard": None}, "shard: null"),
        ({"shard": "3/3"}, "shard must be i/n with i from 0 to n - 1, such as 0/4, got '3/3'"),
        ({"settings": []}, r"settings: \[\]"),
        ({"model": "x"}, 'model: "x"'),
        ({"data": {"name": "x"}}, 'data: {"name": "x"}'),
        ({"unlabeled": {"name": "x"}}, 'unlabeled: {"name": "x"}'),
        ({"unlabeled": 3}, "unlabeled: 3"),
        ({"tokenizer": {"name": "x", "hash": 1}}, 'tokenizer: {"name": "x", "hash": 1}'),
    ],
    ids=str,
)
def test_a_header_that_was_changed(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "g.jsonl", header())
    first, rest = (tmp_path / "g.jsonl").read_text().split("\n", 1)
    (tmp_path / "g.jsonl").write_text(json.dumps({**json.loads(first), **changed}) + "\n" + rest)
    with pytest.raises(ValueError, match=f"g.jsonl, line 1: expected a header written by .*, got {message}$"):
        load_groups(tmp_path / "g.jsonl")


@pytest.mark.parametrize(("shard", "flag"), [("0/1", ""), ("1/4", " --shard 1/4")])
def test_what_is_not_finished_is_refused(shard: str, flag: str, tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    write(path, header(groups=7, shard=shard), complete=False)
    with pytest.raises(ValueError) as raised:
        load_groups(path)
    assert str(raised.value) == (
        f"groups must be a finished file, got {path} with 2 of 7 groups: `gem-kernels score --model 'the model' --data "
        f"'the data' --output {path}{flag}`, with the other settings as they were, goes on"
    )


def test_another_tokenizer_is_named_by_the_header(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "g.jsonl", build_tokenizer()
    mine = tokenizer_hash(tokenizer)
    save_groups(path, groups())
    check_header(path, tokenizer)  # no header: the ids alone tell
    write(path, header(tokenizer={"name": "tok", "hash": mine}))
    check_header(path, tokenizer)
    write(path, header())
    with pytest.raises(ValueError) as raised:
        check_header(path, tokenizer)
    assert str(raised.value) == (
        f"groups must be of this model's tokenizer, got {path} of the tokenizer with hash ab12; the model's has {mine}"
    )


# --- what can be learnt -----------------------------------------------------------------------------------------------


def test_nothing_to_learn_from() -> None:
    def group(role: Any, weight: float) -> Group:
        return Group("", [1], [Member(role, [2], logprobs=[-1.0], weight=weight)])

    for role, weight in (("chosen", 0.0), ("candidate", -0.5)):
        check_learnable([group("candidate", 0.0), group(role, weight)], 9, "g")
    check_learnable([group("candidate", 0.5)], 9, "g", supervised=False)
    with pytest.raises(
        ValueError, match="groups must hold a weight or a chosen answer to learn from, got neither in g"
    ):
        check_learnable([group("candidate", 0.0), group("rejected", 0.0)], 9, "g")
    with pytest.raises(ValueError, match="groups must hold a weight to learn from, got none in g"):
        check_learnable([group("chosen", 0.0)], 9, "g", supervised=False)


@pytest.mark.parametrize("place", ["prompt_ids", "sampling_prompt_ids", "ids", "given"])
def test_tokens_beyond_the_vocabulary(place: str) -> None:
    member = Member("chosen", [9 if place == "ids" else 1], given=[(0, [3]), (1, [9 if place == "given" else 1])])
    prompts = {name: [9 if place == name else 2] for name in ("prompt_ids", "sampling_prompt_ids")}
    groups = [Group("", members=[Member("chosen", [0])], prompt_ids=[1]), Group("", members=[member], **prompts)]
    check_learnable(groups, 10, "g")
    with pytest.raises(ValueError, match="of this model's tokenizer, got token 9 in g; the model has 9"):
        check_learnable(groups, 9, "g")
