"""Run a command with its output in a log, and kill it when it takes too long or falls silent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import ROOT

SILENCE = 100.0  # seconds without output or a finished test, after which a process counts as hung

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Let the kernel kill this process with its parent: a driver that is killed leaves nothing running on the device."""
    if _LIBC is not None:
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


class Log:
    """Print lines and append them to a file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.lock = threading.Lock()

    def __call__(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            self.file.write(text + "\n")


def run(
    command: Sequence[str],
    log: Log,
    name: str,
    seconds: float,
    env: dict[str, str],
    alive: Callable[[], float] = lambda: 0.0,
) -> int | None:
    """Return the exit status of a command whose output goes to the log; None if it was killed after `seconds` or SILENCE.

    Args:
        alive: returns the time.monotonic() of the last sign of life other than output.
    """
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": search, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a process group, so that its children are killed with it
        preexec_fn=_die_with_parent,
    )
    lines: queue.Queue[str] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    start = heard = time.monotonic()
    try:
        while process.poll() is None or not lines.empty():
            try:
                log(f"[{name}] {lines.get(timeout=0.5).rstrip()}")
                heard = time.monotonic()
            except queue.Empty:
                heard = max(heard, alive())
            now = time.monotonic()
            if now - start > seconds or now - heard > SILENCE:
                log(f"[{name}] killed after {now - start:.0f} s, {now - heard:.0f} s of silence")
                return None
        reader.join(2)  # with a limit: its children may still hold the pipe
        while not lines.empty():
            log(f"[{name}] {lines.get().rstrip()}")
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            log(f"[{name}] process {process.pid} does not die: the device may be hung")
