"""Files that are something else: compressed, in another encoding, binary, or a trap: named, in one line, and nothing is run."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from world import listing

from gem.cli import main

FILES = {
    "the data": ("pairs.jsonl", "sft.yaml"),
    "the groups file": ("groups.jsonl", "groups.yaml"),
    "the yaml file": ("sft.yaml", "sft.yaml"),
    "the model's config": ("warm/config.json", "sft.yaml"),
    "the tokenizer": ("warm/tokenizer.json", "sft.yaml"),
}
KINDS: dict[str, Callable[[bytes], bytes]] = {
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "gzip": gzip.compress,
    "binary": lambda content: bytes(range(256)) + content,
    "empty": lambda content: b"",
}


def refused(config: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Return the line with which a training is refused; nothing else may have changed."""
    before = listing(Path())
    status = main(["train" if config == "groups.yaml" else "sft", "--config", config, *more])
    err = capsys.readouterr().err
    assert status == 2, err
    assert "Traceback" not in err and "weights_only" not in err, err
    assert listing(Path()) == before
    line = err.splitlines()[-1]
    assert line.startswith("gem-kernels ")
    return line


CASES = [(file, kind) for file in FILES for kind in KINDS if (file, kind) != ("the data", "gzip")]  # that can be read


@pytest.mark.fault("input: {file} is UTF-16, gzip, binary or empty")
@pytest.mark.parametrize(("file", "kind"), CASES)
def test_a_file_of_another_kind(
    file: str,
    kind: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: Callable[[str, str], None],
) -> None:
    monkeypatch.chdir(folder)
    name, config = FILES[file]
    path = Path(name)
    path.write_bytes(KINDS[kind](path.read_bytes()))
    line = refused(config, capsys)
    row(line, "everything; no folder is claimed")
    assert path.name in line and (kind in line or kind in ("binary", "empty")), line


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("trapped",)


@pytest.mark.fault("input: a trap in {what}")
@pytest.mark.parametrize("what", ["the weights, a pickle that runs code", "the chat template"])
def test_a_trap(
    what: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: Callable[[str, str], None],
) -> None:
    monkeypatch.chdir(folder)
    if what == "the chat template":
        template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
        Path("warm/chat_template.jinja").write_text(template)
    else:
        Path("warm/model.safetensors").unlink()
        torch.save({"lm_head.weight": Trap()}, "warm/pytorch_model.bin", pickle_module=pickle)
    line = refused("sft.yaml", capsys)
    row(line, "everything; the trap does not go off")
    assert not Path("trapped").exists()
