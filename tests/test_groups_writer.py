"""Writing groups files: going on from every byte, what is refused, shards, and failures in the middle."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gem.groups import Group, Header, Member, candidates_line, load_groups, read_header
from gem.groups_writer import GroupsWriter, batches, check_same, merge_groups
from gem.stops import Diverged

STEP, RECORDS = 2, 7
HEADER: Header = {
    "shard": "0/1", "settings": {"seed": 0, "tau": 0.5},
    **{name: {"name": f"a {name}", "hash": f"{name}1"} for name in ("model", "tokenizer", "data")},
}  # fmt: skip


def group(i: int) -> Group:
    """Return the group of record i, with a text that UTF-8 writes in several bytes."""
    sampled = Member("candidate", [i, 2], "größer"[: i % 7], i == 3, [-1.5, -i / 7], [0.5, 0.25], weight=0.25 * i)
    chosen = Member("chosen", [2], logprobs=[-1.0], score=float(i), weight=-0.5)
    rejected = Member("rejected", [3], logprobs=[-1.0], score=2.0)
    return Group("p", [1, i], [sampled, chosen, rejected], where=f"pairs.jsonl, line {i}")


def score(
    path: Path, shard: str = "0/1", *, records: int = RECORDS, until: int | None = None, **header: Any
) -> GroupsWriter:
    """Do what `gem-kernels score` does; stop in order after `until` batches."""
    starts = batches(records, STEP, shard)
    prompts = [group(i).prompt_ids for i in range(records)[starts.start : starts.stop]]
    with GroupsWriter(path, {**HEADER, "shard": shard, **header}, prompts, STEP) as out:
        for start in starts[out.batches : until]:
            out.append([group(i) for i in range(start, min(start + STEP, records))])
        if until is None:
            out.finish()
    return out


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave fsync out: on a busy disk it takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The bytes of an uninterrupted run."""
    score(tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_of_one_run(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    header = read_header(path)
    assert header == {"gem_groups": 1, "complete": True, "groups": RECORDS, **HEADER}
    assert whole.startswith(b'{"gem_groups": 1, "complete": true , "shard": "0/1", "groups": 7, "settings": ')
    loaded = load_groups(path)
    assert [g.prompt_ids for g in loaded] == [[1, i] for i in range(RECORDS)]
    again = score(path)
    assert again.finished and again.batches == 4 and path.read_bytes() == whole
    assert candidates_line(again.summary) == candidates_line(loaded) == "7 candidates, 1 cut off"
    assert all(not m.ids and not g.prompt_ids for g in again.summary for m in g.members)


@pytest.mark.parametrize(("mark", "step"), [(b"false", 7), (b"true ", 41)], ids=["open", "done"])
def test_it_goes_on_from_anywhere(mark: bytes, step: int, tmp_path: Path) -> None:
    """A kill leaves any beginning of the file, and a copy that broke off one that says it is finished."""
    path = tmp_path / "cut.jsonl"
    score(path, records=3)
    whole = path.read_bytes()
    text = whole.replace(b"true ", mark, 1)
    for size in range(0, len(text) + 1, step):
        path.write_bytes(text[:size])
        score(path, records=3)
        assert path.read_bytes() == whole, size


def test_it_goes_on_however_often_it_is_cut(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    for until in range(5):
        out = score(path, until=until)
        assert out.batches == until and not out.finished
        assert not path.exists() if until == 0 else whole.startswith(b'{"gem_groups": 1, "complete": ')
        if until:
            assert (read_header(path) or {})["complete"] is False
            path.write_bytes(path.read_bytes() + whole[: 9 * (until < 4)])
    score(path)
    assert path.read_bytes() == whole


def test_a_last_batch_without_its_content_is_made_again(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    score(path, until=3)
    text = path.read_bytes()
    last = text[:-40] + b"\0" * 39 + b"\n"
    path.write_bytes(last)
    score(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:2], b"x\n", *lines[3:]], "line 3: expected one JSON object a line, got 'x'"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: the group is of another record"),
        (lambda lines: [*lines[:7], lines[7].replace(b"0.25", b"2500")], "line 8: member 0: entropies must be"),
        (lambda lines: [*lines, lines[-1]], "more than 7 groups"),
        (lambda lines: [*lines, b" "], "more than 7 groups"),
        (lambda lines: [lines[0].replace(b"true ", b"true"), *lines[1:]], "line 1"),
    ],
    ids=range(6),
)
def test_a_file_that_was_changed_is_left_alone(change: Any, message: str, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "changed.jsonl"
    path.write_bytes(b"".join(change(whole.splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(ValueError) as raised:
        score(path)
    expected = f"output must be a new file, got {path}, which was changed since it was written: {message}"
    assert str(raised.value).startswith(expected) and path.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"seed": 1, "tau": 0.5}}, "seed: 0 there, 1 now"),
        ({"settings": {"seed": 0}}, "tau: 0.5 there, None now"),
        ({"settings": {"seed": 0, "tau": 0.5, "stop": ["a"]}}, "stop: None there, ['a'] now"),
        ({"shard": "0/3"}, "shard: '0/1' there, '0/3' now, groups: 7 there, 2 now"),
        ({"records": 6}, "groups: 7 there, 6 now"),
        ({"model": {"name": "b", "hash": "2"}}, "model: a model with hash model1 there, b with hash 2 now"),
        (
            {"tokenizer": {"name": "b", "hash": "2"}},
            "tokenizer: a tokenizer with hash tokenizer1 there, b with hash 2 now",
        ),
        ({"data": {"name": "b", "hash": "2"}}, "data: a data with hash data1 there, b with hash 2 now"),
    ],
    ids=str,
)
def test_another_run_is_refused_with_both_values(
    changed: dict[str, Any], message: str, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "whole.jsonl"
    for size in (len(whole), len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as raised:
            score(path, **changed)
        assert str(raised.value) == f"output must be new or a file of the same run, got {path} with {message}"
        assert path.read_bytes() == whole[:size]


def test_parts_of_a_header_are_compared_as_they_are_known(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    check_same(path, {"settings": HEADER["settings"]})
    check_same(path, {"model": {"name": "moved", "hash": "model1"}})  # what it is counts, not where it lies
    check_same(tmp_path / "new.jsonl", {"settings": {}})
    with pytest.raises(ValueError, match="seed: 0 there, 3 now"):
        check_same(path, {"settings": {**HEADER["settings"], "seed": 3}})


@pytest.mark.parametrize("text", [b"x", b"\n", b'{"gem_groups":1}\n', b'{"prompt": ""}\n', b"\x1f\x8b\0", b"\0" * 9])
def test_another_file_is_never_overwritten(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match="output must be a new file, got .*g.jsonl, which exists"):
        score(tmp_path / "g.jsonl")
    assert (tmp_path / "g.jsonl").read_bytes() == text


def test_a_model_that_moved_keeps_the_header(whole: bytes, tmp_path: Path) -> None:
    score(tmp_path / "cut.jsonl", until=1)
    score(tmp_path / "cut.jsonl", model={"name": "moved", "hash": "model1"})
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


# --- failures in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(1, 8))
def test_a_full_disk_leaves_whole_batches(
    call: int, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "full.jsonl", [0]

    def full(number: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if call == 7:
        score(path)  # four batches, and two at the end: nothing failed
        return
    with pytest.raises(OSError, match="No space left") as raised:
        score(path)
    done = min(STEP * (call - 1), RECORDS)
    kept = f"{path} holds {done} of 7 groups, and the same command goes on from there" if done else ""
    assert getattr(raised.value, "kept", "") == kept
    if not done:
        assert not path.exists()
    else:
        assert path.read_bytes().count(b"\n") == done + 1 and path.read_bytes().endswith(b"\n")
    score(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("at", "left"), [(0, 0), (1, 3)])
def test_numbers_that_no_reader_would_take_are_not_written(at: int, left: int, tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"

    def scored(groups: Sequence[Group]) -> Sequence[Group]:
        for value in (math.nan, math.inf, -math.inf):
            groups[1].members[0].logprobs[1] = value
            with pytest.raises(
                Diverged, match=r"^pairs.jsonl, line \d \('p'\): member 0: logprobs must be numbers, got "
            ):
                out.append(groups)
        return groups

    with GroupsWriter(path, HEADER, [[1, i] for i in range(RECORDS)], STEP) as out:
        for start in range(0, at * STEP, STEP):
            out.append([group(start), group(start + 1)])
        scored([group(at * STEP), group(at * STEP + 1)])
    assert (path.read_bytes().count(b"\n") if path.exists() else 0) == left


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("step", [1, 2, 3, 200])
def test_shards_have_the_batches_of_one_run(records: int, step: int) -> None:
    one = [(start, min(start + step, records)) for start in batches(records, step, "0/1")]
    assert one == [(start, min(start + step, records)) for start in range(0, records, step)]
    for n in (1, 2, 3, 5, 9):
        parts = [batches(records, step, f"{i}/{n}") for i in range(n)]
        assert [(start, min(start + step, part.stop)) for part in parts for start in part] == one
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard", ["", "1", "1/1", "4/3", "-1/2", "0/0", "a/b", "0/2/3", "0.0/2", " 0/2"])
def test_what_is_no_shard(shard: str) -> None:
    with pytest.raises(ValueError, match=r"shard must be i/n with i from 0 to n - 1, such as 0/4, got '.*'"):
        batches(10, 2, shard)


def shards(folder: Path, n: int) -> list[Path]:
    paths = [folder / f"shard-{i}.jsonl" for i in range(n)]
    for i, path in enumerate(paths):
        score(path, f"{i}/{n}")
    return paths


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_shards_merge_into_the_file_of_one_run(n: int, whole: bytes, tmp_path: Path) -> None:
    paths = shards(tmp_path, n)
    summary = merge_groups(paths[::-1], tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole
    assert [len(g.members) for g in summary] == [3] * 7 and candidates_line(summary) == "7 candidates, 1 cut off"
    assert score(tmp_path / "merged.jsonl").finished  # and a run may even go on with it


def test_wrong_merges(whole: bytes, tmp_path: Path) -> None:
    a, b, c = shards(tmp_path, 3)
    output = tmp_path / "merged.jsonl"

    def refused(*paths: Path) -> str:
        with pytest.raises(ValueError) as raised:
            merge_groups(paths, output)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]
        return str(raised.value)

    assert refused(a, c) == "shards must be each of 0/3 to 2/3 once, got 0/3, 2/3"
    assert refused(a, b, b, c) == "shards must be each of 0/3 to 2/3 once, got 0/3, 1/3, 1/3, 2/3"
    assert refused(a, tmp_path / "whole.jsonl") == "shards must be each of 0/3 to 2/3 once, got 0/1, 0/3"
    assert refused(a, b, tmp_path / "none").endswith("none': no such file")
    (tmp_path / "bare").write_bytes(whole.split(b"\n", 1)[1])
    assert refused(a, tmp_path / "bare").endswith("bare, which has no header")
    other = tmp_path / "other.jsonl"
    score(other, "1/3", settings={"seed": 5, "tau": 0.5})
    assert refused(a, other, c) == f"shards must be of one run, got seed: 0 in {a}, 5 in {other}"
    other.unlink()
    score(other, "1/3", model={"name": "b", "hash": "2"})
    assert refused(a, other, c) == (
        f"shards must be of one run, got model: a model with hash model1 in {a}, b with hash 2 in {other}"
    )
    other.unlink()
    score(other, "1/3", until=0)
    score(other, "2/3", until=1)
    assert f"groups must be a finished file, got {other} with 2 of 3 groups" in refused(a, b, other)
    text = c.read_bytes()
    c.write_bytes(text[: text.rindex(b"\n", 0, -1) + 1])
    assert refused(a, b, c) == f"shards must be whole, got {c} with 2 groups, and 3 by its header"
    c.write_bytes(text.replace(b"-1.5", b"1.50", 1))
    assert refused(a, b, c) == f"{c}, line 2: member 0: logprobs must be numbers <= 0, got 1.5 (token 0)"
    c.write_bytes(text)
    merge_groups([a, b, c], output)
    assert output.read_bytes() == whole


def test_a_line_is_json_that_others_read(whole: bytes) -> None:
    assert all(isinstance(json.loads(line), dict) for line in whole.splitlines())
