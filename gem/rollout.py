"""Prompts -> completions: the protocol of a rollout backend, and the backend that runs transformers' own generate."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gem.config import RolloutArguments
from gem.decoding import decode
from gem.ends import Ends, model_ends
from gem.positions import check_positions
from gem.stops import Diverged
from gem.tokens import left_pad

logger = logging.getLogger(__name__)


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Seed torch's random numbers of the block from `key` alone, and leave those outside of it as they were.

    What is sampled then depends on nothing that happened before: a resumed run samples what an uninterrupted one would.

    Args:
        key: values with a repr of their own, such as numbers, texts, and lists of them.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))
        yield


class Sampler(Protocol):
    """Rollout backend: GroupMaker draws candidates from it, Evaluation draws answers. A new backend is one such class."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, greedy: bool = False, progress: str | None = None
    ) -> list[list[int]]:
        """Return one completion per prompt, in the order of the prompts; a repeated prompt gets independent samples.

        Online training takes what is sampled for samples of the policy as it is at the call, at temperature 1: a backend that
        lags behind, or samples otherwise, biases the KL term and is exempt from `taper`. Its settings are its own. It takes
        its random numbers, or the seed of its requests, from torch's global generator, which the caller seeds: so a resumed
        run samples what an uninterrupted one would.

        Args:
            prompts: token ids.
            greedy: take the likeliest token instead of sampling.
            progress: label of a progress bar; None: no bar.

        Returns:
            Token ids, at least one. A completion includes the end of sequence, or the token that completes a stop text; one
            without either was cut off.
        """


def sample_completions(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    ends: Ends,
    tokenizer: Any,
    *,
    greedy: bool = False,
    progress: str | None = None,
) -> list[list[int]]:
    """Return one completion per prompt from any backend, cut behind its first end.

    Raises:
        ValueError: the backend returned another number of completions, or one that is no non-empty list of token ids.
    """
    if not prompts:
        return []
    completions = sampler(prompts, greedy=greedy, progress=progress)
    if len(completions) != len(prompts):
        raise ValueError(f"sampler must return a completion for each of {len(prompts)} prompts, got {len(completions)}")
    for ids in completions:
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"sampler must return non-empty lists of token ids, got {str(ids)[:80]!r}")
    return [ends.cut(ids, tokenizer) for ids in completions]


@dataclass(frozen=True)
class TransformersSampler:
    """Sampler over `generate`: it samples from the model's weights at the time of the call."""

    model: nn.Module
    tokenizer: Any
    arguments: RolloutArguments

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, greedy: bool = False, progress: str | None = None
    ) -> list[list[int]]:
        return generate(self.model, self.tokenizer, prompts, self.arguments, greedy=greedy, progress=progress)


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
    """Generate one completion per prompt with transformers; repeat a prompt to get several samples.

    A completion ends at any end of sequence that the model or the tokenizer names, or at the token that completes a text
    of `stop`. It includes that end.

    Args:
        model: a transformers model; its mode (train or eval) is restored.
        prompts: token ids.
        arguments: max_new_tokens, temperature, top_p, stop, rollout_batch_size.
        greedy: take the likeliest token instead of sampling from torch's global generator.
        progress: label of a progress bar; None: no bar.

    Returns:
        Completion token ids in the order of the prompts.

    Raises:
        ValueError: a prompt leaves the model no room for max_new_tokens; raised before anything is generated.
        Diverged: the model gives NaN or infinity, from which nothing can be sampled.
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
    # A checkpoint's own generation settings (a repetition penalty, say) would change the distribution a second time.
    shipped, base.generation_config = base.generation_config, GenerationConfig()
    try:
        # Sorting by length leaves most batches without padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = arguments.rollout_batch_size
        for start in tqdm(range(0, len(order), size), desc=progress, disable=progress is None, leave=False):
            batch = order[start : start + size]
            inputs = left_pad([prompts[i] for i in batch], pad, next(model.parameters()).device)
            width = inputs["input_ids"].shape[1]
            stopping = StoppingCriteriaList([StopTexts(ends, tokenizer, width)] if ends.texts else [])
            try:
                out = model.generate(**inputs, **options, stopping_criteria=stopping)  # type: ignore[operator]
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                first = tokenizer.decode(prompts[batch[0]])
                raise Diverged(
                    f"the model gives probabilities that are not finite for one of {len(batch)} prompts, the first of which "
                    f"is {first[:60]!r}"
                ) from None
            for i, ids in zip(batch, out[:, width:].tolist(), strict=True):
                # The batch runs until its last row ends; the tokens of the other rows behind their end are padding.
                completions[i] = ends.cut(ids, tokenizer)
    finally:
        base.generation_config = shipped
        model.train(was_training)
    return completions


def check_room(model: nn.Module, prompts: Sequence[Sequence[int]], arguments: RolloutArguments) -> None:
    """Check that the model has positions for every prompt followed by max_new_tokens; see `check_positions`.

    Raises:
        ValueError: a row is longer than the model has positions for, and the model cannot go beyond them.
    """
    if not prompts:
        return
    longest = max(map(len, prompts))
    what = f"max_new_tokens={arguments.max_new_tokens} behind a prompt of {longest} tokens"
    check_positions(model, longest + arguments.max_new_tokens, what)


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Criterion that ends a row once its tokens from `width` on contain a stop text. Probabilities are untouched."""

    def __init__(self, ends: Ends, tokenizer: Any, width: int) -> None:
        self.texts, self.tokenizer, self.width = ends.texts, tokenizer, width
        # A character takes at most four tokens (one per byte). The spare eight cover decoders that trim a text's start.
        self.window = 4 * max(map(len, ends.texts)) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        start = max(self.width, input_ids.shape[1] - self.window)
        rows = [decode(row, self.tokenizer) for row in input_ids[:, start:].tolist()]
        return torch.tensor([any(text in row for text in self.texts) for row in rows], device=input_ids.device)


def _pad_id(model: Any, tokenizer: Any, ends: Ends) -> int:
    """Return the tokenizer's padding id if the model has an embedding for it, else an end's id.

    Either id is safe: padding before the prompt is masked, and padding behind the end is cut off.
    """
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return int(pad) if pad is not None and pad < rows else min(ends.ids, default=0)
