"""`gem-kernels evidence`: its config, the order of the runs, what a kill, an error and a divergence leave, and the page."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from evidence_fakes import fake_runner, result_of, sight
from test_cli import refused, run

from gem.data import Example
from gem.evidence import harness
from gem.evidence import run as evidence_run
from gem.evidence.config import Config, read_config
from gem.evidence.harness import (
    LOCK_FILE,
    checked_records,
    duration,
    gpus_of,
    make_runs,
    status_table,
    worker_count,
)
from gem.evidence.page import (
    write_page,
)
from gem.evidence.plan import Cell, Job, Plan, Record, read_records, slug
from gem.evidence.run import METHODS, Runner, Start, changed, curve_of, plain, settings_of, uses_score
from gem.evidence.workers import VISIBLE, cores, processes
from gem.lock import locked
from gem.methods import Trained
from gem.stops import Diverged
from gem.tasks import TASKS, build_model, build_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "configs" / "evidence.yaml"
SMALL = {
    "seeds": [0, 1],
    "rates": [1e-5, 2e-5],
    "sweep": {"pairs": 16, "seeds": [0]},
    "studies": [{"tasks": ["chain"], "methods": ["SFT", "GEM"], "pairs": [4, 16]}],
}


def config_of(folder: Path, **changes: Any) -> Config:
    """Return the config of a file in the folder: SMALL with changes, records in folder/out."""
    path = folder / "evidence.yaml"
    content = {"output_dir": str(folder / "out"), **SMALL, **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return read_config(path, METHODS, TASKS)


class Fake:
    """A pool that makes one run at once in this process: the accuracy is that of `reached`, or `fails` ends it."""

    def __init__(self, fails: Callable[[Job], BaseException | None] = lambda job: None) -> None:
        self.fails, self.made, self.free = fails, [], 1

    def __call__(self, *_: Any) -> Any:
        @contextmanager
        def pool() -> Iterator[Fake]:
            yield self

        return pool()

    def begin(self, job: Job) -> None:
        self.job, self.free = job, 0

    def ended(self) -> list[Any]:
        self.free = 1
        self.made.append(self.job)
        error = self.fails(self.job)
        if isinstance(error, Diverged):
            return [(self.job, result_of(self.job, outcome="diverged", message=str(error)), "")]
        if isinstance(error, Exception):
            return [(self.job, None, str(error))]
        if error is not None:
            raise error
        return [(self.job, result_of(self.job), "")]


def records_of(
    plan: Plan, edit: Callable[[Job, Record], Record | None] = lambda job, record: record
) -> dict[Job, Record]:
    """Return the records of a finished comparison, without those for which `edit` gives None."""
    records: dict[Job, Record] = {}
    while ready := plan.ready(records):
        for job in ready:
            about = {**vars(job), "settings": plain(settings_of(plan.config, job))}
            records[job] = {**about, **(edit(job, result_of(job)) or {"gone": True})}
    return {job: record for job, record in records.items() if "gone" not in record}


# --- the config -------------------------------------------------------------------------------------------------------


def test_the_example_is_read() -> None:
    config = read_config(EXAMPLE, METHODS, ["chain", "misleading", "long"])
    named = {method for study in config.studies for method in study.methods}
    assert named == set(METHODS) and config.rates == (5e-6, 1e-5, 2e-5, 5e-5)
    assert config.sweep_pairs == 16 and config.sweep_seeds == (0,) and set(config.plot) < named


@pytest.mark.parametrize("name", ["evidence-edges", "evidence-many-pairs"])
def test_the_examples_beside_it_are_read(name: str) -> None:
    """They have its budget and seeds among its own, so that their runs may be compared with its runs."""
    config = read_config(EXAMPLE.with_stem(name), METHODS, ["chain", "misleading", "long"])
    whole = read_config(EXAMPLE, METHODS, ["chain", "misleading", "long"])
    assert (config.budget, config.eval_samples) == (whole.budget, whole.eval_samples)
    assert set(config.seeds) <= set(whole.seeds) and config.output_dir != whole.output_dir


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    config = read_config(tmp_path / "own.yaml", METHODS, TASKS)
    assert config.tasks["gsm8k"].model.lora_rank == 16 and config.tasks["gsm8k"].prompts == "prompts.jsonl"


def test_what_a_config_need_not_say(tmp_path: Path) -> None:
    config = config_of(tmp_path, seeds=None, sweep=None, rates=["1e-5", 2])
    assert config.seeds == (0, 1, 2, 3, 4) and config.sweep_seeds == (0,) and config.sweep_pairs == 16
    assert config.rates == (1e-5, 2.0) and config.budget == {} and config.eval_samples == 8


OWN = {"model": "m", "pairs": "p.jsonl", "validation": "v.jsonl", "test": "t.jsonl"}
STUDY = {"tasks": ["chain"], "methods": ["GEM"], "pairs": [4]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stuidies": []}, "config must hold output_dir, studies, rates, seeds, .* alone, got stuidies"),
    ({"rates": None}, "config must hold output_dir, studies, rates, got no rates"),
    ({"rates": []}, "rates must be a list of different numbers > 0"),
    ({"rates": [1e-5, 1e-5]}, "rates must be a list of different numbers > 0"),
    ({"rates": [0]}, "rates must be a list of different numbers > 0"),
    ({"rates": ["fast"]}, "rates must be a list of different numbers > 0"),
    ({"rates": 1e-5}, "rates must be a list of different numbers > 0, got 1e-05"),
    ({"seeds": [0, 0]}, "seeds must be a list of different integers, got"),
    ({"seeds": [-1]}, "seeds must be an integer >= 0, got -1"),
    ({"seeds": 3}, "seeds must be a list of different integers, got 3"),
    ({"workers": 0}, "workers must be an integer >= 1, got 0"),
    ({"eval_samples": 0}, "eval_samples must be an integer >= 1, got 0"),
    ({"sweep": {"pair": 4}}, "sweep must hold pairs, seeds alone, got pair"),
    ({"sweep": {"pairs": True}}, "sweep.pairs must be an integer >= 1, got True"),
    ({"budget": {"group_size": 1}}, "budget.group_size must be an integer >= 2, got 1"),
    ({"budget": {"unlabeled_share": 0}}, "budget.unlabeled_share must be in \\(0, 1\\], got 0"),
    ({"budget": [80]}, "budget must be a mapping of names to values, got \\[80\\]"),
    ({"studies": []}, "studies must be a list of one or more studies, got \\[\\]"),
    ({"studies": [{**STUDY, "pairs": [0]}]}, "studies\\[0\\].pairs must be an integer >= 1, got 0"),
    ({"studies": [STUDY, {**STUDY, "methods": ["GEN"]}]}, "studies\\[1\\].methods must be of SFT, .*, got GEN"),
    ({"studies": [{**STUDY, "methods": ["GEM", "GEM"]}]}, "studies\\[0\\].methods must hold each name once"),
    ({"studies": [{**STUDY, "tasks": ["gsm8k"]}]}, "studies\\[0\\].tasks must be of chain.*, got gsm8k"),
    ({"studies": [{**STUDY, "ablations": 1}]}, "studies\\[0\\].ablations must be true or false, got 1"),
    ({"studies": [{"tasks": ["chain"], "pairs": [4]}]}, "studies\\[0\\] must hold .*, got no methods"),
    ({"plot": ["DPO"]}, "plot must be of SFT, GEM, got DPO"),
    ({"device": 1}, "device must be a text, got 1"),
    ({"tasks": {"chain": OWN}}, "tasks must have names of letters, digits, _ . - other than chain.*, got 'chain'"),
    ({"tasks": {"a/b": OWN}}, "tasks must have names of letters.*, got 'a/b'"),
    ({"tasks": {"own": {"model": "m"}}}, "tasks.own must hold model, pairs, validation, test, got no pairs, valid"),
    ({"tasks": {"own": {**OWN, "data": "x"}}}, "tasks.own must hold .* alone, got data"),
    ({"tasks": {"own": {**OWN, "terms": 5}}}, "tasks.own must hold .* alone, got terms"),
    ({"tasks": {"own": {**OWN, "dtype": "fp8"}}}, "tasks.own.dtype must be one of float32, .*, got 'fp8'"),
    ({"tasks": {"own": {**OWN, "max_length": "2k"}}}, "tasks.own.max_length must be of type int, got '2k'"),
    ({"tasks": {"own": {**OWN, "max_new_tokens": 0}}}, "tasks.own.max_new_tokens must be an integer >= 1, got 0"),
    ({"tasks": {"own": {**OWN, "pairs": 4}}}, "tasks.own.pairs must be a text, got 4"),
    ({"tasks": {"own": {**OWN, "micro_batch": 0}}}, "tasks.own.micro_batch must be an integer >= 1, got 0"),
    (
        {"tasks": {"own": {**OWN, "gradient_checkpointing": 1}}},
        "tasks.own.gradient_checkpointing must be true or false",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_config_names_the_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config_of(tmp_path, **changes)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("output_dir: out\nrates: [1.0e-5]\nsweep: {pairs: 4, pairs: 16}\nstudies: []\n")
    with pytest.raises(ValueError, match="config must hold each key once, got pairs several times in"):
        read_config(path, METHODS, TASKS)
    with pytest.raises(ValueError, match="config must be an existing yaml file, got "):
        read_config(tmp_path / "none.yaml", METHODS, TASKS)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="config must be yaml, got "):
        read_config(path, METHODS, TASKS)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_starts_come_first_then_the_sweep_then_the_studies(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path))
    records: dict[Job, Record] = {}
    assert plan.ready(records) == [Job("chain", 0), Job("chain", 1)]
    records[Job("chain", 0)] = result_of(Job("chain", 0))
    sweeps = [Job("chain", 0, method, 16, rate) for method in ("SFT", "GEM") for rate in (1e-5, 2e-5)]
    assert plan.ready(records) == [Job("chain", 1), *sweeps]
    records |= {job: result_of(job) for job in sweeps[:2]}  # SFT's rate is chosen, GEM's is not; seed 1 has no start
    assert plan.ready(records) == [Job("chain", 1), *sweeps[2:], Job("chain", 0, "SFT", 4, 2e-5)]
    # 2 starts, 4 runs of the sweep, and of 8 cells those 6 that are not one of these
    assert plan.total == 12 and len(records_of(plan)) == 12


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({1e-5: 0.4, 2e-5: 0.5}, 2e-5),
        ({1e-5: 0.5, 2e-5: 0.5}, 1e-5),
        ({1e-5: 0.1, 2e-5: None}, 1e-5),
        ({1e-5: None, 2e-5: None}, 1e-5),
    ],
)
def test_the_rate_is_the_best_of_the_sweep(
    accuracies: dict[float, float | None], chosen: float, tmp_path: Path
) -> None:
    """Of equal ones, the lowest; one that diverged (None) has no accuracy at all."""
    plan = Plan(config_of(tmp_path))
    records = {
        job: result_of(job, outcome="diverged") if (a := accuracies[job.rate]) is None
        else {**result_of(job), "validation": {"accuracy_sampled": a}}
        for job in plan.sweep("chain", "GEM")
    }  # fmt: skip
    assert plan.rate("chain", "GEM", records) == chosen
    assert plan.rate("chain", "SFT", records) is None


def test_the_rate_is_that_of_the_mean_over_the_seeds_of_the_sweep(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path, sweep={"pairs": 4, "seeds": [7, 8]}))
    found = {(7, 1e-5): 0.9, (8, 1e-5): 0.1, (7, 2e-5): 0.6, (8, 2e-5): 0.6}
    jobs = plan.sweep("chain", "GEM")
    records = {job: {"validation": {"accuracy_sampled": found[job.seed, job.rate]}} for job in jobs}
    assert plan.rate("chain", "GEM", records) == 2e-5 and Job("chain", 8) in plan.starts


def test_one_rate_needs_no_sweep(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path, rates=[3e-5]))
    assert plan.sweeps == [] and plan.rate("chain", "GEM", {}) == 3e-5 and plan.total == 2 + 8


def test_only_keeps_what_matching_cells_need(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path), only=["chain/gem/4/1"])
    assert plan.cells == [Cell("chain", "GEM", 4, 1)]
    assert plan.starts == [Job("chain", 0), Job("chain", 1)]
    assert plan.sweeps == [Job("chain", 0, "GEM", 16, rate) for rate in (1e-5, 2e-5)]
    with pytest.raises(ValueError, match="only must match .*, such as chain/sft/4/0, got 'chain/dpo/"):
        Plan(config_of(tmp_path), only=["chain/dpo/*"])


def test_a_run_of_two_studies_is_one(tmp_path: Path) -> None:
    study = SMALL["studies"][0]
    assert Plan(config_of(tmp_path, studies=[study, {**study, "ablations": True}])).total == 12


def test_own_tasks_have_one_start(tmp_path: Path) -> None:
    config = config_of(tmp_path, tasks={"own": OWN}, studies=[{**STUDY, "tasks": ["own", "chain"]}])
    assert Plan(config).starts == [Job("own", 0), Job("chain", 0), Job("chain", 1)]


def test_names_in_paths() -> None:
    assert slug("DPO + SFT") == "dpo-sft" and slug("reward model + RLOO") == "reward-model-rloo"
    assert len({slug(method) for method in METHODS}) == len(METHODS)
    assert str(Job("chain", 3, "DPO + SFT", 16, 2e-5)) == "chain/dpo-sft/pairs16-seed3-rate2e-05"
    assert Job("chain", 3).path == Path("starts/chain/seed3.json")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_each_run_is_made_once_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, pool = Plan(config_of(tmp_path)), Fake()
    make_runs(plan, "the command", pool)
    assert len(pool.made) == len(set(pool.made)) == 12
    first, *out = capsys.readouterr().out.splitlines()
    assert first.startswith("0 of 12 runs are done; ") and first.endswith(
        f" at a time, whose output is in {tmp_path / 'out'}/worker*.log"
    )
    assert out[0] == "1 of 12  starts/chain/seed0: greedy 0.600, sampled 0.500; 10 s"
    assert out[2].startswith("3 of 12  chain/sft/pairs16-seed0-rate1e-05: greedy 0.700, sampled 0.600; 10 s; about ")
    assert out[-1] == f"12 of 12 runs are in {tmp_path / 'out'}"
    record = json.loads((tmp_path / "out/runs/chain/gem/pairs4-seed1-rate2e-05.json").read_text())
    assert record["command"] == "the command" and record["outcome"] == "finished" and record["rate"] == 2e-5
    assert record["settings"]["task"]["summary"] == ""
    assert record["settings"]["method"]["rank"]["tau"] == METHODS["GEM"].rank.tau
    again = Fake()
    make_runs(plan, "", again)
    assert again.made == [] and not list((tmp_path / "out").rglob("*.part"))


def test_a_start_whose_answers_are_cut_off_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Short(Fake):
        def ended(self) -> list[Any]:
            ((job, record, error),) = super().ended()
            return [(job, {**record, "test": {**record["test"], "truncated": 0.9 - 0.8 * job.seed}}, error)]

    make_runs(Plan(config_of(tmp_path, studies=[{**STUDY, "methods": ["SFT"]}])), "", Short())
    told = [line for line in capsys.readouterr().out.splitlines() if "cut off" in line]
    assert len(told) == 1 and "starts/chain/seed0" in told[0]
    assert told[0].endswith("; 90% of its answers are cut off: raise max_new_tokens")


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_a_kill_loses_the_run_in_progress_alone(after: int, tmp_path: Path) -> None:
    plan, killed, pool = Plan(config_of(tmp_path)), Fake(), Fake()
    killed.fails = lambda job: KeyboardInterrupt() if len(killed.made) > after else None
    with pytest.raises(KeyboardInterrupt):
        make_runs(plan, "", killed)
    make_runs(plan, "", pool)
    assert killed.made[:-1] + pool.made == list(dict.fromkeys(killed.made[:-1] + pool.made))
    assert killed.made[-1] == pool.made[0] and len(read_records(tmp_path / "out")) == 12


def test_an_error_ends_nothing_else_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(config_of(tmp_path))
    broken = Fake(lambda job: OSError("no such thing") if job.method == "SFT" and job.rate == 1e-5 else None)
    with pytest.raises(ValueError, match="^1 runs failed, .* again: chain/sft/pairs16-seed0-rate1e-05: no such thing$"):
        make_runs(plan, "", broken)
    assert len(broken.made) == 2 + 4 + 3  # all but the cells of SFT, whose rate is not known
    assert "failed: chain/sft/pairs16-seed0-rate1e-05: no such thing\n" in capsys.readouterr().out
    pool = Fake()
    make_runs(plan, "", pool)
    assert len(pool.made) == 1 + 3


def test_without_a_start_nothing_is_run_from_it(tmp_path: Path) -> None:
    broken = Fake(lambda job: ValueError("no start") if job == Job("chain", 0) else None)
    with pytest.raises(ValueError, match="1 runs failed"):
        make_runs(Plan(config_of(tmp_path)), "", broken)
    assert broken.made == [Job("chain", 0), Job("chain", 1)]


def test_a_divergence_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, again = Plan(config_of(tmp_path)), Fake()
    make_runs(plan, "", Fake(lambda job: Diverged("loss is nan at step 3") if job.rate == 2e-5 else None))
    assert "loss is nan at step 3; 10 s" in capsys.readouterr().out
    make_runs(plan, "", again)
    assert again.made == [] and plan.rate("chain", "GEM", read_records(tmp_path / "out")) == 1e-5


def test_one_harness_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "out" / LOCK_FILE, "output_dir"), pytest.raises(ValueError, match="output_dir is in use by"):
        make_runs(Plan(config_of(tmp_path)), "", Fake())


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    make_runs(Plan(config_of(tmp_path)), "", Fake())
    with pytest.raises(ValueError, match="of the same settings, got .*pairs16.* with another budget.steps: remove"):
        make_runs(Plan(config_of(tmp_path, budget={"steps": 81})), "", Fake())
    with pytest.raises(ValueError, match="with another eval_samples"):
        checked_records(Plan(config_of(tmp_path, eval_samples=4)))
    # what the plan does not use may lie there
    other = {**SMALL["studies"][0], "methods": ["DPO"]}
    make_runs(Plan(config_of(tmp_path, budget={"steps": 81}, studies=[other])), "", Fake())


@pytest.mark.parametrize(
    ("start", "refused"), [({"model": "new", "data": "d"}, False), ({"model": "chain1", "data": "new"}, True)]
)
def test_a_built_in_start_is_known_by_its_data(start: dict[str, str], refused: bool, tmp_path: Path) -> None:
    """Another machine trains it to other bits, and goes on with the runs all the same."""
    plan = Plan(config_of(tmp_path))
    make_runs(plan, "", Fake())
    path = tmp_path / "out" / "starts/chain/seed1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "start": start}))
    if not refused:
        assert not plan.missing(checked_records(plan))
        return
    with pytest.raises(ValueError, match="seed1.* with another the start"):
        checked_records(plan)


def test_a_start_of_the_user_is_known_by_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("settings_of", "changed"):  # the files of the task are not there
        monkeypatch.setattr(harness, name, lambda *_: [])
    plan = Plan(config_of(tmp_path, tasks={"own": OWN}, studies=[{**STUDY, "tasks": ["own"]}]))
    make_runs(plan, "", Fake())
    path = tmp_path / "out" / "starts/own/seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "start": {"model": "new", "data": "d"}}))
    with pytest.raises(ValueError, match="with another the start"):
        checked_records(plan)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs/chain/gem/pairs4-seed0-rate1e-05.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected the record of a run, got one without 'task'"):
        read_records(tmp_path)
    path.write_text(json.dumps(vars(Job("chain", 1, "GEM", 4, 1e-5))))
    with pytest.raises(ValueError, match="expected the record of this run, got that of chain/gem/pairs4-seed1"):
        read_records(tmp_path)


@dataclass
class Inner:
    a: int = 1
    b: list[int] = field(default_factory=lambda: [2])


@dataclass
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)


def test_what_has_changed() -> None:
    now = {"outer": Outer("x"), "n": 3}
    assert changed(plain(now), now) == []
    assert changed(plain({"outer": Outer("y", Inner(a=5)), "n": 4}), now) == ["outer.name", "outer.inner.a", "n"]
    # newer settings: at their defaults nothing has changed, else something has
    assert changed({"outer": {"name": "x", "inner": {"a": 1}}, "n": 3}, now) == []
    assert changed({"outer": {"name": "x"}, "n": 3}, {"outer": Outer("x", Inner(b=[7])), "n": 3}) == ["outer.inner.b"]
    assert changed({"outer": {"name": "x", "old": 1}, "n": 3}, now) == ["outer.old"]


def test_what_is_missing_and_how_long_it_takes(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path, workers=2))
    records = records_of(plan, lambda job, r: {**r, "seconds": 60.0 if job.method == "GEM" else 20.0})
    del records[Job("chain", 1, "GEM", 16, 2e-5)], records[Job("chain", 1, "SFT", 4, 2e-5)]
    assert plan.seconds_left(records) == 80
    table, line = status_table(plan, records)
    assert table.rows == [
        ["chain/start", "2 of 2", "—", ""],
        ["chain/sft", "4 of 5", "2e-05", "4/1"],
        ["chain/gem", "4 of 5", "2e-05", "16/1"],
    ]
    assert line == "10 of 12 runs are done; about 40 s left"
    assert math.isnan(plan.seconds_left({}))
    (_, _, row), line = status_table(plan, {})[0].rows, status_table(plan, {})[1]
    assert row == ["chain/gem", "0 of 5", "—", "16/0 at 1e-05, 16/0 at 2e-05, 4/0, 4/1, 16/1"]
    assert line == "0 of 12 runs are done"
    assert [duration(s) for s in (59.6, 101, 6000, 12345)] == ["60 s", "2 min", "1 h 40 min", "3 h 26 min"]


# --- processes --------------------------------------------------------------------------------------------------------


def test_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error is told and a death too, and neither ends the other runs; the pool leaves no process behind."""
    config = config_of(tmp_path, workers=2, studies=[{"tasks": ["chain"], "methods": ["SFT", "GEM"], "pairs": [16]}])
    with pytest.raises(ValueError, match="2 runs failed"):
        make_runs(Plan(config), "", lambda: processes(config, fake_runner, 2, tmp_path / "out"))
    out = capsys.readouterr().out
    assert "failed: chain/sft/pairs16-seed1-rate2e-05: RuntimeError: out of luck (worker" in out
    assert "failed: chain/gem/pairs16-seed1-rate2e-05: its process ended with status 7\n" in out
    records = read_records(tmp_path / "out")
    assert len(records) == 2 + 4 and "said" not in out and "said" in (tmp_path / "out/worker0.log").read_text()
    assert "out of luck" in "".join(log.read_text() for log in (tmp_path / "out").glob("worker*.log"))
    assert not any(psutil.pid_exists(record["pid"]) for record in records.values())


@pytest.mark.parametrize("before", [None, "4,7,9"])
def test_a_process_sees_one_gpu(before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several, a trainer would put its model on all of them."""
    monkeypatch.setenv(VISIBLE, before) if before else monkeypatch.delenv(VISIBLE, raising=False)
    gpus = ["4", "GPU-5f"]
    with processes(config_of(tmp_path, device="cuda:1"), sight, 3, tmp_path, gpus) as pool:
        for seed in range(3):
            pool.begin(Job("chain", seed))
        seen = {}
        while len(seen) < 3:
            seen |= {job.seed: record for job, record, _ in pool.ended()}
    assert [seen[i] for i in range(3)] == [{"sees": gpus[i % 2], "device": "cuda"} for i in range(3)]
    assert os.environ.get(VISIBLE) == before
    with processes(config_of(tmp_path, device="cpu"), sight, 1, tmp_path) as pool:
        pool.begin(Job("chain", 0))
        assert pool.ended()[0][1] == {"sees": before, "device": "cpu"}


@pytest.mark.parametrize(
    ("device", "visible", "gpus"),
    [
        ("cpu", None, []),
        ("cuda", None, ["0", "1", "2"]),
        (None, "", ["0", "1", "2"]),
        ("cuda:1", None, ["1"]),
        ("cuda", "4, GPU-5f,7", ["4", "GPU-5f", "7"]),
        ("cuda:1", "4,GPU-5f,7", ["GPU-5f"]),
    ],
)
def test_the_gpus_of_a_device(
    device: str | None, visible: str | None, gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, visible) if visible is not None else monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpus_of(device) == gpus  # without a context on one of them: there is no CUDA here
    plan = Plan(replace(config_of(tmp_path), device=device, workers=0))
    assert worker_count(plan) == (len(gpus) or cores())
    assert worker_count(Plan(replace(plan.config, device="mps"))) == 1


def test_what_is_not_there_is_told_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"device must be one of this machine .*, got 'cuda:7'"):
        make_runs(Plan(config_of(tmp_path, device="cuda:7")), "", Fake())
    with pytest.raises(ValueError, match="micro_batch must divide the prompts of a step, 16, got 3"):
        make_runs(Plan(config_of(tmp_path, tasks={"mine": {**OWN, "micro_batch": 3}})), "", Fake())
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    study = {"tasks": ["chain"], "methods": ["SFT", "RLOO majority", "perfect reward"], "pairs": [4]}
    with pytest.raises(ValueError, match="RLOO majority, perfect reward need TRL: pip install"):
        make_runs(Plan(config_of(tmp_path, studies=[study])), "", Fake())
    make_runs(Plan(config_of(tmp_path)), "", Fake())


def test_how_a_run_fits_into_memory_may_change(tmp_path: Path) -> None:
    study, files = {"tasks": ["mine"], "methods": ["GEM"], "pairs": [4]}, {}
    for name in ("pairs", "validation", "test"):
        (tmp_path / name).write_text("")
        files[name] = str(tmp_path / name)
    one, other = (
        config_of(tmp_path, studies=[study], tasks={"mine": {"model": "m", **files, **more}})
        for more in ({}, {"micro_batch": 2, "gradient_checkpointing": True})
    )
    job = Job("mine", 0, "GEM", 4, 1e-5)
    assert changed(plain(settings_of(one, job)), settings_of(other, job)) == []
    assert evidence_run.budget_of(other, "mine").micro == 2 and evidence_run.budget_of(one, "mine").micro == 16


HARNESS = """
import sys
from pathlib import Path
from evidence_fakes import fake_runner
from gem.evidence.plan import Job
from gem.evidence.workers import processes
from gem.signals import terminating

if __name__ == "__main__":
    with terminating(), processes(None, fake_runner, 2, Path(sys.argv[1])) as pool:
        pool.begin(Job("chain", 9))
        pool.begin(Job("chain", 0))
        pool.ended()
        print("begun", flush=True)
        pool.ended()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_workers_at_once(signum: signal.Signals, tmp_path: Path) -> None:
    """Of two processes, one waits for a run and one is in the middle of it."""
    script = tmp_path / "harness.py"
    script.write_text(HARNESS)
    paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as harness:
        assert harness.stdout and harness.stderr and harness.stdout.readline() == "begun\n"
        workers = psutil.Process(harness.pid).children(recursive=True)
        began = time.monotonic()
        os.killpg(harness.pid, signum) if signum == signal.SIGINT else harness.send_signal(signum)  # Ctrl-C reaches all
        assert harness.wait(timeout=10) != 0
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert "leaked" not in harness.stderr.read()
    assert "Interrupt" not in (tmp_path / "worker0.log").read_text()
    assert len(workers) >= 2 and not alive and time.monotonic() - began < 5


# --- one run ----------------------------------------------------------------------------------------------------------


def test_methods_that_use_s() -> None:
    using = {name for name, method in METHODS.items() if uses_score(method)}
    assert {"GEM", "GEM + agreement", "literal GEM", "PRO", "filtering + DPO", "GEM without human pair"} <= using
    assert not using & {"SFT", "RFT", "DPO", "listwise DPO", "RLOO majority", "GEM with random S", "GEM without both"}
    agreement = replace(METHODS["GEM"], rank=replace(METHODS["GEM"].rank, comparators=["agreement"]))
    assert not uses_score(agreement)


def test_a_curve_keeps_few_numbers() -> None:
    history = [
        {"step": 1, "loss": 0.123456, "epoch": 1.0, "kl": math.nan},
        {"step": 1, "eval_loss": 2.0},
        {"step": 2, "loss": math.inf, "kept": 1.0},
    ]
    assert curve_of(history) == {"step": [1, 2], "loss": [0.1235, None], "kept": [None, 1.0]}


class Measured:
    """An evaluation that gives the name of the model."""

    def __init__(self, model: Any, *_: Any) -> None:
        self.reference = model

    def __call__(self, model: Any) -> dict[str, float]:
        return {"accuracy_sampled": float(model)}


def example(i: int, answered: bool = True) -> Example:
    return Example(f"q{i}", [1], [2] if answered else [], [3] if answered else [])


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace starts and training; return what each training was given."""
    given: list[dict[str, Any]] = []

    def train(method: Any, start: Any, tokenizer: Any, pairs: Any, prompts: Any, folder: Path, **more: Any) -> Trained:
        given.append(
            {"pairs": [e.prompt for e in pairs], "prompts": [e.prompt for e in prompts], "start": start, **more}
        )
        folder.mkdir(parents=True)
        if more["rate"] > 1:
            raise Diverged("too fast")
        return Trained(0.75, [], {"optimizer_steps": 3, "sampled_tokens": 7, "seconds": 1.23456})  # type: ignore[arg-type]

    def load(self: Runner, task: str, seed: int) -> Start:
        given.append({"loaded": (task, seed)})
        prompts = [example(i) for i in range(100, 110)] if task == "own" else None
        evaluations: Any = {"validation": Measured(0.25), "test": Measured(0.25)}
        return Start(0.5, None, [example(i) for i in range(40)], prompts, {"q0": "1"}, evaluations, {"model": "m"})

    monkeypatch.setattr(evidence_run, "train_method", train)
    monkeypatch.setattr(Runner, "_load_built_in", load)
    monkeypatch.setattr(Runner, "_load_own", load)
    return given


def test_a_run_gets_its_pairs_by_seed(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    """More pairs hold the fewer ones, every method gets the same, another seed others; the rest are the prompts."""
    runner = Runner(config_of(tmp_path, budget={"steps": 3}))
    record = runner(Job("chain", 0, "GEM", 4, 1e-5))
    runner(Job("chain", 0, "SFT", 16, 1e-5))
    runner(Job("chain", 1, "SFT", 4, 1e-5))
    first, more, other = (t for t in trainings if "loaded" not in t)
    assert len(first["pairs"]) == 4 and more["pairs"][:4] == first["pairs"] != other["pairs"]
    assert sorted(first["pairs"] + first["prompts"]) == sorted(f"q{i}" for i in range(40))
    assert first["seed"] == 0 and first["rate"] == 1e-5 and first["answers"] == {"q0": "1"} and first["start"] == 0.5
    assert first["budget"].steps == 3 and first["budget"].max_new_tokens == TASKS["chain"].max_new_tokens
    assert [t["loaded"] for t in trainings if "loaded" in t] == [("chain", 0), ("chain", 1)]  # kept between two runs
    assert record["test"] == record["validation"] == {"accuracy_sampled": 0.75} and record["uses_score"] is True
    assert record["spent"] == {"optimizer_steps": 3, "sampled_tokens": 7, "seconds": 1.235}
    assert record["outcome"] == "finished" and record["start"] == {"model": "m"} and record["versions"]["torch"]
    assert not (tmp_path / "out" / "scratch" / "runs/chain/gem/pairs4-seed0-rate1e-05").exists()


def test_a_start_is_evaluated_alone(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    record = Runner(config_of(tmp_path))(Job("chain", 0))
    assert record["test"] == {"accuracy_sampled": 0.5} and "spent" not in record and len(trainings) == 1


def test_a_diverged_run_has_a_message_and_no_metrics(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    record = Runner(config_of(tmp_path))(Job("chain", 0, "GEM", 4, 2.0))
    assert record["outcome"] == "diverged" and record["message"] == "too fast" and "test" not in record


def test_own_tasks_load_once_for_all_seeds(tmp_path: Path, trainings: list[dict[str, Any]]) -> None:
    runner = Runner(config_of(tmp_path, tasks={"own": {**OWN, "max_new_tokens": 99}}))
    for seed in (0, 1):
        runner(Job("own", seed, "SFT", 4, 1e-5))
    loaded, first, second = trainings
    assert loaded == {"loaded": ("own", 0)} and first["pairs"] != second["pairs"]
    assert sorted(first["prompts"]) == sorted(second["prompts"]) == [f"q{i}" for i in range(100, 110)]
    assert first["prompts"] != second["prompts"]  # some methods take the first ones alone
    assert first["budget"].max_new_tokens == 99 and first["budget"].rollout_batch_size == 64
    with pytest.raises(ValueError, match="pairs of own must hold at least 41 records, got 40"):
        runner(Job("own", 0, "SFT", 41, 1e-5))
    with pytest.raises(ValueError, match="prompts of own must have a chosen answer for perfect reward, got none of 'q"):
        runner(Job("own", 0, "perfect reward", 4, 1e-5))


def test_the_whole_of_it_on_a_tiny_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in task of a few questions and an own model with its files, in this process: starts, sweep, runs, page."""
    with_trl = ["RLOO majority"] if find_spec("trl") else []
    tiny = replace(TASKS["chain"], n_sft=32, n_pairs=12, n_test=4, warm_steps=2, warm_batch=4)
    monkeypatch.setitem(TASKS, "chain", tiny)
    own = tmp_path / "own"
    tiny.write(own, seed=5)
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(own / "model")
    tokenizer.save_pretrained(own / "model")
    (own / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+2+3+4="}) + "\n" for i in range(1, 9)))
    files = {name: str(own / f"{name}.jsonl") for name in ("pairs", "prompts", "validation", "test")}
    config = config_of(
        tmp_path,
        seeds=[0],
        device="cpu",
        budget={"steps": 1, "prompts": 2, "group_size": 2},
        eval_samples=3,
        rates=[1e-5],
        tasks={"mine": {"model": str(own / "model"), "prompt_format": "text", "max_new_tokens": 8, **files}},
        studies=[{**STUDY, "methods": ["SFT"]}, {**STUDY, "tasks": ["mine"], "methods": ["GEM", *with_trl]}],
    )
    runner = Runner(config)

    class InProcess(Fake):
        def ended(self) -> list[Any]:
            self.free = 1
            return [(self.job, runner(self.job), "")]

    plan = Plan(config)
    make_runs(plan, "test", InProcess())
    records = checked_records(plan)
    assert len(records) == plan.total == 4 + len(with_trl)
    record = records[Job("mine", 0, "GEM", 4, 1e-5)]
    assert {"accuracy_greedy", "accuracy_sampled", "accuracy_majority", "preference_reference"} <= record["test"].keys()
    assert record["spent"]["sampled_tokens"] > 0 and record["curve"] and record["settings"]["budget"]["steps"] == 1
    assert records[Job("mine", 0)]["test"]["preference_reference"] == 0.5  # the start is its own reference
    write_page(tmp_path / "page.md", plan, records)
    assert "## mine" in (tmp_path / "page.md").read_text()
    Path(files["pairs"]).write_text(Path(files["test"]).read_text())
    with pytest.raises(ValueError, match="with another files.pairs"):
        checked_records(plan)
    with pytest.raises(ValueError, match="test of mine must hold questions that are not trained on, got 4 of 4"):
        Runner(config)(Job("mine", 0))
    for rank, message in (
        (0, "mine must set lora_rank.* in bfloat16, where a step of 1e-05"),
        (4, "are not trained on"),
    ):
        coarse = replace(config.tasks["mine"].model, dtype="bfloat16", lora_rank=rank)
        tasks = {"mine": replace(config.tasks["mine"], model=coarse)}
        with pytest.raises(ValueError, match=message):
            Runner(replace(config, rates=(1e-3, 1e-5), tasks=tasks))(Job("mine", 0))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(config_of(tmp_path).path)
    monkeypatch.setattr(harness, "processes", Fake())
    status, out, _ = run(capsys, "evidence", "--config", config, "--only", "chain/gem/*")
    assert status == 0 and out.endswith(f"7 of 7 runs are in {tmp_path / 'out'}\n")
    status, out, _ = run(capsys, "evidence", "--config", config, "--list")
    assert status == 0 and "chain/gem    5 of 5  2e-05" in out and "7 of 12 runs are done; about " in out
    status, out, _ = run(capsys, "evidence", "--config", config, "--page", str(tmp_path / "page.md"))
    assert status == 0 and "7 of 12 runs are done" in (tmp_path / "page.md").read_text()
    record = json.loads((tmp_path / "out/runs/chain/gem/pairs4-seed1-rate2e-05.json").read_text())
    assert record["command"] == f"gem-kernels evidence --config {config} --only 'chain/gem/*'"
    assert "required: --config" in refused(capsys, "evidence", "--list")
    assert "config must be an existing yaml file, got 'none'" in refused(capsys, "evidence", "--config", "none")
    monkeypatch.setattr(harness, "processes", Fake(lambda job: OSError("no")))
    assert "2 runs failed" in refused(capsys, "evidence", "--config", config)
