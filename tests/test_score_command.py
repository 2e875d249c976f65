"""`gem-kernels score` and `merge`: going on after a kill, shards, and what is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refused, run, write_files

from gem.groups_writer import GroupsWriter
from gem.lock import locked
from gem.pipeline import GroupMaker

SCORE = ["score", "--model", "cfg/config.json", "--tokenizer", "tok", "--data", "pairs.jsonl", "--group_size", "2"]
SCORE += [
    "--max_new_tokens",
    "4",
    "--rollout_batch_size",
    "6",
    "--device",
    "cpu",
    "--auroc_gate",
    "0",
]  # 3, 3, 2 groups


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, a tokenizer and pairs of its own, without waiting for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    return write_files(tmp_path)


@pytest.fixture
def whole(files: Path, capsys: pytest.CaptureFixture[str]) -> bytes:
    """The file of an uninterrupted run."""
    status, out, err = run(capsys, *SCORE, "--output", "whole.jsonl")
    assert status == 0 and "8 groups, 8 kept, in whole.jsonl" in out, err
    assert not Path("whole.jsonl.lock").exists()
    return Path("whole.jsonl").read_bytes()


def test_score_goes_on_where_it_was_cut(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    lines = whole.replace(b"true ", b"false", 1).splitlines(keepends=True)
    said = run(capsys, *SCORE, "--output", "whole.jsonl")[1]
    assert said.startswith("whole.jsonl holds this run, finished:\n16 candidates")
    for there in (0, 1, 2, 4, 7, 8, 9):
        Path("cut.jsonl").write_bytes(b"".join(lines[:there]) + lines[min(there, 8)][:20] * (there < 9))
        status, out, err = run(capsys, *SCORE, "--output", "cut.jsonl")
        assert status == 0, err
        assert Path("cut.jsonl").read_bytes() == whole, there
        assert out.replace("cut.jsonl", "whole.jsonl") == said.split("\n", 1)[1]


def test_an_interruption_keeps_whole_batches(
    whole: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append: Callable[..., None] = GroupsWriter.append

    def interrupted(self: GroupsWriter, groups: Any) -> None:
        append(self, groups)
        torch.rand(3)  # what was drawn before changes nothing
        if self.batches == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GroupsWriter, "append", interrupted)
        status, out, err = run(capsys, *SCORE, "--output", "cut.jsonl")
    assert status == 130 and not out
    assert err.splitlines()[-1].endswith("cut.jsonl holds 6 of 8 groups, and the same command goes on from there")
    train = ["train", "--model", "cfg/config.json", "--tokenizer", "tok", "--groups", "cut.jsonl", "--use_cpu", "true"]
    assert (
        "groups must be a finished file, got cut.jsonl with 6 of 8 groups: `gem-kernels score --model cfg/config.json "
        "--data pairs.jsonl --output cut.jsonl`" in refused(capsys, *train, "--output_dir", "out")
    )
    assert not Path("out").exists()
    assert run(capsys, *SCORE, "--output", "cut.jsonl")[0] == 0
    assert Path("cut.jsonl").read_bytes() == whole


def test_shards_merge_into_the_file_of_one_run(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        status, _, err = run(capsys, *SCORE, "--shard", f"{i}/2", "--output", f"shard-{i}.jsonl")
        assert status == 0, err
    status, out, err = run(capsys, "merge", "shard-1.jsonl", "shard-0.jsonl", "--output", "whole2.jsonl")
    assert status == 0 and out.startswith("16 candidates") and "8 groups, 8 kept, in whole2.jsonl" in out, err
    assert Path("whole2.jsonl").read_bytes() == whole and not Path("whole2.jsonl.lock").exists()
    merge = ["merge", "shard-0.jsonl", "--output"]
    assert "output must be a new file, got whole.jsonl, which exists" in refused(capsys, *merge, "whole.jsonl")
    assert "shards must be each of 0/2 to 1/2 once, got 0/2" in refused(capsys, *merge, "new.jsonl")
    assert "shard must be i/n" in refused(capsys, *SCORE, "--shard", "2/2")
    assert not Path("new.jsonl").exists() and not Path("groups.jsonl").exists()


def test_another_run_is_refused_before_the_model_loads(
    whole: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = [*SCORE, "--output", "whole.jsonl"]
    with monkeypatch.context() as patched:
        patched.setattr("gem.models.load_model", lambda *_: pytest.fail("the model was loaded"))
        assert "got whole.jsonl with tau: 0.5 there, 2.0 now" in refused(capsys, *score, "--tau", "2")
        assert "shard: '0/1' there, '0/2' now" in refused(capsys, *score, "--shard", "0/2")
        with Path("pairs.jsonl").open("a") as out:
            out.write("\n")
        assert "data: pairs.jsonl with hash" in refused(capsys, *score)
        write_files(Path())
        shutil.copytree("tok", "tok2")
        changed = json.loads(Path("tok2/tokenizer_config.json").read_text())
        Path("tok2/tokenizer_config.json").write_text(json.dumps({**changed, "chat_template": "{{ messages }}"}))
        there = ["--tokenizer", "tok2", "--prompt_format", "auto"]
        assert "tokenizer: tok with hash" in refused(capsys, *score, *there)
        Path("other.jsonl").write_text("{}\n")
        taken = [*SCORE, "--output", "other.jsonl"]
        assert "output must be a new file, got other.jsonl, which exists" in refused(capsys, *taken)
    config = json.loads(Path("cfg/config.json").read_text())
    Path("cfg/config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    assert "model: cfg/config.json with hash" in run(capsys, *score)[2]
    assert Path("whole.jsonl").read_bytes() == whole


def test_nothing_is_left_of_a_run_without_a_group(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(files.iterdir())
    monkeypatch.setattr(GroupMaker, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    assert "RuntimeError: no" in run(capsys, *SCORE, "--output", "new.jsonl")[2]
    assert set(files.iterdir()) == before


def test_two_at_once(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.jsonl").write_bytes(whole[:5000])
    with locked(Path("two.jsonl.lock"), "output"):
        assert f"output is in use by process {os.getpid()}" in refused(capsys, *SCORE, "--output", "two.jsonl")
        merge = ["merge", "whole.jsonl", "--output", "two2.jsonl"]
        assert run(capsys, *merge)[0] == 0
    assert Path("two.jsonl").read_bytes() == whole[:5000] and Path("two2.jsonl").read_bytes() == whole
