"""Commands of gem-kernels as processes that can be killed, forked from a server that has imported torch and transformers.

    result = command("sft", "--config", "sft.yaml", folder=tmp_path, plants=[...]).end()

A start costs a fork, not the seconds of the imports. The command runs as the console script does: `sys.exit(main())`, with
stdout and stderr in files.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

PRELOADED = [
    "torch",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "datasets",
    "gem.cli",
    "gem.demo",
]
LIMIT = 240  # seconds that a command may take before it counts as hanging; the slowest needs 30 on a quiet machine

_LOGS = Path(tempfile.mkdtemp(prefix="gem-faults-"))
atexit.register(shutil.rmtree, _LOGS, ignore_errors=True)
_NUMBERS = count()
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)
# A status can be read once. multiprocessing polls all its processes whenever it starts one, so of two threads that read the
# same status at the same time one would find nothing, and call it 255.
_STATUS = threading.Lock()
T = TypeVar("T")


def scratch(name: str) -> Path:
    """Return a path that is removed at the end of the session."""
    return _LOGS / name


class Plant(Protocol):
    """A fault of the code itself, from tests/faults/plants.py; `set` plants it into the process of the command."""

    def set(self) -> None: ...


@dataclass(frozen=True)
class Disk:
    """A small disk at `path`, a folder below that of the command; what it holds at the end is copied to `path`.kept.

    kib: its size. read_only: nothing can be written. Without mount namespaces, kib limits each file instead.
    """

    path: str
    kib: int = 64
    read_only: bool = False

    def enter(self) -> None:
        """Mount the disk for this process alone, and copy its content after the command, which runs in a fork."""
        if not can_mount():
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.kib << 10, self.kib << 10))
            return
        _own_mounts()
        Path(self.path).mkdir(parents=True, exist_ok=True)
        _mount("tmpfs", self.path, "tmpfs", 1 if self.read_only else 0, f"size={self.kib}k")  # 1: MS_RDONLY
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            shutil.copytree(self.path, f"{self.path}.kept")
            os._exit(status if status >= 0 else 128 - status)


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit status (minus the signal that ended it), its output, and its seconds."""

    status: int
    out: str
    err: str
    seconds: float

    def line(self, status: int) -> str:
        """Return the line that tells the user why the command failed, after the checks that hold for every failure."""
        assert self.status == status, (self.status, self.err[-3000:])
        self.quiet()
        last = self.lines[-1]
        found = re.fullmatch(r"gem-kernels (\w+): (.+)", last)
        assert found, last
        assert sum(line.startswith(f"gem-kernels {found[1]}: ") for line in self.lines) == 1, self.err
        return last

    def quiet(self) -> Result:
        """Return the result after the check that no traceback was shown."""
        assert "Traceback" not in self.err and "weights_only" not in self.err, self.err[-3000:]
        return self

    def ended(self) -> Result:
        """Return the result of a command that ran to its end."""
        assert self.status == 0, (self.status, self.err[-3000:])
        return self.quiet()

    @property
    def lines(self) -> list[str]:
        """The lines of stderr. A progress bar rewrites its line: what it showed before the last time is left out."""
        return [line.split("\r")[-1].rstrip() for line in self.err.splitlines() if line.strip()]


class Running:
    """A command that has been started."""

    def __init__(self, argv: Sequence[str], folder: Path, spec: Mapping[str, Any]) -> None:
        logs = _LOGS / str(next(_NUMBERS))
        self._out, self._err = logs.with_suffix(".out"), logs.with_suffix(".err")
        self._began = time.monotonic()
        self.process = _CONTEXT.Process(target=_run, args=(argv, str(folder), str(self._out), str(self._err), spec))
        with _STATUS:
            self.process.start()

    def err(self) -> str:
        """Return stderr so far."""
        return self._err.read_text(encoding="utf-8", errors="replace") if self._err.exists() else ""

    @property
    def status(self) -> int | None:
        """The exit status, minus the signal that ended the command; None while it runs."""
        with _STATUS:
            return self.process.exitcode

    def signal(self, signum: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.process.pid is not None and self.status is None:
            os.kill(self.process.pid, signum)

    def end(self, limit: float = LIMIT) -> Result:
        """Wait for the end, and fail after `limit` seconds."""
        wait([self.process.sentinel], limit)
        status = self.status
        if status is None:
            self.process.kill()
            wait([self.process.sentinel])
        assert status is not None, f"still running after {limit} s:\n{self.err()[-3000:]}"
        out = self._out.read_text(encoding="utf-8", errors="replace")
        return Result(status, out, self.err(), time.monotonic() - self._began)


def command(
    *argv: str,
    folder: Path,
    plants: Sequence[Plant] = (),
    environment: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> Running:
    """Start `gem-kernels` with arguments in a folder."""
    return Running(argv, folder, {"plants": list(plants), "environment": dict(environment or {}), "disk": disk})


def ranks(
    *argv: str,
    folder: Path,
    plants: Mapping[int, Sequence[Plant]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Running]:
    """Start a command on two ranks, as torchrun does; `plants` go to their rank, `environment` is accelerate's, if it did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        command(
            *argv,
            folder=folder,
            plants=(plants or {}).get(rank, ()),
            environment={**shared, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Return the results of several calls, two of which run at a time: each waits for a process."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def _run(argv: Sequence[str], folder: str, out: str, err: str, spec: Mapping[str, Any]) -> None:
    """Run a command in this process, which is a fresh fork, and exit with its status."""
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.update(spec["environment"])
    import torch

    from gem.cli import main

    torch.set_num_threads(1)
    if spec["disk"] is not None:
        spec["disk"].enter()
    for plant in spec["plants"]:
        plant.set()
    sys.argv = ["gem-kernels", *argv]
    sys.exit(main())


# --- mounts of one process ----------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER, _NEW_MOUNTS, _RECURSIVE, _PRIVATE = 0x10000000, 0x00020000, 0x4000, 0x40000


def can_mount() -> bool:
    """Return True if a process may mount a disk for itself, as Linux allows in a user namespace."""
    if not hasattr(os, "waitstatus_to_exitcode") or not sys.platform.startswith("linux"):
        return False
    if not (child := os.fork()):
        try:
            _own_mounts()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _own_mounts() -> None:
    """Give this process a user and a mount namespace of its own."""
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USER | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    _mount("none", "/", None, _RECURSIVE | _PRIVATE, None)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    if _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")
