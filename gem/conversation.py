"""A conversation as its chat template writes it, taken apart: what the model is given, and what it says itself.

A template may trim a content, drop what stands before `</think>`, or put a block in front of it. So it renders a marker in the
place of each content of the assistant, and the record's own words go where the marker came out: nothing is lost or moved.

    ...<|im_start|>user / hi<|im_end|> / <|im_start|>assistant /  MARKER  <|im_end|>   /
    ^ given, to the end of the generation prompt                  ^ learnt             ^ nobody's
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, NamedTuple, cast

from transformers.utils.chat_template_utils import render_jinja_template

from gem.problems import BadRecord, shown

Message = dict[str, Any]

# A tag that opens a block of reasoning at the end of a generation prompt, as DeepSeek-R1's does; and what closes one.
_OPENING = re.compile(r"(<\w+>|\[[A-Z_]+\]|◁\w+▷)\s*$")
_CLOSING = re.compile(r"</\w+>|\[/[A-Z_]+\]|◁/\w+▷")
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Part(NamedTuple):
    """A stretch of a completion."""

    text: str
    learnt: bool
    """whether the assistant says it; else others do, or the template"""


class Rendered(NamedTuple):
    """A prompt and the parts of each completion: prompt + parts is a whole text."""

    prompt: str
    completions: list[list[Part]]


class Turn(NamedTuple):
    """A turn of the assistant in a rendered conversation: text[start:at] + content + text[after:end] is what it says."""

    start: int
    at: int
    after: int
    end: int
    content: str
    opened: str
    """the tag that its generation prompt ends with, and the blanks behind it"""
    header: int
    """length of the text with its generation prompt; more than `start` where the conversation has no such tag there"""


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
        except (
            Exception
        ) as error:  # a template raises what it likes: its own words, jinja's errors, TypeError, KeyError
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

    def take_apart(
        self, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
    ) -> Rendered:
        """The texts of one record.

        Args:
            prompt: ends with a turn of the user or of a tool; or with one of the assistant, which the completions go on with.
            completions: the messages that follow the prompt, for each.
            options: `tools` and further variables of the template.

        Raises:
            BadRecord: the template refuses the conversation, leaves some of it out, or begins a turn of the assistant otherwise
                than with its generation prompt; or a completion has no turn of the assistant.
        """
        if prompt[-1]["role"] == "assistant" and all(c[0]["role"] == "assistant" for c in completions):
            return self._continued(prompt, completions, options)
        answered = all(c[0]["role"] == "assistant" for c in completions)
        header = self.render(prompt, answered, options)
        skeletons = [Skeleton(self, prompt, c, options) for c in completions]
        begun = _beginning(header, skeletons)
        return Rendered(begun, [s.parts(begun, answered) for s in skeletons])

    def _continued(
        self, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
    ) -> Rendered:
        """One message in two pieces: the prompt's last turn, and what the completions begin with."""
        last = prompt[-1]
        if len(prompt) == 1 or last.get("tool_calls"):
            what = "calls of tools" if last.get("tool_calls") else "nothing before it"
            raise BadRecord("a last turn of the prompt to go on with must be text behind another turn", what)
        edge = (
            _marker([*prompt, *(m for c in completions for m in c)]) + "edge"
        )  # where the one ends and the other begins
        said = [[{**last, **c[0], "content": last["content"] + edge + c[0]["content"]}, *c[1:]] for c in completions]
        rendered = self.take_apart(prompt[:-1], said or [[{**last, "content": last["content"] + edge}]], options)
        heads = [parts[0].text.partition(edge) for parts in rendered.completions]
        if len({head for head, _, _ in heads}) != 1 or not all(found for _, found, _ in heads):
            raise BadRecord("the last turn of the prompt must begin all completions alike", shown(last["content"]))
        rest = [[Part(text, True), *parts[1:]] for (_, _, text), parts in zip(heads, rendered.completions, strict=True)]
        return Rendered(rendered.prompt + heads[0][0], rest if completions else [])

    def said_spans(self, messages: Sequence[Message], options: dict[str, Any]) -> list[tuple[int, int]] | None:
        """[start, end) of what the template marks by {% generation %}, in characters; None: it marks nothing."""
        template = self.tokenizer.get_chat_template(tools=options.get("tools"))
        if re.search(r"\{%-?\s*generation\s*-?%\}", template) is None:
            return None
        variables = {"chat_template": template, **self.tokenizer.special_tokens_map, **options}
        rendered: Any = render_jinja_template([list(messages)], return_assistant_tokens_mask=True, **variables)
        return [(int(start), int(end)) for start, end in rendered[1][0]]

    @cached_property
    def request(self) -> str:
        """What the template puts behind a user's words to ask for an answer, without blanks; empty where that is not told."""
        mark = _marker([])
        try:
            asked = self.render([{"role": "user", "content": mark}], True, {})
        except BadRecord:
            return ""
        return _squeezed(asked.partition(mark)[2])

    @cached_property
    def _end_of_last_turn(self) -> str:
        """What the template puts behind the last content of a conversation, without blanks at its end."""
        mark = _marker([])
        try:
            text = self.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}], False, {})
        except BadRecord:
            return ""
        return self.to_token(text.partition(mark)[2]) or text.partition(mark)[2].rstrip()

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """What reads as a token of its own: special ones and others that were added."""
        known = {str(t) for t in self.tokenizer.added_tokens_decoder.values()} | set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(re.escape(t) for t in sorted(known, key=len, reverse=True)) or r"(?!)")

    def to_token(self, text: str) -> str:
        """The text up to and with the first such token; empty where there is none."""
        found = self._tokens.search(text)
        return text[: found.end()] if found else ""

    def end_of_turn(self, between: str, own: str, last: bool) -> str:
        """What of the template's text behind a content ends the turn: the model says it, and stops there.

        Args:
            between: what stands there in the conversation, to the next content.
            own: what stands there where the turn is the last one.
            last: whether it is.
        """
        if last:
            return self.to_token(between) or between.rstrip()
        same = between[: _common(own, between)]
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


class Skeleton:
    """A conversation rendered with a marker for each content of the assistant in its completion."""

    def __init__(
        self, chat: ChatTemplate, prompt: Sequence[Message], completion: Sequence[Message], options: dict[str, Any]
    ) -> None:
        self.chat, self.options = chat, options
        self.messages = [*prompt, *completion]
        said = [k for k in range(len(prompt), len(self.messages)) if self.messages[k]["role"] == "assistant"]
        if not said:
            raise BadRecord("a completion must hold a turn of the assistant", shown([m["role"] for m in completion]))
        del self.messages[said[-1] + 1 :]  # nothing is learnt of what follows
        mark = _marker(self.messages)
        marks = [{**m, "content": f"{mark}{k}x"} if m["content"] else m for k, m in enumerate(self.messages)]
        self.marked = [marks[k] if k in said else m for k, m in enumerate(self.messages)]
        self.all_marked = [*self.messages[: len(prompt)], *marks[len(prompt) :]]
        chat.render(self.messages, False, options)  # a template may refuse what is said
        self.text = chat.render(self.marked, False, options)
        self.turns = [self._turn(k) for k in said]
        self._check_nothing_left_out(said)

    def parts(self, begun: str, answered: bool) -> list[Part]:
        """What follows `begun`, to the end of the last turn. answered: whether the completion begins with the assistant's."""
        parts: list[Part] = []
        done = min(
            len(begun), self.turns[0].start
        )  # less where `begun` ends with a tag that the conversation leaves out
        spans = self.chat.said_spans(self.marked, self.options)
        for turn in self.turns:
            first = turn is self.turns[0] and answered
            start = done if first else turn.start
            lead, content = self.text[start : turn.at], turn.content
            if set(_CLOSING.findall(lead)) & set(_CLOSING.findall(content)):
                start, lead = turn.at, ""  # the template puts in a block of reasoning, and the record brings its own
            if not lead and (len(begun) if first else turn.start) >= turn.header:  # one tag, the prompt's
                tag = turn.opened.rstrip()
                content = content.removeprefix(tag).removeprefix(turn.opened[len(tag) :])
            if turn.start > done and not first:
                parts.append(Part(self.text[done : turn.start], False))
            if spans is None:
                parts.append(Part(lead + content + self.text[turn.after : turn.end], True))
            else:
                parts += _split(self.text, start, turn.at, spans)
                parts.append(Part(content, any(a <= turn.at and turn.after <= b for a, b in spans)))
                parts += _split(self.text, turn.after, turn.end, spans)
            done = turn.end
        parts = _joined([part for part in parts if part.text])
        if not any(part.learnt for part in parts):
            raise BadRecord("the chat template must mark a turn of the completion by {% generation %}")
        return parts if parts[-1].learnt else parts[:-1]

    def _turn(self, k: int) -> Turn:
        message, mark = self.messages[k], self.marked[k]["content"]
        header = self.chat.render(self.marked[:k], True, self.options)
        start = _common(header, self.text)
        # Of the generation prompt alone: a user's text may end with a tag, too.
        asked = _common(header, self.chat.render(self.marked[:k], False, self.options)) if k else 0
        opened = _opened(header[asked:])
        behind = len(header) - len(opened)
        if header[start:behind].strip():
            raise BadRecord(
                "the chat template must render the prompt as a prefix of the conversation",
                f"{shown(header[max(0, start - 20) :])} and then {shown(self.text[max(0, start - 20) :][:40])}",
            )
        start = min(start, behind) if start < len(header) else start
        if mark and self.text.count(mark) != 1:
            raise BadRecord("the chat template must write every turn of the assistant", shown(message["content"]))
        at = self.text.index(mark) if mark else start
        after = at + len(mark)
        end = self._end(k, after)
        said = _squeezed(self.text[start:end])
        for name in _REASONING:
            words = message.get(name)
            if isinstance(words, str) and _squeezed(words) not in said:
                raise BadRecord(f"the chat template must write the {name!r} of a turn", shown(words))
        _check_calls(message, said)
        return Turn(start, at, after, end, self.chat.without_end(message["content"]), opened, len(header))

    def _end(self, k: int, after: int) -> int:
        """Where turn k ends, whose content ends at `after`."""
        last = k == len(self.messages) - 1
        alone = self.text if last else self.chat.render(self.marked[: k + 1], False, self.options)
        if self.messages[k].get("tool_calls"):  # they stand behind the content, with whatever ends them
            return after + len(self.text[after : _common(alone, self.text)].rstrip())
        limit = len(self.text) if last else self._next_content(k, after)
        return after + len(self.chat.end_of_turn(self.text[after:limit], alone[after:], last))

    @cached_property
    def _bare(self) -> str:
        """The conversation without anybody's words in its completion: what stands between them is the template's."""
        try:
            return self.chat.render(self.all_marked, False, self.options)
        except BadRecord:  # some read what a tool says as JSON
            return self.text

    def _next_content(self, k: int, after: int) -> int:
        """Where what is said behind turn k, whose content ends at `after`, begins."""
        words = next((m["content"] for m in self.all_marked[k + 1 :] if m["content"]), "")
        own = self.marked[k]["content"]
        between = self._bare.partition(own)[2].partition(words)[0] if own and words else ""
        return after + len(between) if self.text.startswith(between, after) else after

    def _check_nothing_left_out(self, said: Sequence[int]) -> None:
        """The words of the others are in the text. Of earlier answers a template may drop the reasoning, as in a real chat."""
        text = _squeezed(self.text)
        for k, message in enumerate(self.messages):
            words = message["content"]
            if message["role"] == "assistant":
                words = _CLOSING.split(words)[-1]
            as_json = json.dumps(words, ensure_ascii=False)[1:-1]  # as many write what a tool gave
            if k not in said and _squeezed(words) not in text and _squeezed(as_json) not in text:
                raise BadRecord(f"the chat template must write the turns of the {message['role']}", shown(words))
            if k not in said:
                _check_calls(message, text)
        for tool in self.options.get("tools") or []:
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and _squeezed(name) not in text:
                raise BadRecord("the chat template must write the tools", shown(name))


def _check_calls(message: Message, text: str) -> None:
    """Whether the calls of tools in a message are in a text without blanks, each of them."""
    names = Counter(str(call.get("function", call).get("name")) for call in message.get("tool_calls") or [])
    for name, n in names.items():
        if text.count(_squeezed(name)) < n:
            raise BadRecord("the chat template must write the calls of tools of a turn", shown(name))


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


def _split(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> list[Part]:
    """text[start:end] in parts, of which those inside of a span are learnt."""
    edges = sorted({start, end, *(edge for span in spans for edge in span if start < edge < end)})
    return [Part(text[a:b], any(c <= a and b <= d for c, d in spans)) for a, b in pairwise(edges)]


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with neighbours of a kind as one."""
    return [Part("".join(p.text for p in run), learnt) for learnt, run in groupby(parts, key=lambda part: part.learnt)]


def _beginning(header: str, skeletons: Sequence[Skeleton]) -> str:
    """What comes before all completions of a record: the generation prompt, but for what not all of them go on from."""
    first = [(s.turns[0], s.text) for s in skeletons]
    tag = first[0][0].opened.rstrip() if first and first[0][0].header == len(header) else ""
    if all(text.startswith(header) or (tag and _goes_on(tag, turn.content)) for turn, text in first):
        return header
    begun = header[: min(turn.start for turn, _ in first)]
    if not all(text.startswith(begun) for _, text in first):
        raise BadRecord("the chat template must render the prompt as a prefix of the conversation", shown(begun[-40:]))
    return begun


def _opened(header: str) -> str:
    """The tag that a generation prompt ends with, and the blanks behind it."""
    found = _OPENING.search(header)
    return header[found.start() :] if found else ""


def _goes_on(tag: str, content: str) -> bool:
    """Whether a content begins inside the block that a tag opens, or repeats the tag."""
    closing = tag[0] + "/" + tag[1:]
    return content.startswith(tag) or (closing in content and tag not in content)


def _marker(messages: Sequence[Message]) -> str:
    """A word that no message has in it, and no template changes."""
    mark, said = "gemturn", repr(messages)
    while mark in said:
        mark += "n"
    return mark


def _common(a: str, b: str) -> int:
    """Length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _squeezed(text: str) -> str:
    return "".join(text.split())
