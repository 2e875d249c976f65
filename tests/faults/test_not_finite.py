"""NaN and infinity, wherever they enter: the run stops at that step with status 3, and what it saved before is good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Result
from plants import STEP, At, spoil_gradient
from transformers import AutoModelForCausalLM
from world import MODES, listing, loads, nothing_half_written, whole_checkpoints

TRAINED = ("sft", "train --groups", "train online")


def finite_log(run: Path) -> None:
    """Assert that no log holds NaN."""
    for path in run.rglob("trainer_state.json"):
        for entry in json.loads(path.read_text())["log_history"]:
            assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry


def stopped(result: Result, run: Path) -> str:
    """Return the line of a run that stopped itself, after the checks of what it leaves."""
    line = result.line(3)
    nothing_half_written(run)
    finite_log(run)
    kept = whole_checkpoints(run)
    assert not kept or kept[-1] in line or "holds the weights of" in line, f"{kept} are whole: {line}"
    assert not (run / "metrics.json").exists()
    if (run / "model.safetensors").exists():
        loads(run)
    return line


@pytest.mark.fault("numbers: NaN in one entry of a gradient")
@pytest.mark.parametrize("mode", TRAINED)
def test_nan_in_a_gradient(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES[mode]
    line = stopped(of.start(folder, plants=[At(STEP, spoil_gradient, 6, after=True)]).end(), folder / of.output)
    assert "step 6" in line and "checkpoint-4" in line and "nan" in line.lower()
    row(line, "checkpoint-4, the last whole one")


RATES = {  # what is wrong -> its flags, and what is left
    "learning_rate=10": (("--learning_rate", "10"), ""),
    "learning_rate=1e30": (("--learning_rate", "1e30"), ""),
    "learning_rate=10 behind a warmup": (("--learning_rate", "10", "--warmup_steps", "8"), "checkpoint-"),
    "learning_rate=1e12 without a guard rail": (("--learning_rate", "1e12", "--stop_growth", "0"), "checkpoint-"),
}


@pytest.mark.fault("numbers: {rate}, {mode}")
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("mode", TRAINED)
def test_a_learning_rate_that_explodes(mode: str, rate: str, folder: Path, row: Callable[[str, str], None]) -> None:
    of, (flags, left) = MODES[mode], RATES[rate]
    result = of.start(folder, *flags, "--save_steps", "1").end()
    line = stopped(result, folder / of.output)
    row(
        line, "the last whole checkpoint, with finite weights" if left else "nothing was saved yet but the best weights"
    )
    assert left in line
    for path in (folder / of.output).rglob("trainer_state.json"):  # Trainer logs 0.0 for a loss that is not finite
        assert all(entry.get("loss") != 0.0 for entry in json.loads(path.read_text())["log_history"])


@pytest.mark.fault("numbers: NaN in the model's weights")
@pytest.mark.parametrize("mode", [*TRAINED, "score"])
def test_nan_in_the_weights(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    _change_weights(folder / "warm", lambda weight: weight.view(-1)[:3].fill_(math.nan))
    before = listing(folder)
    line = MODES[mode].start(folder).end().line(2)
    assert "nan in lm_head.weight (3 of" in line
    row(line, "everything; no folder is claimed")
    assert listing(folder) == before


@pytest.mark.fault("numbers: weights so large that the logits overflow")
@pytest.mark.parametrize("mode", [*TRAINED, "score"])
def test_weights_that_overflow(mode: str, folder: Path, row: Callable[[str, str], None]) -> None:
    """Weights can be finite and the logits not: status 3 where numbers fail, 2 where the head's check refuses the model."""
    _change_weights(folder / "warm", lambda weight: weight.fill_(3e38))
    result = MODES[mode].start(folder).end()
    line = result.line(3 if result.status == 3 else 2)
    row(line, "everything")
    assert "finite" in line
    for name in ("groups.jsonl", "scored/groups.jsonl"):
        assert "NaN" not in (folder / name).read_text() if (folder / name).exists() else True


def _change_weights(model: Path, change: Callable[[torch.Tensor], object]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        change(whole.lm_head.weight)
    whole.save_pretrained(model)


@pytest.mark.fault("numbers: NaN in a groups file, with a header or without")
@pytest.mark.parametrize("header", ["with", "without"])
@pytest.mark.parametrize("field", ["weight", "logprobs", "score"])
def test_nan_in_a_groups_file(field: str, header: str, folder: Path, row: Callable[[str, str], None]) -> None:
    lines = (folder / "groups.jsonl").read_text().splitlines()
    group = json.loads(lines[5])
    member = group["members"][0]
    member[field] = [math.nan] * len(member["ids"]) if field == "logprobs" else math.nan
    lines[5] = json.dumps(group)
    kept = lines if header == "with" else [line for line in lines if "gem_groups" not in line]
    (folder / "groups.jsonl").write_text("".join(f"{line}\n" for line in kept))
    before = listing(folder)
    line = MODES["train --groups"].start(folder).end().line(2)
    assert f"groups.jsonl, line {kept.index(lines[5]) + 1}: " in line
    row(line, "everything; no folder is claimed")
    assert listing(folder) == before


@pytest.mark.fault("numbers: nothing to learn from, as every candidate is cut off")
def test_nothing_to_learn(folder: Path, row: Callable[[str, str], None]) -> None:
    of = MODES["train online"]
    flags = (
        "--max_new_tokens",
        "1",
        "--human_weight",
        "0",
        "--sft_weight",
        "0",
        "--kl_weight",
        "0",
        "--max_steps",
        "60",
    )
    result = of.start(folder, *flags).end()
    row(stopped(result, folder / of.output), "the checkpoints so far")
