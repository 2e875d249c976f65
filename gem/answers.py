"""The final answer of a completion, in the form in which answers are compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from gem.config import LAST_TOKENS
from gem.ends import Ends
from gem.spans import Spans, find_spans

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")


def final_answer(ids: Sequence[int], tokenizer: Any, ends: Ends, markers: Sequence[str]) -> str:
    """Return the final answer of a completion of one turn, normalised; "" if it gives none.

    Args:
        ids: tokens of the completion, with or without its end.
        tokenizer: the model's tokenizer.
        ends: ends of a completion, which are no part of the answer.
        markers: texts that announce the answer (gem.spans).
    """
    content = ends.content(ids, tokenizer)
    return read_answer(content, find_spans(content, tokenizer, markers=markers, last_tokens=LAST_TOKENS), tokenizer)


def read_answer(content: Sequence[int], spans: Spans, tokenizer: Any) -> str:
    """Return the normalised answer of the tokens before the end of a completion, whose spans are known.

    A single line without a marker is the answer as a whole: the last tokens, which stand for it in Eq. 1, may cut a word.
    """
    start, end = spans.answer
    start = 0 if spans.rule == "last_tokens" else start
    return normalise(tokenizer.decode(list(content[start:end]), skip_special_tokens=True))


def most_frequent(answers: Sequence[str]) -> tuple[str, int]:
    """Return the answer that most give, of equals the first, and their number; ("", 0) if all are "", which is no answer."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts.items(), key=lambda item: item[1], default=("", 0))


def normalise(answer: str) -> str:
    """Return the form in which answers are compared: the last number without separators and trailing zeros, else the words."""
    numbers = NUMBER.findall(answer)
    if numbers:
        number = f"{Decimal(numbers[-1].replace(',', '')):f}"  # exact: as floats, two long numbers may be equal
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return "0" if number == "-0" else number
    return " ".join(answer.lower().split()).strip(" .")
