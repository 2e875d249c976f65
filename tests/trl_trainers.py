"""Trainers of TRL with a tiny model, for the tests of gem.integrations.trl."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")

from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from gem.tasks import build_tokenizer

STEPS = 5


TIMES = ("time", "runtime", "per_second", "total_flos")


CHAT = (
    "{% for m in messages %}{{ '+' if m['role'] == 'user' else '=' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def save_tiny_llama(path: Path) -> str:
    """Save a tiny Llama, where TRL looks for its reference model; a few nats between its logits. Return its folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def sums(n: int) -> list[dict[str, str]]:
    """Prompt, right and wrong answer."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        a, b = rng.randrange(10), rng.randrange(10)
        wrong = f"{a + b} #### {a + b + 1}" if rng.random() < 0.5 else f"{a + b + 1}"
        rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a}+{b}={a + b} #### {a + b}", "rejected": wrong})
    return rows


def fives(completions: list[Any], **_: Any) -> list[float]:
    """A reward that varies: the share of fives and blanks."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [(text.count("5") + text.count(" ")) / 8 for text in texts]


RECORDS = {
    SFTTrainer: [{"prompt": r["prompt"], "completion": r["chosen"]} for r in sums(24)],
    DPOTrainer: sums(24),
    KTOTrainer: [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
        for r in sums(12) for k in ("chosen", "rejected")
    ],
    GRPOTrainer: [{"prompt": r["prompt"]} for r in sums(24)],
    RLOOTrainer: [{"prompt": r["prompt"]} for r in sums(24)],
}  # fmt: skip


CONFIGS: dict[type, type] = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
}


SAMPLING = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.7, "num_iterations": 2, "beta": 0.1}


SETTINGS: dict[type, dict[str, Any]] = {
    SFTTrainer: {},
    DPOTrainer: {"beta": 0.5, "use_weighting": True},
    KTOTrainer: {"beta": 0.5},
    GRPOTrainer: SAMPLING,
    RLOOTrainer: SAMPLING,
}


def build_trainer(kind: type, model: Any, folder: str, tmp_path: Path, **changes: Any) -> Any:
    """A trainer of a few steps on the CPU in fp32; changes: of its arguments, and what TRL's constructor takes."""
    of_trainer = {
        k: changes.pop(k) for k in ("peft_config", "rollout_func", "reward_funcs", "ref_model") if k in changes
    }
    if kind in (GRPOTrainer, RLOOTrainer):
        of_trainer.setdefault("reward_funcs", [fives])
    records = changes.pop("records", RECORDS[kind])
    defaults = {
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
    }
    config = CONFIGS[kind](
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        lr_scheduler_type="constant",
        **{**defaults, **SETTINGS[kind], **changes},
    )
    tokenizer = changes.get("tokenizer") or build_tokenizer()
    tokenizer.chat_template = CHAT
    dataset = Dataset.from_list(records)
    return kind(
        model=model, args=config, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        processing_class=tokenizer, **of_trainer,
    )  # fmt: skip


def logs(trainer: Any) -> list[dict[str, float]]:
    """Return what a trained trainer logged, without times."""
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in TIMES)} for entry in trainer.state.log_history
    ]
