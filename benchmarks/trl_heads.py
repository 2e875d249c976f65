"""Five steps of TRL's trainers with TRL's lm_head and with ours, on a CPU: peak memory, time and losses.

    python -m benchmarks.trl_heads --out benchmarks/results/trl_heads-<device>-<date>.json
    python -m benchmarks.trl_heads --table benchmarks/results/trl_heads-<device>-<date>.json     the rows of docs/models.md

The model is a small Llama with a vocabulary of 128256, in fp32. Every run is its own process, the heads take turns, and the
table shows medians. The peak is the highest resident set in train() minus what was resident before: without weights, with
gradients and optimizer states, for both heads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks import turns
from benchmarks.measure import forget_peak, resident

V, D, STEPS, ROUNDS = 128256, 64, 5, 3
TASKS = {
    "DPO": "8 sequences of 64 + 192 tokens",
    "GRPO": "8 completions of up to 64 tokens for a prompt of 128",
    "SFT": "4 sequences of 512 tokens",
}
HEADS = ("TRL", "gem-kernels")


def build_trainer(task: str, folder: str) -> Any:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    from gem.tasks import build_tokenizer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": D,
        "intermediate_size": 2 * D,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=4, **sizes, **special)).save_pretrained(folder)
    rng = random.Random(0)

    def text(n: int) -> str:
        return "".join(rng.choice("0123456789+= ") for _ in range(n))

    common: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    }
    tokenizer = build_tokenizer()
    kind: Any
    args: Any
    match task:
        case "DPO":
            rows = [{"prompt": text(63), "chosen": text(191), "rejected": text(191)} for _ in range(4 * STEPS)]
            kind, args = DPOTrainer, DPOConfig(per_device_train_batch_size=4, max_length=512, **common)
        case "SFT":
            rows = [{"prompt": text(1), "completion": text(509)} for _ in range(4 * STEPS)]
            kind, args = SFTTrainer, SFTConfig(per_device_train_batch_size=4, max_length=512, **common)
        case _:
            rows = [{"prompt": text(127)} for _ in range(8 * STEPS)]
            size: dict[str, Any] = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 64}
            kind, args = GRPOTrainer, GRPOConfig(beta=0.1, **size, **common)
    reward = {"reward_funcs": mean_token} if task == "GRPO" else {}
    return kind(folder, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **reward)


def mean_token(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 7 for token in ids) / len(ids) for ids in completion_ids]


@contextlib.contextmanager
def timed(owner: Any, method: str, total: list[float]) -> Iterator[None]:
    """Append the seconds of every call of owner.method to `total` inside the block."""
    inner = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            total.append(time.perf_counter() - start)

    setattr(owner, method, watched)
    yield


def run(task: str, head: str) -> dict[str, Any]:
    """Run once, in this process."""
    from gem.integrations.trl import use_gem_head

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(task, folder)
        if head == "gem-kernels":
            use_gem_head(trainer)
        generation: list[float] = []
        with timed(trainer.model, "generate", generation), contextlib.redirect_stdout(io.StringIO()):
            before, start = forget_peak(), time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        peak = resident("VmHWM") - before
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"peak_mib": peak, "seconds": seconds - sum(generation), "generation": sum(generation), "losses": losses}


def measure() -> dict[str, Any]:
    shape = {"V": V, "D": D, "steps": STEPS, "rounds": ROUNDS}
    return turns.measure("benchmarks.trl_heads", "task", {task: task for task in TASKS}, HEADS, ROUNDS, shape)


def table(document: dict[str, Any]) -> list[str]:
    lines = [
        "| trainer | head | peak MiB | seconds, 5 steps | largest difference of a loss |",
        "|---|---|---:|---:|---:|",
    ]
    for task, batch in TASKS.items():
        runs = {h: [r for r in document["runs"] if (r["task"], r["head"]) == (task, h)] for h in HEADS}
        gap = max(abs(a - b) for a, b in zip(*(runs[h][0]["losses"] for h in HEADS), strict=True))
        for head in HEADS:
            peak, seconds = (statistics.median(r[name] for r in runs[head]) for name in ("peak_mib", "seconds"))
            what = f"{task}: {batch}" if head == HEADS[0] else ""
            lines.append(
                f"| {what} | {head} | {peak:,.0f} | {seconds:.1f} | {'' if head == HEADS[0] else f'{gap:.0e}'} |"
            )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    turns.main(parser, run, lambda arguments: measure(), table)
