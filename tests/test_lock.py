"""The lock of a folder or file: held by one process, freed however it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gem import lock
from gem.lock import check_free, locked

HOLD = (
    "import pathlib, sys, time; from gem.lock import locked\n"
    "with locked(pathlib.Path(sys.argv[1]), 'output'): print('held', flush=True); time.sleep(60)\n"
)


def holder(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_it_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "groups.jsonl.lock"
    check_free(path, "output")
    assert not path.parent.exists()
    with locked(path, "output"):
        told = json.loads(path.read_text())
        assert told["pid"] == os.getpid() and told["host"] == socket.gethostname()
        by = re.escape(f"in use by process {os.getpid()} on {socket.gethostname()} (since {told['since']})")
        for take in (check_free, lambda *args: locked(*args).__enter__()):
            with pytest.raises(ValueError, match=f"^output is {by}, got {tmp_path}/new/groups.jsonl$"):
                take(path, "output")
        with pytest.raises(ValueError, match=f"^output_dir is {by}, got {tmp_path}$"):
            check_free(path, "output_dir", tmp_path)
    assert not path.exists()
    with pytest.raises(KeyError), locked(path, "output"):
        raise KeyError
    assert not path.exists()


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_killed_holder(has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_locks:
        monkeypatch.setattr(lock, "fcntl", None)
    path = tmp_path / "run.lock"
    process = holder(path)
    try:
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
            check_free(path, "output_dir")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()
    with locked(path, "output_dir"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"pid": "me"}'])
def test_a_lock_file_that_says_nothing(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    with locked(path, "output_dir"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(content)
    monkeypatch.setattr(lock, "fcntl", None)
    advice = f"in use by another process, got {tmp_path}/run; remove {path} if that process is gone"
    with pytest.raises(ValueError, match=re.escape(advice)):
        check_free(path, "output_dir")


@pytest.mark.parametrize("error", [None, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(error, "no locks")

    if error is None:
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
    path = tmp_path / "run.lock"
    with (
        locked(path, "output_dir"),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} .*; remove {path} if"),
    ):
        check_free(path, "output_dir")
    assert not path.exists()
    path.write_text(json.dumps({"pid": 1 << 30, "host": socket.gethostname(), "since": "yesterday"}))  # dead
    with locked(path, "output_dir"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(json.dumps({"pid": 1 << 30, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(ValueError, match=rf"by process \d+ on elsewhere \(since yesterday\), got .*; remove {path} if"):
        check_free(path, "output_dir")


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="input/output error"), locked(tmp_path / "run.lock", "output_dir"):
        pass


def test_a_worker_that_outlives_a_killed_holder(tmp_path: Path) -> None:
    """The forked workers of a killed run live on for some seconds."""
    path = tmp_path / "run.lock"
    script = (
        "import os, pathlib, signal, sys; from gem.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'output_dir'):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match="in use by process"):
            check_free(path, "output_dir")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(path, "output_dir"):
            os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    """Processes that start at once: each holds the lock alone, whoever removes its file meanwhile."""
    path, count = tmp_path / "run.lock", tmp_path / "count"
    count.write_text("0")
    script = (
        "import sys, pathlib; from gem.lock import locked\n"
        "path, count, n = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0\n"
        "while n < 100:\n"
        "    try:\n"
        "        with locked(path, 'output'): count.write_text(str(int(count.read_text()) + 1)); n += 1\n"
        "    except ValueError as error:\n"
        "        if 'in use' not in str(error): raise\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), str(count)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert count.read_text() == "300" and not path.exists()
