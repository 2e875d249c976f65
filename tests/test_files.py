"""Files that are not text, places that cannot be written, and files that appear whole or not at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gem.files import check_file, check_writable, read_text, replacing, seems_to_be, write_lines


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save([1], buffer)
    return buffer.getvalue()


TEXT = '{"prompt": "1+1=", "chosen": "ä"}\n'
KINDS = {
    "gzip": gzip.compress(TEXT.encode()),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00\x01",
    "zip, as torch.save, npz and office files are": saved(),
    "a pickle": pickle.dumps([1]),
    "safetensors": safetensors.torch.save({"a": torch.ones(2)}),
    "parquet": b"PAR1\x15\x04",
    "GGUF": b"GGUF\x03\x00\x00\x00",
    "SQLite": b"SQLite format 3\x00\x10",
    "PDF": b"%PDF-1.7\n",
    "binary": bytes(range(99)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_seems_to_be(kind: str) -> None:
    assert seems_to_be(KINDS[kind][:64]) == kind


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_encodings_with_and_without_a_mark(encoding: str) -> None:
    assert seems_to_be(TEXT.encode(encoding)[:64]) == encoding[:6].upper()


@pytest.mark.parametrize("content", ["", "a", TEXT, "ä" * 40, "\ufeff" + TEXT])
def test_text_seems_to_be_nothing_else(content: str) -> None:
    assert seems_to_be(content.encode()[:63]) == ""


def test_text_is_read_without_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ä\n", encoding="utf-8-sig")
    assert read_text(tmp_path / "a") == "ä\n"
    (tmp_path / "a").write_text("a: ä\n", encoding="utf-16-le")
    with pytest.raises(ValueError, match="a: expected UTF-8 text, got UTF-16"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="a: expected UTF-8 text, got byte 0xe9 at 3"):
        read_text(tmp_path / "a")


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_that_can_be_written_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    for path in (tmp_path, tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_writable(path, "output")
    check_file(tmp_path / "there", "output")
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "kept"


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/no/such")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "file" / "x", r"output must be in a folder, got .*file/x: .*file is a file"),
        (
            tmp_path / "link",
            r"output must be where one may write, got .*: .*link links to /no/such, which is not there",
        ),
        (tmp_path / "link" / "x" / "y", r"link links to /no/such, which is not there"),
        (tmp_path, r"output must be a file, got .*, which is a folder"),
        (tmp_path / "pipe", r"output must be a file, got .*, which is a device or pipe"),
        (Path("/dev/null"), r"output must be a file, got /dev/null, which is a device or pipe"),
        (tmp_path / ("x" * 300), r"output must be where one may write, got .*: File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            check_file(path, "output")


def test_a_place_is_tried_and_not_only_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write where nobody can: on a file system that is full or read-only."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"output_dir must be where one may write, got .*new: Read-only file system"):
        check_writable(tmp_path / "new", "output_dir")


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["in the block", "at the flush", "at the rename"])
def test_a_failure_leaves_what_was_there(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if fails != "in the block":
        monkeypatch.setattr(os, "fsync" if fails == "at the flush" else "replace", fail)
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "a") as out:
        out.write("new")
        if fails == "in the block":
            fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_lines_replace_a_file_and_make_its_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "new" / "a", ["ä", "b"])
    write_lines(tmp_path / "new" / "a", ["c"])
    assert (tmp_path / "new" / "a").read_text() == "c\n" and len(list((tmp_path / "new").iterdir())) == 1
