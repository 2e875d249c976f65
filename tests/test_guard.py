"""The guard rails: the AUROC gate warns, and a run whose held-out numbers have fallen stops."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from test_trainer import make_trainer

from gem.config import GuardArguments, LossArguments
from gem.guard import CollapseGuard, has_fallen, warn_below_gate


def test_has_fallen() -> None:
    guard = GuardArguments(stop_patience=2, stop_margin=0.05)
    assert not has_fallen([0.5, 0.6], guard)
    assert not has_fallen([0.6, 0.5, 0.57], guard)
    assert has_fallen([0.4, 0.6, 0.5, 0.5], guard)
    assert not has_fallen([0.6, 0.1, 0.1], GuardArguments(stop_patience=0))


def test_guard_stops_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = iter([0.9, 0.88, 0.2, 0.2, 0.2, 0.2, 0.2])
    trainer = make_trainer(
        tmp_path,
        LossArguments(),
        guard=GuardArguments(stop_patience=2),
        evaluation=lambda model: {"accuracy_sampled": next(values), "auroc": 0.4},
        args={"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    )
    with caplog.at_level(logging.WARNING, logger="gem.guard"):
        trainer.train()
    assert trainer.state.global_step == 3  # evaluations at 0, 1, 2, 3: two in a row below 0.9 - 0.05
    assert "S orders 0.40 of the pairs rightly" in caplog.text
    assert "accuracy_sampled fell to 0.200" in caplog.text
    assert CollapseGuard.WATCHED[0] == "eval_accuracy_sampled"


def test_the_gate_passes_its_own_value_and_a_missing_one(caplog: pytest.LogCaptureFixture) -> None:
    for auroc in (0.55, 1.0, math.nan):
        warn_below_gate(auroc, GuardArguments(auroc_gate=0.55))
    assert not caplog.text
    warn_below_gate(0.54, GuardArguments(auroc_gate=0.55))
    assert "AUROC gate: S orders 0.54 of the pairs rightly, below auroc_gate=0.55" in caplog.text
