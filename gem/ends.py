"""The ends of a completion: every end of sequence that a model and its tokenizer name, and the stop texts of the user.

Chat models end a turn with one token and a text with another (Llama 3, Gemma, Qwen); the tokenizer names only one of them.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from gem.decoding import decode
from gem.tokens import cut_at_eos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ends:
    """ids: the token ids that end a completion. texts: a completion also ends once it contains one of these."""

    ids: frozenset[int]
    texts: tuple[str, ...] = ()

    def has_ended(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """True if a completion ended by itself: its last token is an end, or its text contains one of `texts`."""
        return bool(ids) and (ids[-1] in self.ids or self._text_at(ids, tokenizer) is not None)

    def cut(self, ids: Sequence[int], tokenizer: Any = None) -> list[int]:
        """Return the tokens up to and including the first end; with a tokenizer, also the token that completes a stop text."""
        kept = cut_at_eos(ids, self.ids)
        if tokenizer is None or (found := self._text_at(kept, tokenizer)) is None:
            return kept
        return kept[: found[1]]

    def content(self, ids: Sequence[int], tokenizer: Any) -> list[int]:
        """Return the tokens before the end: without the end id, or without all tokens of the stop text."""
        if ids and ids[-1] in self.ids:
            return list(ids[:-1])
        found = self._text_at(ids, tokenizer)
        return list(ids) if found is None else list(ids[: found[0]])

    def _text_at(self, ids: Sequence[int], tokenizer: Any) -> tuple[int, int] | None:
        """Return [start, end) of the tokens of the stop text that is completed first; None if there is none."""
        if not self.texts:
            return None

        def text_of(n: int) -> str:
            return decode(ids[:n], tokenizer)  # keeps special tokens, which a stop text may contain

        whole = text_of(len(ids))
        ends = [at + len(text) for text in self.texts if (at := whole.find(text)) >= 0]
        if not ends:
            return None
        end, counts = min(ends), range(len(ids) + 1)
        start = min(at for text in self.texts if (at := whole.find(text)) >= 0 and at + len(text) == end)
        # An incomplete character decodes to a replacement: the text contains a stop text only when that is complete.
        last = bisect_left(counts, True, key=lambda n: any(text in text_of(n) for text in self.texts))
        first = bisect_left(counts, start + 1, key=lambda n: len(text_of(n)))
        return min(first, last) - 1, last


def ends_of(tokenizer: Any, generation_config: Any = None, stop: Sequence[str] = ()) -> Ends:
    """Return the ends that a tokenizer and a generation config name (eos_token_id: an id, a list of ids, or None).

    Args:
        tokenizer: of transformers.
        generation_config: of transformers; None: use the tokenizer's end alone.
        stop: texts that also end a completion.
    """
    named = [*_ids(getattr(generation_config, "eos_token_id", None)), *_ids(tokenizer.eos_token_id)]
    return Ends(frozenset(named), tuple(stop))


def model_ends(model: Any, tokenizer: Any, stop: Sequence[str] = ()) -> Ends:
    """Return the ends of a transformers model, wrapped or not, from its generation config, its config and the tokenizer.

    If the generation config names ends, those of the config count only if they are special tokens: the default of a config
    class is often an ordinary token of another vocabulary.
    """
    generation_config, config = _configs(model)
    ends = ends_of(tokenizer, generation_config, stop)
    named = bool(_ids(getattr(generation_config, "eos_token_id", None)))
    further = [i for i in _ids_of_config(config) if not named or is_special(tokenizer, i)]
    return Ends(ends.ids | frozenset(further), ends.texts)


def own_ends(model: Any) -> frozenset[int]:
    """Return the ids that a transformers model names as ends in its generation config, else in its config."""
    generation_config, config = _configs(model)
    return frozenset(_ids(getattr(generation_config, "eos_token_id", None)) or _ids_of_config(config))


def _configs(model: Any) -> tuple[Any, Any]:
    """Return the generation config and config of a model; peft's wrapper forwards both, torch's wrappers do not."""
    while not hasattr(model, "config") and (hasattr(model, "_orig_mod") or hasattr(model, "module")):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return getattr(model, "generation_config", None), getattr(model, "config", None)


def _ids_of_config(config: Any) -> list[int]:
    """Return the end ids of a config, else those of its text config: multimodal models have one."""
    own = _ids(getattr(config, "eos_token_id", None))
    if own or not hasattr(config, "get_text_config"):
        return own
    return _ids(getattr(config.get_text_config(), "eos_token_id", None))


def is_special(tokenizer: Any, token: int) -> bool:
    """True if the tokenizer's decoder can skip this token id as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token)
    return (added is not None and bool(added.special)) or token in tokenizer.all_special_ids


def _ids(value: Any) -> list[int]:
    """Return eos_token_id as a list; it may be an id, a list or tensor of ids, or None."""
    if value is None:
        return []
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them in a model's configs, got {value!r}")
    return ids


def warn_if_turns_do_not_end(tokenizer: Any, ends: Ends) -> None:
    """Log a warning if the chat template ends an answer with text that is no end, so that no answer would ever end.

    A base model whose tokenizer has the template of a chat model does so. A template that cannot render is skipped here, as the
    encoder reports it.
    """
    tail = _behind_an_answer(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    if not ids or ends.ids & set(ids) or any(text in tail for text in ends.texts):
        return
    special = next((i for i in ids if is_special(tokenizer, i) or i in tokenizer.added_tokens_decoder), None)
    if special is None:
        how = f"with the text {tail!r}, which is no end: give --stop {tail!r}"
    else:
        token = tokenizer.convert_ids_to_tokens(special)
        how = f"with {token}, which is no end of this model: give --eos_token {token!r}"
    logger.warning("the chat template ends a turn %s, else no answer comes to its end", how)


def _behind_an_answer(tokenizer: Any) -> str:
    """Return the text that a chat template puts behind the assistant's last message, stripped; "" if unknown."""
    answer = "An answer."
    turns = {"user": "A question?", "assistant": answer}
    for shape in (str, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": role, "content": shape(text)} for role, text in turns.items()]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # templates raise errors of any type
            continue
        _, found, tail = text.rpartition(answer)
        if found:
            return cast(str, tail.strip())
    return ""
