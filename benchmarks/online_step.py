"""What a step of online GEM costs, stage by stage, on a CPU: this tree, another checkout, and TRL's GRPOTrainer.

    python -m benchmarks.online_step --out benchmarks/results/online_step-<device>-<date>.json [--against PATH] [MODEL]
    python -m benchmarks.online_step --table benchmarks/results/online_step-<device>-<date>.json

MODEL is SmolLM2-135M-Instruct, a folder or a GGUF file; without it, only the demo's task is run. PATH is a checkout whose gem
and gem_kernels run the same steps with the same seeds.

    demo       80 steps of the demo's GEM arm: 16 prompts, 5 candidates of up to 32 tokens
    SmolLM2    5 steps: 2 prompts, 4 candidates of up to 64 tokens; full fine-tuning, and LoRA of rank 8

GEM trains on the human pair of a prompt beside its candidates, GRPO on the candidates alone; all have a reference. Every run
is its own process, the arms take turns, and the tables show medians. FLOP and tokens are counted in a run of their own, of
2 steps of SmolLM2: that takes time.

The stages are told apart from outside, so that every tree and trainer is measured alike:

    generation   model.generate
    scoring      forwards of the policy without gradients
    reference    forwards of another model, or of the policy with its adapters off
    training     the rest of training_step
    optimizer    its step
    rest         data, text, ranking, logs
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import turns
from benchmarks.results import ROOT, said

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Json = dict[str, Any]

STAGES = ("generation", "scoring", "reference", "training", "optimizer", "rest")
NOW, BEFORE, TRL_OURS, TRL_OWN = "gem-kernels", "gem-kernels before", "TRL, gem's head", "TRL"
DEMO, FULL, LORA = "demo", "SmolLM2", "SmolLM2, LoRA"
STEPS = {DEMO: 80, FULL: 5, LORA: 5}
COUNTED = {DEMO: 80, FULL: 2, LORA: 2}
PROMPTS, K, NEW_TOKENS, RANK, BETA = 2, 4, 64, 8, 0.05
RATES = {FULL: 1e-5, LORA: 1e-4}


# --- the stages of a step -----------------------------------------------------------------------------------------------


class Stages:
    """Seconds, tokens through the body and, with a counter, FLOP of each stage. Everything belongs to exactly one stage."""

    def __init__(self, counter: FlopCounterMode | None = None) -> None:
        self.seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.flop: Counter[str] = Counter()
        self._counter, self._open = counter, ["rest"]
        self._at, self._counted = time.perf_counter(), 0

    @property
    def now(self) -> str:
        return self._open[-1]

    def begin(self, stage: str) -> None:
        self.settle()
        self._open.append(stage)

    def end(self) -> None:
        self.settle()
        self._open.pop()

    def settle(self) -> None:
        """Put what was spent since the last change on the account of the stage that ran."""
        now, counted = time.perf_counter(), self._counter.get_total_flops() if self._counter else 0
        self.seconds[self.now] += now - self._at  # type: ignore[assignment]
        self.flop[self.now] += counted - self._counted
        self._at, self._counted = now, counted

    def inside(self, stage: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, each call of which belongs to the stage that `stage` names for its arguments."""

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.begin(stage(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return watched


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let owner.name be make(owner.name) inside the block."""
    own, inner = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(inner))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, inner)
        else:
            delattr(owner, name)


@contextmanager
def watching(trainer: Any, counter: FlopCounterMode | None = None) -> Iterator[Stages]:
    """Account for what runs inside the block by its stage. Classes are watched, so that a reference is seen too."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import GenerationMixin, TrainerCallback

    policy = trainer.model
    causal = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    body = getattr(causal, causal.base_model_prefix)
    tuned = next((m for m in policy.modules() if isinstance(m, BaseTunerLayer)), None)
    stages = Stages(counter)

    def of_forward(module: Any, *_: Any) -> str:
        if stages.now in ("generation", "scoring", "reference"):  # a forward inside a forward
            return stages.now
        if (module is not policy and module is not causal) or (tuned is not None and tuned.disable_adapters):
            return "reference"
        return stages.now if torch.is_grad_enabled() else "scoring"

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
            rows = args[0] if args else kwargs.get("input_ids")
            rows = kwargs["inputs_embeds"][..., 0] if rows is None else rows
            stages.tokens[stages.now] += rows.numel()
            return forward(module, *args, **kwargs)

        return watched

    class Optimizer(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            stages.begin("optimizer")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            stages.end()

    with ExitStack() as stack:
        for owner in {type(policy), type(causal)}:
            stack.enter_context(replaced(owner, "__call__", lambda f: stages.inside(of_forward, f)))
        stack.enter_context(replaced(type(body), "__call__", counted))
        generation = replaced(GenerationMixin, "generate", lambda f: stages.inside(lambda *_: "generation", f))
        training = replaced(trainer, "training_step", lambda f: stages.inside(lambda *_: "training", f))
        stack.enter_context(generation)
        stack.enter_context(training)
        trainer.add_callback(Optimizer)
        try:
            yield stages
        finally:
            stages.settle()
            trainer.remove_callback(Optimizer)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, taught the operators that it does not know: ours, sums in place, and attention on a CPU.

    A group loss is made of products that it sees. Our operators hide theirs: one of hidden (N, D) and weight (V, D) forward;
    backward that again, and one for each of the two gradients that is needed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gem_kernels.operands import N_UPSTREAM

    def head(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
        return int(2 * hidden[0] * hidden[1] * weight[0])

    def head_backward(*args: Any, **_: Any) -> int:
        hidden, weight = args[N_UPSTREAM + 1 : N_UPSTREAM + 3]
        needed: list[bool] = args[-1]
        return head(hidden, weight) * (1 + needed[0] + needed[1])

    def product_in_place(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query
        return int(2 * batch * heads * length * key[2] * (size + value[3]))

    def attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return attention(query, key, value) * 5 // 2  # scores again, and four gradients, where forward has two products

    ours, aten = torch.ops.gem_kernels, torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ours.linear_logprob: head,
            ours.linear_logprob_backward: head_backward,
            aten.addmm_: product_in_place,
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        },
    )


# --- what is trained ----------------------------------------------------------------------------------------------------


def prepare(folder: Path, source: str | None) -> None:
    """Make what the runs of all arms begin with, unless it is there: the demo's data and warm start, and MODEL as a folder."""
    from gem.config import ModelArguments
    from gem.models import load_model, load_tokenizer
    from gem.tasks import CHAIN, make_start

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        make_start(CHAIN, folder, 0)
    if not (folder / DEMO).exists():
        shutil.copytree(folder / "warm-start", folder / DEMO)
    if source and not (folder / FULL).exists():
        tokenizer = load_tokenizer(ModelArguments(model=source))
        model: Any = load_model(ModelArguments(model=source), tokenizer)
        model.save_pretrained(folder / FULL)
        tokenizer.save_pretrained(folder / FULL)


def questions() -> list[dict[str, str]]:
    """Return a record for every prompt of SmolLM2's steps: prompt, chosen, rejected."""
    rng, rows = random.Random(0), []
    for _ in range(PROMPTS * STEPS[FULL]):
        minute, minutes = rng.randrange(60, 1000), rng.randrange(20, 300)
        start, end, wrong = (f"{t // 60}:{t % 60:02d}" for t in (minute, minute + minutes, minute + minutes + 10))
        hours = f"{minutes // 60} h {minutes % 60} min"
        rows.append(
            {
                "prompt": f"A train leaves at {start} and needs {hours}. When does it arrive? Reason step by step.",
                "chosen": f"The train needs {minutes} minutes. {minutes} minutes after {start} it is {end}.\n#### {end}",
                "rejected": f"The train needs {minutes} minutes.\n#### {wrong}",
            }
        )
    return rows


def gem_trainer(case: str, folder: Path, steps: int) -> Any:
    """Return a GEMTrainer that trains online, without evaluation, of whichever tree is imported."""
    from transformers import TrainingArguments

    from gem.config import (
        GuardArguments,
        LossArguments,
        ModelArguments,
        RankArguments,
        RolloutArguments,
        ScoreArguments,
    )
    from gem.data import encode_records, load_records
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import GroupMaker
    from gem.trainer import GEMTrainer

    source = str(folder / (DEMO if case == DEMO else FULL))
    tokenizer = load_tokenizer(ModelArguments(model=source))
    model = load_model(ModelArguments(model=source, lora_rank=RANK if case == LORA else 0), tokenizer)
    if case == DEMO:
        loss, rank, prompts, rate, k = LossArguments(), RankArguments(), 16, 2e-5, 5
        records = load_records(str(folder / "data" / "pairs.jsonl"), need=("chosen", "rejected"))
        examples, new = encode_records(records, tokenizer, prompt_template="{prompt}", max_length=64), 32
    else:
        loss, rank, prompts, rate, k = LossArguments(), RankArguments(), PROMPTS, RATES[case], K
        form: Any = {"prompt_template": "{prompt}", "max_length": 1024, "prompt_format": "chat"}
        examples, new = encode_records(questions(), tokenizer, **form), NEW_TOKENS
    rollout = RolloutArguments(group_size=k, max_new_tokens=new, rollout_batch_size=prompts * k)
    score = ScoreArguments()
    maker = GroupMaker(model, tokenizer, rollout, score, rank, reference_of(model, loss, score))
    arguments = TrainingArguments(
        max_steps=steps, per_device_train_batch_size=prompts, learning_rate=rate, **common(folder)
    )
    return GEMTrainer(
        model,
        arguments,
        loss=loss,
        guard=GuardArguments(stop_patience=0, stop_idle=0),
        train_dataset=examples,
        processing_class=tokenizer,
        make_groups=maker,
    )


def reference_of(model: Any, loss: Any, score: Any) -> Any:
    """Return the reference that `gem-kernels train` makes in the tree that is imported."""
    try:
        from gem.reference import reference_for
    except ImportError:  # before gem.reference: always a copy
        import copy

        return copy.deepcopy(model).eval().requires_grad_(False)
    return reference_for(model, loss, score)


def trl_trainer(case: str, folder: Path, steps: int, ours: bool) -> Any:
    """Return a GRPOTrainer over the same prompts, k, lengths and adapters."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    from gem.config import ModelArguments
    from gem.integrations.trl import use_gem_head
    from gem.models import load_tokenizer

    source = str(folder / FULL)
    sizes: dict[str, Any] = {"num_generations": K, "max_completion_length": NEW_TOKENS, "beta": BETA}
    trainer: Any = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        length,
        GRPOConfig(
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * K,
            learning_rate=RATES[case],
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            **sizes,
            **common(folder),
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in questions()]),
        processing_class=load_tokenizer(ModelArguments(model=source)),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear") if case == LORA else None,
    )
    return use_gem_head(trainer) if ours else trainer


def length(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward that costs nothing and varies."""
    return [len(completion[0]["content"]) / 100 for completion in completions]


def common(folder: Path) -> dict[str, Any]:
    """Return the arguments that all trainers share."""
    return {
        "output_dir": str(folder / "out"),
        "seed": 0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }


# --- runs ---------------------------------------------------------------------------------------------------------------


def run(argument: str, arm: str) -> Json:
    """Run once, in this process. argument: JSON with case, folder, steps, count, and the tree whose gem must run."""
    from transformers import set_seed

    import gem
    from benchmarks.measure import forget_peak, resident

    given = json.loads(argument)
    if (found := Path(gem.__file__).parent.parent) != Path(given["trees"][arm]):
        raise RuntimeError(f"{arm} must run the gem of {given['trees'][arm]}, got that of {found}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    case, folder, steps = given["case"], Path(given["folder"]), given["steps"]
    import_module("gem.trainer" if arm in (NOW, BEFORE) else "gem.integrations.trl")  # code is no part of the peak
    resting = forget_peak()
    set_seed(0)
    if arm in (NOW, BEFORE):
        trainer = gem_trainer(case, folder, steps)
    else:
        trainer = trl_trainer(case, folder, steps, ours=arm == TRL_OURS)
    counter = flop_counter() if given["count"] else None
    forget_peak()
    with redirect_stdout(StringIO()), counter or nullcontext(), watching(trainer, counter) as stages:
        trainer.train()
    row = {"steps": steps, "tokens": dict(stages.tokens)}
    if counter:
        return {**row, "flop": dict(stages.flop)}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**row, "seconds": dict(stages.seconds), "peak_mib": resident("VmHWM") - resting, "losses": losses}


def measure(arguments: argparse.Namespace) -> Json:
    """Run all cases and arms: once with a counter, then several times on the clock."""
    against: Path | None = arguments.against and arguments.against.resolve()
    trees = {arm: str(ROOT) for arm in (NOW, TRL_OURS, TRL_OWN)} | ({BEFORE: str(against)} if against else {})
    ours = [NOW, BEFORE] if against else [NOW]
    with tempfile.TemporaryDirectory() as made:
        folder = (arguments.folder or Path(made)).resolve()
        prepare(folder, arguments.model)
        documents = []
        for count, steps, rounds in ((True, COUNTED, 1), (False, STEPS, arguments.rounds)):
            for cases, arms in (([DEMO], ours), ([FULL, LORA] if arguments.model else [], [*ours, TRL_OURS, TRL_OWN])):
                shared = {"folder": str(folder), "trees": trees, "count": count}
                runs = {
                    case: json.dumps({"case": case, "steps": 2 if arguments.trial else steps[case], **shared})
                    for case in cases
                }
                other = {BEFORE: against} if against else {}
                documents.append(turns.measure("benchmarks.online_step", "case", runs, arms, rounds, {}, trees=other))
    first, *_, last = documents
    shape = {"steps": STEPS, "prompts": PROMPTS, "k": K, "new_tokens": NEW_TOKENS, "rank": RANK, "beta": BETA}
    return {
        **first,
        "against": said("git", "-C", str(against), "rev-parse", "HEAD") if against else None,
        "load": {"before": first["load"]["before"], "after": last["load"]["after"]},
        "shape": {**shape, "rounds": arguments.rounds},
        "runs": [row for document in documents for row in document["runs"]],
    }


# --- tables -------------------------------------------------------------------------------------------------------------


def table(document: Json) -> list[str]:
    """Return a table of seconds and memory, and one of FLOP and tokens."""
    seconds = [
        f"| task | | {' | '.join(STAGES)} | steps a second | peak MiB | largest difference of a loss |",
        f"|---|---|{'---:|' * (len(STAGES) + 3)}",
    ]
    counts = [
        f"| task | | {' | '.join(STAGES[:4])} | GFLOP a step | {' | '.join(STAGES[:4])} | tokens a step |",
        f"|---|---|{'---:|' * 10}",
    ]
    runs = document["runs"]
    for case in dict.fromkeys(r["case"] for r in runs):
        arms = list(dict.fromkeys(r["head"] for r in runs if r["case"] == case))
        for arm in arms:
            mine = [r for r in runs if (r["case"], r["head"]) == (case, arm)]
            timed, (counted,) = [r for r in mine if "seconds" in r], [r for r in mine if "flop" in r]
            steps, name = timed[0]["steps"], f"| {case if arm == arms[0] else ''} | {arm} |"
            spent = {s: statistics.median(r["seconds"].get(s, 0.0) for r in timed) / steps for s in STAGES}
            rate = steps / statistics.median(sum(r["seconds"].values()) for r in timed)
            peak = statistics.median(r["peak_mib"] for r in timed)
            gap = f"{_gap(runs, case):.0e}" if arm == BEFORE else ""
            each = " | ".join(f"{value:.3f}" for value in spent.values())
            seconds.append(f"{name} {each} | {rate:.3g} | {peak:,.0f} | {gap} |")
            flop, tokens = (
                [counted[what].get(stage, 0) / unit for stage in STAGES[:4]] + [sum(counted[what].values()) / unit]
                for what, unit in (("flop", 1e9 * counted["steps"]), ("tokens", counted["steps"]))
            )
            counts.append(
                f"{name} {' | '.join(f'{x:,.1f}' for x in flop)} | {' | '.join(f'{x:,.0f}' for x in tokens)} |"
            )
    return [*seconds, "", *counts]


def _gap(runs: list[Json], case: str) -> float:
    """Return the largest difference between the losses of one step in the two trees."""
    losses = [
        next(r["losses"] for r in runs if (r["case"], r["head"]) == (case, arm) and "losses" in r)
        for arm in (NOW, BEFORE)
    ]
    return float(max(abs(a - b) for a, b in zip(*losses, strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="SmolLM2-135M-Instruct: a folder or a GGUF file")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--folder", type=Path, help="keep the demo's warm start and the model here for the next call")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of every arm")
    parser.add_argument("--trial", action="store_true", help="two steps a run")
    turns.main(parser, run, measure, table)
