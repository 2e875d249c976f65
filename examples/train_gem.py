"""Reference training script: all of GEM (arXiv 2511.13007) on a Hugging Face model, in plain calls.

    python examples/train_gem.py --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --output_dir runs/gem
    accelerate launch --config_file examples/configs/llama3-8b-8xa100/fsdp2.yaml examples/train_gem.py ...  # sharded

pairs.jsonl: one {"prompt": ..., "chosen": ..., "rejected": ...} per line, texts or chat messages; the last tenth is held out.
First a supervised warm start; then, per step: candidates -> entropies and Eq. 1 -> ranking with the human pair -> Eq. 2.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from gem.config import (
    COT_PROMPT,
    DataArguments,
    EvalArguments,
    GuardArguments,
    LossArguments,
    ModelArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
)
from gem.data import read_examples
from gem.ends import model_ends
from gem.evaluate import Evaluation
from gem.models import load_model, load_tokenizer
from gem.pipeline import GroupMaker, pair_group
from gem.reference import reference_for
from gem.trainer import GEMTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub name, GGUF file, or a config .json: from scratch")
    parser.add_argument("--tokenizer", help="folder, hub name or tokenizer.json; default: the model's")
    parser.add_argument("--eos_token", help="for a tokenizer.json that does not name its end of sequence")
    parser.add_argument("--data", required=True, help="preference records, jsonl or a datasets folder")
    parser.add_argument("--output_dir", default="runs/gem")
    parser.add_argument("--warm_steps", type=int, default=200, help="supervised steps on the chosen answers")
    parser.add_argument("--steps", type=int, default=200, help="GEM steps")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts per step and process")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--prompt_format", default="auto", help="plain prompts: auto | chat (the user's turn) | text")
    parser.add_argument("--system", default="", help="system message for chats without one")
    parser.add_argument("--cot_prompt", nargs="?", const=COT_PROMPT, help="ask candidates for a chain of thought")
    parser.add_argument("--dtype", default="float32", help="of the weights; bfloat16 loses small steps of AdamW")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: for a GPU")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()

    # Model and data. Records become token ids once; labels are shifted once, in gem.data.pack.
    set_seed(a.seed)
    model_arguments = ModelArguments(a.model, a.tokenizer, a.eos_token, a.dtype)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, tokenizer)
    rollout = RolloutArguments(group_size=5, max_new_tokens=a.max_new_tokens, cot_prompt=a.cot_prompt)
    frame = "{prompt}" if tokenizer.chat_template else "{prompt}\n"
    prompting = {"prompt_format": a.prompt_format, "prompt_template": frame, "system": a.system}
    data, ends = DataArguments(a.data, max_length=a.max_length, **prompting), model_ends(model, tokenizer)
    examples = read_examples(data, tokenizer, need=("chosen", "rejected"), rollout=rollout, ends=ends)
    held_out = examples[-max(1, len(examples) // 10) :]
    examples = examples[: len(examples) - len(held_out)]

    shared = {"per_device_train_batch_size": a.batch_size, "learning_rate": a.learning_rate, "logging_steps": 1}

    def arguments(name: str, steps: int, **more: Any) -> TrainingArguments:
        more |= {"output_dir": f"{a.output_dir}/{name}", "report_to": "none", "bf16": a.bf16, "seed": a.seed}
        return TrainingArguments(max_steps=steps, warmup_steps=steps // 10, **shared, **more)

    # Warm start: -log pi(chosen), a mean over tokens. The rejected answers are not read.
    warm_start = GEMTrainer(
        model,
        arguments("warm-start", a.warm_steps, save_strategy="no"),
        loss=LossArguments(loss="sft"),
        guard=GuardArguments(),
        train_dataset=[pair_group(example) for example in examples],
        processing_class=tokenizer,
    )
    warm_start.train()
    warm_start.save_model()  # under FSDP2 the model is in shards now: the next phase begins with a whole one
    warm_start.accelerator.wait_for_everyone()
    model = load_model(replace(model_arguments, model=f"{a.output_dir}/warm-start"), tokenizer)

    # GEM. Each step samples k candidates per prompt, scores them with Eq. 1, ranks them together with the human pair
    # (Bradley-Terry posterior) and turns the ranks into the weights of Eq. 2. The reference is the frozen warm start.
    loss, score, rank = LossArguments(), ScoreArguments(), RankArguments()  # SEGA, 0.05 KL, 0.1 supervised
    make_groups = GroupMaker(model, tokenizer, rollout, score, rank, reference_for(model, loss, score), pairs=examples)
    evaluation = Evaluation(model, tokenizer, held_out, rollout, score, EvalArguments())
    trainer = GEMTrainer(
        model,
        arguments("gem", a.steps, eval_strategy="steps", eval_steps=max(1, a.steps // 10), eval_on_start=True),
        loss=loss,
        guard=GuardArguments(),  # warn if the score is uninformative, stop if held-out numbers fall
        train_dataset=examples,
        processing_class=tokenizer,
        make_groups=make_groups,
        evaluation=evaluation,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    metrics = json.dumps(evaluation(model), indent=1)
    if trainer.is_world_process_zero():
        (Path(a.output_dir) / "gem" / "metrics.json").write_text(metrics)
        print(metrics)  # `gem-kernels report runs/gem/gem` draws the curves


if __name__ == "__main__":
    main()
