"""All of GEM on a laptop, from few human pairs: a Llama from scratch on chain addition, beside RFT, SFT and DPO.

    "3+8+5+9="  ->  worked "3+8=11 11+5=16 16+9=25 #### 25", or the shortcut "#### 24"

Half of the supervised data is worked, the other half takes the shortcut and is mostly wrong. The warm start answers like
this data. A human has compared two answers to a few questions, and prefers worked answers to wrong ones; of the other questions
nobody knows the answer. All methods start from the same warm start and take the same steps (gem.methods).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import set_seed

from gem.config import EvalArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.evaluate import Evaluation
from gem.files import write_lines
from gem.groups import save_groups
from gem.methods import METHODS, Budget, train_method
from gem.rails import Verdict, as_metrics, write_rails
from gem.report import differences_table, plain, results_table, write_report
from gem.results import Run, load_run
from gem.runs import write_about, write_results
from gem.tasks import CHAIN, examples_of, make_start

TASK = CHAIN
PAIRS = 16  # with a human comparison; the prompts of the other pairs are used without
ARMS = ("GEM", "GEM + agreement", "RFT", "SFT", "DPO + SFT", "literal GEM")
RATE = 2e-5
BUDGET = Budget(max_new_tokens=TASK.max_new_tokens)
EVAL_EVERY = 10  # steps
FINAL_SAMPLES = 8  # sampled completions per held-out question in the table

MARKER_FILE = "demo.json"


def run_arm(
    name: str, start: Any, tokenizer: Any, pairs: Sequence[Example], evaluation: Evaluation, folder: Path, seed: int
) -> Run:
    """Train by a method of METHODS and leave a finished run in `folder`."""
    print(f"\n{name}, seed {seed}")
    few, others = pairs[:PAIRS], pairs[PAIRS:]
    evaluation.samples = 1
    trained = train_method(
        METHODS[name],
        start,
        tokenizer,
        few,
        others,
        folder,
        seed=seed,
        rate=RATE,
        budget=BUDGET,
        evaluation=evaluation,
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        eval_on_start=True,
    )
    trained.model.save_pretrained(folder)
    if trained.maker is not None:
        save_groups(folder / "last_groups.jsonl", trained.maker(list(few[: BUDGET.prompts])))
    return finish(name, folder, seed, trained.model, evaluation, trained.verdicts)


def finish(
    name: str, folder: Path, seed: int, model: Any, evaluation: Evaluation, rails: Sequence[Verdict] = ()
) -> Run:
    """Evaluate the model and write its results, and the verdicts of its training, into the run's folder."""
    set_seed(12345)  # every method is sampled with the same random numbers
    evaluation.samples = FINAL_SAMPLES
    metrics = evaluation(model) | as_metrics(rails)
    write_about(folder, name, seed)
    if rails:
        write_rails(folder, rails)
    write_results(folder, metrics, evaluation.completions)
    return load_run(folder)


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Silence warnings: the report shows the AUROC that the gate would warn about."""
    ours = logging.getLogger("gem")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


@_errors_alone()
def run_demo(output: Path, *, seeds: int = 1) -> list[Run]:
    """Run every step of the demo `seeds` times, print the tables and write output/report.html.

    Raises:
        ValueError: `output` holds something other than an earlier demo.
    """
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER_FILE).is_file():
            raise ValueError(f"output_dir must be empty or hold an earlier demo, got {output}")
        shutil.rmtree(output)
    write_lines(output / MARKER_FILE, [json.dumps({name: asdict(METHODS[name]) for name in ARMS}, indent=1)])
    runs = [run for seed in range(seeds) for run in _run_seed(output / f"seed{seed}", seed)]
    print("\n" + plain(results_table(runs)))
    if seeds > 1:
        print(f"\n{ARMS[0]} minus the others, paired by seed\n" + plain(differences_table(runs, ARMS[0])))
    write_report(output / "report.html", runs, title="GEM on chain addition", notes=NOTES)
    print(f"\nreport: {output / 'report.html'}")
    return runs


def _run_seed(folder: Path, seed: int) -> Iterator[Run]:
    """Yield the runs of a seed: the warm start and every arm."""
    print(f"\nwarm start, seed {seed}")
    start, tokenizer = make_start(TASK, folder, seed)
    pairs, test = (
        examples_of(folder / f"data/{name}.jsonl", tokenizer, "chosen", "rejected") for name in ("pairs", "test")
    )
    rollout = RolloutArguments(max_new_tokens=BUDGET.max_new_tokens, rollout_batch_size=512)
    evaluation = Evaluation(start, tokenizer, test, rollout, ScoreArguments(), EvalArguments())
    yield finish("warm start", folder / "warm-start", seed, start, evaluation)
    for name in ARMS:
        slug = name.lower().replace(" + ", "-").replace(" ", "-")
        yield run_arm(name, start, tokenizer, pairs, evaluation, folder / slug, seed)


NOTES = (
    f"Task: the sum of {TASK.terms} numbers; {TASK.n_sft:,} supervised questions, {PAIRS} with a human comparison, "
    f"{TASK.n_pairs - PAIRS:,} of which nobody has seen an answer, {TASK.n_test} held out. No question is in two sets, though "
    "another order of its numbers may be. A Llama of 0.6 million parameters from scratch: a demonstration, not a benchmark.",
    f"Each method: {BUDGET.steps} steps of {BUDGET.prompts} prompts from the same warm start, at learning rate {RATE:g}. Those "
    f"that sample draw {BUDGET.group_size} completions of a prompt. Sampled and majority accuracy: {FINAL_SAMPLES} samples per "
    "question.",
    "RFT: supervised, on the human answers and on one sample of the warm start for up to 1,280 other questions, with an "
    "answer that at least two of five share.",
    "Literal GEM: Eq. 1 and 2 as printed, advantages divided by their standard deviation, no human pair in the "
    "ranking, no KL, no supervised term.",
)
