"""JSON files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gem.files import replacing

Json = dict[str, Any]


def write_json(path: Path, document: Any) -> None:
    with replacing(path) as out:
        out.write(json.dumps(document, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Return the document, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one thread of one process at a time into the block. The system frees the lock of a process that dies."""
    import fcntl  # not on Windows, where no GPU run writes

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def update_json(path: Path, change: Callable[[Json], object]) -> Json:
    """Change, in place, the document of a file that several processes write; return it. It begins as {}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        document: Json = read_json(path) or {}
        change(document)
        write_json(path, document)
    return document
