"""Read text files, and write files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that replaces `path` by rename if the block succeeds; otherwise `path` stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8; the message names the file, which Python's own does not.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as out:
        for line in lines:
            out.write(line + "\n")
