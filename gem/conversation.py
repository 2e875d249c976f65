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
from typing import Any, NamedTuple

from gem.chat_template import ChatTemplate, common, marker, squeezed
from gem.messages import REASONING, Message
from gem.problems import BadRecord, shown

# A tag that opens a block of reasoning at the end of a generation prompt, as DeepSeek-R1's does; and what closes one.
_OPENING = re.compile(r"(<\w+>|\[[A-Z_]+\]|◁\w+▷)\s*$")
_CLOSING = re.compile(r"</\w+>|\[/[A-Z_]+\]|◁/\w+▷")


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


def take_apart(
    chat: ChatTemplate, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
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
        return _continued(chat, prompt, completions, options)
    answered = all(c[0]["role"] == "assistant" for c in completions)
    header = chat.render(prompt, answered, options)
    skeletons = [Skeleton(chat, prompt, c, options) for c in completions]
    begun = _beginning(header, skeletons)
    return Rendered(begun, [s.parts(begun, answered) for s in skeletons])


def _continued(
    chat: ChatTemplate, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
) -> Rendered:
    """One message in two pieces: the prompt's last turn, and what the completions begin with."""
    last = prompt[-1]
    if len(prompt) == 1 or last.get("tool_calls"):
        what = "calls of tools" if last.get("tool_calls") else "nothing before it"
        raise BadRecord("a last turn of the prompt to go on with must be text behind another turn", what)
    # Where the one ends and the other begins.
    edge = marker([*prompt, *(m for c in completions for m in c)]) + "edge"
    said = [[{**last, **c[0], "content": last["content"] + edge + c[0]["content"]}, *c[1:]] for c in completions]
    rendered = take_apart(chat, prompt[:-1], said or [[{**last, "content": last["content"] + edge}]], options)
    heads = [parts[0].text.partition(edge) for parts in rendered.completions]
    if len({head for head, _, _ in heads}) != 1 or not all(found for _, found, _ in heads):
        raise BadRecord("the last turn of the prompt must begin all completions alike", shown(last["content"]))
    rest = [[Part(text, True), *parts[1:]] for (_, _, text), parts in zip(heads, rendered.completions, strict=True)]
    return Rendered(rendered.prompt + heads[0][0], rest if completions else [])


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
        mark = marker(self.messages)
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
        # Less than `begun` where that ends with a tag which the conversation leaves out.
        done = min(len(begun), self.turns[0].start)
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
        start = common(header, self.text)
        # Of the generation prompt alone: a user's text may end with a tag, too.
        asked = common(header, self.chat.render(self.marked[:k], False, self.options)) if k else 0
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
        said = squeezed(self.text[start:end])
        for name in REASONING:
            words = message.get(name)
            if isinstance(words, str) and squeezed(words) not in said:
                raise BadRecord(f"the chat template must write the {name!r} of a turn", shown(words))
        _check_calls(message, said)
        return Turn(start, at, after, end, self.chat.without_end(message["content"]), opened, len(header))

    def _end(self, k: int, after: int) -> int:
        """Where turn k ends, whose content ends at `after`."""
        last = k == len(self.messages) - 1
        alone = self.text if last else self.chat.render(self.marked[: k + 1], False, self.options)
        if self.messages[k].get("tool_calls"):  # they stand behind the content, with whatever ends them
            limit = self.chat.whole_tokens(self.text, after, common(alone, self.text))
            return after + len(self.text[after:limit].rstrip())
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
        text = squeezed(self.text)
        for k, message in enumerate(self.messages):
            words = message["content"]
            if message["role"] == "assistant":
                words = _CLOSING.split(words)[-1]
            as_json = json.dumps(words, ensure_ascii=False)[1:-1]  # as many write what a tool gave
            if k not in said and squeezed(words) not in text and squeezed(as_json) not in text:
                raise BadRecord(f"the chat template must write the turns of the {message['role']}", shown(words))
            if k not in said:
                _check_calls(message, text)
        for tool in self.options.get("tools") or []:
            name = _name(tool)
            if name and squeezed(name) not in text:
                raise BadRecord("the chat template must write the tools", shown(name))


def _name(tool: dict[str, Any]) -> str:
    """Of a tool, or of a call of one; empty where there is none."""
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else ""


def _check_calls(message: Message, text: str) -> None:
    """Whether the calls of tools in a message are in a text without blanks, each of them."""
    names = Counter(name for call in message.get("tool_calls") or [] if (name := _name(call)))
    for name, n in names.items():
        if text.count(squeezed(name)) < n:
            raise BadRecord("the chat template must write the calls of tools of a turn", shown(name))


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
