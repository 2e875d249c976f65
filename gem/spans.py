"""Where the final answer of a completion starts, in tokens: the two spans that Eq. 1 (arXiv 2511.13007) reads.

A marker found on the decoded text and mapped back to tokens; else the last non-empty line, when there are several; else
the last few tokens. What that leaves open is decided here:

- The last marker with text after it wins. A model names the marker while it plans ("I will put it after ####"), closes
  its reasoning (`</think>`) before it boxes the answer, and corrects itself; graders read the last one too. Markers at
  the end of the text were cut off or announce nothing, and are in neither span.
- The answer runs from the first to the last visible character after the marker. After a marker that opens a brace, as
  `\\boxed{` does, it ends before the brace that matches; where none does, at the end of the text.
- A token with any character of the answer is the answer's: a tokenizer that glues a brace to a digit loses no answer.
- The branch is every token before the first one with a piece of the marker, or of the answer where there is no marker;
  earlier markers are part of the reasoning.
- Special and blank tokens at the end (end of sequence, padding, the line break of a chat template) are in neither span.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from gem.decoding import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a decoder shows for the bytes of a character that is not complete yet.
_REPLACEMENT = "\ufffd"


class Spans(NamedTuple):
    """Offsets [start, end) into the tokens of a completion."""

    branch: tuple[int, int]
    """the reasoning; may be empty"""
    answer: tuple[int, int]
    """the final answer; empty only when nothing but markers and blanks was said"""
    rule: Literal["marker", "last_line", "last_tokens"]
    """what found the answer"""


def find_spans(
    completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, markers: Sequence[str], last_tokens: int
) -> Spans:
    """The reasoning and the final answer of a completion, by the rules in the module's docstring.

    Args:
        completion_ids: (n,) token ids of the completion alone, with or without its end of sequence.
        tokenizer: the model's, slow or fast. About 3 log2(n) prefixes are decoded.
        markers: texts that announce the answer, none of them empty.
        last_tokens: length of the answer by the last rule, >= 1.

    Raises:
        TypeError: markers is one string.
        ValueError: a marker is empty, or last_tokens < 1.
    """
    if isinstance(markers, str):
        raise TypeError(f"markers must be a sequence of strings, got the string {markers!r}")
    if not all(markers):
        raise ValueError(f"markers must not hold an empty string, got {list(markers)!r}")
    if last_tokens < 1:
        raise ValueError(f"last_tokens must be >= 1, got {last_tokens}")

    ids = _without_tail([int(i) for i in completion_ids], tokenizer)
    prefixes = range(len(ids) + 1)

    @cache
    def text_of(n: int) -> str:
        return decode(ids[:n], tokenizer)

    # Characters of the first n tokens, those complete and those begun. Both only grow with n, which bisection needs and
    # len(text_of(n)) does not: some decoders show a replacement for each byte of a character until its last one comes.
    def complete(n: int) -> int:
        return len(text_of(n).rstrip(_REPLACEMENT))

    def begun(n: int) -> int:
        return complete(n) + text_of(n).endswith(_REPLACEMENT)

    def token_at(char: int) -> int:
        """The first token with a piece of this character."""
        return bisect_right(prefixes, char, key=begun) - 1

    def token_end(char: int) -> int:
        """One past the last token with a piece of the characters before this one."""
        return min(bisect_left(prefixes, char, key=complete), len(ids))  # past the end: bytes that stay incomplete

    text = _without_markers_at_end(text_of(len(ids)), markers)
    if marked := _marked_answer(text, markers):
        marker, start, end = marked
        return Spans((0, token_at(marker)), (token_at(start), token_end(end)), "marker")
    end = token_end(len(text))
    line = text.rfind("\n") + 1
    if text[:line].strip():
        start = token_at(line + _blanks(text[line:]))
        return Spans((0, start), (start, end), "last_line")
    start = max(0, end - last_tokens)
    return Spans((0, start), (start, end), "last_tokens")


def _without_tail(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens without the special and the blank ones at the end."""
    # The decoder knows them all. tokenizer.all_special_ids has only those with a role (eos, pad, ...), so none for a
    # tokenizer that was loaded from a bare file.
    n = len(ids)
    while n and not decode(ids[n - 1 : n], tokenizer, skip_special_tokens=True).strip():
        n -= 1
    return ids[:n]


def _without_markers_at_end(text: str, markers: Sequence[str]) -> str:
    text = text.rstrip()
    while marker := next((m for m in markers if text.endswith(m)), None):
        text = text.removesuffix(marker).rstrip()
    return text


def _marked_answer(text: str, markers: Sequence[str]) -> tuple[int, int, int] | None:
    """Start of the marker, start and end of the answer in characters; None: no marker has text after it."""
    pattern = "|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True))
    matches = list(re.finditer(pattern, text)) if markers else []
    for match in reversed(matches):
        start = match.end()
        answer = text[start : _closing_brace(text, start) if match.group().endswith("{") else None]
        if answer.strip():
            return match.start(), start + _blanks(answer), start + len(answer.rstrip())
    return None


def _closing_brace(text: str, start: int) -> int:
    """Where the brace opened before `start` closes, LaTeX's escaped braces aside; the end of the text if nowhere."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return len(text)


def _blanks(text: str) -> int:
    """The number of blank characters it begins with."""
    return len(text) - len(text.lstrip())
