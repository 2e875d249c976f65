"""Token ids -> text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast


def decode(ids: Sequence[int], tokenizer: Any, *, skip_special_tokens: bool = False, **options: Any) -> str:
    """Return the exact text of token ids; without clean-up, the text of a prefix is a prefix of the text."""
    options |= {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return cast(str, tokenizer.decode(list(ids), **options))
