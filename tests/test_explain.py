"""Errors as lines: what is wrong with a disk, and what is kept. test_cli.py has those of every other kind."""

from __future__ import annotations

import pickle

import pytest
from safetensors import SafetensorError

from gem.explain import explain
from gem.stops import Diverged, Terminated

HINT = "(--debug shows the traceback)"
SERIALIZING = "Error while serializing: I/O error: No space left on device (os error 28)"

PICKLE = "a file holds a pickle that is damaged or asks for more than tensors, which is not run here"
NOT_WHOLE = "a file could not be written whole, as on a full disk"
UNEXPECTED = "[enforce fail at inline_container.cc:672] . unexpected pos 11840 vs 11728"
WRITER = "PytorchStreamWriter failed writing file data/0: file write failed"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a/b"), "the disk is full (a/b: No space left on device)"),
        (OSError(122, "Disk quota exceeded"), "the disk is full ([Errno 122] Disk quota exceeded)"),
        (SafetensorError(SERIALIZING), f"the disk is full ({SERIALIZING})"),
        (RuntimeError("basic_ios::clear: iostream error"), f"{NOT_WHOLE} (basic_ios::clear: iostream error)"),
        (RuntimeError(f"{UNEXPECTED}\nmore"), f"{NOT_WHOLE} ({UNEXPECTED})"),
        (RuntimeError(f"{WRITER}\nmore"), f"{NOT_WHOLE} ({WRITER})"),
        (pickle.UnpicklingError("Weights only load failed.\n(1) pass weights_only=False"), PICKLE),
        (RuntimeError("re-running with weights_only=False will load it"), PICKLE),
        (OSError(30, "Read-only file system", "a"), f"OSError: a: Read-only file system {HINT}"),
        (NotADirectoryError(20, "Not a directory", "a/b"), f"NotADirectoryError: a/b: Not a directory {HINT}"),
        (Diverged("step 3:\n the loss is nan"), "step 3: the loss is nan"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_an_error_of_a_disk_or_of_the_numbers(error: BaseException, line: str) -> None:
    assert explain(error, "sft") == line
    error.kept = "a/checkpoint-2 is the last whole checkpoint"  # type: ignore[attr-defined]
    assert explain(error, "sft") == f"{line}; a/checkpoint-2 is the last whole checkpoint"


@pytest.mark.parametrize("command", ["sft", "train", "score", "eval", "report", "doctor", "demo"])
def test_a_signal_says_how_to_go_on_where_one_can(command: str) -> None:
    for error, word in ((Terminated(15), "terminated"), (KeyboardInterrupt(), "interrupted")):
        line = explain(error, command)
        assert line.startswith(word) and (": the same command goes on" in line) == (
            command in ("sft", "train", "score")
        )
    assert (
        explain(Terminated(15, "terminated after step 3: a is saved"), command) == "terminated after step 3: a is saved"
    )
