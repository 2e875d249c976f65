"""A lock file that says who works on a folder or file: two commands that write to one place would ruin both results."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What flock raises where it is not supported: some network and FUSE file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[IO[str]] = set()


class HeldError(ValueError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, name: str, what: Path | None = None) -> Iterator[None]:
    """Hold a lock file for the block. A lock whose holder is dead is taken over.

    The operating system frees the lock when its process ends, however it ends. On a file system without locks, the process
    id in the file decides.

    Args:
        path: the lock file. It is removed at the end, and so are folders that were made for it, if they are empty.
        name: the argument that gave the place; the message begins with it.
        what: the place that the message names; default: `path` without its .lock.

    Raises:
        HeldError: another process holds the lock.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _take(path, name, what or path.with_suffix(""))
    _held.add(file)
    try:
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}, file)
        file.flush()
        yield
    finally:
        if fcntl is None:  # Windows removes no open file
            file.close()
        path.unlink(missing_ok=True)  # while it is held, so that nobody else's file goes
        _held.discard(file)
        file.close()
        with suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


def check_free(path: Path, name: str, what: Path | None = None) -> None:
    """Raise ValueError if another process holds the lock at `path`; see `locked`. Nothing new is made."""
    if path.exists():
        with locked(path, name, what):
            pass


def _take(path: Path, name: str, what: Path) -> IO[str]:
    """Return the open lock file, held by this process."""
    while True:
        new = True
        try:
            file = path.open("x+", encoding="utf-8")
        except FileExistsError:
            new = False
            try:
                file = path.open("r+", encoding="utf-8")
            except FileNotFoundError:  # its holder ended just now
                continue
        locks = _flock(file)
        if locks is None and (new or _is_dead(_holder(file))):
            return file
        if locks and _is_at(file, path):
            return file
        holder = _holder(file)
        file.close()
        if not locks:
            advice = f"; remove {path} if that process is gone" if locks is None else ""
            raise HeldError(f"{name} is in use by {_described(holder)}, got {what}{advice}")


def _flock(file: IO[str]) -> bool | None:
    """Lock an open file. Return False if another process holds it, None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Return True if an open file still lies at its path; its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> dict[str, Any]:
    """Return who holds the lock; {} if the file does not say, as in the moment before it is written."""
    file.seek(0)
    try:
        content = json.load(file)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return True if the holder is a process of this host that has ended. That of another host counts as alive."""
    import psutil  # a dependency of accelerate; needed only where there are no locks

    pid = holder.get("pid")
    return holder.get("host") == socket.gethostname() and isinstance(pid, int) and not psutil.pid_exists(pid)


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _close_in_child() -> None:
    """Close the locks that a forked process inherits: a worker that outlives its parent for a moment must not hold them."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
