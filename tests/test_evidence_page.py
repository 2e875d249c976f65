"""The page of `gem-kernels evidence`: its numbers against hand-computed ones, and what it says of missing runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from evidence_fakes import result_of
from test_evidence import SMALL, STUDY, config_of, records_of

from gem.evidence.page import (
    MARK,
    Results,
    counted,
    differences,
    gate_table,
    rates_table,
    results_table,
    spent_table,
    write_page,
)
from gem.evidence.plan import Job, Plan, Record
from gem.report import T_QUANTILES


def measured(**accuracies: float) -> Callable[[Job, Record], Record]:
    """Return an edit of records_of: the sampled test accuracy of "SFT4_0" is that of SFT with 4 pairs and seed 0."""

    def edit(job: Job, record: Record) -> Record:
        name = f"{job.method}{job.pairs or ''}_{job.seed}"
        return {**record, "test": {**record["test"], "accuracy_sampled": accuracies.get(name, 0.5)}}

    return edit


def test_a_cell_is_a_mean_with_its_t_interval(tmp_path: Path) -> None:
    """0.5, 0.6 and 0.9: mean 2/3, sample variance 13/300, half-width 4.3027 sqrt(13/900)."""
    plan = Plan(config_of(tmp_path, seeds=[0, 1, 2]))
    results = Results(plan, records_of(plan, measured(GEM4_0=0.5, GEM4_1=0.6, GEM4_2=0.9)))
    table = results_table(results, "chain", ["SFT", "GEM"], 4)
    assert [row[0] for row in table.rows] == ["start", "SFT", "GEM"]
    at = table.header.index("sampled")
    assert table.rows[2][at] == f"0.667 ± {4.3027 * math.sqrt(13 / 900):.3f}" == "0.667 ± 0.517"
    assert table.rows[1][at] == "0.500 ± 0.000" and table.rows[2][-1] == "3"
    assert table.rows[1][table.header.index("majority")] == "—"


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """GEM minus SFT is 0.10 and 0.12 at 4 pairs: 0.11 ± 12.7062 * 0.01 excludes nothing; at 16 pairs 0.20 and 0.20 does."""
    plan = Plan(config_of(tmp_path))
    edit = measured(GEM4_0=0.6, SFT4_0=0.5, GEM4_1=0.3, SFT4_1=0.18, GEM16_0=0.9, SFT16_0=0.7, GEM16_1=0.5, SFT16_1=0.3)
    table = differences(Results(plan, records_of(plan, edit)), "chain", "GEM", ["SFT", "GEM"])
    assert table.header == ["GEM minus", "accuracy", "4 pairs", "16 pairs"]
    assert counted(1) == "1 pair"
    assert table.rows[0] == ["SFT", "sampled", f"+0.110 ± {T_QUANTILES[0] * 0.01:.3f}", "**+0.200 ± 0.000**"]
    assert [row[:2] for row in table.rows] == [["SFT", name] for name in ("sampled", "greedy", "majority")]


def test_missing_and_diverged_runs_are_said(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path, seeds=[0, 1, 2]))

    def edit(job: Job, record: Record) -> Record | None:
        if job.pairs == 4 and (job.method, job.seed) in (("GEM", 2), ("SFT", 0), ("SFT", 1), ("SFT", 2)):
            return None
        return result_of(job, outcome="diverged") if (job.method, job.pairs, job.seed) == ("GEM", 16, 1) else record

    results = Results(plan, records_of(plan, edit))
    rows = {row[0]: row for row in results_table(results, "chain", ["SFT", "GEM"], 4).rows}
    assert rows["SFT"][1] == "not run" and rows["SFT"][-1] == "0 of 3 seeds" and rows["GEM"][-1] == "2 of 3 seeds"
    rows = {row[0]: row for row in results_table(results, "chain", ["SFT", "GEM"], 16).rows}
    assert rows["GEM"][-1] == "3, 1 diverged" and rows["GEM"][2].startswith("0.710 ± ")  # of seeds 0 and 2
    row, *_ = differences(results, "chain", "GEM", ["SFT", "GEM"]).rows
    assert row[2] == "not run" and row[3] == "**+0.000 ± 0.000** (2 of 3 seeds)".replace("**", "")


def test_rates_and_budgets(tmp_path: Path) -> None:
    plan = Plan(config_of(tmp_path))

    def edit(job: Job, record: Record) -> Record:
        if job.method == "SFT" and job.rate == 2e-5:
            return result_of(job, outcome="diverged")
        return {**record, "spent": {"optimizer_steps": 80, "sampled_tokens": 1000 * (job.seed + 1), "seconds": 5.0}}

    results = Results(plan, records_of(plan, edit))
    assert rates_table(results, "chain", ["SFT", "GEM"]).rows == [
        ["SFT", "**0.600**", "diverged"],
        ["GEM", "0.600", "**0.700**"],
    ]
    assert spent_table(results, "chain", ["GEM"]).rows == [["GEM", "80", "1,500", "5"]]
    write_page(tmp_path / "page.md", plan, records_of(plan, edit))
    said = "It is the lowest for SFT, and the highest for GEM: a rate beyond might be better there."
    assert said in (tmp_path / "page.md").read_text(encoding="utf-8")
    one = Plan(config_of(tmp_path, rates=[1e-5]))
    assert rates_table(Results(one, {}), "chain", ["SFT"]).rows == [["SFT", "**not swept**"]]


def test_the_gate_as_a_prediction(tmp_path: Path) -> None:
    """Seeds 0 and 1 are warned of, 2 and 3 are not; of GEM, 0 collapses, and 3 by divergence; of SFT nothing does."""
    study = {**STUDY, "methods": ["SFT", "GEM"]}
    plan = Plan(config_of(tmp_path, seeds=[0, 1, 2, 3], sweep={"pairs": 4, "seeds": [0]}, studies=[study]))

    def edit(job: Job, record: Record) -> Record:
        if not job.method:
            auroc = {} if job.seed == 9 else {"auroc": 0.5 if job.seed < 2 else 0.6}
            return {**record, "validation": auroc, "test": {"accuracy_sampled": 0.5}}
        if (job.method, job.seed) == ("GEM", 3):
            return result_of(job, outcome="diverged")
        accuracy = 0.44 if (job.method, job.seed, job.rate) == ("GEM", 0, 2e-5) else 0.46  # a fall of 0.04 is none
        return {**record, "test": {"accuracy_sampled": accuracy}}

    rows = {row[0]: row[1:] for row in gate_table(Results(plan, records_of(plan, edit))).rows}
    assert rows["methods that use S, chosen rate"] == ["4", "2", "2", "1", "0.50", "0.50", "0"]
    assert rows["all methods, chosen rate"] == ["8", "4", "2", "1", "0.25", "0.50", "0"]
    assert rows["methods that use S, every rate"] == [
        "5",
        "3",
        "2",
        "1",
        "0.33",
        "0.50",
        "0",
    ]  # one run of the sweep more
    assert rows["methods that do not use S, chosen rate"] == ["4", "2", "0", "0", "0.00", "—", "0"]
    assert rows["all methods, every rate"] == ["10", "6", "2", "1", "0.17", "0.50", "0"]


def test_the_page_is_made_from_records_alone(tmp_path: Path) -> None:
    ablations = {"tasks": ["chain"], "methods": ["GEM with random S"], "pairs": [16], "ablations": True}
    plan = Plan(config_of(tmp_path, studies=[*SMALL["studies"], ablations]))
    path = tmp_path / "docs" / "evidence.md"
    write_page(path, plan, {})  # before the first run
    assert "Not run yet: " in path.read_text()
    path.write_text(path.read_text().replace("# Evidence", "# Ours\n\nWords of ours."))
    records = records_of(plan, lambda job, record: {**record, "summary": "Sums of some numbers."})
    write_page(path, plan, records)
    text = path.read_text()
    assert text.startswith("# Ours\n\nWords of ours.\n\n" + MARK) and text.count(MARK) == 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "](evidence.png)" in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:] == [
        "## chain", "### chain, 4 pairs", "### chain, 16 pairs", "### GEM minus the others", "### Learning rates",
        "### What a run spends", "## Ablations", "### chain: ablations", "#### chain, 16 pairs",
        "#### GEM minus the others", "#### Learning rates", "#### What a run spends", "## Does the gate predict a collapse?",
        "## Making this page",
    ]  # fmt: skip
    assert "| GEM with random S | sampled | +0.000 ± 0.000 |" in text and "Sums of some numbers." in text
    assert f"--config {plan.config.path.as_posix()} --only 'chain/*'" in text
    assert f"{plan.total} of {plan.total} runs are done" in text
