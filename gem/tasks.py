"""Toy tasks on a laptop: their data, a tokenizer, a small Llama, and the warm start from which every method begins.

    model, tokenizer = make_start(TASKS["chain"], folder, seed=0)

All are chain addition, one token per character: "3+8+5+9=" -> "3+8=11 11+5=16 16+9=25 #### 25". The tasks differ in the
number of terms and in how the supervised data errs, and so in what S of Eq. 1 says about an answer of the warm start. The human
prefers right sums.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

from gem.config import GuardArguments, LossArguments
from gem.data import Example, encode_records, load_records
from gem.files import read_text, write_lines
from gem.fingerprint import data_hash
from gem.pipeline import pair_group
from gem.trainer import GEMTrainer

LOW, HIGH = 1, 9  # of a term
# Shares: shortcuts in the supervised data of chain and long, right ones among them.
SHORTCUTS, RIGHT_SHORTCUTS = 0.5, 0.1
SLIPS = 0.3  # share of their rejected answers that are worked with one wrong sum; the others are wrong shortcuts

RUN_ON = 0.65  # share of run-on answers in misleading's supervised data
OFF = (-1, 0, 1, 1)  # how far a sum of a run-on answer may be off, each as likely

MARKER_FILE = "start.json"  # written last: the folder holds a whole start, of these settings

Answer = Callable[[random.Random, list[int]], str]
"""Returns the text of an answer to the sum of some terms."""


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


def build_model(tokenizer: Any, positions: int = 64) -> LlamaForCausalLM:
    """Return a Llama of 0.6 million parameters with random weights, for sequences of up to `positions` tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
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


def half_shortcuts(rng: random.Random, terms: list[int]) -> str:
    """Return a worked answer, which is right, or a shortcut, which is mostly wrong."""
    if rng.random() >= SHORTCUTS:
        return worked(rng, terms, slip=False)
    return f"#### {sum(terms) if rng.random() < RIGHT_SHORTCUTS else wrong(rng, sum(terms))}"


def slip_or_shortcut(rng: random.Random, terms: list[int]) -> str:
    """Return a wrong answer: worked with a slip, or a shortcut."""
    return worked(rng, terms, slip=True) if rng.random() < SLIPS else f"#### {wrong(rng, sum(terms))}"


def run_on(rng: random.Random, terms: list[int]) -> str:
    """Return an answer without copies of the sums, "3+8=11+5=16+9=25 #### 25", all of whose sums but the first are guessed."""
    total, sums = terms[0], str(terms[0])
    for i, term in enumerate(terms[1:]):
        total += term + (rng.choice(OFF) if i else 0)
        sums += f"+{term}={total}"
    return f"{sums} #### {total}"


def mostly_run_on(rng: random.Random, terms: list[int]) -> str:
    """Return a run-on answer, or a worked one, which is right."""
    return run_on(rng, terms) if rng.random() < RUN_ON else worked(rng, terms, slip=False)


def wrong_run_on(rng: random.Random, terms: list[int]) -> str:
    """Return a run-on answer that is wrong."""
    answer = run_on(rng, terms)
    while answer.endswith(f" {sum(terms)}"):
        answer = run_on(rng, terms)
    return answer


@dataclass(frozen=True)
class Task:
    """A toy task: the answers of its data, the sizes of its sets, and how its warm start is trained.

    Args:
        name: its name in TASKS.
        summary: what it is, in one sentence.
        supervised: answers of the supervised data.
        rejected: answers that the human rejects, all wrong; the chosen ones are worked and right.
        terms: numbers to add, each from LOW to HIGH.
        positions: tokens that the model has positions for.
        max_new_tokens: limit on the tokens of a sampled answer.
        n_sft, n_pairs, n_test: supervised questions; preference pairs; pairs held out for the test, and as many for validation.
        warm_steps, warm_batch, warm_rate: optimizer steps of the warm start, questions of a step, peak learning rate.

    Raises:
        ValueError: the sets need more questions than there are.
    """

    name: str
    summary: str
    supervised: Answer
    rejected: Answer
    terms: int = 4
    positions: int = 64
    max_new_tokens: int = 32
    n_sft: int = 4000
    n_pairs: int = 1500
    n_test: int = 200
    warm_steps: int = 400
    warm_batch: int = 64
    warm_rate: float = 1e-3

    def __post_init__(self) -> None:
        needed, there = self.n_sft + self.n_pairs + 2 * self.n_test, (HIGH - LOW + 1) ** self.terms
        if needed > there:
            raise ValueError(
                f"n_sft + n_pairs + 2 n_test must be <= {there}, all sums of {self.terms} terms, got {needed}"
            )

    def write(self, folder: Path, seed: int) -> None:
        """Write the data, in the public format; no question is in two files, though another order of its terms may be.

        sft.jsonl has prompt and completion; pairs.jsonl, test.jsonl and validation.jsonl have prompt, chosen and rejected. The
        pairs are in random order: the first n are a sample of n.
        """
        rng = random.Random(1000 + seed)
        rows = self._questions(rng, self.n_sft + self.n_pairs + self.n_test)
        test, pairs, sft = (
            rows[: self.n_test],
            rows[self.n_test : self.n_test + self.n_pairs],
            rows[self.n_test + self.n_pairs :],
        )
        write_lines(folder / "test.jsonl", [self._pair(rng, terms) for terms in test])
        write_lines(folder / "pairs.jsonl", [self._pair(rng, terms) for terms in pairs])
        write_lines(folder / "sft.jsonl", [_line(terms, completion=self.supervised(rng, terms)) for terms in sft])
        validation = self._questions(rng, self.n_test, taken=rows)
        write_lines(folder / "validation.jsonl", [self._pair(rng, terms) for terms in validation])

    def _questions(self, rng: random.Random, count: int, taken: Collection[list[int]] = ()) -> list[list[int]]:
        """Return the terms of `count` different questions, in random order, none of them taken."""
        used, found = {tuple(terms) for terms in taken}, set[tuple[int, ...]]()
        while len(found) < count:
            found |= {tuple(rng.randint(LOW, HIGH) for _ in range(self.terms))} - used
        rows = [list(terms) for terms in sorted(found)]
        rng.shuffle(rows)
        return rows

    def _pair(self, rng: random.Random, terms: list[int]) -> str:
        """Return the line of a preference pair."""
        rejected = self.rejected(rng, terms)
        return _line(terms, chosen=worked(rng, terms, slip=False), rejected=rejected)


def _line(terms: list[int], **answers: str) -> str:
    """Return the line of a question and its answers."""
    return json.dumps({"prompt": "+".join(map(str, terms)) + "=", **answers})


CHAIN = Task(
    "chain",
    "Half of the supervised answers are worked and right, the other half are shortcuts, mostly wrong and uncertain: "
    "S tells right from wrong.",
    half_shortcuts,
    slip_or_shortcut,
)
MISLEADING = Task(
    "misleading",
    "Most supervised answers run on, and guess their sums; the others are worked, right, and certain: S prefers wrong answers.",
    mostly_run_on,
    wrong_run_on,
)
LONG = Task(
    "long",
    "The first task with ten terms, 75 tokens where an answer is worked: S tells right from wrong.",
    half_shortcuts,
    slip_or_shortcut,
    terms=10,
    positions=128,
    max_new_tokens=96,
    warm_steps=800,
    warm_batch=32,
    warm_rate=2e-3,
)
TASKS = {task.name: task for task in (CHAIN, MISLEADING, LONG)}


def examples_of(file: Path, tokenizer: Any, *need: str) -> list[Example]:
    """Return the examples of a file; every record must have the fields of `need`."""
    return encode_records(load_records(str(file), need=need), tokenizer, prompt_template="{prompt}", max_length=128)


def warm_start(
    model: LlamaForCausalLM, tokenizer: Any, data: Path, folder: Path, seed: int, task: Task = CHAIN
) -> None:
    """Train the model on the supervised data of a task, in place."""
    groups = [pair_group(example) for example in examples_of(data / "sft.jsonl", tokenizer, "chosen")]
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_steps=task.warm_steps,
        per_device_train_batch_size=task.warm_batch,
        learning_rate=task.warm_rate,
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


def make_start(task: Task, folder: Path, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the warm start of a task and its tokenizer, from `folder`; it is trained there first unless it is there, whole.

    Args:
        task: a task of TASKS, or one with other settings.
        folder: gets data/, as `Task.write` leaves it, and warm-start/, the model with its tokenizer.
        seed: of the data, the initial weights and the order of the supervised questions.
    """
    warm, marker = folder / "warm-start", folder / MARKER_FILE
    settings = {name: value for name, value in vars(task).items() if isinstance(value, (str, int, float))}
    with TemporaryDirectory() as scratch:  # the functions that write the answers are settings, too
        task.write(Path(scratch), seed)
        about = json.dumps({**settings, "seed": seed, "data": data_hash(scratch)}, indent=1)
    if not marker.is_file() or read_text(marker).strip() != about:
        marker.unlink(missing_ok=True)
        shutil.rmtree(warm, ignore_errors=True)  # not overwritten: a model that was loaded from there maps its file
        task.write(folder / "data", seed)
        tokenizer = build_tokenizer()
        set_seed(seed)
        model = build_model(tokenizer, task.positions)
        warm_start(model, tokenizer, folder / "data", warm, seed, task)
        model.save_pretrained(warm)
        tokenizer.save_pretrained(warm)
        write_lines(marker, [about])
    return LlamaForCausalLM.from_pretrained(warm), PreTrainedTokenizerFast.from_pretrained(warm)
