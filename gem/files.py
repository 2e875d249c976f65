"""Read text files, try whether a place can be written, and write files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_KINDS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"PK\x03\x04": "zip, as torch.save, npz and office files are",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"GGUF": "GGUF",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "SQLite",
    b"%PDF": "PDF",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def seems_to_be(start: bytes) -> str:
    """Return what a file seems to be by its first bytes, a few dozen; "" if it may be UTF-8 text."""
    kind = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "")
    if kind:
        return kind
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle"
    if start[8:10] == b'{"' and b"\0" in start[:8]:  # eight bytes of length, then JSON
        return "safetensors"
    if b"\0" not in start:
        return ""
    zeros = [i % 4 for i, byte in enumerate(start) if byte == 0]
    if len(start) >= 8 and len(zeros) * 4 >= len(start) * 3 - 3 and len(set(zeros)) == 3:
        return "UTF-32"
    if len(start) >= 4 and len(zeros) * 2 >= len(start) - 1 and len({i % 2 for i in zeros}) == 1:
        return "UTF-16"
    return "binary"


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8; the message names the file and what it seems to be.
    """
    with path.open("rb") as file:
        kind = seems_to_be(file.read(64))
    if kind:
        raise ValueError(f"{path}: expected UTF-8 text, got {kind}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def read_yaml(path: str) -> tuple[Any, Any]:
    """Return the content of a config file and its yaml node, which still has the keys that come twice.

    Raises:
        ValueError: there is no such file, or it is no yaml.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"config must be an existing yaml file, got {path!r}")
    try:
        text = read_text(Path(path))
        return yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"config must be yaml, got {path}: {error}") from None


def check_writable(path: Path, name: str) -> None:
    """Check that a file or folder can be made at `path`, by a file without a name in the nearest folder that exists.

    Args:
        path: where the result will go.
        name: the argument that gave the path; the message begins with it.

    Raises:
        ValueError: a parent is a file or a link to nothing, or nothing can be written there.
    """
    with _named(path, name):
        for link in (path, *path.absolute().parents):
            if link.is_symlink() and not link.exists():
                to = f"{link} links to {os.readlink(link)}, which is not there"
                raise ValueError(f"{name} must be where one may write, got {path}: {to}")
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
        if above != path and not above.is_dir():
            raise ValueError(f"{name} must be in a folder, got {path}: {above} is a file")
        with tempfile.TemporaryFile(dir=above if above.is_dir() else path.absolute().parent) as file:
            file.write(b"tried")
            file.flush()


def check_file(path: Path, name: str) -> None:
    """Raise ValueError unless a file can be written at `path`. Call it before the work whose result the file will hold."""
    with _named(path, name):
        if path.exists() and not path.is_file():  # replacing() would put a file in the place of /dev/null
            kind = "folder" if path.is_dir() else "device or pipe"
            raise ValueError(f"{name} must be a file, got {path}, which is a {kind}")
    check_writable(path, name)


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Turn an OSError of the block into a ValueError: a full or read-only file system refuses only who tries to write."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name} must be where one may write, got {path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """Yield a file, of text or bytes, that replaces `path` by rename if the block succeeds; otherwise `path` stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") if binary else part.open("w", encoding="utf-8", newline="\n") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as out:
        for line in lines:
            out.write(line + "\n")
