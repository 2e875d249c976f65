"""Prompts -> candidates, by transformers' own generate. Candidates from elsewhere come as a record's `candidates`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gem.config import RolloutArguments
from gem.decoding import decode
from gem.ends import Ends, model_ends
from gem.models import check_positions

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    arguments: RolloutArguments,
    *,
    greedy: bool = False,
    progress: str | None = None,
) -> list[list[int]]:
    """One completion for each prompt (repeat a prompt to get several), with what ends it unless cut off.

    Each end of the model and of the tokenizer ends a completion, and so does the token that completes a text of `stop`.

    Args:
        model: a transformers model; its mode (train or eval) is restored.
        prompts: token ids.
        arguments: max_new_tokens, temperature, top_p, stop, rollout_batch_size.
        greedy: take the likeliest token instead of sampling from torch's global generator.
        progress: label of a progress bar, None: no bar.

    Returns:
        Completion token ids in the order of the prompts.

    Raises:
        ValueError: a prompt that leaves the model no room for max_new_tokens; before anything is generated.
    """
    check_room(model, prompts, arguments)
    if arguments.top_p < 1 and not greedy:
        logger.warning("top_p=%g: the ratio to the sampler is off by the kept mass; 1.0 is exact", arguments.top_p)
    was_training = model.training
    model.eval()
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    ends = model_ends(base, tokenizer, arguments.stop)
    pad = _pad_id(base, tokenizer, ends)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": not greedy}
    options |= {"eos_token_id": sorted(ends.ids), "pad_token_id": pad}
    if not greedy:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    completions: list[list[int]] = [[] for _ in prompts]
    # What a checkpoint ships for chatting (a repetition penalty, say) would be a second temper on the distribution.
    shipped, base.generation_config = base.generation_config, GenerationConfig()
    try:
        # Prompts of one length together: no padding in most batches, and none that matters in the rest.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = arguments.rollout_batch_size
        for start in tqdm(range(0, len(order), size), desc=progress, disable=progress is None, leave=False):
            batch = order[start : start + size]
            inputs = _left_padded([prompts[i] for i in batch], pad, next(model.parameters()).device)
            width = inputs["input_ids"].shape[1]
            stopping = StoppingCriteriaList([StopTexts(ends, tokenizer, width)] if ends.texts else [])
            out = model.generate(**inputs, **options, stopping_criteria=stopping)  # type: ignore[operator]
            for i, ids in zip(batch, out[:, width:].tolist(), strict=True):
                # The batch goes on after one row has ended: what stands behind is padding.
                completions[i] = ends.cut(ids, tokenizer)
    finally:
        base.generation_config = shipped
        model.train(was_training)
    return completions


def check_room(model: nn.Module, prompts: Sequence[Sequence[int]], arguments: RolloutArguments) -> None:
    """Whether the model has positions for every prompt and max_new_tokens behind it; see `check_positions`.

    Raises:
        ValueError: it has not, and cannot go beyond its positions.
    """
    longest = max(map(len, prompts), default=0)
    what = f"max_new_tokens={arguments.max_new_tokens} behind a prompt of {longest} tokens"
    check_positions(model, longest + arguments.max_new_tokens, what)


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends each row whose new tokens, those from `width` on, hold a stop text. Probabilities are left alone."""

    def __init__(self, ends: Ends, tokenizer: Any, width: int) -> None:
        self.texts, self.tokenizer, self.width = ends.texts, tokenizer, width
        # A character takes four tokens at most (a byte each); some more, as a decoder may trim where a text begins.
        self.window = 4 * max(map(len, ends.texts)) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        start = max(self.width, input_ids.shape[1] - self.window)
        rows = input_ids[:, start:].tolist()
        said = [decode(row, self.tokenizer) for row in rows]
        return torch.tensor([any(text in row for text in self.texts) for row in said], device=input_ids.device)


def _pad_id(model: Any, tokenizer: Any, ends: Ends) -> int:
    """The tokenizer's padding where the model has an embedding for it, else an end: masked before, cut off behind."""
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return int(pad) if pad is not None and pad < rows else min(ends.ids, default=0)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, (R, T) int64, of prompts that end together."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
