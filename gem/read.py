"""Read the rows of a file, a folder or a hub dataset, each with its place for later messages.

    for where, row in read_rows("pairs.jsonl"):         # ("pairs.jsonl, line 3", {...} or a BadRecord)
    for where, row in read_rows("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"):

A line that cannot be read becomes a BadRecord; a file that cannot be read raises a ValueError.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gem.files import seems_to_be
from gem.problems import BadRecord, shown

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | BadRecord]]

_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_PACKED = (".gz", ".bz2", ".xz")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # metadata, no rows
_SHARD = re.compile(r"-\d+-of-\d+$")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z]).*", re.IGNORECASE)
_PART = re.compile(r"[-_]?(part|shard)?[-_]?\d+$", re.IGNORECASE)
# Keys of the rows in a JSON object.
_LISTS = ("data", "rows", "records", "examples", "instances", "items", "samples")
_WANTED = "data must be an existing file, folder or hub dataset"


def read_rows(source: str, split: str | None = None) -> Rows:
    """Yield the place and the content of each row of `source`, in order.

    Args:
        source: a file of JSON lines or a JSON array, csv, tsv or parquet, each also packed with gzip, bzip2 or xz; a folder
            of such files or of datasets.save_to_disk; the name of a hub dataset.
        split: a split of a folder, a hub dataset or a JSON object of lists; None: "train", if there are splits.

    Raises:
        ValueError: no rows, no such split, or a file that does not match its name.
    """
    path = Path(source)
    if path.is_dir():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        return _saved(source, split) if saved else _folder(path, split)
    if path.exists():
        return _file(path, split)
    if _kind(path) or source.startswith(("/", ".", "~")):
        raise ValueError(f"{_WANTED}, got {source!r}: no such file")
    return _hub(source, split)


def _kind(path: Path) -> str | None:
    """Return the kind of a file by its name: json, csv or parquet."""
    return _KINDS.get(Path(path.stem).suffix if path.suffix in _PACKED else path.suffix)


def _picked(splits: dict[str, Any], split: str | None, source: str) -> Any:
    wanted = split or "train"
    if wanted not in splits:
        raise ValueError(f"data must have a {wanted} split, got {sorted(splits)} in {source!r} (--split names one)")
    return splits[wanted]


# --- folders and the hub ----------------------------------------------------------------------------------------------


def _folder(path: Path, split: str | None) -> Rows:
    """Read the data files of a folder that belong to one split, which file and folder names give, as on the hub."""
    files = sorted(p for p in path.rglob("*") if _kind(p) and p.name not in _ABOUT and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(path).parts))  # fmt: skip
    if not files:
        raise ValueError(f"{_WANTED}, got {str(path)!r}: a folder without data files ({', '.join(_KINDS)})")
    splits: dict[str, list[Path]] = {}
    for file, name in zip(files, _split_names(path, files), strict=True):
        splits.setdefault(name, []).append(file)
    picked = _picked(splits, split, str(path))
    if len(kinds := {_kind(file) for file in picked}) > 1:
        raise ValueError(f"data must be files of one kind, got {sorted(map(str, kinds))} in {str(path)!r}")
    return (row for file in picked for row in _file(file, None))


def _split_names(path: Path, files: list[Path]) -> list[str]:
    """Return the split of each file: "train_prefs-00000-of-00002.parquet", "pairs_test.jsonl", "test/0000.parquet".

    All files are train if no name gives a split.
    """
    names = [_split_name(file.relative_to(path)) for file in files]
    if not any(names):
        return ["train"] * len(files)
    return [name or file.name.split(".")[0] for name, file in zip(names, files, strict=True)]


def _split_name(file: Path) -> str | None:
    stem = file.name.split(".")[0]
    if _SHARD.search(stem):
        return _SHARD.sub("", stem)
    for part in (stem, *reversed(file.parts[:-1])):
        if found := _SPLIT.search(part):
            return _PART.sub("", found[0])
    return None


def _saved(source: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(source)
    except Exception as error:  # missing or truncated files: OSError, errors of json and pyarrow, KeyError
        raise ValueError(f"{_WANTED}, got {source!r}: {_reason(error)}") from None
    return _table(loaded, source, split)


def _hub(source: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(source)
    except Exception as error:  # no such name, no network, a gated set, a broken file: each library raises its own type
        raise ValueError(f"{_WANTED}, got {source!r}: {_reason(error)}") from None
    return _table(loaded, source, split)


def _table(loaded: Any, source: str, split: str | None) -> Rows:
    if not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train"): loaded} if split else {"train": loaded}
    table = _picked(loaded, split, source)

    def rows() -> Rows:
        i = -1
        try:
            for i, row in enumerate(table):
                yield f"{source}, row {i}", _without_none(dict(row))
        except Exception as error:  # a truncated arrow file fails only when its rows are read
            raise ValueError(f"{source}, row {i + 1}: expected a readable row, got {_reason(error)}") from None

    return rows()


def _reason(error: Exception) -> str:
    """Return the first line of an error, or its type if it has no text: libraries explain at length."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


# --- files ------------------------------------------------------------------------------------------------------------


def _file(path: Path, split: str | None) -> Rows:
    """Read a file; its name gives the kind, its first bytes the compression."""
    kind = _kind(path) or "json"
    if split and split != "train" and kind != "json":
        raise ValueError(f"split must be left out for a file of one table, got {split!r} and {str(path)!r}")
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if kind == "parquet" or start[:4] == b"PAR1":
            yield from _parquet(path)
            return
        opener = next((o for magic, o in _OPENERS.items() if start.startswith(magic)), open)
        with opener(path, "rb") as stream:
            if other := seems_to_be(stream.read(64)):
                raise ValueError(f"{path}: expected UTF-8 text, got {other}")
            stream.seek(0)
            yield from _csv(path, stream) if kind == "csv" else _json(path, stream, split)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: expected a file that can be read whole, got {_reason(error)}") from None


def _json(path: Path, stream: BinaryIO, split: str | None) -> Rows:
    """Read a JSON array, an object with a list of rows, or JSON lines, whichever the content is."""
    first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    stream.seek(0)
    if ".json" in path.suffixes or first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        rows = _json_whole(path, stream.read(), split)
        if rows is not None:
            yield from rows
            return
        stream.seek(0)
    if split and split != "train":
        raise ValueError(f"split must be left out for a file of JSON lines, got {split!r} and {str(path)!r}")
    for number, raw in enumerate(stream, 1):
        try:
            row = _json_line(raw, number)
        except BadRecord as error:
            yield f"{path}, line {number}", error
            continue
        if row is not None:
            yield f"{path}, line {number}", row


def _json_line(raw: bytes, number: int) -> Row | None:
    line = ""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if not line.strip():
            return None
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRecord("expected UTF-8 text", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("expected one JSON object a line", f"{shown(line.strip())} ({error})") from None
    if not isinstance(row, dict):
        raise BadRecord("expected a JSON object", type(row).__name__)
    return row


def _json_whole(path: Path, raw: bytes, split: str | None) -> Rows | None:
    """Return the rows of a file that is one JSON value; None if it has one value a line."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text, got {error}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or not raw.strip():
            return None
        raise ValueError(f"{path}, line {error.lineno}: expected a whole JSON value, got {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON value, got {error}") from None
    rows = _picked(lists, split, str(path)) if (lists := _lists(value)) else value
    rows = rows if isinstance(rows, list) else [rows]
    return (
        (f"{path}, row {i}", row if isinstance(row, dict) else BadRecord("expected a JSON object", type(row).__name__))
        for i, row in enumerate(rows)
    )


def _lists(value: Any) -> dict[str, list[Any]]:
    """Return {"train": rows} for {"data": rows}, {split: rows} for an object with one list a split, and {} for a record."""
    if not isinstance(value, dict):
        return {}
    lists = {name: items for name, items in value.items() if isinstance(items, list) and items
             and all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in items)
             and (name in _LISTS or _SPLIT.match(name) or len(value) == 1)}  # fmt: skip
    return {"train": next(iter(lists.values()))} if len(lists) == 1 and not _SPLIT.match(next(iter(lists))) else lists


def _csv(path: Path, stream: BinaryIO) -> Rows:
    """Read a table with a header; an empty cell is absent. The place of a row is its first line."""
    # The csv module's limit of 131,072 characters a field, which is global, is too small for long answers.
    csv.field_size_limit(2**31 - 1)
    # surrogateescape keeps bytes that are not UTF-8, so that the error names one row and not the whole block.
    lines = (line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, line in enumerate(stream))
    header = next(lines, "")
    delimiter = "\t" if ".tsv" in path.suffixes else ";" if ";" in header and "," not in header else ","

    def with_header() -> Iterator[str]:
        yield header
        yield from lines

    reader = csv.reader(with_header(), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or (names and not all(names)):
            raise ValueError(f"{path}, line 1: expected a header of different names, got {names}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}, line {line}", _cells(names, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: expected a row of a table, got {error}") from None


def _cells(names: list[str], cells: list[str]) -> Row | BadRecord:
    if len(cells) != len(names):
        return BadRecord(f"expected {len(names)} cells", str(len(cells)))
    if torn := [cell for cell in cells if not _is_utf8(cell)]:
        return BadRecord("expected UTF-8 text", shown(torn[0]))
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_none(value: Any) -> Any:
    """Remove the fields that are None at any depth: a table gives each row the fields of all rows."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            i = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {i}", _without_none(row)
                    i += 1
    except (ImportError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow's own types, OSError, thrift's errors as text
        raise ValueError(f"{path}: expected a whole parquet file, got {_reason(error)}") from None
