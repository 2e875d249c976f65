"""All of GEM on a laptop: a Llama from scratch on chain addition, beside DPO, plain SFT and the literal recipe.

    "3+8+5+9="  ->  worked "3+8=11 11+5=16 16+9=25 #### 25", or the shortcut "#### 24"

Half of the supervised data is worked, the other half takes the shortcut and is mostly wrong. The warm start answers like
this data. The preference pairs prefer worked answers to wrong ones. All methods start from the same warm start and see the
same number of prompts; METHODS lists every difference between them.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

from gem.config import (
    EvalArguments,
    GuardArguments,
    LossArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
)
from gem.data import Example, encode_records, load_records
from gem.evaluate import Evaluation
from gem.files import write_lines
from gem.groups import save_groups
from gem.pipeline import GroupMaker, pair_group
from gem.rails import Verdict, as_metrics, write_rails
from gem.report import plain, results_table, write_report
from gem.results import Run, load_run
from gem.runs import write_about, write_results
from gem.trainer import GEMTrainer

TERMS, LOW, HIGH = 4, 1, 9
N_SFT, N_PAIRS, N_TEST = 4000, 1500, 200
SHORTCUTS, RIGHT_SHORTCUTS = 0.5, 0.1  # shares: shortcuts in the supervised data, right ones among them
SLIPS = 0.3  # share of the rejected answers that are worked with one wrong sum; the others are wrong shortcuts
WARM_STEPS, WARM_BATCH, WARM_RATE = 400, 64, 1e-3
STEPS, PROMPTS, EVAL_EVERY = 80, 16, 10
FINAL_SAMPLES = 4  # sampled completions per held-out question in the table

MARKER_FILE = "demo.json"


@dataclass(frozen=True)
class Method:
    """Settings of one arm of the comparison, from the warm start on."""

    learning_rate: float
    loss: LossArguments = field(default_factory=LossArguments)
    rank: RankArguments = field(default_factory=RankArguments)
    group_size: int = 5  # 0: offline, on the human pairs alone


METHODS = {
    "GEM": Method(2e-5),
    "DPO + SFT term": Method(2e-5, LossArguments(loss="dpo"), group_size=0),
    "SFT on chosen": Method(2e-5, LossArguments(loss="sft"), group_size=0),
    "literal recipe": Method(
        2e-5,
        LossArguments(kl_weight=0.0, sft_weight=0.0, taper=False),
        RankArguments(human_weight=0.0, reward="identity", weight_norm="std", filter_groups=False),
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character and one for the marker."""
    vocab = ["<pad>", "<bos>", "<eos>", "####", " ", "+", "=", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """Return a Llama of 0.6 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def worked(rng: random.Random, terms: list[int], slip: bool) -> str:
    """Return an answer in running sums; with a slip, one of them is wrong and the error carries on."""
    wrong_at = rng.randrange(1, len(terms)) if slip else 0
    total, sums = terms[0], []
    for i, term in enumerate(terms[1:], 1):
        new = total + term if i != wrong_at else wrong(rng, total + term)
        sums.append(f"{total}+{term}={new}")
        total = new
    return " ".join(sums) + f" #### {total}"


def wrong(rng: random.Random, value: int) -> int:
    """Return a number near `value`, but not it."""
    return rng.choice([v for v in (value + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)) if v >= 0])


def write_data(folder: Path, seed: int) -> None:
    """Write sft.jsonl (prompt, completion), pairs.jsonl and test.jsonl (prompt, chosen, rejected), in the public format."""
    rng = random.Random(1000 + seed)
    questions: set[tuple[int, ...]] = set()
    while len(questions) < N_SFT + N_PAIRS + N_TEST:
        questions.add(tuple(rng.randint(LOW, HIGH) for _ in range(TERMS)))
    rows = [list(q) for q in sorted(questions)]
    rng.shuffle(rows)

    def prompt(terms: list[int]) -> str:
        return "+".join(map(str, terms)) + "="

    def supervised(terms: list[int]) -> dict[str, str]:
        if rng.random() >= SHORTCUTS:
            return {"prompt": prompt(terms), "completion": worked(rng, terms, slip=False)}
        answer = sum(terms) if rng.random() < RIGHT_SHORTCUTS else wrong(rng, sum(terms))
        return {"prompt": prompt(terms), "completion": f"#### {answer}"}

    def pair(terms: list[int]) -> dict[str, str]:
        rejected = worked(rng, terms, slip=True) if rng.random() < SLIPS else f"#### {wrong(rng, sum(terms))}"
        return {"prompt": prompt(terms), "chosen": worked(rng, terms, slip=False), "rejected": rejected}

    test, pairs, sft = rows[:N_TEST], rows[N_TEST : N_TEST + N_PAIRS], rows[N_TEST + N_PAIRS :]
    write_lines(folder / "test.jsonl", [json.dumps(pair(t)) for t in test])
    write_lines(folder / "pairs.jsonl", [json.dumps(pair(t)) for t in pairs])
    write_lines(folder / "sft.jsonl", [json.dumps(supervised(t)) for t in sft])


def examples_of(file: Path, tokenizer: Any, *need: str) -> list[Example]:
    """Return the examples of a file; every record must have the fields of `need`."""
    return encode_records(load_records(str(file), need=need), tokenizer, prompt_template="{prompt}", max_length=64)


def training_arguments(folder: Path, seed: int, **changes: Any) -> TrainingArguments:
    """Return the TrainingArguments that every arm shares, with changes."""
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        **changes,
    )


def warm_start(model: LlamaForCausalLM, tokenizer: Any, data: Path, folder: Path, seed: int) -> None:
    """Train the model on the supervised data, in place."""
    groups = [pair_group(example) for example in examples_of(data / "sft.jsonl", tokenizer, "chosen")]
    arguments = training_arguments(
        folder,
        seed,
        max_steps=WARM_STEPS,
        per_device_train_batch_size=WARM_BATCH,
        learning_rate=WARM_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=30,
    )
    trainer = GEMTrainer(
        model,
        arguments,
        loss=LossArguments(loss="sft"),
        guard=GuardArguments(),
        train_dataset=groups,
        processing_class=tokenizer,
    )
    trainer.train()


def run_method(
    name: str, method: Method, start: LlamaForCausalLM, tokenizer: Any, data: Path, folder: Path, seed: int
) -> Run:
    """Train a copy of the warm start and leave a finished run in `folder`."""
    set_seed(seed)
    model = copy.deepcopy(start)
    rollout = RolloutArguments(group_size=method.group_size, max_new_tokens=32, rollout_batch_size=512)
    pairs = examples_of(data / "pairs.jsonl", tokenizer, "chosen", "rejected")
    test = examples_of(data / "test.jsonl", tokenizer, "chosen", "rejected")
    maker = GroupMaker(model, tokenizer, rollout, ScoreArguments(), method.rank, reference=start)
    online = method.group_size > 0
    evaluation = Evaluation(start, tokenizer, test, rollout, ScoreArguments(), EvalArguments())
    arguments = training_arguments(
        folder,
        seed,
        max_steps=STEPS,
        per_device_train_batch_size=PROMPTS,
        learning_rate=method.learning_rate,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        eval_on_start=True,
    )
    trainer = GEMTrainer(
        model,
        arguments,
        loss=method.loss,
        guard=GuardArguments(stop_patience=0),  # the table compares equal budgets
        train_dataset=pairs if online else maker(pairs),
        processing_class=tokenizer,
        make_groups=maker if online else None,
        evaluation=evaluation,
    )
    print(f"\n{name}, seed {seed}")
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if online:
        save_groups(folder / "last_groups.jsonl", maker(pairs[:PROMPTS]))
    evaluation.samples = FINAL_SAMPLES
    return finish(name, folder, seed, model, evaluation, trainer.verdicts())


def finish(
    name: str,
    folder: Path,
    seed: int,
    model: LlamaForCausalLM,
    evaluation: Evaluation,
    rails: Sequence[Verdict] = (),
) -> Run:
    """Evaluate the model and write its results, and the verdicts of its training, into the run's folder."""
    set_seed(12345)  # every method is sampled with the same random numbers
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
    """Run every step of the demo `seeds` times, print the table and write output/report.html.

    Raises:
        ValueError: `output` holds something other than an earlier demo.
    """
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER_FILE).is_file():
            raise ValueError(f"output_dir must be empty or hold an earlier demo, got {output}")
        shutil.rmtree(output)
    write_lines(output / MARKER_FILE, [json.dumps({name: asdict(m) for name, m in METHODS.items()}, indent=1)])
    runs = []
    for seed in range(seeds):
        folder = output / f"seed{seed}"
        write_data(folder / "data", seed)
        tokenizer = build_tokenizer()
        set_seed(seed)
        start = build_model(tokenizer)
        print(f"\nwarm start, seed {seed}: {sum(p.numel() for p in start.parameters()):,} parameters")
        warm = folder / "warm-start"
        warm_start(start, tokenizer, folder / "data", warm, seed)
        start.save_pretrained(warm)
        tokenizer.save_pretrained(warm)
        test = examples_of(folder / "data" / "test.jsonl", tokenizer, "chosen", "rejected")
        rollout = RolloutArguments(max_new_tokens=32, rollout_batch_size=512)
        evaluation = Evaluation(
            start, tokenizer, test, rollout, ScoreArguments(), EvalArguments(eval_samples=FINAL_SAMPLES)
        )
        runs.append(finish("warm start", warm, seed, start, evaluation))
        for name, method in METHODS.items():
            slug = name.lower().replace(" + ", "-").replace(" ", "-")
            runs.append(run_method(name, method, start, tokenizer, folder / "data", folder / slug, seed))
    table = results_table(runs)
    print("\n" + plain(table))
    write_report(output / "report.html", runs, title="GEM on chain addition", notes=NOTES)
    print(f"\nreport: {output / 'report.html'}")
    return runs


NOTES = (
    f"Task: the sum of {TERMS} numbers from {LOW} to {HIGH}; {N_SFT:,} supervised, {N_PAIRS:,} preference and {N_TEST} "
    "held-out questions. No question is in two sets, though another order of its numbers may be. "
    "A Llama of 0.6 million parameters from scratch: a demonstration, not a benchmark.",
    f"Each method: {STEPS} steps of {PROMPTS} prompts from the same warm start. Sampled accuracy: {FINAL_SAMPLES} samples "
    "per question.",
    "SFT on chosen is the simplest baseline: the task has one right answer, and the chosen one shows it. GEM and DPO have "
    "the same loss as a term, at a tenth of the weight.",
    "Literal recipe: Eq. 1 and 2 as printed, advantages divided by their standard deviation, no human pair in the "
    "ranking, no KL, no supervised term.",
)
