"""What a run began with changes between a kill and the next start: refused with both, and with the old input it goes on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import scratch
from plants import GROUPS, STEP, At, Send
from transformers import AutoModelForCausalLM
from world import MODES, RECORDS, listing, same, uninterrupted, world


def other_row(path: Path) -> None:
    """Change one digit of a data file."""
    path.write_text(path.read_text().replace("9+9=", "9+8="))


def other_weight(path: Path) -> None:
    """Change one weight of a model in its last bit."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    model.save_pretrained(path)


def other_token(path: Path) -> None:
    """Swap the numbers of two tokens."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["8"], vocab["9"] = vocab["9"], vocab["8"]
    file.write_text(json.dumps(content))


def other_group(path: Path) -> None:
    """Leave out the last group of a file."""
    *kept, _ = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept).replace(f'"groups": {RECORDS}', f'"groups": {RECORDS - 1}'))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "data": ("pairs.jsonl", other_row),
    "eval_data": ("held_out.jsonl", lambda path: path.write_text(path.read_text().replace("90+90=", "90+91="))),
    "groups": ("groups.jsonl", other_group),
    "model": ("warm", other_weight),
    "tokenizer": ("warm", other_token),
}
CASES = [
    *(("sft", name) for name in ("data", "model", "tokenizer")),
    *(("train --groups", name) for name in ("groups", "eval_data", "model", "tokenizer")),
    *(("train online", name) for name in ("data", "eval_data", "model", "tokenizer")),
    *(("score", name) for name in ("data", "model", "tokenizer")),
]


@cache
def killed(mode: str) -> Path:
    """Return a folder in which a mode was killed half-way."""
    folder = Path(shutil.copytree(world(), scratch(f"killed {mode}")))
    of = MODES[mode]
    result = of.start(folder, plants=[At(STEP if of.trains else GROUPS, Send(signal.SIGKILL), call=6)]).end()
    assert result.status == -signal.SIGKILL
    return folder


@pytest.mark.fault("changed: another {name} when a killed command goes on")
@pytest.mark.parametrize(("mode", "name"), CASES)
def test_it_is_refused(mode: str, name: str, tmp_path: Path, row: Callable[[str, str], None]) -> None:
    uninterrupted(mode)
    here = Path(shutil.copytree(killed(mode), tmp_path / "here"))
    file, change = CHANGES[name]
    change(here / file)
    before = listing(here)
    line = MODES[mode].start(here).end().line(2)
    assert f"{name} must be" in line or ("output must be" in line and f"{name}: " in line)
    assert listing(here) == before
    row(line, "everything; with the old one it goes on")
    path = here / file
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(world() / file, path)
    else:
        shutil.copy(world() / file, path)
    same(MODES[mode].finish(here), mode)
