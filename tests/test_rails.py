"""The verdict of each guard rail, from the log of a training and its settings alone, and where it can be read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run, write_files
from test_trainer import examples, groups_of, make_trainer, tiny_model

from gem.config import GuardArguments, LossArguments
from gem.rails import Verdict, as_metrics, explosion, has_fallen, idle_steps, verdicts, write_rails
from gem.results import load_run
from gem.stops import Diverged


def named(history: list[dict[str, float]], guard: GuardArguments | None = None, **more: Any) -> dict[str, Verdict]:
    return {verdict.rail: verdict for verdict in verdicts(history, guard or GuardArguments(), **more)}


def logged(**columns: list[float]) -> list[dict[str, float]]:
    rows = zip(*columns.values(), strict=True)
    return [{"step": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, 1)]


def evaluated(**columns: list[float]) -> list[dict[str, float]]:
    rows = zip(*columns.values(), strict=True)
    return [{"step": 10 * i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)]


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "more", "verdict", "worst", "said"),
    [
        ([{"step": 0, "eval_auroc": 0.72}], {}, "passed", 0.72, "S orders 0.72 of the pairs rightly, at least 0.55"),
        ([{"step": 0, "eval_auroc": 0.4}], {}, "fired", 0.4, "before the first step: S orders 0.40 of the pairs"),
        ([{"step": 10, "eval_auroc": 0.4}], {}, "not watched", None, "nothing was evaluated before step 1"),
        ([{"step": 0, "eval_preference_sum": 1}], {}, "not watched", None, "the evaluation before step 1 has no AUROC"),
        ([], {"pairs": 0.6}, "passed", 0.6, "S orders 0.60"),
        ([{"step": 0, "eval_auroc": 0.9}], {"pairs": 0.5}, "fired", 0.5, "S orders 0.50"),
        ([], {"pairs": 0.5, "number": 10}, "fired", 0.5, "S orders 0.50 of 10 human pairs rightly, below auroc_gate=0.55"),
        ([], {"pairs": 0.6, "number": 10}, "passed", 0.6, "S orders 0.60 of 10 human pairs rightly, at least 0.55"),
        ([], {"pairs": 0.5, "number": 9}, "not watched", None,
         "S orders 0.50 of 9 human pairs rightly (fewer than 10 pairs are too few to tell)"),
        ([], {"pairs": 1.0, "number": 1}, "not watched", None, "S orders 1.00 of 1 human pair rightly (fewer"),
        ([{"step": 0, "eval_auroc": 0.9}], {"pairs": 0.5, "number": 9}, "passed", 0.9, "S orders 0.90 of the pairs"),
    ],
)  # fmt: skip
def test_the_gate(history: Any, more: Any, verdict: str, worst: float | None, said: str) -> None:
    found = named(history, **more)["auroc_gate"]
    assert (found.verdict, found.worst) == (verdict, worst) and said in found.said
    assert named(history, GuardArguments(auroc_gate=0.0), **more)["auroc_gate"].verdict == "off"


@pytest.mark.parametrize(
    ("values", "verdict", "worst", "said"),
    [
        ([0.5, 0.6, 0.7], "passed", 0.0, "no fall lasted 2 evaluations; limit 0.05"),
        ([0.6, 0.57, 0.58, 0.7], "passed", 0.02, "largest lasting fall 0.020, of eval_accuracy_sampled; limit 0.05"),
        ([0.6, 0.7, 0.5, 0.4], "fired", 0.2,
         "step 30: eval_accuracy_sampled fell to 0.400, and has been 0.200 below its best for 2 evaluations"),
        ([0.6, 0.1], "not watched", None, "2 evaluations are too few for stop_patience=2"),
        ([], "not watched", None, "nothing was evaluated (eval_strategy)"),
    ],
)  # fmt: skip
def test_a_collapse(values: list[float], verdict: str, worst: float | None, said: str) -> None:
    history = evaluated(eval_accuracy_sampled=values)
    found = named(history, GuardArguments(stop_patience=2))["collapse"]
    assert found.verdict == verdict and found.said == said
    assert found.worst == (pytest.approx(worst) if worst is not None else None)
    assert named(history, GuardArguments(stop_patience=0))["collapse"].verdict == "off"
    pairs_alone = evaluated(eval_preference_sum=values or [0.5])
    assert named(pairs_alone)["collapse"].said == "no answers were sampled (eval_samples)"


def test_the_worse_of_two_numbers_counts() -> None:
    history = evaluated(eval_accuracy_sampled=[0.5, 0.47, 0.47], eval_auroc=[0.9, 0.8, 0.8])
    found = named(history, GuardArguments(stop_patience=2))["collapse"]
    assert found.verdict == "fired" and "eval_auroc fell to 0.800" in found.said


def test_an_explosion() -> None:
    start = logged(loss=[1.0] * 12, grad_norm=[2.0] * 12)
    assert named(start)["explosion"] == Verdict(
        "explosion", "not watched", "12 logged steps are too few: it needs 10 and 3 more"
    )
    grown = logged(loss=[1.0] * 14, grad_norm=[2.0] * 11 + [8.0, 9.0, 7.0])
    said = "grad_norm at most 3.5 times its level at the start for 3 logged steps; limit 50"
    assert named(grown)["explosion"] == Verdict("explosion", "passed", said, 3.5, 50.0)
    fired = named(grown, GuardArguments(stop_growth=3.0))["explosion"]
    assert fired.verdict == "fired" and fired.said.startswith("step 14: grad_norm has been above 6 for 3 logged steps")
    assert named(grown, GuardArguments(stop_growth=0.0))["explosion"].verdict == "off"
    worse_than_guessing = logged(loss=[3.0, 9.0, 9.0, 9.0])
    assert named(worse_than_guessing, guessing=2.8)["explosion"].verdict == "fired"


def test_a_leap_and_a_number_that_is_not_finite() -> None:
    steps = logged(loss=[1.0] * 3, weight_growth=[1.01, 1.5, 1.02])
    assert named(steps)["leap"].said == "the norm of the weights grew 1.5 times at most, in step 2; limit 10"
    found = named(steps, error=Diverged("step 4: the norm", "leap"))
    assert (found["leap"].verdict, found["leap"].said, found["finite"].verdict) == (
        "fired",
        "step 4: the norm",
        "passed",
    )
    found = named(steps, error=Diverged("step 4: the loss is nan"))
    assert (found["leap"].verdict, found["finite"].verdict, found["finite"].said) == (
        "passed", "fired", "step 4: the loss is nan",
    )  # fmt: skip
    assert named(steps, GuardArguments(stop_growth=0.0))["leap"].verdict == "off"
    assert named([])["leap"].verdict == named([])["idle"].verdict == "not watched"


def test_nothing_to_learn() -> None:
    steps = logged(loss=[1.0] * 6, kept=[1.0, 0, 0, 0, 1, 0])
    found = named(steps, online=True)["idle"]
    assert (found.verdict, found.worst) == ("passed", 3)
    found = named(steps, GuardArguments(stop_idle=3), online=True)["idle"]
    assert found.verdict == "fired" and found.said.startswith(
        "step 4: 3 steps in a row had nothing to learn from: no group"
    )
    assert named(steps)["idle"].said == "no step had nothing to learn from; limit 20"
    assert named(steps, GuardArguments(stop_idle=0))["idle"].verdict == "off"


def test_the_gap_of_the_sampler() -> None:
    steps = logged(loss=[1.0] * 3, sampler_gap=[0.01, 0.09, 0.02])
    assert named(steps)["sampler_gap"].verdict == "passed"
    found = named(logged(loss=[1.0], sampler_gap=[0.11]))["sampler_gap"]
    assert (found.verdict, found.worst, found.limit) == ("fired", 0.11, 0.1)
    assert named([])["sampler_gap"].said == "nothing was sampled in training"
    assert named([], online=True)["sampler_gap"].said == "no step was logged"
    said = "no log-probs of a sampler and the policy were there to compare"
    assert named(logged(loss=[1.0]), online=True)["sampler_gap"].said == said
    found = named(logged(loss=[1.0], sampler_gap=[0.06], sampler_gap_max=[0.5]))["sampler_gap"]
    assert (found.verdict, found.worst) == ("fired", 0.5)  # what was warned of, not the mean of eight steps


# --- the verdict is what the guard does -------------------------------------------------------------------------------


STRICT = GuardArguments(stop_growth=2.0, stop_idle=3, stop_patience=2)
STOPS: dict[str, Callable[[list[dict[str, float]]], bool]] = {
    "collapse": lambda log: has_fallen([entry["eval_auroc"] for entry in log], STRICT),
    "explosion": lambda log: bool(explosion(log, STRICT)),
    "idle": lambda log: idle_steps(log, True) >= STRICT.stop_idle,
}


@pytest.mark.parametrize("rail", STOPS)
def test_a_rail_has_fired_where_the_guard_stops(rail: str) -> None:
    """On random logs, cut where the guard stops a run."""
    rng, fired = random.Random(0), 0
    for _ in range(300):
        n = rng.randint(1, 40)
        log = logged(
            loss=[rng.choice([0.5, 1.0] if i < 14 else [0.5, 3.0, -3.0, 5.0]) for i in range(n)],
            grad_norm=[rng.choice([0.1, 0.2, 0.3, math.inf]) for _ in range(n)],
            kept=[rng.choice([0.0, 1.0, 1.0]) for _ in range(n)],
            eval_auroc=[rng.choice([0.5, 0.56, 0.58, 0.62]) for _ in range(n)],
        )
        end = next((i for i in range(1, n + 1) if STOPS[rail](log[:i])), 0)
        found = named(log[: end or n], STRICT, online=True)[rail]
        assert (found.verdict == "fired") == bool(end), found
        if found.worst is not None and found.limit is not None:
            assert (found.worst >= found.limit if rail == "idle" else found.worst > found.limit) == bool(end), found
        fired += bool(end)
    assert 30 < fired < 270, fired


# --- where they are read ----------------------------------------------------------------------------------------------


def test_metrics_and_file(tmp_path: Path) -> None:
    found = [Verdict("a", "passed", "well", 1.0, 2.0), Verdict("b", "fired", "ill"), Verdict("c", "off", "b=0"),
             Verdict("d", "not watched", "why")]  # fmt: skip
    assert as_metrics(found) == {"rail_a": 1.0, "rail_b": 0.0}
    write_rails(tmp_path, found)
    (tmp_path / "metrics.json").write_text("{}")
    assert load_run(tmp_path).rails[1] == {"rail": "b", "verdict": "fired", "said": "ill"}
    assert json.loads((tmp_path / "rails.json").read_text())["rails"][0]["limit"] == 2.0
    (tmp_path / "rails.json").write_text('{"rails": [{"rail": "b"}]}')
    with pytest.raises(
        ValueError, match=r'rails\.json: expected "rails" to be a list of objects with rail, verdict, said'
    ):
        load_run(tmp_path)


def test_of_a_trainer(tmp_path: Path) -> None:
    model = tiny_model()
    data = groups_of(model, 10)
    for group in data:
        group.members[1].score, group.members[2].score = 1.0, 2.0
    trainer = make_trainer(tmp_path, LossArguments(), model=model, data=data)
    trainer.train()
    found = {verdict.rail: verdict for verdict in trainer.verdicts()}
    assert list(found) == ["auroc_gate", "collapse", "explosion", "leap", "idle", "finite", "sampler_gap"]
    assert (found["auroc_gate"].verdict, found["auroc_gate"].worst) == ("fired", 0.0)
    assert found["leap"].verdict == "passed" and 0.9 < float(found["leap"].worst or 0) < 1.1
    growths = [entry["weight_growth"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(growths) == 4 and math.prod(growths) == pytest.approx(1, abs=0.1)


def test_the_evaluation_after_a_training_stops_nothing(tmp_path: Path) -> None:
    values = iter([0.9, 0.8, 0.1, 0.1])
    trainer = make_trainer(
        tmp_path,
        LossArguments(),
        guard=GuardArguments(stop_patience=2, stop_margin=0.2),
        evaluation=lambda model: {"accuracy_sampled": next(values)},
        args={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    )
    trainer.train()  # it evaluates at the steps 0, 3 and 4
    assert trainer.evaluate()["eval_accuracy_sampled"] == 0.1 and not trainer.stopped


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


SFT = ("sft", "--config", "sft.yaml", "--save_steps", "1", "--save_total_limit", "9")


def test_a_run_that_stopped_itself_can_be_reported(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its first step: nothing is saved but the log and the verdicts, and the folder is free for other settings."""
    pytest.importorskip("matplotlib")
    for rate in ("10", "20"):
        status, _, err = run(capsys, *SFT, "--learning_rate", rate)
        assert status == 3 and "made the norm of the weights" in err and "no checkpoint was written" in err
        assert {p.name for p in Path("sft").iterdir()} == {"run.json", "rails.json", "trainer_state.json"}
        assert json.loads(Path("sft/run.json").read_text())["settings"]["learning_rate"] == float(rate)
    status, out, _ = run(capsys, "report", "sft")
    assert status == 0 and "guard rails hit" in out and out.splitlines()[2].split() == ["sft", "1", "leap"]
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<h2>Guard rails</h2>" in page and "✗ fired" in page and "lower it" in page
    assert run(capsys, *SFT)[0] == 0  # other settings, the same folder
    assert {v["rail"]: v["verdict"] for v in load_run(Path("sft")).rails}["leap"] == "passed"
    metrics = json.loads(Path("sft/metrics.json").read_text())
    assert metrics["rail_leap"] == metrics["rail_finite"] == 1.0 and "rail_collapse" not in metrics


def test_a_number_that_is_not_finite_leaves_a_log(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gem.trainer import GEMTrainer

    own = GEMTrainer.training_step

    def training_step(self: GEMTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            self.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)  # type: ignore[union-attr, operator]
        return own(self, *args, **kwargs)

    monkeypatch.setattr(GEMTrainer, "training_step", training_step)
    assert run(capsys, *SFT)[0] == 3
    stopped = load_run(Path("sft"))
    assert [entry["step"] for entry in stopped.history] == [1, 2]
    fired = [verdict for verdict in stopped.rails if verdict["verdict"] == "fired"]
    assert [verdict["rail"] for verdict in fired] == ["finite"] and fired[0]["said"].startswith("step 3: the gradient")
    assert Path("sft/checkpoint-2/manifest.json").exists() and not Path("sft/metrics.json").exists()
    monkeypatch.setattr(GEMTrainer, "training_step", own)
    assert run(capsys, *SFT)[0] == 0  # it goes on from checkpoint-2
    assert "fired" not in {verdict["verdict"] for verdict in load_run(Path("sft")).rails}
    torch.manual_seed(0)


def test_a_full_disk_does_not_hide_why_a_run_stopped(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gem.runs.write_rails", full)
    status, _, err = run(capsys, *SFT, "--learning_rate", "10")
    assert status == 3 and "made the norm of the weights" in err
    assert not Path("sft").exists()


def test_online_examples_have_no_pairs_to_judge_by(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LossArguments(), data=examples(4), make_groups=lambda batch: [])
    assert trainer.verdicts()[0].verdict == "not watched"
