"""The code around the benchmarks. The benchmarks themselves check that all libraries agree (`--benchmark-disable`)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import planted_faults
import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import contest, measure, online_step, plot, real_step, record, results, trl_heads
from benchmarks.gold import make_gold
from benchmarks.results import OURS
from benchmarks.shapes import TINY, Shape, make_inputs, ragged
from gem.tasks import CHAIN, build_model, build_tokenizer

ROOT = Path(__file__).parent.parent


def document(**of_ours: Any) -> dict[str, Any]:
    """Return a result with our row (2 s, 500 MiB) and eager's (4 s, 1000 MiB)."""
    common = {"task": "task", "shape": "shape", "N": 8, "D": 4, "V": 16, "dtype": "float32"}
    ours = {"library": OURS, "s": 2.0, "peak extra MiB": 500.0, "error of logprob": 1e-6} | of_ours
    eager = {"library": "eager", "s": 4.0, "peak extra MiB": 1000.0, "error of logprob": 1e-5}
    rows = [
        {"extra_info": common | row, "stats": {"median": 2 * row["s"], "min": row.pop("s"), "rounds": 5}}
        for row in (ours, eager)
    ]
    missing = [{**common, "library": "quack", "reason": "not installed"}]
    return {"benchmarks": rows, "does_not": missing, "machine_info": {"device": "a CPU", "threads": 2}}


def test_compare_sees_what_got_worse_and_nothing_else() -> None:
    report, worse = results.compare(document(), document())
    assert not worse and report.endswith("0 worse")
    assert not results.compare(document(), document(**{"s": 2.2, "peak extra MiB": 540.0}))[1]
    for change, said in (
        ({"s": 2.5}, "least s / eager 0.500 -> 0.625"),
        ({"peak extra MiB": 650.0}, "peak extra MiB / eager 0.500 -> 0.650"),
        ({"error of logprob": 1e-5}, "error of logprob 1.0e-06 -> 1.0e-05"),
    ):
        report, worse = results.compare(document(), document(**change))
        assert len(worse) == 1 and said in worse[0] and report.endswith("1 worse"), change


def test_compare_is_by_ratios_so_that_machines_may_differ() -> None:
    slower = copy.deepcopy(document())
    for row in slower["benchmarks"]:
        row["stats"] = {name: 7 * value for name, value in row["stats"].items()}
    assert not results.compare(document(), slower)[1]


def test_compare_misses_a_row_of_ours_that_is_gone() -> None:
    less = document()
    less["benchmarks"] = [row for row in less["benchmarks"] if row["extra_info"]["library"] != OURS]
    assert "no longer there" in results.compare(document(), less)[1][0]
    assert results.compare(less, less)[1] == ["the two files have no row of ours in common"]


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in ("old.json", "new.json", "other.json"))
    old.write_text(json.dumps(document()))
    new.write_text(json.dumps(document(**{"s": 3.9})))
    other.write_text("{}")
    for files, status, said in (
        ((old, old), 0, "0 worse"),
        ((old, new), 1, "1 worse"),
        ((old, other), None, "no 'benchmarks'"),
    ):
        command = [sys.executable, "-m", "pytest", "benchmarks", "--compare", *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert said in done.stdout + done.stderr
        assert done.returncode == status if status is not None else done.returncode


def test_table_lists_libraries_without_a_time() -> None:
    text = results.table(results.rows(document()))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == [OURS, "eager"]
    assert "0.50" in lines[3] and "does not: quack: not installed" in lines[5]


def test_readme_and_docs_are_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main(["--check"]) == 0, capsys.readouterr().out


_ON_CPU = [doc for doc in map(results.read, plot.newest().values()) if "capability" not in doc["machine_info"]]


@pytest.mark.parametrize("of_file", _ON_CPU, ids=lambda doc: doc["machine_info"]["device"])
def test_what_we_claim_holds_in_the_results_on_file(of_file: dict[str, Any]) -> None:
    """Check the claims on a CPU: N=1024, D=512, V=128256 in fp32; errors with bf16 operands at |z| of 30 and more."""
    tasks = {
        key: {row["library"]: row for row in of_task if "median s" in row}
        for key, of_task in results.by_task(results.rows(of_file)).items()
    }
    small_cache, careful = f"{OURS}, cache 128 MiB", "eager, entropy without a graph"
    sega = tasks["SEGA, weights from the pass", "1024x512x128256"]
    frozen = tasks["SEGA, frozen head", "1024x512x128256"]
    assert all(frozen[name]["rounds"] == 5 for name in (OURS, "eager", "TRL"))
    assert all(sega[name]["rounds"] == 5 for name in (OURS, "eager", careful, "TRL"))
    assert frozen[OURS]["median s"] <= 0.85 * frozen["eager"]["median s"]
    for eager in ("eager", careful):
        assert sega[OURS]["median s"] <= 1.0 * sega[eager]["median s"]
        assert sega[OURS]["peak extra MiB"] <= sega[eager]["peak extra MiB"] / 4
        assert sega[small_cache]["peak extra MiB"] <= sega[eager]["peak extra MiB"] / 10
    assert sega[OURS]["median s"] <= 0.9 * sega["TRL"]["median s"]
    narrow = tasks["score: logprob and entropy, forward", "512x512x128256-bf16"]
    assert narrow[OURS]["largest |logit|"] >= 30
    for peer, what in itertools.product(("TRL", "Liger scaled CE"), ("logprob", "entropy")):
        assert narrow[peer][f"error of {what}"] >= 100 * narrow[OURS][f"error of {what}"], (peer, what)
    ((_, spans),) = [item for item in tasks.items() if item[0][0].startswith("topm_mean")]
    assert spans[OURS]["median s"] <= spans["loop of torch.topk"]["median s"]


def test_rows_survive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = record.Record(tmp_path / "rows.json", "bench")
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    rows = document()["benchmarks"] + document()["does_not"]
    for row in rows:
        record.append(row)
    found = record.benchmarks_in(json.loads(stage.path.read_text()))
    assert len(found["benchmarks"]) == 2 and len(found["does_not"]) == 1
    assert results.rows(found) == results.rows(document())
    assert record.timed({"stages": {"bench": {"rows": rows}}}) == {
        ("task", "shape", library) for library in (OURS, "eager", "quack")
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def test_libraries_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(measure, "seconds", lambda step: step() or 1.0)
    times = measure.in_turns({name: lambda name=name: calls.append(name) for name in "abc"})
    assert calls == list("abc") * measure.ROUNDS
    assert all(of_one == [1.0] * measure.ROUNDS for of_one in times.values())
    monkeypatch.setattr(measure, "seconds", lambda step: 1e-3)
    assert len(measure.in_turns({"fast": lambda: None})["fast"]) == measure.MANY_ROUNDS
    monkeypatch.setattr(measure, "seconds", lambda step: 1e3)
    slow = measure.in_turns({"slow": lambda: None, "claimed": lambda: None}, claimed=["claimed"])
    assert {name: len(of_one) for name, of_one in slow.items()} == {"slow": 2, "claimed": measure.CLAIM_ROUNDS}


def test_stopwatch_advances_by_the_times_it_plays() -> None:
    watch, times = measure.Stopwatch(), iter([0.5, 0.25])
    seen = [watch()]
    for _ in range(2):
        watch.play(times)
        seen.append(watch())
    assert seen == [0.0, 0.5, 0.75]


@pytest.mark.skipif(measure._start_peak() is None, reason="this system does not show the peak of a process")
def test_peak_memory_counts_what_is_freed_again_and_not_what_comes_back() -> None:
    mib = 1 << 18  # floats

    def step() -> torch.Tensor:
        torch.ones(64 * mib).sum()
        return torch.ones(32 * mib)

    peak, result = measure.peak_memory(step, lambda t: [t])
    assert peak is not None and 30 < peak < 40  # 64 at the peak, minus 32 of the result
    assert result.numel() == 32 * mib


def test_a_library_that_computes_something_else_is_not_timed() -> None:
    def make(gold: Any, library: str) -> contest.Step:
        off = {"right": 0.0, OURS: 0.0, "wrong": 2.0}[library]
        return lambda: contest.Result((gold.logprob + off).float())

    def exact(gold: Any) -> contest.Exact:
        return contest.Exact(gold.logprob)

    rows = contest.compete(contest.Task("t", make, exact, 1), TINY, [OURS, "right", "wrong"], timed=True)
    assert rows["wrong"].reason == "disagrees with fp64: logprob by 2" and not rows["wrong"].times
    assert rows["right"].reason is None and len(rows["right"].times) >= measure.ROUNDS
    assert rows["right"].info["error of logprob"] < 1e-5


def test_an_error_of_ours_is_not_hidden_in_a_row() -> None:
    def broken(gold: Any, library: str) -> contest.Step:
        raise RuntimeError("out of luck")

    def exact(gold: Any) -> contest.Exact:
        return contest.Exact()

    assert contest.compete(contest.Task("t", broken, exact, 1), TINY, ["TRL"], timed=False)["TRL"].reason == (
        "fails: RuntimeError: out of luck"
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        contest.compete(contest.Task("t", broken, exact, 1), TINY, [OURS], timed=False)


@pytest.mark.parametrize("count", [False, True], ids=["clock", "counter"])
def test_the_stages_of_an_online_step_add_up(count: bool, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    CHAIN.write(tmp_path / "data", 0)
    for part in (tokenizer, build_model(tokenizer)):
        part.save_pretrained(tmp_path / online_step.DEMO)
    trainer = online_step.gem_trainer(online_step.DEMO, tmp_path, 2)
    drawn: list[Any] = []
    draw = trainer.make_groups.draw
    trainer.make_groups.draw = lambda *args, **more: drawn.append(draw(*args, **more)) or drawn[-1]
    own = type(trainer.model).__call__
    counter = online_step.flop_counter() if count else None
    with counter or contextlib.nullcontext(), online_step.watching(trainer, counter) as stages:
        start = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - start
    assert sum(stages.seconds.values()) == pytest.approx(took, abs=0.5) and set(stages.seconds) <= set(
        online_step.STAGES
    )
    assert all(stages.seconds[stage] > 0 for stage in ("generation", "reference", "training", "optimizer", "rest"))
    assert type(trainer.model).__call__ is own and "training_step" not in vars(trainer)
    groups = [group for of_step in drawn for group in of_step]
    trained = sum(len(group.prompt_ids) + len(member.ids) for group in groups for member in group.members)
    assert trained <= stages.tokens["training"] and stages.tokens["reference"] and stages.tokens["generation"]
    assert not stages.tokens["rest"] and not stages.tokens["optimizer"]
    if counter is not None:
        assert sum(stages.flop.values()) == counter.get_total_flops() and not stages.flop["rest"]
        body = 2 * sum(p.numel() for n, p in trainer.model.named_parameters() if ".layers." in n and p.ndim == 2)
        for stage, times in (("generation", 1), ("reference", 1), ("training", 3)):
            assert 1 <= stages.flop[stage] / (times * body * stages.tokens[stage]) < 1.2, (
                stage
            )  # head and attention are small


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_peaked_as_a_trained_model() -> None:
    gold = make_gold(make_inputs(Shape("a head", 128, 64, 32_000, torch.float32)))
    entropy = gold.distribution["mean entropy (nats)"]
    assert 0.5 < entropy < 3 and gold.distribution["mean entries above 2^-12"] > 5
    assert float(gold.entropy.min()) < 0.01 and float(gold.entropy.max()) > 3
    assert 25 < gold.distribution["largest |logit|"] < 60


@pytest.mark.parametrize("n", [1, 7, 96, 1024, 8192])
def test_groups_are_ragged_and_cover_every_token(n: int) -> None:
    cu_seqlens, cu_groups = ragged(n)
    lengths = cu_seqlens.diff()
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == n and bool((lengths > 0).all())
    assert set(cu_groups.tolist()) <= set(cu_seqlens.tolist())
    assert cu_groups[0] == 0 and cu_groups[-1] == n and bool((cu_groups.diff() > 0).all())
    if n >= 1024:
        assert len(lengths.unique()) > 2


def test_gold_is_autograd_in_fp64() -> None:
    x = make_inputs(TINY)
    gold = make_gold(x)
    hidden, weight = (t.double().requires_grad_() for t in (x.hidden, x.weight))
    log_p = (hidden @ weight.T).log_softmax(-1)
    logprob, entropy = log_p.gather(1, x.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    (x.a * logprob + x.b * entropy).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    dhidden, dweight = gold.gradients(x.a, x.b)
    torch.testing.assert_close(gold.logprob, logprob.detach())
    torch.testing.assert_close(gold.entropy, entropy.detach())
    torch.testing.assert_close(dhidden, hidden.grad[gold.sample])
    torch.testing.assert_close(dweight, weight.grad[gold.columns])


def test_the_table_of_trls_trainers_is_what_its_results_say() -> None:
    *_, newest = sorted(results.FOLDER.glob("trl_heads-*.json"))
    rows = trl_heads.table(json.loads(newest.read_text(encoding="utf-8")))
    assert len(rows) == 2 + 2 * len(trl_heads.TASKS)
    assert "\n".join(rows) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "rows_of"), [("real_step", real_step.table), ("planted_faults", planted_faults.table)]
)
def test_the_tables_of_real_models_are_what_their_results_say(name: str, rows_of: Any) -> None:
    *_, newest = sorted(results.FOLDER.glob(f"{name}-*.json"))
    rows = rows_of(json.loads(newest.read_text(encoding="utf-8")))
    assert len(rows) >= 6
    assert "\n".join(rows) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_tables_of_an_online_step_are_what_its_results_say() -> None:
    *_, newest = sorted(results.FOLDER.glob("online_step-*.json"))
    rows = online_step.table(json.loads(newest.read_text(encoding="utf-8")))
    assert len(rows) >= 16
    assert "\n".join(rows) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
