"""Split a rendered conversation into the prompt, the text that the model is trained on, and the text around it.

A template may trim a content, drop the text before `</think>`, or put a block in front of a content. Each content of the
assistant is therefore rendered as a marker and then replaced by the record's own words: nothing is lost or moved.

    ...<|im_start|>user / hi<|im_end|> / <|im_start|>assistant /  MARKER  <|im_end|>   /
    ^ read, to the end of the generation prompt                   ^ trained on         ^ left out
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

# A tag at the end of a generation prompt that opens a block of reasoning, as DeepSeek-R1's does, and the tag that closes one.
_OPENING = re.compile(r"(<\w+>|\[[A-Z_]+\]|◁\w+▷)\s*$")
_CLOSING = re.compile(r"</\w+>|\[/[A-Z_]+\]|◁/\w+▷")


class Part(NamedTuple):
    """A stretch of a completion."""

    text: str
    learnt: bool
    """True if the assistant writes it; False for text of other roles and of the template"""


class Rendered(NamedTuple):
    """A prompt and the parts of each completion; the prompt and one completion's parts concatenate to a whole text."""

    prompt: str
    completions: list[list[Part]]


class Turn(NamedTuple):
    """A turn of the assistant in a rendered conversation; it writes text[start:at] + content + text[after:end]."""

    start: int
    at: int
    after: int
    end: int
    content: str
    opened: str
    """the opening tag at the end of the turn's generation prompt, with the blanks behind it"""
    header: int
    """length of the text with the turn's generation prompt; above `start` if the conversation lacks the tag there"""


def take_apart(
    chat: ChatTemplate, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
) -> Rendered:
    """Render one record and split it into the prompt and the parts of each completion.

    Args:
        prompt: ends with a turn of the user or of a tool, or with one of the assistant that the completions continue.
        completions: for each completion, the messages that follow the prompt.
        options: `tools` and further variables of the template.

    Raises:
        BadRecord: the template refuses the conversation, omits part of it, or starts a turn of the assistant with anything
            but its generation prompt; or a completion has no turn of the assistant.
    """
    if prompt[-1]["role"] == "assistant" and all(c[0]["role"] == "assistant" for c in completions):
        return _continued(chat, prompt, completions, options)
    assistant_first = all(c[0]["role"] == "assistant" for c in completions)
    header = chat.render(prompt, assistant_first, options)
    skeletons = [Skeleton(chat, prompt, c, options) for c in completions]
    begun = _beginning(header, skeletons)
    return Rendered(begun, [s.parts(begun, assistant_first) for s in skeletons])


def _continued(
    chat: ChatTemplate, prompt: Sequence[Message], completions: Sequence[Sequence[Message]], options: dict[str, Any]
) -> Rendered:
    """Split a record whose prompt ends with a message that the completions continue."""
    last = prompt[-1]
    if len(prompt) == 1 or last.get("tool_calls"):
        what = "calls of tools" if last.get("tool_calls") else "nothing before it"
        raise BadRecord("a last turn of the prompt to go on with must be text behind another turn", what)
    # Marks the boundary between the prompt's half of the message and the completion's.
    edge = marker([*prompt, *(m for c in completions for m in c)]) + "edge"
    whole = [[{**last, **c[0], "content": last["content"] + edge + c[0]["content"]}, *c[1:]] for c in completions]
    rendered = take_apart(chat, prompt[:-1], whole or [[{**last, "content": last["content"] + edge}]], options)
    heads = [parts[0].text.partition(edge) for parts in rendered.completions]
    if len({head for head, _, _ in heads}) != 1 or not all(found for _, found, _ in heads):
        raise BadRecord("the last turn of the prompt must begin all completions alike", shown(last["content"]))
    rest = [[Part(text, True), *parts[1:]] for (_, _, text), parts in zip(heads, rendered.completions, strict=True)]
    return Rendered(rendered.prompt + heads[0][0], rest if completions else [])


class Skeleton:
    """A conversation rendered with a marker in place of each assistant content of its completion."""

    def __init__(
        self, chat: ChatTemplate, prompt: Sequence[Message], completion: Sequence[Message], options: dict[str, Any]
    ) -> None:
        self.chat, self.options = chat, options
        self.messages = [*prompt, *completion]
        answers = [k for k in range(len(prompt), len(self.messages)) if self.messages[k]["role"] == "assistant"]
        if not answers:
            raise BadRecord("a completion must hold a turn of the assistant", shown([m["role"] for m in completion]))
        del self.messages[answers[-1] + 1 :]  # later messages are not trained on
        mark = marker(self.messages)
        marks = [{**m, "content": f"{mark}{k}x"} if m["content"] else m for k, m in enumerate(self.messages)]
        self.marked = [marks[k] if k in answers else m for k, m in enumerate(self.messages)]
        self.all_marked = [*self.messages[: len(prompt)], *marks[len(prompt) :]]
        chat.render(self.messages, False, options)  # a template may refuse the contents themselves
        self.text = chat.render(self.marked, False, options)
        self.turns = [self._turn(k) for k in answers]
        self._check_nothing_left_out(answers)

    def parts(self, begun: str, assistant_first: bool) -> list[Part]:
        """Return the parts behind `begun`, up to the end of the last assistant turn.

        Args:
            begun: the text of the prompt.
            assistant_first: True if the completion starts with a turn of the assistant.
        """
        parts: list[Part] = []
        # The turn starts before len(begun) if `begun` ends with a tag that the conversation omits.
        done = min(len(begun), self.turns[0].start)
        spans = self.chat.generation_spans(self.marked, self.options)
        for turn in self.turns:
            first = turn is self.turns[0] and assistant_first
            start = done if first else turn.start
            lead, content = self.text[start : turn.at], turn.content
            if set(_CLOSING.findall(lead)) & set(_CLOSING.findall(content)):
                start, lead = turn.at, ""  # the template adds a block of reasoning, but the record has its own
            if not lead and (len(begun) if first else turn.start) >= turn.header:  # the prompt has the opening tag
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
        # Look for a tag in the generation prompt only: a user's text may also end with one.
        before = common(header, self.chat.render(self.marked[:k], False, self.options)) if k else 0
        opened = _opened(header[before:])
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
        written = squeezed(self.text[start:end])
        for name in REASONING:
            words = message.get(name)
            if isinstance(words, str) and squeezed(words) not in written:
                raise BadRecord(f"the chat template must write the {name!r} of a turn", shown(words))
        _check_calls(message, written)
        return Turn(start, at, after, end, self.chat.without_end(message["content"]), opened, len(header))

    def _end(self, k: int, after: int) -> int:
        """Return the position in the text where turn k ends; its content ends at `after`."""
        last = k == len(self.messages) - 1
        alone = self.text if last else self.chat.render(self.marked[: k + 1], False, self.options)
        if self.messages[k].get("tool_calls"):  # calls are written behind the content, followed by their own end
            limit = self.chat.whole_tokens(self.text, after, common(alone, self.text))
            return after + len(self.text[after:limit].rstrip())
        limit = len(self.text) if last else self._next_content(k, after)
        return after + len(self.chat.end_of_turn(self.text[after:limit], alone[after:], last))

    @cached_property
    def _bare(self) -> str:
        """The conversation with every content of the completion marked: the text between two markers is the template's."""
        try:
            return self.chat.render(self.all_marked, False, self.options)
        except BadRecord:  # some templates parse a tool's content as JSON
            return self.text

    def _next_content(self, k: int, after: int) -> int:
        """Return the position of the next content behind turn k, whose content ends at `after`."""
        words = next((m["content"] for m in self.all_marked[k + 1 :] if m["content"]), "")
        own = self.marked[k]["content"]
        between = self._bare.partition(own)[2].partition(words)[0] if own and words else ""
        return after + len(between) if self.text.startswith(between, after) else after

    def _check_nothing_left_out(self, answers: Sequence[int]) -> None:
        """Raise BadRecord unless the text contains all other messages; earlier answers may lack their reasoning."""
        text = squeezed(self.text)
        for k, message in enumerate(self.messages):
            words = message["content"]
            if message["role"] == "assistant":
                words = _CLOSING.split(words)[-1]
            as_json = json.dumps(words, ensure_ascii=False)[1:-1]  # many templates write a tool's output as JSON
            if k not in answers and squeezed(words) not in text and squeezed(as_json) not in text:
                raise BadRecord(f"the chat template must write the turns of the {message['role']}", shown(words))
            if k not in answers:
                _check_calls(message, text)
        for tool in self.options.get("tools") or []:
            name = _name(tool)
            if name and squeezed(name) not in text:
                raise BadRecord("the chat template must write the tools", shown(name))


def _name(tool: dict[str, Any]) -> str:
    """Return the name of a tool or of a tool call; empty if it has none."""
    function = tool.get("function")
    name = (function if isinstance(function, dict) else tool).get("name")
    return name if isinstance(name, str) else ""


def _check_calls(message: Message, text: str) -> None:
    """Raise BadRecord unless a text without blanks contains the name of every tool call of a message."""
    names = Counter(name for call in message.get("tool_calls") or [] if (name := _name(call)))
    for name, n in names.items():
        if text.count(squeezed(name)) < n:
            raise BadRecord("the chat template must write the calls of tools of a turn", shown(name))


def _split(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> list[Part]:
    """Return text[start:end] in parts; parts within one of the spans are trained on."""
    edges = sorted({start, end, *(edge for span in spans for edge in span if start < edge < end)})
    return [Part(text[a:b], any(c <= a and b <= d for c, d in spans)) for a, b in pairwise(edges)]


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with neighbours of the same kind merged."""
    return [Part("".join(p.text for p in run), learnt) for learnt, run in groupby(parts, key=lambda part: part.learnt)]


def _beginning(header: str, skeletons: Sequence[Skeleton]) -> str:
    """Return the text before all completions of a record: the header, less an opening tag that not all completions continue."""
    first = [(s.turns[0], s.text) for s in skeletons]
    tag = first[0][0].opened.rstrip() if first and first[0][0].header == len(header) else ""
    if all(text.startswith(header) or (tag and _goes_on(tag, turn.content)) for turn, text in first):
        return header
    begun = header[: min(turn.start for turn, _ in first)]
    if not all(text.startswith(begun) for _, text in first):
        raise BadRecord("the chat template must render the prompt as a prefix of the conversation", shown(begun[-40:]))
    return begun


def _opened(header: str) -> str:
    """Return the opening tag at the end of a generation prompt with the blanks behind it; empty if there is none."""
    found = _OPENING.search(header)
    return header[found.start() :] if found else ""


def _goes_on(tag: str, content: str) -> bool:
    """True if a content repeats an opening tag, or starts inside the block that the tag opens."""
    closing = tag[0] + "/" + tag[1:]
    return content.startswith(tag) or (closing in content and tag not in content)
