"""The chat template of a tokenizer: what it makes of a conversation, what it marks, and how it ends a turn."""

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
        BadRecord: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise BadRecord("chat messages need a tokenizer with a chat template, got one without")
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], generate: bool, options: dict[str, Any]) -> str:
        """The text of a conversation, on request with the generation prompt behind it.

        Raises:
            BadRecord: the template refuses the conversation.
        """
        try:
            return self._rendered(messages, generate, options)
        # A template raises what it likes: its own words, jinja's errors, TypeError, KeyError.
        except Exception as error:
            as_text = [_with_text_arguments(message) for message in messages]
            if as_text != list(messages):
                try:  # of a template that puts the arguments of a call behind its name as they are
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

    def said_spans(self, messages: Sequence[Message], options: dict[str, Any]) -> list[tuple[int, int]] | None:
        """[start, end) of what the template marks by {% generation %}, in characters; None: it marks nothing."""
        template = self.tokenizer.get_chat_template(tools=options.get("tools"))
        if re.search(r"\{%-?\s*generation\s*-?%\}", re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)) is None:
            return None
        variables = {"chat_template": template, **self.tokenizer.special_tokens_map, **options}
        rendered: Any = render_jinja_template([list(messages)], return_assistant_tokens_mask=True, **variables)
        return [(int(start), int(end)) for start, end in rendered[1][0]]

    @cached_property
    def request(self) -> str:
        """What the template puts behind a user's words to ask for an answer, without blanks; empty where that is not told."""
        mark = marker([])
        try:
            asked = self.render([{"role": "user", "content": mark}], True, {})
        except BadRecord:
            return ""
        return squeezed(asked.partition(mark)[2])

    @cached_property
    def _end_of_last_turn(self) -> str:
        """What the template puts behind the last content of a conversation, without blanks at its end."""
        mark = marker([])
        try:
            text = self.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}], False, {})
        except BadRecord:
            return ""
        return self.to_token(text.partition(mark)[2]) or text.partition(mark)[2].rstrip()

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """What reads as a token of its own: special ones and others that were added."""
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        return any_of({*added, *self.tokenizer.all_special_tokens})

    def to_token(self, text: str) -> str:
        """The text up to and with the first such token; empty where there is none."""
        found = self._tokens.search(text)
        return text[: found.end()] if found else ""

    def whole_tokens(self, text: str, start: int, end: int) -> int:
        """`end`, or where the token begins that it would cut."""
        return next((f.start() for f in self._tokens.finditer(text, start) if f.start() < end < f.end()), end)

    def end_of_turn(self, between: str, own: str, last: bool) -> str:
        """What of the template's text behind a content ends the turn: the model says it, and stops there.

        Args:
            between: what stands there in the conversation, to the next content.
            own: what stands there where the turn is the last one.
            last: whether it is.
        """
        if last:
            return self.to_token(between) or between.rstrip()
        same = between[: common(own, between)]
        usual = self.to_token(own) or own.rstrip()
        if usual and same.startswith(usual):
            return usual
        # The template ends a turn before another in another way. One that ends no turn begins the next one's header here: then
        # it is no end that another token follows, but a text.
        end = self.to_token(between)
        rest = between[len(end) :].lstrip()
        return end if end.endswith(self.tokenizer.eos_token) or (end and self._tokens.match(rest)) else ""

    def without_end(self, content: str) -> str:
        """A content that brings the end of its turn with it: the template writes that."""
        token, text = self._end_of_last_turn.strip(), content.rstrip()
        return text.removesuffix(token) if self._tokens.fullmatch(token) and text.endswith(token) else content


def _with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
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
    """What finds the longest of some texts; nothing where there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or r"(?!)")


def marker(messages: Sequence[Message]) -> str:
    """A word that no message has in it, and no template changes."""
    mark, said = "gemturn", repr(messages)
    while mark in said:
        mark += "n"
    return mark


def common(a: str, b: str) -> int:
    """Length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def squeezed(text: str) -> str:
    return "".join(text.split())
