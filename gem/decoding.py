"""Token ids -> the text that they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast


def decode(ids: Sequence[int], tokenizer: Any, *, skip_special_tokens: bool = False, **options: Any) -> str:
    """The text as it is: cleaned up, that of a prefix would not be a prefix of the text."""
    options |= {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return cast(str, tokenizer.decode(list(ids), **options))
