"""Prompts -> completions: the protocol of a generator, and the generator that runs transformers' own generate."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gem.config import RolloutArguments
from gem.decoding import decode
from gem.distributed import is_sharded, most, whole_weights
from gem.ends import Ends, model_ends
from gem.positions import check_positions
from gem.stops import Diverged
from gem.tokens import left_pad

logger = logging.getLogger(__name__)
Finish = Literal["stop", "length"]
"""How a completion ended: at an end of sequence or stop text, or cut off."""
REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values alone: rows of them can be repeated. Others hold a state, or an index."""


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


class Completion(NamedTuple):
    """One sampled completion of a prompt."""

    ids: list[int]  # at least one; with its end
    finish: Finish
    logprobs: list[float] | None = None  # of the tokens, under the sampler at temperature 1, nats; None: it gives none


class Generator(Protocol):
    """Where candidates come from: GroupMaker draws candidates, Evaluation draws answers. A new backend is one such callable."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int = 1, *, greedy: bool = False, progress: str | None = None
    ) -> list[list[Completion]]:
        """Return n independent completions of each prompt, in the order of the prompts.

        Online training takes what is sampled for samples of the policy as it is at the call, at temperature 1: a backend that
        lags behind, or samples otherwise, biases the KL term and is exempt from `taper`. Its settings are its own. It takes
        its random numbers, or the seed of its requests, from torch's global generator, which the caller seeds: so a resumed
        run samples what an uninterrupted one would.

        Args:
            prompts: token ids.
            n: completions of each prompt, >= 1.
            greedy: take the likeliest token instead of sampling.
            progress: label of a progress bar; None: no bar.

        Returns:
            One list of n completions per prompt. A completion includes the end of sequence, or the token that completes a stop
            text; one without either was cut off.
        """


def draw_completions(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    n: int,
    ends: Ends,
    tokenizer: Any,
    *,
    greedy: bool = False,
    progress: str | None = None,
) -> list[list[Completion]]:
    """Return n completions per prompt from any backend, checked, and cut behind their first end.

    A generator with a true attribute `collective` is called by all processes, also without a prompt.

    Raises:
        ValueError: the backend returned another number of completions, or one that is no non-empty list of token ids.
    """
    if not n or (not prompts and not getattr(generator, "collective", False)):
        return [[] for _ in prompts]
    drawn = generator(prompts, n, greedy=greedy, progress=progress)
    if len(drawn) != len(prompts) or any(len(completions) != n for completions in drawn):
        got = [len(completions) for completions in drawn]
        raise ValueError(f"generator must return {n} completions for each of {len(prompts)} prompts, got {got}")
    return [[_cut(completion, ends, tokenizer) for completion in completions] for completions in drawn]


def _cut(completion: Completion, ends: Ends, tokenizer: Any) -> Completion:
    """Return a checked completion without what stands behind its first end, and how it ended."""
    ids, _, logprobs = completion
    if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"generator must return non-empty lists of token ids, got {str(ids)[:80]!r}")
    if logprobs is not None and len(logprobs) != len(ids):
        raise ValueError(f"generator must return a log-prob for each of {len(ids)} tokens, got {len(logprobs)}")
    kept = ends.cut(ids, tokenizer)
    finish: Finish = "stop" if ends.has_ended(kept, tokenizer) else "length"
    return Completion(kept, finish, None if logprobs is None else logprobs[: len(kept)])


@dataclass(frozen=True)
class TransformersGenerator:
    """Generator over transformers' generate: it samples from the model's weights at the time of the call.

    The tokens of a prompt but its last pass through the model once, for all n completions, where the model keeps nothing but
    keys and values of them. A batch holds the groups of max(1, rollout_batch_size // n) prompts; a larger group is split.

    Args:
        model: a transformers model; its mode (train or eval) is restored.
        tokenizer: the model's tokenizer.
        arguments: max_new_tokens, temperature, top_p, stop, rollout_batch_size.
    """

    model: nn.Module
    tokenizer: Any
    arguments: RolloutArguments

    @property
    def collective(self) -> bool:
        """True for a model that FSDP2 has sharded: each process gets whole weights from the others, and then samples alone."""
        return is_sharded(self.model)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int = 1, *, greedy: bool = False, progress: str | None = None
    ) -> list[list[Completion]]:
        """Return n completions of each prompt with their log-probs; see Generator.

        Raises:
            ValueError: a prompt leaves the model no room for max_new_tokens; raised before anything is generated.
            Diverged: the model gives NaN or infinity, from which nothing can be sampled.
        """
        check_room(self.model, prompts, self.arguments)
        warn_of_top_p(self.arguments, greedy)
        completions: list[list[Completion]] = [[] for _ in prompts]
        batches = prompt_batches(prompts, n, self.arguments.rollout_batch_size)
        if self.collective and not most(len(batches)):
            return completions
        with (
            whole_weights(self.model),
            _sampling(self.model, self.tokenizer, self.arguments, greedy) as sampler,
            tqdm(batches, desc=progress, disable=progress is None, leave=False) as bar,
        ):
            for batch in bar:
                for i, group in zip(batch, sampler.groups([prompts[i] for i in batch], n), strict=True):
                    completions[i] = group
        return completions


def prompt_batches(prompts: Sequence[Sequence[int]], n: int, rows: int) -> list[list[int]]:
    """Return the indices of the prompts of each batch, of max(1, rows // n) groups. They are of similar length: little pads."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, rows // n)
    return [order[start : start + step] for start in range(0, len(order), step)]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    arguments: RolloutArguments,
    *,
    greedy: bool = False,
    progress: str | None = None,
) -> list[list[int]]:
    """Generate one completion per prompt with transformers: TransformersGenerator with n = 1, token ids alone.

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
    generator = TransformersGenerator(model, tokenizer, arguments)
    return [completion.ids for (completion,) in generator(prompts, greedy=greedy, progress=progress)]


def warn_of_top_p(arguments: RolloutArguments, greedy: bool) -> None:
    """Log a warning if what is sampled is not from the distribution whose log-probs it brings."""
    if arguments.top_p < 1 and not greedy:
        logger.warning("top_p=%g: the ratio to the sampler is off by the kept mass; 1.0 is exact", arguments.top_p)


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


@dataclass(frozen=True)
class _Sampler:
    """A model ready to sample, and how it does; `_sampling` makes it."""

    model: Any  # with its adapters
    base: Any  # without peft's wrapper
    tokenizer: Any
    ends: Ends
    pad: int
    rows: int  # at once
    options: dict[str, Any]  # of generate

    def groups(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[Completion]]:
        """Return n completions of each prompt of a batch."""
        inputs = left_pad(prompts, self.pad, next(self.model.parameters()).device)
        cache = self._prefill(inputs) if n > 1 and min(map(len, prompts)) > 1 else None
        found: list[list[Completion]] = [[] for _ in prompts]
        for first in range(0, n, self.rows):  # more than one round only for a single prompt
            copies = min(self.rows, n - first)
            own = copy.deepcopy(cache) if first + copies < n else cache
            try:
                rows = self._sample(inputs, copies, own)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                said = self.tokenizer.decode(prompts[0])
                raise Diverged(
                    f"the model gives probabilities that are not finite for one of {len(prompts)} prompts, the first of "
                    f"which is {said[:60]!r}"
                ) from None
            if any(math.isnan(x) for row in rows for x in row.logprobs or ()):  # the likeliest of NaN is some token
                raise Diverged(f"the model gives log-probs that are not finite for one of {len(prompts)} prompts")
            for i, completions in enumerate(found):
                completions += rows[i * copies : (i + 1) * copies]
        return found

    def _prefill(self, inputs: dict[str, Tensor]) -> DynamicCache | None:
        """Return the cache of all tokens but the last, by generate's own prefill; None where it is not all that a model keeps.

        Recurrent layers keep a state, and multimodal models the positions of their last batch.
        """
        config = self.base.config
        if (
            getattr(self.model, "active_peft_config", None) is not None
            and self.model.active_peft_config.is_prompt_learning
        ):
            return None
        if self.base._is_stateful or config.is_encoder_decoder or config.get_text_config() is not config:
            return None
        prompts = {name: rows[:, :-1] for name, rows in inputs.items()}
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        out = self.model.generate(**prompts, **options, synced_gpus=False)
        cache, width = getattr(out, "past_key_values", None), prompts["input_ids"].shape[1]
        layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
        whole = all(type(layer) in REPEATABLE and layer.get_seq_length() == width for layer in layers)
        return cache if layers and whole else None

    def _sample(self, inputs: dict[str, Tensor], copies: int, cache: DynamicCache | None) -> list[Completion]:
        """Return the completions of a batch, those of a prompt next to each other."""
        width = inputs["input_ids"].shape[1]
        options = {name: rows.repeat_interleave(copies, 0) for name, rows in inputs.items()} | self.options
        if cache is not None:
            cache.batch_repeat_interleave(copies)
            options["past_key_values"] = cache
        logprobs = SampledLogprobs()
        out = self.model.generate(
            **options,
            synced_gpus=False,  # with whole weights no process waits for another
            logits_processor=LogitsProcessorList([logprobs]),
            stopping_criteria=StoppingCriteriaList(
                [StopTexts(self.ends, self.tokenizer, width)] if self.ends.texts else []
            ),
        )[:, width:]
        # The batch runs until its last row ends; the tokens of the other rows behind their end are padding.
        rows = zip(out.tolist(), logprobs.of(out).tolist(), strict=True)
        return [_cut(Completion(ids, "length", values), self.ends, self.tokenizer) for ids, values in rows]


@contextmanager
def _sampling(model: nn.Module, tokenizer: Any, arguments: RolloutArguments, greedy: bool) -> Iterator[_Sampler]:
    """Put a model into evaluation mode, without the generation settings that it came with, for the block."""
    was_training = model.training
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    ends = model_ends(base, tokenizer, arguments.stop)
    pad = _pad_id(base, tokenizer, ends)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": not greedy}
    options |= {"eos_token_id": sorted(ends.ids), "pad_token_id": pad}
    if not greedy:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    # A checkpoint's own generation settings (a repetition penalty, say) would change the distribution a second time.
    shipped, base.generation_config = base.generation_config, GenerationConfig()
    model.eval()
    try:
        yield _Sampler(model, base, tokenizer, ends, pad, arguments.rollout_batch_size, options)
    finally:
        base.generation_config = shipped
        model.train(was_training)


class SampledLogprobs(LogitsProcessor):  # type: ignore[misc]
    """Processor that changes nothing and takes the log-prob of each token from the logits that it was sampled from.

    It stands before temperature and top-p, so the log-probs are those of the model. It keeps the logits of one step: which
    token they gave is seen at the next step.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None  # (R, V) of the last step
        self.steps: list[Tensor] = []  # each (R,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self.logits = scores
        return scores

    def _take(self, tokens: Tensor) -> None:
        if self.logits is not None:
            chosen = self.logits.gather(1, tokens[:, None]).squeeze(1)
            self.steps.append(chosen - self.logits.logsumexp(1))

    def of(self, sampled: Tensor) -> Tensor:
        """Return the log-probs (R, T) of all sampled tokens (R, T), nats."""
        if len(self.steps) < sampled.shape[1]:
            self._take(sampled[:, -1])
        return torch.stack(self.steps[: sampled.shape[1]], 1)


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
