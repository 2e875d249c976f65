"""Find the final answer of a completion, in tokens: the two spans that Eq. 1 (arXiv 2511.13007) reads.

The rules are tried in this order (_RULES): the text after a marker; the last non-empty line, if there are several; the last few
tokens. They work on the decoded text, and the result is mapped back to tokens. Details that the paper leaves open:

- The last marker with text after it wins. A model names the marker while it plans ("I will put it after ####"), closes
  its reasoning (`</think>`) before it boxes the answer, and corrects itself; graders read the last one too. Markers at
  the end of the text were cut off or announce nothing, and are in neither span.
- The answer runs from the first to the last visible character after the marker. After a marker that opens a brace, as
  `\\boxed{` does, it ends before the matching brace, or at the end of the text if there is none.
- A token with any character of the answer belongs to the answer, even if the tokenizer joins a brace to a digit.
- The branch is every token before the first one with a piece of the marker, or of the answer if there is no marker;
  earlier markers are part of the reasoning.
- Special and blank tokens at the end (end of sequence, padding, the line break of a chat template) are in neither span.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from gem.decoding import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The character to which a decoder maps the bytes of an incomplete character.
_REPLACEMENT = "\ufffd"


class Spans(NamedTuple):
    """Offsets [start, end) into the tokens of a completion."""

    branch: tuple[int, int]
    """the reasoning; may be empty"""
    answer: tuple[int, int]
    """the final answer; empty only if the completion holds nothing but markers and blanks"""
    rule: str
    """the name of the rule that found the answer, from _RULES"""


def find_spans(
    completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, markers: Sequence[str], last_tokens: int
) -> Spans:
    """Return the reasoning and the final answer of a completion, by the rules in the module's docstring.

    Args:
        completion_ids: (n,) token ids of the completion alone, with or without its end of sequence.
        tokenizer: the model's, slow or fast. About 3 log2(n) prefixes are decoded.
        markers: texts that announce the answer, none of them empty.
        last_tokens: length of the answer by the rule last_tokens, >= 1.

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

    # The number of complete characters, and of complete or begun ones, in the first n tokens. Bisection needs numbers that only
    # grow with n. len(text_of(n)) does not: some decoders give one replacement for each byte until a character is complete.
    def complete(n: int) -> int:
        return len(text_of(n).rstrip(_REPLACEMENT))

    def begun(n: int) -> int:
        return complete(n) + text_of(n).endswith(_REPLACEMENT)

    def token_at(char: int) -> int:
        """Return the first token with a piece of this character."""
        return bisect_right(prefixes, char, key=begun) - 1

    def token_end(char: int) -> int:
        """Return one past the last token with a piece of the characters before this one."""
        return min(bisect_left(prefixes, char, key=complete), len(ids))  # the last bytes may stay incomplete

    text = _without_markers_at_end(text_of(len(ids)), markers)
    completion = _Completion(text, markers, last_tokens, token_at, token_end)
    for name, rule in _RULES.items():
        if found := rule(completion):
            branch_end, *answer = found
            return Spans((0, branch_end), (answer[0], answer[1]), name)
    raise AssertionError("the last rule finds an answer in any completion")


class _Completion(NamedTuple):
    """The text of a completion, without a tail of markers and blanks, and its map to tokens."""

    text: str
    markers: Sequence[str]
    last_tokens: int
    token_at: Callable[[int], int]
    """the first token with a piece of a character"""
    token_end: Callable[[int], int]
    """one past the last token with a piece of the characters before one"""


def _after_marker(c: _Completion) -> tuple[int, int, int] | None:
    if not (marked := _marked_answer(c.text, c.markers)):
        return None
    marker, start, end = marked
    return c.token_at(marker), c.token_at(start), c.token_end(end)


def _last_line(c: _Completion) -> tuple[int, int, int] | None:
    line = c.text.rfind("\n") + 1
    if not c.text[:line].strip():
        return None
    start = c.token_at(line + _blanks(c.text[line:]))
    return start, start, c.token_end(len(c.text))


def _last_tokens(c: _Completion) -> tuple[int, int, int]:
    end = c.token_end(len(c.text))
    start = max(0, end - c.last_tokens)
    return start, start, end


# Every rule by name, in the order in which they are tried. A rule returns (end of the branch, start and end of the answer) in
# tokens, or None if it does not apply.
_RULES: dict[str, Callable[[_Completion], tuple[int, int, int] | None]] = {
    "marker": _after_marker,
    "last_line": _last_line,
    "last_tokens": _last_tokens,
}


def _without_tail(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens without special and blank ones at the end."""
    # Ask the decoder, which skips every special token. tokenizer.all_special_ids has only those with a role (eos, pad, ...), so
    # none for a tokenizer loaded from a bare file.
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
    """Return the start of the marker, and start and end of the answer, in characters; None if no marker has text after it."""
    pattern = "|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True))
    matches = list(re.finditer(pattern, text)) if markers else []
    for match in reversed(matches):
        start = match.end()
        answer = text[start : _closing_brace(text, start) if match.group().endswith("{") else None]
        if answer.strip():
            return match.start(), start + _blanks(answer), start + len(answer.rstrip())
    return None


def _closing_brace(text: str, start: int) -> int:
    """Return where the brace opened before `start` closes, skipping LaTeX's escaped braces; else the end of the text."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return len(text)


def _blanks(text: str) -> int:
    """Return the number of leading blank characters."""
    return len(text) - len(text.lstrip())
