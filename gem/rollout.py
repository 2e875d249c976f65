"""Prompts -> candidates, by transformers' own generate. Candidates from elsewhere come as a record's `candidates`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from gem.config import RolloutArguments

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
    """One completion for each prompt (repeat a prompt to get several), with its end of sequence unless cut off.

    Args:
        model: a transformers model; its mode (train or eval) is restored.
        prompts: token ids.
        arguments: max_new_tokens, temperature, top_p, rollout_batch_size.
        greedy: take the likeliest token instead of sampling from torch's global generator.
        progress: label of a progress bar, None: no bar.

    Returns:
        Completion token ids in the order of the prompts.
    """
    if arguments.top_p < 1 and not greedy:
        logger.warning("top_p=%g: the ratio to the sampler is off by the kept mass; 1.0 is exact", arguments.top_p)
    was_training = model.training
    model.eval()
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sampling = {} if greedy else {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    completions: list[list[int]] = [[] for _ in prompts]
    # What a checkpoint ships for chatting (a repetition penalty, say) would be a second temper on the distribution.
    shipped, base.generation_config = base.generation_config, GenerationConfig()
    try:
        # Prompts of one length together: no padding in most batches, and none that matters in the rest.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = arguments.rollout_batch_size
        for start in tqdm(range(0, len(order), size), desc=progress, disable=progress is None, leave=False):
            batch = order[start : start + size]
            width = max(len(prompts[i]) for i in batch)
            input_ids = torch.tensor(
                [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device
            )
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
            out = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=arguments.max_new_tokens,
                do_sample=not greedy,
                eos_token_id=eos,
                pad_token_id=pad,
                **sampling,
            )
            for i, ids in zip(batch, out[:, width:].tolist(), strict=True):
                completions[i] = ids[: ids.index(eos) + 1] if eos in ids else ids
    finally:
        base.generation_config = shipped
        model.train(was_training)
    return completions
