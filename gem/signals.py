"""SIGTERM and SIGINT: the work in hand is ended in order, by the second signal or after GRACE seconds at once.

    with terminating():                 # a command: the first signal raises Terminated or KeyboardInterrupt
        ...
    with graceful(trainer) as stop:     # training: the step is finished and saved
        trainer.train()
    stop.signum                         # the signal, 0 if none came

The Python handlers of signals run in the main thread, between two instructions of Python. A thread beside it hears of a signal
at once, whatever the main thread is waiting for.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from gem.stops import Terminated

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PAUSE = 0.3  # seconds in which the same signal again is an echo: schedulers send one to a group and to its leader
GRACE = 30.0  # seconds from the first signal, as long as torchrun and most schedulers wait before they kill
_FINISHED = b"\0"  # no signal has this number


@dataclass
class Stop:
    """The signal that asks for the end of a training, 0 for none."""

    signum: int = 0


@contextmanager
def terminating() -> Iterator[None]:
    """Let the first SIGTERM of the block raise Terminated in the main thread, and the first SIGINT KeyboardInterrupt."""

    def end(signum: int) -> None:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)

    with _handled(end):
        yield


@contextmanager
def graceful(trainer: Any) -> Iterator[Stop]:
    """Let the first SIGTERM or SIGINT of the block end a training after its step, with a checkpoint.

    Args:
        trainer: a transformers.Trainer whose train() is called in the block. With several processes, one that gets a signal
            stops all of them at the same step.

    Yields:
        the signal that came, on every process.
    """
    stop = Stop()
    callback = _callback(trainer, stop)
    trainer.callback_handler.callbacks.insert(
        0, callback
    )  # before gem.saving.KeepWhole, which says when a checkpoint is due

    def note(signum: int) -> None:
        stop.signum = signum

    said = "finishing the step and saving a checkpoint; a second signal ends the process at once"
    try:
        with _handled(note, said):
            yield stop
    finally:
        trainer.remove_callback(callback)


def _callback(trainer: Any, stop: Stop) -> Any:
    import torch
    from transformers import TrainerCallback

    class StopAtSignal(TrainerCallback):
        """Ask for a checkpoint and the end of the training at the end of a step, once a signal has come."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if trainer.accelerator.num_processes > 1:
                seen = torch.tensor(stop.signum, device=args.device)
                torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
                stop.signum = int(seen)
            if stop.signum and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return StopAtSignal()


def die_by(signum: int) -> None:
    """End this process by the default action of a signal, from any thread."""
    ctypes.pythonapi.PyOS_setsig(signum, None)  # signal.signal is for the main thread alone, which may hang
    os.kill(os.getpid(), signum)


# --- one signal after the other ---------------------------------------------------------------------------------------

_active: list[socket.socket] = []  # of the blocks that handle signals in this process


@contextmanager
def _handled(first: Callable[[int], None], said: str = "") -> Iterator[None]:
    """Call first(signum) in the main thread at the first signal of the block; the second one ends the process.

    Outside the main thread, where Python lets nobody handle signals, the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        if len(came) == 1:
            first(signum)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_watch, args=(reader, said), daemon=True)
    thread.start()
    fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = [signal.signal(signum, handle) for signum in SIGNALS]
    _active.append(writer)
    try:
        yield
    finally:
        _active.remove(writer)
        for signum, handler in zip(SIGNALS, before, strict=True):
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        writer.send(_FINISHED)
        thread.join()
        reader.close()
        writer.close()


def _watch(reader: socket.socket, said: str) -> None:
    """Read the numbers of the signals as they come; end the process at the second of ours, or GRACE seconds after the first."""
    signum = _next_signal(reader)
    if not signum:
        return
    name = signal.Signals(signum).name
    if said:
        logger.warning("%s: %s", name, said)
    first = time.monotonic()
    try:
        while (left := first + GRACE - time.monotonic()) > 0:
            reader.settimeout(left)
            again = _next_signal(reader)
            if not again:
                return
            if again != signum or time.monotonic() > first + PAUSE:
                die_by(again)
    except TimeoutError:
        pass
    logger.error("%s: still at work after %g seconds: the process ends as it is", name, GRACE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has the latter, which ends it as well


def _next_signal(reader: socket.socket) -> int:
    """Return the next of SIGNALS that came, 0 at the end of the block."""
    while (byte := reader.recv(1)) != _FINISHED:
        if byte[0] in SIGNALS:
            return byte[0]
    return 0


# --- forked workers ---------------------------------------------------------------------------------------------------

# A signal of the whole process group is the parent's affair: a worker that dies of it would fail the step in hand. Both signals
# wait while a worker is forked, else it could hear of one with its parent's handlers, and pass it on as a second one.


def _before_fork() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _in_parent() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child() -> None:
    if not _active:
        return
    _active.clear()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_by_parent, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_by_parent() -> None:
    """Wait for SIGTERM, which stays blocked here, from the parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
