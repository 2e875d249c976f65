"""Rows of token ids: padded on the left, cut behind the first end."""

from __future__ import annotations

import torch

from gem.tokens import cut_at_eos, left_pad


def test_rows_end_together_and_padding_is_masked() -> None:
    found = left_pad([[5, 6, 7], [8], []], pad_id=9)
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert {t.dtype for t in found.values()} == {torch.int64}


def test_the_first_end_is_kept_and_nothing_behind_it() -> None:
    assert cut_at_eos([5, 2, 6, 2], {2, 3}) == [5, 2]
    assert cut_at_eos((3, 5), {2, 3}) == [3]
    assert cut_at_eos([5, 6], {2, 3}) == [5, 6] and cut_at_eos([], {2}) == []
