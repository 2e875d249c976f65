"""The one JSON of a run on a GPU, to which every process of the run writes.

    {"header": ..., "stages": {stage: {"rows": [...], "ok": ..., "decision": ..., "seconds": ...}}}

A row is on file before the next one is measured, and the file is replaced by rename: whatever is killed, and whenever, what
remains is a complete JSON with every row so far.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.files import Json, read_json, update_json

_RECORD, _STAGE = "GEM_KERNELS_RECORD", "GEM_KERNELS_STAGE"


UNFINISHED = "did not return: its process hung, died or was killed"


class Record:
    """A stage's part of the file."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    @staticmethod
    def of_environment() -> Record | None:
        """Return the record that the process which started this one named, or None."""
        path = os.environ.get(_RECORD)
        return Record(Path(path), os.environ[_STAGE]) if path else None

    def environment(self) -> dict[str, str]:
        """Return the variables that hand this record to a process."""
        return {_RECORD: str(self.path), _STAGE: self.stage}

    def read(self) -> Json:
        """Return what is on file of this stage, with "rows" at least."""
        return self._mine(read_json(self.path) or {})

    def _mine(self, whole: Json) -> Json:
        mine: Json = whole.setdefault("stages", {}).setdefault(self.stage, {})
        mine.setdefault("rows", [])
        return mine

    def change(self, change: Callable[[Json], object]) -> None:
        update_json(self.path, lambda whole: change(self._mine(whole)))

    def put(self, **facts: Any) -> None:
        self.change(lambda mine: mine.update(facts))

    def append(self, row: Json) -> None:
        self.change(lambda mine: mine["rows"].append(row))

    def claim(self, name: str) -> bool:
        """Append a row that says its work did not return, for the case that it does not; False if there is one already."""
        claimed: list[str] = []

        def change(mine: Json) -> None:
            if all(row.get("name") != name for row in mine["rows"]):
                mine["rows"].append({"name": name, "error": UNFINISHED})
                claimed.append(name)

        self.change(change)
        return bool(claimed)

    def release(self) -> list[str]:
        """Take back the last claim if its work did not return, and return its name: no fault of its own ended it."""
        released: list[str] = []

        def change(mine: Json) -> None:
            if mine["rows"] and mine["rows"][-1].get("error") == UNFINISHED and "name" in mine["rows"][-1]:
                released.append(mine["rows"].pop()["name"])

        self.change(change)
        return released

    def begin(self) -> None:
        """Keep the rows of an earlier run of this stage, but the one that was in progress, and nothing else of it."""
        self.release()

        def change(mine: Json) -> None:
            rows = mine["rows"]
            mine.clear()
            mine["rows"] = rows

        self.change(change)

    def finish(self, name: str, results: Json) -> None:
        """Replace the claimed row."""

        def change(mine: Json) -> None:
            at = next(i for i, row in enumerate(mine["rows"]) if row.get("name") == name)
            mine["rows"][at] = {"name": name, **results}

        self.change(change)


def append(row: Json) -> None:
    """Append a row of a benchmark, if this process belongs to a run on a GPU."""
    if record := Record.of_environment():
        record.append(row)


def benchmarks_in(document: Json) -> Json:
    """Return {"benchmarks": ..., "does_not": ...} of all stages, as the results of `make bench` hold them."""
    rows = [row for stage in document.get("stages", {}).values() for row in stage.get("rows", ())]
    return {
        "benchmarks": [row for row in rows if "stats" in row],
        "does_not": [row for row in rows if "reason" in row and "task" in row],
    }


def key_of(row: Json) -> tuple[str, str, str]:
    """Return (task, shape, library) of a benchmark's row, with a time or without."""
    key = row.get("extra_info", row)
    return key["task"], key["shape"], key["library"]


def timed(document: Json) -> set[tuple[str, str, str]]:
    """Return the keys of every benchmark that the document holds, those without a time included."""
    return {key_of(row) for rows in benchmarks_in(document).values() for row in rows}
