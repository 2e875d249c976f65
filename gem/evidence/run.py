"""One run of `gem-kernels evidence`: a start, evaluated, or a training from it, as the content of its record.

runner = Runner(config)
record = runner(Job("chain", seed=0, method="GEM", pairs=16, rate=2e-5))
"""

from __future__ import annotations

import gc
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gem.answers import final_answer
from gem.config import EvalArguments, RolloutArguments, ScoreArguments, comparator_weights
from gem.data import Example, read_examples
from gem.ends import model_ends
from gem.evaluate import Evaluation
from gem.evidence.config import TASK_FILES, Config
from gem.evidence.plan import Job, Record
from gem.fingerprint import data_hash, model_hash, source_hash
from gem.guard import lost_steps
from gem.lock import HeldError, locked
from gem.methods import METHODS, Budget, Method, train_method
from gem.mixing import shared_prompts
from gem.models import load_model, load_tokenizer, pick_device, placed, source_ends
from gem.stops import Diverged
from gem.tasks import TASKS, examples_of, make_start

EVALUATION_SEED = 12345  # every run is sampled with the same random numbers
CURVE = ("loss", "kl", "score", "kept", "distinct", "final_entropy", "branch_entropy", "length", "truncated", "reward")
"""Keys of the trainer's log that a record keeps."""
FILES = ("pairs", "validation", "test")
PACKAGES = ("gem-kernels", "torch", "transformers", "trl")


@dataclass
class Start:
    """What the runs of a task and a seed begin with, loaded once."""

    model: Any
    tokenizer: Any
    pairs: list[Example]
    prompts: list[Example] | None  # None: the pairs that were not drawn
    answers: dict[str, str]  # right answers by prompt, where a chosen answer gives them
    evaluations: dict[str, Evaluation]  # of the validation and the test questions
    hashes: dict[str, str]  # of the model and of the data


class Runner:
    """Callable that makes one run after the other; it keeps the last start, whose runs are best made in a row."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, pick_device(config.device)
        self._loaded: tuple[tuple[str, int], Start] | None = None

    def __call__(self, job: Job) -> Record:
        """Return what a run adds to its record: outcome, metrics, curve, what was spent, where it ran.

        Raises:
            ValueError: bad data, too few pairs, a model that does not load; and as train_method.
        """
        gc.collect()  # the last run's trainer and its model hold one another
        began = time.perf_counter()
        start = self._start(job.task, job.seed)
        record = self._trained(job, start) if job.method else self._begun(job, start)
        used = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device
        return {
            **record,
            "start": start.hashes,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
            "device": str(used),
            "threads": torch.get_num_threads(),
        }

    def _begun(self, job: Job, start: Start) -> Record:
        summary = {"summary": TASKS[job.task].summary} if job.task in TASKS else {}
        return {"outcome": "finished", **summary, **self._metrics(start, start.model)}

    def _trained(self, job: Job, start: Start) -> Record:
        method, own = METHODS[job.method], self.config.tasks.get(job.task)
        order = random.Random(job.seed).sample(range(len(start.pairs)), len(start.pairs))
        if job.pairs > len(start.pairs):
            raise ValueError(f"pairs of {job.task} must hold at least {job.pairs} records, got {len(start.pairs)}")
        pairs, rest = ([start.pairs[i] for i in part] for part in (order[: job.pairs], order[job.pairs :]))
        # In an order of the seed, as some methods take the first ones alone.
        prompts = rest if start.prompts is None else random.Random(job.seed).sample(start.prompts, len(start.prompts))
        unknown = [example.prompt for example in (*pairs, *prompts) if example.prompt not in start.answers]
        if method.reward == "perfect" and unknown:
            raise ValueError(
                f"prompts of {job.task} must have a chosen answer for {job.method}, got none of {unknown[0]!r}"
            )
        folder = self.config.output_dir / "scratch" / job.path.with_suffix("")
        record: Record = {"uses_score": uses_score(method)}
        try:
            trained = train_method(
                method,
                start.model,
                start.tokenizer,
                pairs,
                prompts,
                folder,
                seed=job.seed,
                rate=job.rate,
                budget=budget_of(self.config, job.task),
                answers=start.answers,
                gradient_checkpointing=own is not None and own.gradient_checkpointing,
                disable_tqdm=True,
            )
            metrics = self._metrics(start, trained.model)  # a model may give NaN only here
        except Diverged as error:
            return {**record, "outcome": "diverged", "message": str(error)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            **record,
            "outcome": "finished",
            **metrics,
            "spent": {name: _short(value) for name, value in trained.spent.items()},
            "curve": curve_of(trained.history),
        }

    def _metrics(self, start: Start, model: Any) -> Record:
        metrics = {}
        for name, evaluation in start.evaluations.items():
            set_seed(EVALUATION_SEED)
            metrics[name] = {key: _short(value, 6) for key, value in evaluation(model).items()}
        return metrics

    def _start(self, task: str, seed: int) -> Start:
        key = self.config.start_of(task, seed)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two models may not fit
            gc.collect()
            load = self._load_own if task in self.config.tasks else self._load_built_in
            self._loaded = (key, load(*key))
        return self._loaded[1]

    def _load_built_in(self, task: str, seed: int) -> Start:
        folder = self.config.output_dir / "starts" / task / f"seed{seed}"
        with _waiting(folder.with_suffix(".lock")):  # for another worker that trains it
            model, tokenizer = make_start(TASKS[task], folder, seed)
        data = folder / "data"
        read = {name: examples_of(data / f"{name}.jsonl", tokenizer, "chosen", "rejected") for name in FILES}
        hashes = {"model": model_hash(model), "data": data_hash(str(data))}
        return self._start_with(task, placed(model, self.device), tokenizer, read, hashes)

    def _load_own(self, name: str, seed: int) -> Start:
        task = self.config.tasks[name]
        tokenizer = load_tokenizer(task.model)
        ends = source_ends(task.model, tokenizer)
        read = {}
        for file in FILES if not task.prompts else (*FILES, "prompts"):
            need = {"pairs": ("chosen", "rejected"), "prompts": ()}.get(file, ("chosen",))
            read[file] = read_examples(task.data, tokenizer, need=need, source=getattr(task, file), ends=ends)
        hashes = {"data": " ".join(source_hash(getattr(task, file), examples) for file, examples in read.items())}
        set_seed(seed)  # of new adapters
        model = load_model(task.model, tokenizer, self.device)
        if lost := lost_steps(model, min(self.config.rates)):
            raise ValueError(
                f"with dtype={task.model.dtype}, {name} must set lora_rank (or dtype=float32, for full fine-tuning): "
                f"it would train {lost}, at the lowest of rates"
            )
        return self._start_with(name, model, tokenizer, read, {"model": model_hash(model), **hashes})

    def _start_with(
        self,
        task: str,
        model: Any,
        tokenizer: Any,
        read: Mapping[str, list[Example]],
        hashes: dict[str, str],
    ) -> Start:
        """Return a start with the examples that were read."""
        budget = budget_of(self.config, task)
        rollout = RolloutArguments(max_new_tokens=budget.max_new_tokens, rollout_batch_size=budget.rollout_batch_size)
        arguments = EvalArguments(eval_samples=self.config.eval_samples, eval_limit=0)
        evaluations = {
            name: Evaluation(model, tokenizer, read[name], rollout, ScoreArguments(), arguments)
            for name in ("validation", "test")
        }
        trained_on = [*read["pairs"], *read.get("prompts", ())]
        for name, evaluation in evaluations.items():
            if not evaluation.answered:
                raise ValueError(f"{name} of {task} must hold records whose chosen answer is one turn, got none")
            if shared := shared_prompts(read[name], trained_on):
                raise ValueError(
                    f"{name} of {task} must hold questions that are not trained on, got {shared} of {len(read[name])} that "
                    "are in its pairs or prompts"
                )
        ends, markers = model_ends(model, tokenizer), ScoreArguments().markers
        answers = {
            e.prompt: final_answer(e.chosen_ids, tokenizer, ends, markers)
            for e in (*read["pairs"], *read.get("prompts", ()))
            if e.chosen_ids and not e.chosen_given
        }
        return Start(model, tokenizer, read["pairs"], read.get("prompts"), answers, evaluations, hashes)


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Hold a lock file for the block, once it is free."""
    while True:
        try:
            with locked(path, "output_dir"):
                yield
                return
        except HeldError:
            time.sleep(1)


def budget_of(config: Config, task: str) -> Budget:
    """Return the budget of a run: the config's, with the task's max_new_tokens."""
    if task in config.tasks:  # of any size: as many completions at once as a GPU with a large model can hold
        own = config.tasks[task]
        at_once = {"rollout_batch_size": 64, "micro_batch": own.micro_batch}
        return Budget(max_new_tokens=own.max_new_tokens, **at_once, **config.budget)
    return Budget(max_new_tokens=TASKS[task].max_new_tokens, **config.budget)


def uses_score(method: Method) -> bool:
    """Return True if S of Eq. 1 has a say in what the method learns."""
    informs = not method.shuffled and (method.score.final_weight or method.score.branch_weight)
    ordered = method.candidates and method.loss.loss == "pro"
    return bool(
        informs and "entropy" in comparator_weights(method.rank) and (ordered or method.kind in ("online", "ranked"))
    )


def curve_of(history: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Return the columns step and CURVE of the log entries that have a number of CURVE; None stands for what is not finite."""
    entries = [entry for entry in history if any(key in entry for key in CURVE)]
    columns = {
        key: [_short(entry[key]) if math.isfinite(entry.get(key, math.nan)) else None for entry in entries]
        for key in ("step", *CURVE)
    }
    return {key: column for key, column in columns.items() if any(value is not None for value in column)}


def _short(value: float, digits: int = 4) -> float:
    """Return a number with so many significant digits, an integer as it is."""
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


# --- the settings of a run --------------------------------------------------------------------------------------------


def settings_of(config: Config, job: Job) -> dict[str, Any]:
    """Return what the numbers of a run depend on, beside its start: dataclasses and plain values."""
    own = config.tasks.get(job.task)
    own = own and replace(own, micro_batch=0, gradient_checkpointing=False)  # they change the rounding alone
    budget = replace(budget_of(config, job.task), micro_batch=0)
    trained = {"method": METHODS[job.method], "budget": budget} if job.method else {}
    files = {name: data_hash(getattr(own, name)) for name in TASK_FILES} if own else {}
    task = own or replace(TASKS[job.task], summary="")  # words change no number
    return {"task": task, "files": files, "eval_samples": config.eval_samples, **trained}


def plain(value: Any) -> Any:
    """Return settings as JSON holds them: dataclasses as objects, functions by their names."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.__qualname__ if callable(value) else value


def changed(recorded: Any, now: Any, name: str = "") -> list[str]:
    """Return the names of the settings that are not those of a record, such as "method.rank.tau".

    A setting that is newer than the record was not there to be set: the record counts as made with its default.
    """
    if not isinstance(recorded, dict) or not (is_dataclass(now) or isinstance(now, dict)):
        return [] if recorded == plain(now) else [name]
    values = now if isinstance(now, dict) else {f.name: getattr(now, f.name) for f in fields(now)}
    older = {} if isinstance(now, dict) else {f.name: plain(_default(f)) for f in fields(now)}
    before = {**older, **recorded}
    return [
        inner
        for key in dict.fromkeys((*values, *recorded))
        for inner in changed(before.get(key, MISSING), values.get(key, MISSING), f"{name}.{key}".lstrip("."))
    ]


def _default(of: Field[Any]) -> Any:
    """Return the default of a field, MISSING if it has none."""
    return of.default if of.default_factory is MISSING else of.default_factory()
