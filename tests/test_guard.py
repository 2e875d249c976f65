"""The guard rails: the AUROC gate warns; a run that collapses, explodes or learns nothing stops, and has its best weights."""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import examples, groups_of, make_trainer, tiny_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from gem.config import GuardArguments, LossArguments, check
from gem.data import Example
from gem.groups import Group
from gem.guard import CollapseGuard, SoundWeights, lost_steps, warn_below_gate
from gem.rails import explosion, has_fallen, idle_steps
from gem.stops import Diverged


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


def test_the_gate_passes_its_own_value_and_a_missing_one(caplog: pytest.LogCaptureFixture) -> None:
    for auroc in (0.55, 1.0, math.nan):
        warn_below_gate(auroc, GuardArguments(auroc_gate=0.55))
    assert not caplog.text
    warn_below_gate(0.54, GuardArguments(auroc_gate=0.55))
    assert "AUROC gate: S orders 0.54 of the pairs rightly, below auroc_gate=0.55" in caplog.text


def test_the_gate_does_not_warn_of_few_pairs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        warn_below_gate(0.2, GuardArguments(), 9)
        assert [(r.levelname, r.message) for r in caplog.records] == [
            ("INFO", "AUROC gate: S orders 0.20 of 9 human pairs rightly (fewer than 10 pairs are too few to tell)")
        ]
        warn_below_gate(0.9, GuardArguments(), 1)
        assert len(caplog.records) == 1
        warn_below_gate(0.2, GuardArguments(), 10)
    assert caplog.records[1].levelname == "WARNING" and "S orders 0.20 of 10 human pairs rightly, below" in caplog.text


# --- the best weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "best"), [([0.9, 0.2, 0.2], 0), ([0.1, 0.6, 0.5, 0.7, 0.1, 0.1], 3)])
def test_a_collapse_restores_the_weights_of_the_best_evaluation(values: list[float], best: int, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def evaluation(model: Any) -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"accuracy_sampled": values[len(seen) - 1]}

    trainer = make_trainer(
        tmp_path,
        LossArguments(),
        guard=GuardArguments(stop_patience=2),
        evaluation=evaluation,
        args={
            "max_steps": 20,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_on_start": True,
            "save_strategy": "steps",
        },
    )
    trainer.train()
    assert (
        trainer.stopped == f"stopped after step {len(values) - 1} of 20: eval_accuracy_sampled fell to {values[-1]:.3f}"
    )
    assert not trainer.diverged and trainer.restored == str(tmp_path / "checkpoint-best")
    assert trainer.final_metrics is None  # it was of other weights
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, seen[best][name], atol=0, rtol=0)
    assert any(not torch.equal(seen[best][name], seen[-1][name]) for name in seen[0])


def test_without_checkpoints_nothing_is_restored(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        LossArguments(),
        guard=GuardArguments(stop_patience=1),
        evaluation=lambda model: {"auroc": 1 / (1 + trainer.state.global_step)},
        args={"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "no"},
    )
    trainer.train()
    assert "eval_auroc fell to 0.500" in trainer.stopped and not trainer.restored
    assert trainer.final_metrics == {"eval_auroc": 0.5}


@pytest.mark.parametrize("damage", ["overwritten", "deleted"])
def test_damaged_best_weights_are_not_restored(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = iter([0.1, 0.9, 0.1, 0.1])

    def evaluation(model: Any) -> dict[str, float]:
        if trainer.state.global_step == 2 and damage == "overwritten":
            with (tmp_path / "checkpoint-best" / "model.safetensors").open("r+b") as file:
                file.seek(2000)
                file.write(b"?" * 64)
        elif trainer.state.global_step == 2:
            shutil.rmtree(tmp_path / "checkpoint-best")
        return {"accuracy_sampled": next(values)}

    trainer = make_trainer(
        tmp_path,
        LossArguments(),
        guard=GuardArguments(stop_patience=2),
        evaluation=evaluation,
        args={"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "steps",
              "save_steps": 1},
    )  # fmt: skip
    trainer.train()
    assert trainer.restored == str(tmp_path / "checkpoint-2")  # of the checkpoints there are, the last
    assert ("checkpoint-best is not whole and is not restored" in caplog.text) == (damage == "overwritten")


def test_without_a_difference_the_later_evaluation_is_the_best() -> None:
    guard = CollapseGuard(GuardArguments())
    history: list[dict[str, float]] = []
    for accuracy, preference, best in ((0.0, 0.5, True), (0.0, 0.7, True), (0.0, 0.6, False), (0.0, 0.7, True)):
        history += [{"loss": 1.0}, {"eval_accuracy_sampled": accuracy, "eval_preference_token": preference}]
        assert guard.is_best(TrainerState(log_history=history)) == best


# --- explosion --------------------------------------------------------------------------------------------------------


def logged(**columns: list[float]) -> list[dict[str, float]]:
    rows = zip(*columns.values(), strict=True)
    return [{"step": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([0.01] * 10 + [9.0] * 3, False),  # the level is at least one nat
        ([2.0] * 10 + [150.0] * 3, True),
        ([2.0] * 10 + [-150.0] * 3, True),  # negative weights push without end
        ([2.0] * 10 + [150.0, 50.0, 150.0], False),  # one bad batch
        ([0.1] * 9 + [40.0] + [150.0] * 3, False),  # the start had its share of groups that weigh nothing
        ([2.0] * 9 + [150.0] * 3, False),  # too early to tell
        ([2.0 * 1.2**i for i in range(60)], True),  # the level is that of the start, so slow growth ends too
    ],
)
def test_a_loss_far_above_its_start(losses: list[float], stops: bool) -> None:
    assert bool(explosion(logged(loss=losses), GuardArguments())) == stops
    assert not explosion(logged(loss=losses), GuardArguments(stop_growth=0.0))


def test_a_gradient_far_above_its_start() -> None:
    norms = [0.0, 0.02, 0.01, 0.02] * 4 + [2.0] * 3
    steps = logged(loss=[1.0] * len(norms), grad_norm=norms)
    assert explosion(steps, GuardArguments()) == (
        "grad_norm has been above 1 for 3 logged steps, its level at the start was 0.02 (stop_growth=50; lower learning_rate)"
    )
    assert not explosion(steps[:-1], GuardArguments())
    skipped = logged(loss=[1.0] * len(norms), grad_norm=[*norms[:-3], math.inf, math.inf, math.inf])
    assert not explosion(skipped, GuardArguments())  # by the scaler of fp16


def test_a_language_model_worse_than_guessing() -> None:
    assert not explosion(logged(loss=[3.0, 6.5, 6.4, 6.3]), GuardArguments())
    assert "loss is above 6 nats a token" in explosion(logged(loss=[3.0, 6.5, 6.4, 6.3]), GuardArguments(), 2.8)
    assert not explosion(logged(loss=[9.0, 8.5, 8.4, 8.3]), GuardArguments(), 2.8)  # it comes from there


def test_a_factor_that_any_run_exceeds() -> None:
    with pytest.raises(ValueError, match=r"stop_growth must be 0 \(never\) or at least 2, got 0\.5"):
        check(GuardArguments(stop_growth=0.5))


def test_an_explosion_stops_the_run_before_it_saves_what_is_left(tmp_path: Path) -> None:
    """At this learning rate the loss of SEGA without its guard rails runs away."""
    model = tiny_model()
    data = groups_of(model, 8)
    trainer = make_trainer(
        tmp_path,
        LossArguments(taper=False, kl_weight=0.0, sft_weight=0.0),
        guard=GuardArguments(stop_growth=5.0),
        model=model,
        data=data,
        args={"max_steps": 60, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    )
    trainer.train()
    assert trainer.diverged and "for 3 logged steps" in trainer.stopped, trainer.state.log_history[-3:]
    step = trainer.state.global_step
    assert not (tmp_path / f"checkpoint-{step}").exists()
    # The last step that was well, step - 3, says nothing of its own update.
    assert trainer.restored == str(tmp_path / f"checkpoint-{step - 4}")


@pytest.mark.parametrize("rate", [10.0, 1e4, 1e30])
def test_a_step_that_throws_the_weights_away(rate: float, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, LossArguments(), args={"learning_rate": rate, "save_strategy": "steps", "save_steps": 1}
    )
    with pytest.raises(Diverged, match=r"step 1: the optimizer's step has (made the norm of the weights|left weights)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# --- steps that are rounded away --------------------------------------------------------------------------------------


def test_the_weights_that_16_bits_keep_from_moving() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(weight.weight, std=0.02)
    said = lost_steps(weight, 1e-5)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=1e-5, weight_decay=0.0)
    shares = []
    for _ in range(20):
        before = weight.weight.detach().clone()
        weight.weight.grad = torch.randn_like(before)
        optimizer.step()
        shares.append(float((weight.weight == before).float().mean()))
    told = re.fullmatch(r"weights in bfloat16, where a step of 1e-05 leaves (\d+)% of them as they are", said)
    assert told and 0.8 < shares[0] < 0.9 and abs(int(told[1]) / 100 - shares[0]) < 0.01, (said, shares)
    assert min(shares[1:]) > shares[0], shares  # later steps are smaller: what is told is the least


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 2**-8), ("bfloat16", -(2**-8)), ("float16", 2**-5)])
def test_the_weight_from_which_a_step_is_lost(dtype: str, value: float) -> None:
    model = torch.nn.Linear(4, 4, bias=False, dtype=getattr(torch, dtype))
    torch.nn.init.constant_(model.weight, value)
    assert "100%" in lost_steps(model, 2**-17 * 0.99)
    assert not lost_steps(model, 2**-15) and not lost_steps(model, 0.0) and not lost_steps(model.float(), 2**-17)
    assert not lost_steps(model.to(getattr(torch, dtype)).requires_grad_(False), 2**-18)  # beside adapters


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_training_whose_steps_are_lost_says_so(optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    data = groups_of(model, 4)
    args = {"learning_rate": 1e-6, "max_steps": 1, "optim": optim}
    make_trainer(tmp_path, LossArguments(loss="sft"), model=model.bfloat16(), data=data, args=args).train()
    assert ("the optimizer changes weights in bfloat16" in caplog.text) == (optim == "adamw_torch")


@pytest.mark.parametrize(
    ("optim", "asked", "warns"),
    [
        ("lion_32bit", None, True),
        ("adamw_anyprecision", None, True),  # without Kahan's sum, the default of transformers
        ("adamw_anyprecision", "use_kahan_summation=True", False),
        ("adamw_anyprecision", "use_kahan_summation=False", True),
        ("adamw_torch_8bit", "bf16_stochastic_round=True", False),
        ("stable_adamw", None, False),  # which makes up for it by itself
        ("ademamix", None, True),
        ("adafactor", None, True),
        ("schedule_free_sgd", None, False),
    ],
)
def test_the_optimizers_that_lose_small_steps(
    optim: str, asked: str | None, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(str(tmp_path), optim=optim, optim_args=asked, learning_rate=1e-6, use_cpu=True)
    SoundWeights(GuardArguments()).on_train_begin(args, TrainerState(), TrainerControl(), model=tiny_model().bfloat16())
    assert ("the optimizer changes weights in bfloat16" in caplog.text) == warns


# --- nothing to learn -------------------------------------------------------------------------------------------------


def test_idle_steps() -> None:
    steps = logged(loss=[1.0] * 5, kept=[0.5, 0, 0, 1, 0], no_gradient=[0.0, 0, 1, 0, 0.5])
    assert [idle_steps(steps[:n], True) for n in range(6)] == [0, 0, 1, 2, 0, 1]
    assert [idle_steps(steps[:n], False) for n in range(6)] == [
        0,
        0,
        0,
        1,
        0,
        0,
    ]  # a file's weights may be 0 on purpose
    (every_tenth,) = logged(loss=[1.0], truncated=[0.75], flawed=[0.25], kept=[1.0])
    assert idle_steps([{**every_tenth, "step": 10}], True) == 10


def test_a_run_with_nothing_to_learn_says_so_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    made = groups_of(model, 8)

    def dropped(batch: list[Example]) -> list[Group]:
        groups = copy.deepcopy(made[: len(batch)])
        for group in groups:
            group.kept = False
            for member in group.members:
                member.weight = 0.0
        return groups

    trainer = make_trainer(
        tmp_path,
        LossArguments(),  # its supervised term still has a gradient
        guard=GuardArguments(stop_idle=4),
        model=model,
        data=examples(8),
        make_groups=dropped,
        args={"max_steps": 20},
    )
    with caplog.at_level(logging.WARNING, logger="gem.guard"):
        trainer.train()
    assert trainer.stopped.startswith(
        "stopped after step 4 of 20: 4 steps in a row had nothing to learn from: no group is"
    )
    assert trainer.diverged
    assert caplog.text.count("2 steps in a row had nothing to learn from") == 1
    assert "the run stops after 4" in caplog.text


def test_a_dead_model_stops(tmp_path: Path) -> None:
    model = tiny_model()
    data = groups_of(model, 8)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are 0
    for p in model.parameters():
        p.requires_grad_(p is model.model.layers[0].mlp.up_proj.weight)
    trainer = make_trainer(
        tmp_path, LossArguments(), guard=GuardArguments(stop_idle=3), model=model, data=data, args={"max_steps": 9}
    )
    trainer.train()
    assert trainer.stopped == "stopped after step 3 of 9: 3 steps in a row had nothing to learn from: the gradient is 0"
