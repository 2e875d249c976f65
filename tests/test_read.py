"""Every kind of file and folder gives the same rows; the error for a damaged one names its file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gem.problems import BadRecord
from gem.read import read_rows

ROWS = [
    {"prompt": 'say "hi", twice', "chosen": "hi\nhi", "rejected": "hä"},
    {"prompt": "1+2=", "chosen": "3", "rejected": "4"},
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
]


def lines(rows: list[Any] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: Path, rows: list[dict[str, str]] = ROWS, encoding: str = "utf-8", **options: Any) -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Any] = ROWS) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def rows_of(source: Path | str, split: str | None = None) -> list[Any]:
    return [row for _, row in read_rows(str(source), split)]


def places_of(source: Path | str, split: str | None = None) -> list[str]:
    return [where for where, _ in read_rows(str(source), split)]


# --- files ------------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda p: p.write_text(lines()),
    "lines.json": lambda p: p.write_text(lines()),
    "d.ndjson": lambda p: p.write_text(lines()),
    "no_suffix": lambda p: p.write_text(lines()),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "pretty.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "array.jsonl": lambda p: p.write_text(json.dumps(ROWS)),  # the name does not decide
    "object.json": lambda p: p.write_text(json.dumps({"version": "1.0", "data": ROWS})),
    "alone.json": lambda p: p.write_text(json.dumps({"pairs": ROWS})),
    "bom.json": lambda p: p.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "bom.jsonl": lambda p: p.write_text(lines(), encoding="utf-8-sig"),
    "d.csv": write_csv,
    "bom.csv": lambda p: write_csv(p, encoding="utf-8-sig"),
    "semicolon.csv": lambda p: write_csv(p, delimiter=";"),
    "unix.csv": lambda p: write_csv(p, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "d.tsv": lambda p: write_csv(p, delimiter="\t"),
    "d.parquet": write_parquet,
    "d.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines().encode())),
    "d.json.bz2": lambda p: p.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "d.jsonl.xz": lambda p: p.write_bytes(lzma.compress(lines().encode())),
    "packed.jsonl": lambda p: p.write_bytes(gzip.compress(lines().encode())),  # recognised by its first bytes
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    assert rows_of(tmp_path / name) == ROWS


def test_places_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n" + lines())
    assert places_of(tmp_path / "d.jsonl") == [f"{tmp_path}/d.jsonl, line {n}" for n in (2, 3, 4)]
    write_csv(tmp_path / "d.csv")  # its first row contains a line break
    assert places_of(tmp_path / "d.csv") == [f"{tmp_path}/d.csv, line {n}" for n in (2, 4, 5)]
    (tmp_path / "header.csv").write_text('"a\nb",c\n1,2\n')
    assert list(read_rows(str(tmp_path / "header.csv"))) == [
        (f"{tmp_path}/header.csv, line 3", {"a\nb": "1", "c": "2"})
    ]
    write_parquet(tmp_path / "d.parquet")
    assert places_of(tmp_path / "d.parquet")[2] == f"{tmp_path}/d.parquet, row 2"


def test_an_empty_cell_is_absent_and_a_long_one_is_read(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond the csv module's own limit
    write_csv(tmp_path / "d.csv", [{"prompt": long, "chosen": "", "rejected": "4"}])
    assert rows_of(tmp_path / "d.csv") == [{"prompt": long, "rejected": "4"}]


def test_a_record_alone_in_a_json_file_is_a_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    for record in (ROWS[1], {"messages": messages}, {"prompt": "1", "chosen": "2", "tools": [{"type": "function"}]}):
        (tmp_path / "d.json").write_text(json.dumps(record, indent=1))
        assert rows_of(tmp_path / "d.json") == [record]


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    row = {"chosen": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    write_parquet(tmp_path / "d.parquet", [row, row])
    assert rows_of(tmp_path / "d.parquet") == [row, row]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{", "expected one JSON object a line, got '{'"),
        (b'{"a": 1} {"a": 2}', "expected one JSON object a line"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": "caf\xe9"}', "expected UTF-8 text"),
        (b"[" * 100_000, "expected one JSON object a line"),  # deeper than Python's recursion limit
        (b'{"a": ' + b"9" * 5000 + b"}", "expected one JSON object a line"),  # more digits than Python's int limit
    ],
)
def test_a_line_that_does_not_parse_is_a_bad_record_and_the_rest_is_read(
    tmp_path: Path, line: bytes, error: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line + b"\n" + json.dumps(ROWS[1]).encode())
    (_, first), (where, bad), (_, last) = read_rows(str(path))
    assert (first, last) == (ROWS[0], ROWS[1]) and where == f"{path}, line 2"
    assert isinstance(bad, BadRecord) and str(bad).startswith(error)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"a,b\n1,2\n1,2,3\n4,5\n", "expected 2 cells, got 3"),
        (b"a,b\n1,2\n1\n4,5\n", "expected 2 cells, got 1"),
        (b"a,b\n1,2\ncaf\xe9,3\n4,5\n", "expected UTF-8 text, got 'caf"),
    ],
)
def test_a_bad_row_of_a_table_is_a_bad_record(tmp_path: Path, content: bytes, error: str) -> None:
    (tmp_path / "d.csv").write_bytes(content)
    (_, first), (where, bad), (_, last) = read_rows(str(tmp_path / "d.csv"))
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "4", "b": "5"}) and where.endswith("d.csv, line 3")
    assert isinstance(bad, BadRecord) and str(bad).startswith(error)


def test_what_is_no_object_in_an_array_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([ROWS[0], "text", ROWS[1]]))
    where, bad = list(read_rows(str(tmp_path / "d.json")))[1]
    assert where.endswith("d.json, row 1") and str(bad) == "expected a JSON object, got str"


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


TORN = {
    "d.jsonl.gz": (torn(gzip.compress(lines(ROWS * 99).encode())), "expected a file that can be read whole"),
    "header.jsonl.gz": (b"\x1f\x8b" + b"no gzip at all", "expected a file that can be read whole"),
    "bits.jsonl.gz": (gzip.compress(lines().encode())[:14] + b"\xff" * 40, "expected a file that can be read whole"),
    "d.jsonl.xz": (torn(lzma.compress(lines(ROWS * 99).encode())), "expected a file that can be read whole"),
    "d.jsonl.bz2": (torn(bz2.compress(lines(ROWS * 99).encode())), "expected a file that can be read whole"),
    "d.json": (torn(json.dumps(ROWS, indent=0).encode()), r"d\.json, line \d+: expected a whole JSON value"),
    "latin.json": (b'[\n{"a": "caf\xe9"}]', r"latin\.json, line 2: expected UTF-8 text"),
    "d.parquet": (b"PAR1" + b"torn", "expected a whole parquet file"),
    "no.parquet": (lines().encode(), "expected a whole parquet file"),
    "utf16.jsonl": (lines().encode("utf-16"), "expected UTF-8 text, got UTF-16"),
    "utf16_without_a_mark.jsonl": (lines().encode("utf-16-le"), "expected UTF-8 text, got UTF-16"),
    "utf16.csv": (b"\xff\xfea\0,\0b\0\n\0", "expected UTF-8 text, got UTF-16"),
    "d.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\x00", "expected UTF-8 text, got zstd"),
    "d.zip": (b"PK\x03\x04\x14\x00", "expected UTF-8 text, got zip"),
    "packed.jsonl": (gzip.compress(lines().encode("utf-16")), "expected UTF-8 text, got UTF-16"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(lines().encode())), "expected UTF-8 text, got gzip"),
    "open.csv": (b'a,b\n1,2\n"1,2\n', r"open\.csv, line 3: expected a row of a table"),
    "twice.csv": (b"a,a\n1,2\n", "line 1: expected a header of different names"),
    "unnamed.csv": (b"a,\n1,2\n", "line 1: expected a header of different names"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path, name: str) -> None:
    content, message = TORN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        rows_of(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and not isinstance(error.value, UnicodeDecodeError)


def test_a_torn_parquet_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", ROWS * 1000)
    (tmp_path / "d.parquet").write_bytes(torn((tmp_path / "d.parquet").read_bytes()))
    with pytest.raises(ValueError, match=r"d\.parquet: expected a whole parquet file"):
        rows_of(tmp_path / "d.parquet")


# --- folders, splits, the hub -----------------------------------------------------------------------------------------


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "splits") == ROWS
    assert rows_of(tmp_path / "splits", "test") == [ROWS[1]]
    assert places_of(tmp_path / "splits")[1] == f"{tmp_path}/splits, row 1"


def test_a_torn_folder_of_save_to_disk(tmp_path: Path) -> None:
    for name, broken in (("state", "state.json"), ("info", "dataset_info.json"), ("data", "data-00000-of-00001.arrow")):
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / name))
        (tmp_path / name / broken).write_text("{")
        with pytest.raises(ValueError, match=f"{name}"):
            rows_of(tmp_path / name)
    (tmp_path / "data" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="data must be an existing file, folder or hub dataset"):
        rows_of(tmp_path / "data")


def folder(path: Path, names: list[str]) -> Path:
    """Write files of one row each, which holds its place."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": name}
        if name.endswith("parquet"):
            write_parquet(path / name, [row])
        else:
            (path / name).write_text(json.dumps(row))
    return path


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        (["b.jsonl", "a.jsonl"], None, ["a.jsonl", "b.jsonl"]),
        (["part-0.parquet", "part-1.parquet"], None, ["part-0.parquet", "part-1.parquet"]),
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["pairs_train.jsonl", "pairs_test.jsonl"], "test", ["pairs_test.jsonl"]),
        (["train-part-0.jsonl", "train-part-1.jsonl", "valid.jsonl"], None, ["train-part-0.jsonl", "train-part-1.jsonl"]),
        (
            ["data/train_prefs-00000-of-00002.parquet", "data/train_prefs-00001-of-00002.parquet",
             "data/train_sft-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"],
            "train_prefs",
            ["data/train_prefs-00000-of-00002.parquet", "data/train_prefs-00001-of-00002.parquet"],
        ),
        (["filtered-00000-of-00001.parquet", "raw-00000-of-00001.parquet"], "filtered", ["filtered-00000-of-00001.parquet"]),
        (["data/Alpaca-7B/train.jsonl", "data/Alpaca-7B/test.jsonl"], "train", ["data/Alpaca-7B/train.jsonl"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "test", ["default/test/0000.parquet"]),
        (["pairs.jsonl", "test.jsonl"], "pairs", ["pairs.jsonl"]),
        (["a.jsonl", "README.md", ".cache/b.jsonl", "dataset_infos.json"], None, ["a.jsonl"]),
    ],
)  # fmt: skip
def test_folders_of_files(tmp_path: Path, files: list[str], split: str | None, read: list[str]) -> None:
    assert [row["prompt"] for row in rows_of(folder(tmp_path, files), split)] == read


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    files = folder(tmp_path / "a", ["train_prefs-00000-of-00001.parquet", "test_prefs-00000-of-00001.parquet"])
    with pytest.raises(ValueError, match=r"data must have a train split, got \['test_prefs', 'train_prefs'\]"):
        rows_of(files)
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "b"))
    for split in (None, "train", "dev"):
        with pytest.raises(ValueError, match=rf"a {split or 'train'} split, got \['test'\] in .*--split"):
            rows_of(tmp_path / "b", split)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(ValueError, match="a test split, got"):
        rows_of(tmp_path / "c", "test")


def test_splits_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert rows_of(tmp_path / "d.json") == ROWS and rows_of(tmp_path / "d.json", "test") == ROWS[:1]
    with pytest.raises(ValueError, match=r"a dev split, got \['test', 'train'\]"):
        rows_of(tmp_path / "d.json", "dev")
    (tmp_path / "d.jsonl").write_text(lines())
    write_parquet(tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.parquet"):
        assert rows_of(tmp_path / name, "train") == ROWS
        with pytest.raises(ValueError, match="split must be left out for a file of .*'test'"):
            rows_of(tmp_path / name, "test")


def test_a_folder_with_nothing_to_read(tmp_path: Path) -> None:
    for name, files in (("empty", []), ("words", ["README.md", "notes.txt"]), ("hidden", [".git/a.jsonl"])):
        (tmp_path / name).mkdir()
        with pytest.raises(
            ValueError, match="data must be an existing file, folder or hub dataset, got .*without data"
        ):
            rows_of(folder(tmp_path / name, files))
    with pytest.raises(ValueError, match=r"files of one kind, got \['csv', 'json'\]"):
        rows_of(folder(tmp_path / "both", ["a.jsonl", "b.csv"]))


@pytest.mark.parametrize("missing", ["no.jsonl", "no.csv", "no.jsonl.gz", "./no", "/no/where", "~/no"])
def test_a_file_that_is_not_there_is_not_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked"))
    with pytest.raises(ValueError, match="data must be an existing file, folder or hub dataset, got .*no such file"):
        rows_of(missing)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(ROWS)
    loaded = datasets.DatasetDict({"train_prefs": table, "train_sft": table.select([0])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    assert rows_of("some/set", "train_sft") == ROWS[:1]
    assert places_of("some/set", "train_prefs")[2] == "some/set, row 2"
    with pytest.raises(ValueError, match=r"a train split, got \['train_prefs', 'train_sft'\] in 'some/set'"):
        rows_of("some/set")


class _OddError(Exception):
    """An error that is neither a ValueError nor an OSError."""


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub"),
        FileNotFoundError("no such thing"),
        pyarrow.ArrowInvalid("not an arrow file"),
        RuntimeError("Dataset scripts are no longer supported"),
        ValueError("Config name is missing.\nPick one of ..."),
        KeyError("features"),
        _OddError(),
    ],
    ids=repr,
)
def test_whatever_goes_wrong_on_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match="^data must be an existing file, folder or hub dataset, got 'some/set': "
    ) as got:
        rows_of("some/set")
    first = (str(error) or repr(error)).splitlines()[0]
    assert str(got.value).endswith(first) and type(got.value) is ValueError and "\n" not in str(got.value)
