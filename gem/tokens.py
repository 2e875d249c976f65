"""Rows of token ids: padded on the left before generation, cut behind the first end after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Pad prompts on the left, so that all of them end in the last column, where generation continues.

    Returns:
        input_ids and attention_mask, each (R, T) int64 on `device`.
    """
    import torch  # here, so that gem.ends needs no torch

    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def cut_at_eos(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the tokens up to and including the first that is in `ends`; all of them if none is."""
    first = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:first])
