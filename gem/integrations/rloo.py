"""TRL's RLOOTrainer and RewardTrainer as baselines: gem's examples in, TRL's own sampling, advantages, KL and loss inside.

    history, tokens = train_rloo(model, start, tokenizer, examples, majority_reward, markers, budget, settings)

A reward function gets the examples of a step, each with its completions (ids and normalised answer), and returns their rewards.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer  # type: ignore[attr-defined]

from gem.answers import final_answer, most_frequent
from gem.config import GuardArguments
from gem.data import Example
from gem.ends import Ends, model_ends
from gem.guard import SoundWeights, check_weights
from gem.stops import Diverged

GUARD = GuardArguments(stop_growth=0)  # of finite weights alone: a comparison needs equal budgets


class Sampled(NamedTuple):
    """A completion that TRL sampled."""

    ids: list[int]
    answer: str  # normalised; "" if it was cut off or gives none


Reward = Callable[[Example, Sequence[Sampled]], list[float]]
"""The rewards of the completions of one example."""


class Sampling(Protocol):
    """What train_rloo reads of a budget."""

    @property
    def prompts(self) -> int: ...
    @property
    def micro(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...


def majority_reward(example: Example, completions: Sequence[Sampled]) -> list[float]:
    """Return 1 for each completion with the most frequent answer of the group, of equals the first; else 0."""
    most, _ = most_frequent([c.answer for c in completions])
    return [float(bool(c.answer) and c.answer == most) for c in completions]


def perfect_reward(answers: Mapping[str, str]) -> Reward:
    """Return the reward that is 1 for the right answer, by the text of the prompt."""

    def reward(example: Example, completions: Sequence[Sampled]) -> list[float]:
        return [float(bool(c.answer) and c.answer == answers[example.prompt]) for c in completions]

    return reward


def model_reward(
    start: Any, tokenizer: Any, pairs: Sequence[Example], budget: Sampling, settings: Mapping[str, Any]
) -> Reward:
    """Train a reward model on human pairs with TRL's RewardTrainer, and return its reward.

    Args:
        start: a transformers model: the reward model is its body with a new head. Of a PeftModel, its body with the adapters
            merged in, under new ones of the same rank.
        tokenizer: the model's tokenizer.
        pairs: as many as all steps take.
        budget: pairs of a step and of a micro-batch.
        settings: of TrainingArguments.

    Raises:
        Diverged: a weight is not finite after a step.
    """
    adapters = _reward_adapters(start)
    with _scratch(settings) as folder:
        merged = copy.deepcopy(start).merge_and_unload() if adapters else start
        merged.save_pretrained(folder)
        del merged
        gc.collect()  # a fused head and its model hold one another
        scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=start.dtype)
    scorer.score.float()  # a new head learns little in bfloat16, whose steps are coarser than the learning rate
    half = start.dtype == torch.bfloat16
    tokenizer = _padding_with_no_end(tokenizer, model_ends(start, tokenizer))
    scorer.config.pad_token_id = _pad_id(tokenizer)
    rows = [{"chosen_ids": e.prompt_ids + e.chosen_ids, "rejected_ids": e.prompt_ids + e.rejected_ids} for e in pairs]
    args = RewardConfig(
        per_device_train_batch_size=budget.micro,
        gradient_accumulation_steps=budget.prompts // budget.micro,
        bf16=half,
        max_length=None,
        **{"gradient_checkpointing": False, **settings},
    )
    trainer: Any = RewardTrainer(
        scorer,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=[SoundWeights(GUARD)],
    )
    trainer.train()
    scorer = trainer.model.eval()

    @torch.no_grad()
    def reward(example: Example, completions: Sequence[Sampled]) -> list[float]:
        rows = [torch.tensor(example.prompt_ids + c.ids) for c in completions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_pad_id(tokenizer))
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = scorer.device
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = scorer(ids.to(device), mask.to(device)).logits
        return logits[:, 0].tolist()  # type: ignore[no-any-return]

    return reward


def _scratch(settings: Mapping[str, Any]) -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a model, in that of the run: who ends a run by force finds nothing elsewhere."""
    inside = Path(settings["output_dir"])
    inside.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=inside)


def _padding_with_no_end(tokenizer: Any, ends: Ends) -> Any:
    """Return a copy whose padding is no end of an answer, if it has such a token: a reward model reads what precedes it."""
    own = copy.deepcopy(tokenizer)
    special = [own.pad_token, own.bos_token, own.unk_token, *map(str, own.added_tokens_decoder.values())]
    free = (token for token in special if token and own.convert_tokens_to_ids(token) not in ends.ids)
    own.pad_token = next(free, own.pad_token)
    return own


def _reward_adapters(start: Any) -> Any:
    """Return the LoraConfig of a reward model on a PeftModel, which makes the new head train too; None without adapters."""
    if not hasattr(start, "peft_config"):
        return None
    from peft import LoraConfig  # an extra

    own = start.peft_config[start.active_adapter]
    return LoraConfig(task_type="SEQ_CLS", r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules)


def train_rloo(
    model: Any,
    start: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    reward: Reward,
    markers: Sequence[str],
    budget: Sampling,
    settings: Mapping[str, Any],
) -> tuple[list[dict[str, float]], int]:
    """Train the model in place; return TRL's log and the number of sampled tokens.

    Args:
        model: a transformers model.
        start: TRL's reference, of the KL term.
        tokenizer: the models' tokenizer.
        examples: whose prompts TRL samples from.
        reward: of the completions of an example.
        markers: texts that announce the answer.
        budget: prompts of a step, completions of a prompt, tokens of a completion.
        settings: of TrainingArguments.

    Raises:
        Diverged: TRL samples from NaN, or a weight or a reward is not finite.
        ValueError: the tokenizer does not give an example's prompt_ids for any text that TRL could be handed.
    """
    by_text = {_text(e, tokenizer): e for e in examples}
    ends, k = model_ends(start, tokenizer), budget.group_size
    tokens = 0

    def of_group(example: Example, ids: list[list[int]]) -> list[float]:
        given = reward(example, [Sampled(own, _answer(own, tokenizer, ends, markers)) for own in ids])
        if not all(map(math.isfinite, given)):  # of which TRL would make an advantage of 0
            raise Diverged(f"the rewards of a prompt must be finite, got {given} for {example.prompt[:60]!r}")
        return given

    def rewards(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        starts = range(0, len(prompts), k)
        return [r for at in starts for r in of_group(by_text[prompts[at]], completion_ids[at : at + k])]

    args = RLOOConfig(
        per_device_train_batch_size=budget.micro * k,
        gradient_accumulation_steps=budget.prompts // budget.micro,
        num_generations=k,
        max_completion_length=budget.max_new_tokens,
        bf16=False,
        **{"gradient_checkpointing": False, **settings},
    )
    with _scratch(settings) as folder:
        if not hasattr(start, "peft_config"):  # else the reference is a copy of the adapters
            start.save_pretrained(folder)
            model.config._name_or_path = folder  # from where TRL loads the reference
        dataset = Dataset.from_list([{"prompt": _text(e, tokenizer)} for e in examples])
        sound: list[TrainerCallback] = [SoundWeights(GUARD)]
        trainer: Any = RLOOTrainer(
            model, rewards, args, train_dataset=dataset, processing_class=tokenizer, callbacks=sound
        )
        try:
            trainer.train()
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise Diverged(f"step {trainer.state.global_step + 1}: {error}") from None
    check_weights(model, "after training by RLOO, the model has")
    return trainer.state.log_history, tokens


def _text(example: Example, tokenizer: Any) -> str:
    """Return the text of which TRL, which tokenizes prompts itself, makes the example's prompt_ids."""
    bos = tokenizer.bos_token or ""
    # A rendered chat begins with the token that the tokenizer adds.
    for text in (example.prompt, example.prompt.removeprefix(bos)):
        if tokenizer(text=text)["input_ids"] == example.prompt_ids:
            return text
    raise ValueError(
        f"tokenizer must give the prompt_ids of every prompt to TRL, got others for {example.prompt[:60]!r}"
    )


def _answer(ids: Sequence[int], tokenizer: Any, ends: Ends, markers: Sequence[str]) -> str:
    return final_answer(ids, tokenizer, ends, markers) if ends.has_ended(ids, tokenizer) else ""


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
