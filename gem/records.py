"""Load preference records of any public format, from any source, in one shape.

    records = load_records("pairs.jsonl", need=("chosen", "rejected"))
    records = load_records("HuggingFaceH4/ultrafeedback_binarized", need=("chosen",), split="train_prefs", on_bad_row="skip")

gem.read reads the rows, gem.formats recognises and renames their columns, and gem.shapes brings them into one shape. Bad
records are collected and reported by reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from gem.converters import Row
from gem.formats import Format, left_aside, recognise
from gem.messages import content_of
from gem.problems import BadRecord, Problems
from gem.read import read_rows
from gem.shapes import Record, shape

logger = logging.getLogger(__name__)

_SEEN_FIRST = 100  # rows by whose columns the format is recognised


def load_records(
    source: str,
    *,
    need: Sequence[str],
    limit: int = 0,
    split: str | None = None,
    on_bad_row: str = "auto",
    problems: Problems | None = None,
    data_format: str = "auto",
) -> list[Record]:
    """Return the records of a file, a folder or a hub dataset; docs/data.md lists the formats and the shapes.

    Args:
        source: a file (JSON lines, a JSON array, csv, tsv, parquet; packed or not), a folder of them or of
            datasets.save_to_disk, or the name of a hub dataset.
        need: fields that each record must have beside its prompt: "chosen", "rejected".
        limit: number of rows to use, from the first; 0: all.
        split: a split of a folder or hub dataset; None: "train".
        on_bad_row: "auto", "skip" or "stop", as in gem.problems.
        problems: collects the bad records for a caller that settles them; None: they are settled here.
        data_format: the name of a format, for columns that are recognised wrongly.

    Returns:
        One dict a record: "prompt" (str or messages); if present "chosen", "rejected" (str, or messages if the prompt is
        messages), "candidates" (a list of these), "tools" (list of dicts), "chat_template_kwargs" (dict), "system" (str, only
        for a text prompt); "_where", the place for later messages. Messages are dicts with "role" and "content" (str).

    Raises:
        ValueError: no rows, an unknown format, or, with problems=None, a record that cannot be used.
    """
    own = Problems(on_bad_row) if problems is None else problems
    rows = list(islice(read_rows(source, split), limit or None))
    if not rows:
        raise ValueError(f"data must hold at least one record, got none in {source!r}")
    first = [row for _, row in rows if not isinstance(row, BadRecord)][:_SEEN_FIRST]
    records = []
    if first or data_format != "auto":
        format = recognise(first, data_format)
        _log_format(source, len(rows), format, first)
        records = _read(rows, format, need, own)
    else:
        for where, row in rows:
            if isinstance(row, BadRecord):
                own.add(where, row)
    if problems is None:
        own.settle(len(rows))
    return records


def _log_format(source: str, total: int, format: Format, first: Sequence[Row]) -> None:
    aside = left_aside(format, first)
    more = f" ({', '.join(aside)} left aside)" if aside else ""
    logger.info("%s: %d records, read as %s: %s%s", source, total, format.title, format.read_as, more)


def _read(
    rows: Sequence[tuple[str, Row | BadRecord]], format: Format, need: Sequence[str], problems: Problems
) -> list[Record]:
    records: list[Record] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        try:
            if isinstance(row, BadRecord):
                raise row
            fields = sorted(name for name, value in row.items() if value is not None)
            record, notes = shape(format.read(row), need, fields)
            key = _key(record)
            if key in seen:
                if problems.on_bad_row != "auto":  # auto keeps it: rows may be repeated on purpose
                    raise BadRecord("a duplicate of an earlier record", f"that of {seen[key]}")
                notes = [*notes, "a duplicate of an earlier record, which counts again"]
        except BadRecord as error:
            problems.add(where, error)
            continue
        seen[key] = where
        for note in notes:
            problems.note(where, note)
        records.append({**record, "_where": where})
    return records


def _key(record: Record) -> str:
    """Return a key that is equal for two records with the same input and the same completions."""
    parts: list[Any] = [record.get(name) for name in ("system", "tools", "chat_template_kwargs")]
    parts += [content_of(record[name]) if name in record else None for name in ("prompt", "chosen", "rejected")]
    parts += [content_of(candidate) for candidate in record.get("candidates", [])]
    return json.dumps(parts, sort_keys=True, default=str)
