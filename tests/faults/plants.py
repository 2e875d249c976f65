"""Faults that are planted into a command: something happens at the n-th call of a function, or at the n-th change of a file.

Each is pickled into the process of the command, which plants it after its imports; nothing of gem knows of it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

STEP = "transformers:Trainer.training_step"
OPTIMIZER = "torch.optim:AdamW.step"
EVALUATION = "gem.evaluate:Evaluation.__call__"
SAVE = "transformers:Trainer._save_checkpoint"
GROUPS = "gem.pipeline:GroupMaker.draw"
LOAD = "gem.models:load_model"


@dataclass(frozen=True)
class At:
    """Act before the n-th call of a function, or after it; `act` gets the arguments of the call."""

    function: str  # "module:name" or "module:Class.name"
    act: Callable[..., None]
    call: int = 1
    after: bool = False

    def set(self) -> None:
        module, _, path = self.function.partition(":")
        *holders, name = path.split(".")
        holder: Any = import_module(module)
        for part in holders:
            holder = getattr(holder, part)
        own, calls = getattr(holder, name), [0]

        @wraps(own)
        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.call and not self.after:
                self.act(*args)
            result = own(*args, **kwargs)
            if calls[0] == self.call and self.after:
                self.act(*args)
            return result

        setattr(holder, name, planted)


@dataclass(frozen=True)
class Now:
    """Act as the command starts."""

    act: Callable[..., None]

    def set(self) -> None:
        self.act()


@dataclass(frozen=True)
class Put:
    """Put a value in the place of a name."""

    name: str  # "module:NAME"
    value: Any

    def set(self) -> None:
        module, _, name = self.name.partition(":")
        setattr(import_module(module), name, self.value)


@dataclass(frozen=True)
class WatchMemory:
    """Append the resident memory of the process, in bytes, to a file at every training step."""

    path: str

    def set(self) -> None:
        import psutil
        from transformers import Trainer

        own, process = Trainer.training_step, psutil.Process()

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with Path(self.path).open("a") as out:
                out.write(f"{process.memory_info().rss}\n")
            return own(*args, **kwargs)

        Trainer.training_step = training_step


@dataclass(frozen=True)
class AtWrite:
    """Kill the process (SIGKILL) before its n-th change of a file at or below `path`: opened, renamed, removed, ..."""

    path: str
    change: int

    def set(self) -> None:
        root, seen = str(Path(self.path).resolve()), [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if _changes(event, args, root):
                seen[0] += 1
                if seen[0] == self.change:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def _changes(event: str, args: tuple[Any, ...], root: str) -> bool:
    """Return True for an audit event that is about to change something at or below `root`."""
    if event == "open":
        path, mode, flags = args
        writes = any(letter in "wax+" for letter in mode or "") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        return writes and isinstance(path, str) and os.path.abspath(path).startswith(root)
    if event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        return False
    paths = [os.path.abspath(arg) for arg in args if isinstance(arg, str)]
    inside = any(isinstance(arg, int) and arg >= 0 for arg in args)  # relative to a folder that is open: rmtree
    return inside or any(path.startswith(root) for path in paths)


@dataclass(frozen=True)
class Send:
    """Send this process a signal, `delay` seconds later if that is not 0."""

    signum: int
    delay: float = 0.0

    def __call__(self, *_: Any) -> None:
        if not self.delay:
            os.kill(os.getpid(), self.signum)
            return
        timer = threading.Timer(self.delay, os.kill, (os.getpid(), self.signum))
        timer.daemon = True
        timer.start()


@dataclass(frozen=True)
class Touch:
    """Make a file, which tells the test that the command has come this far, and wait: it works slowly."""

    path: str
    seconds: float = 0.0

    def __call__(self, *_: Any) -> None:
        Path(self.path).touch()
        end = time.monotonic() + self.seconds
        while (rest := end - time.monotonic()) > 0:  # a signal cuts a sleep short
            time.sleep(rest)


@dataclass(frozen=True)
class Fill:
    """Fill the disk that a file is on."""

    path: str

    def __call__(self, *_: Any) -> None:
        with Path(self.path).open("wb", buffering=0) as out, suppress(OSError):
            while out.write(bytes(1024)):
                pass


def spoil_gradient(trainer: Any, model: Any, *_: Any) -> None:
    """Put NaN into one entry of one gradient, as a kernel with a bug would."""
    parameter = next(p for p in model.parameters() if p.grad is not None)
    parameter.grad.view(-1)[0] = float("nan")
