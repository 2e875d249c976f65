"""A tokenizer's chat template: rendering, the characters it marks for training, and the text with which it ends a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from gem.messages import Message
from gem.problems import BadRecord


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        BadRecord: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise BadRecord("chat messages need a tokenizer with a chat template, got one without")
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], generate: bool, options: dict[str, Any]) -> str:
        """Return the text of a conversation, with the generation prompt behind it if `generate`.

        Raises:
            BadRecord: the template refuses the conversation.
        """
        try:
            return self._rendered(messages, generate, options)
        # Templates raise errors of any type: their own messages, jinja's errors, TypeError, KeyError.
        except Exception as error:
            as_text = [_with_text_arguments(message) for message in messages]
            if as_text != list(messages):
                try:  # some templates print a call's arguments verbatim, and so need text
                    return self._rendered(as_text, generate, options)
                except Exception:
                    pass
            reason = " ".join(str(error).split()) or repr(error)
            raise BadRecord("the chat template must take the conversation", reason) from None

    def _rendered(self, messages: Sequence[Message], generate: bool, options: dict[str, Any]) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, **options
        )
        return cast(str, text)

    def generation_spans(self, messages: Sequence[Message], options: dict[str, Any]) -> list[tuple[int, int]] | None:
        """Return [start, end) in characters of each {% generation %} block; None if the template has no such block."""
        template = self.tokenizer.get_chat_template(tools=options.get("tools"))
        if re.search(r"\{%-?\s*generation\s*-?%\}", re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)) is None:
            return None
        variables = {"chat_template": template, **self.tokenizer.special_tokens_map, **options}
        rendered: Any = render_jinja_template([list(messages)], return_assistant_tokens_mask=True, **variables)
        return [(int(start), int(end)) for start, end in rendered[1][0]]

    @cached_property
    def request(self) -> str:
        """The text that the template puts behind a user's turn to prompt for an answer, blanks removed; empty if unknown."""
        mark = marker([])
        try:
            text = self.render([{"role": "user", "content": mark}], True, {})
        except BadRecord:
            return ""
        return squeezed(text.partition(mark)[2])

    @cached_property
    def _end_of_last_turn(self) -> str:
        """The text that the template puts behind the last content of a conversation, trailing blanks removed."""
        mark = marker([])
        try:
            text = self.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}], False, {})
        except BadRecord:
            return ""
        return self.to_token(text.partition(mark)[2]) or text.partition(mark)[2].rstrip()

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """A pattern that matches any special or added token of the tokenizer."""
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        return any_of({*added, *self.tokenizer.all_special_tokens})

    def to_token(self, text: str) -> str:
        """Return the text up to and including its first special or added token; empty if it has none."""
        found = self._tokens.search(text)
        return text[: found.end()] if found else ""

    def whole_tokens(self, text: str, start: int, end: int) -> int:
        """Return `end`, or the start of the special or added token that text[start:end] would cut."""
        return next((f.start() for f in self._tokens.finditer(text, start) if f.start() < end < f.end()), end)

    def end_of_turn(self, between: str, own: str, last: bool) -> str:
        """Return the part of the template's text behind a content that ends the turn: the model generates it and stops.

        Args:
            between: the text behind the content in this conversation, up to the next content.
            own: the text behind the content when its turn is the last one.
            last: True if the turn is the last one.
        """
        if last:
            return self.to_token(between) or between.rstrip()
        same = between[: common(own, between)]
        usual = self.to_token(own) or own.rstrip()
        if usual and same.startswith(usual):
            return usual
        # The template ends an inner turn differently from the last one. If it has no end for inner turns, `between` starts with
        # the next turn's header. A token is therefore an end only if it is the end of sequence or if another token follows it.
        end = self.to_token(between)
        rest = between[len(end) :].lstrip()
        return end if end.endswith(self.tokenizer.eos_token) or (end and self._tokens.match(rest)) else ""

    def without_end(self, content: str) -> str:
        """Return the content without an end of turn of its own, which the template writes itself."""
        token, text = self._end_of_last_turn.strip(), content.rstrip()
        return text.removesuffix(token) if self._tokens.fullmatch(token) and text.endswith(token) else content


def _with_text_arguments(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            call = {
                **call,
                "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
            }
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of several texts, and never matches if there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)")


def marker(messages: Sequence[Message]) -> str:
    """Return a word that occurs in no message and that no template changes."""
    mark, text = "gemturn", repr(messages)
    while mark in text:
        mark += "n"
    return mark


def common(a: str, b: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def squeezed(text: str) -> str:
    return "".join(text.split())
