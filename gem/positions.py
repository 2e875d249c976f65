"""How long a row may be: the positions that a model has, and those for which it was trained."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def position_limit(model: Any) -> tuple[int, bool]:
    """Return how many tokens a row may have, and True if that is a hard limit: the model looks positions up in a table.

    (0, False) means that no limit is known. Rotary positions exist for any length; beyond the limit the model is untrained.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(config, "rope_parameters", None) is not None:
        return limit or 0, False
    if limit is None:
        bias = getattr(config, "max_seq_len", None)  # MPT's name; its bias by distance is such a table
        return bias or 0, bias is not None

    def is_table(name: str, rows: int) -> bool:
        own = name.rsplit(".", 1)[-1]
        return (
            "pos" in own or own == "wpe"
        ) and limit <= rows <= limit + 8  # some models reserve the first rows for padding

    tables = [(name, m.num_embeddings) for name, m in inner.named_modules() if isinstance(m, nn.Embedding)]
    tables += [(name, max(buffer.shape, default=0)) for name, buffer in inner.named_buffers()]
    return limit, any(is_table(name, rows) for name, rows in tables)


def check_positions(model: Any, length: int, what: str) -> None:
    """Check that a model takes rows of `length` tokens; warn once if it does but was not trained for them.

    Args:
        model: of transformers, or a peft model around one.
        length: tokens of the longest row.
        what: the setting that determines the length, for the message.

    Raises:
        ValueError: the model has fewer positions.
    """
    limit, hard = position_limit(model)
    if not limit or length <= limit:
        return
    if hard:
        raise ValueError(f"{what} must fit into the model's {limit} positions, got a row of {length} tokens")
    _warn_of_long_rows(limit)


@cache
def _warn_of_long_rows(limit: int) -> None:
    logger.warning("rows are longer than max_position_embeddings=%d of the model, for which it was trained", limit)
