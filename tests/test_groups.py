"""The groups file: a round trip, writing all or nothing, and errors that name the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gem.files import replacing, write_lines
from gem.groups import Group, Member, candidates_line, load_groups, save_groups


def groups() -> list[Group]:
    scored = Member(
        "candidate", [5, 6, 2], "größer \u2028 als 3", False, [-1.5, -0.25, -1e-7], [0.5, 1.25, 0.0], (0, 1), (1, 2),
        "marker", -0.75, 1.25, 0.5, 0.1, 0.2, 0.3,
    )  # fmt: skip
    cut_off = Member("candidate", [5, 5], truncated=True, logprobs=[-1.0, math.nan], entropies=[math.nan, 0.1])
    human = Member("chosen", [3, 2], "日本語 \\boxed{1}\n\t\"'", logprobs=[-2.0, -math.inf])
    return [Group('1+2=\r\n"', [1, 4], [scored, cut_off]), Group("é", [1], [human], kept=False)]


def same(a: Any, b: Any) -> bool:
    """Return True if a and b are equal, with NaN equal to itself and types compared."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return same(list(vars(a).values()), list(vars(b).values())) if hasattr(a, "__dict__") else a == b


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "g.jsonl"
    save_groups(path, groups())
    loaded = load_groups(path)
    assert same(loaded, groups())
    assert loaded[0].members[0].branch_span == (0, 1) and math.isnan(loaded[0].members[1].score)
    assert "NaN" not in path.read_text(encoding="utf-8")  # not valid JSON
    assert path.read_bytes().count(b"\n") == 2
    assert loaded[0].role("candidate") == 0 and loaded[0].role("rejected") is None and loaded[1].role("chosen") == 0


def test_an_editor_may_leave_a_mark_and_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    save_groups(path, groups())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n")
    assert same(load_groups(path), groups())


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


def spoiled(change: Any) -> str:
    row = {"prompt": "", "prompt_ids": [1], "kept": True}
    row["members"] = [{"role": "chosen", "ids": [3, 2], "logprobs": [-1.0, -1.0]}]
    change(row)
    return json.dumps(row)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "tru', "expected one JSON object a line, got"),
        ("[]", "expected a group written by"),
        ("3", "expected a group written by"),
        (spoiled(lambda r: r.pop("members")), "expected a group written by .*members"),
        (spoiled(lambda r: r["members"][0].update(reward=1)), "expected a group written by .*reward"),
        (spoiled(lambda r: r["members"][0].pop("ids")), "expected a group written by .*ids"),
        (spoiled(lambda r: r["members"].clear()), "every member needs ids"),
        (spoiled(lambda r: r["members"][0].update(ids=[])), "every member needs ids"),
        (spoiled(lambda r: r["members"][0].update(logprobs=[-1.0])), "every member needs ids and as many logprobs"),
        (spoiled(lambda r: r["members"][0].update(role="human")), "role must be one of .*got human"),
    ],
)
def test_corrupt_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "g.jsonl"
    save_groups(path, [Group("", [1], [Member("chosen", [3], logprobs=[0.0])])])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"g.jsonl, line 2: {message}"):
        load_groups(path)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"groups must be a file written by `gem-kernels score`, got .*no such file"):
        load_groups(tmp_path / "g.jsonl")
    (tmp_path / "g.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one group, got none"):
        load_groups(tmp_path / "g.jsonl")


def test_turns_of_others_and_the_prompt_of_candidates_come_back(tmp_path: Path) -> None:
    member = Member("chosen", [5, 6], logprobs=[-1.0, -2.0], given=[(1, [7, 8]), (1, [9])], flaw="empty")
    group = Group("q", [1], [member], question="what?", sampling_prompt_ids=[1, 2])
    save_groups(tmp_path / "g.jsonl", [group])
    (again,) = load_groups(tmp_path / "g.jsonl")
    assert again.members[0].given == member.given and again.members[0].flaw == "empty"
    assert (again.question, again.sampling_prompt_ids) == ("what?", [1, 2])
    row = json.loads((tmp_path / "g.jsonl").read_text())
    for name in ("question", "sampling_prompt_ids"):  # of an older release
        del row[name]
    del row["members"][0]["given"], row["members"][0]["flaw"]
    (tmp_path / "g.jsonl").write_text(json.dumps(row))
    (old,) = load_groups(tmp_path / "g.jsonl")
    assert old.sampling_prompt_ids == [] and old.members[0].given == [] and old.question == ""


def test_candidates_that_are_not_scored_are_counted_by_reason() -> None:
    said: list[dict[str, Any]] = [
        {},
        {"truncated": True},
        {"flaw": "empty"},
        {"truncated": True},
        {"flaw": "repeats the prompt"},
    ]
    members = [Member("candidate", [1], **more) for more in said]
    group = Group("", [1], [*members, Member("chosen", [1], truncated=True)])
    assert candidates_line([group]) == "5 candidates, 2 cut off, 1 empty, 1 repeats the prompt"
    assert candidates_line([]) == "0 candidates"
