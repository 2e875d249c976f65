"""SIGTERM and SIGINT: the first one ends the work in order, the second one and the end of the grace period at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_cli import run, write_files

from gem import cli
from gem.signals import SIGNALS, graceful, terminating
from gem.stops import Diverged, Terminated

ROOT = Path(cli.__file__).parent.parent


def started(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_the_first_signal_raises(signum: int, error: type[BaseException]) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(error), terminating():
        signal.raise_signal(signum)
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with terminating():
            handlers.extend(signal.getsignal(s) for s in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(s) for s in SIGNALS]


SECOND = """
import os, signal, time
from gem.signals import terminating
with terminating():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
"""
HANGS = """
import ctypes, os, signal, threading
from gem import signals
signals.GRACE = 0.2
def hang():  # in C, without looking at signals, as in a collective that never ends
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
with signals.terminating():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hang()
"""
FORKS = """
import os, signal, time
from gem.signals import terminating
with terminating():
    child = os.fork()
    if not child:
        time.sleep(0.3)
        os._exit(7)
    os.kill(child, signal.SIGINT)  # of a terminal's Ctrl-C, which all processes of the group get
    other = os.fork()
    if not other:
        os.kill(child, signal.SIGTERM)  # of another process than its parent
        os._exit(0)
    os.waitpid(other, 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    done = started(SECOND, tmp_path)
    assert done.returncode == -signal.SIGTERM and not done.stderr


def test_what_hangs_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    done = started(HANGS, tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == "SIGTERM: still at work after 0.2 seconds: the process ends as it is\n"


def test_workers_leave_signals_to_their_parent(tmp_path: Path) -> None:
    done = started(FORKS, tmp_path)
    assert done.stdout.split() == ["7", "0"], done.stderr


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (Terminated(signal.SIGTERM), 143, "terminated: the same command goes on from the last checkpoint"),
        (Terminated(signal.SIGINT, "terminated after step 3: a is saved"), 130, "terminated after step 3: a is saved"),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from the last checkpoint"),
        (Diverged("step 3: the loss is nan"), 3, "step 3: the loss is nan"),
        (ValueError("tau must be > 0"), 2, "tau must be > 0"),
    ],
    ids=repr,
)  # fmt: skip
def test_the_status_says_how_a_command_ended(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_sft", fail)
    assert run(capsys, "sft") == (status, "", f"gem-kernels sft: {line}\n")
    error.kept = "a/checkpoint-2 is kept"  # type: ignore[attr-defined]
    kept = run(capsys, "sft")[2]
    assert kept.endswith("a/checkpoint-2 is kept\n") and kept.count("\n") == 1 and "last checkpoint" not in kept


def test_a_started_process_dies_by_the_signal(tmp_path: Path) -> None:
    code = "import signal; from gem import cli; cli._report = lambda argv: signal.raise_signal(15); import sys; "
    done = started(code + "sys.argv = ['gem-kernels', 'report']; cli.main()", tmp_path)
    assert done.returncode == -signal.SIGTERM and done.stderr == "gem-kernels report: terminated\n"


def test_a_closed_or_full_stdout_is_one_line(tmp_path: Path) -> None:
    """What is printed is buffered: it fails at the end, and once more when Python ends."""
    code = "from gem import cli; cli._report = print; import sys; sys.argv = ['gem-kernels', 'report']; sys.exit(cli.main())"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2
    assert done.stderr == b"gem-kernels report: the disk is full ([Errno 28] No space left on device)\n"


def test_a_training_saves_and_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupted run ends with the bits of an uninterrupted one."""
    from gem.trainer import GEMTrainer

    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    steps, step, came = GEMTrainer.training_step, 0, 0

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        if step == came:
            signal.raise_signal(signal.SIGTERM)
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(GEMTrainer, "training_step", training_step)
    assert run(capsys, "sft", "--config", "sft.yaml", "--max_steps", "6", "--output_dir", "whole")[0] == 0
    step, came = 0, 2
    command = ("sft", "--config", "sft.yaml", "--max_steps", "6")
    status, _, err = run(capsys, *command)
    assert status == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == (
        "gem-kernels sft: terminated after step 2 of 6: sft/checkpoint-2 is saved, the same command goes on from there"
    )
    assert "SIGTERM: finishing the step and saving a checkpoint" in caplog.text
    came = 0
    assert run(capsys, *command)[0] == 0
    assert Path("sft/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


class Fields:
    """What graceful() needs of a Trainer, a TrainerState or a TrainerControl."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_a_stop_is_asked_for_before_the_last_step() -> None:
    callbacks: list[Any] = [None]
    trainer = Fields(
        callback_handler=Fields(callbacks=callbacks),
        remove_callback=callbacks.remove,
        accelerator=Fields(num_processes=1),
    )
    with graceful(trainer) as stop:
        callback = callbacks[0]
        for signum, step, asked in ((0, 3, False), (signal.SIGINT, 3, True), (0, 9, False)):
            if signum:
                signal.raise_signal(signum)
            control: Any = Fields(should_save=False, should_training_stop=False)
            callback.on_step_end(None, Fields(global_step=step, max_steps=9), control)
            assert control.should_save == control.should_training_stop == asked
    assert stop.signum == signal.SIGINT and callbacks == [None]
