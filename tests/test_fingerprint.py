"""Hashes of data, tokenizer and model: any change changes them, and nothing else does."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import write_files
from torch import nn
from transformers import PreTrainedTokenizer

from gem import fingerprint
from gem.config import DataArguments, ModelArguments
from gem.data import read_examples
from gem.fingerprint import data_hash, model_hash, records_hash, tokenizer_hash
from gem.models import load_tokenizer


def test_data(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("one")
    first = data_hash(str(file))
    assert len(first) == 16 and int(first, 16) and data_hash(str(shutil.copy(file, tmp_path / "copy"))) == first
    file.write_text("two")
    assert data_hash(str(file)) != first
    assert data_hash("owner/dataset") == ""


def test_data_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text("one")
    (tmp_path / "data" / "test" / "0.jsonl").write_text("two")
    hashes = [data_hash(str(tmp_path / "data"))]
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / ".cache" / "lock").write_text("")
    assert data_hash(str(tmp_path / "data")) == hashes[0]
    (tmp_path / "data" / "test" / "0.jsonl").rename(tmp_path / "data" / "test" / "1.jsonl")
    hashes.append(data_hash(str(tmp_path / "data")))
    (tmp_path / "data" / "train.jsonl").write_text("two")
    hashes.append(data_hash(str(tmp_path / "data")))
    assert len(set(hashes)) == 3


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(6, 7, bias=False))
    model[3].weight = model[0].weight  # tied
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_bit_of_a_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK", 8)  # several blocks, the last one ragged
    model = small_model(dtype)
    hashes = [model_hash(model)]
    assert model_hash(copy.deepcopy(model)) == hashes[0] and len(hashes[0]) == 16
    for tensor in model.state_dict(keep_vars=True).values():
        words = tensor.detach().reshape(-1).view(torch.uint8)
        for at in range(len(words)):
            words[at] ^= 1 << (at % 8)
            hashes.append(model_hash(model))
            words[at] ^= 1 << (at % 8)
    tied = model[0].weight.numel() * model[0].weight.element_size()  # listed twice, the same both times
    assert len(set(hashes)) == len(hashes) - tied
    assert model_hash(model) == hashes[0]


def test_what_else_a_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK", 8)
    hashes = [model_hash(small_model())]
    for changed in range(5):
        model = small_model()
        weight = model[0].weight
        with torch.no_grad():
            if changed == 0:
                weight[[0, 1]] = weight[[1, 0]]  # order within a tensor
            elif changed == 1:
                weight.view(-1)[:16] = weight.view(-1)[:16].view(2, 8).flip(0).reshape(-1)  # order of blocks
            elif changed == 2:
                model[0].weight = model[3].weight = nn.Parameter(weight.view(6, 7))
            elif changed == 3:
                weight.view(-1)[[2, 5]] *= -1  # two bits
            else:
                model[1].weight = nn.Parameter(model[1].weight.t().contiguous().t())  # the same, laid out otherwise
        hashes.append(model_hash(model))
    assert len(set(hashes[:5])) == 5 and hashes[5] == hashes[0]
    assert model_hash(small_model(torch.float64)) != hashes[0]
    assert model_hash(nn.Identity()) != hashes[0]


@pytest.mark.gpu
def test_cuda_gives_the_same() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(3000, 1001, dtype=dtype)
        assert model_hash(model) == model_hash(copy.deepcopy(model).cuda())


def test_records_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    tokenizer = load_tokenizer(ModelArguments(tokenizer="tok"))
    examples = read_examples(DataArguments(data="pairs.jsonl"), tokenizer, need=("chosen",))
    first = records_hash(examples)
    assert records_hash(list(examples)) == first and len(first) == 16
    assert records_hash(examples[::-1]) != first and records_hash(examples[:-1]) != first
    examples[0].chosen_ids[0] += 1
    assert records_hash(examples) != first

    first = tokenizer_hash(tokenizer)
    tokenizer(["1+1=", "2"], padding=True, truncation=True, max_length=3)  # leaves its settings in the backend
    assert tokenizer_hash(tokenizer) == first and len(first) == 16
    tokenizer.save_pretrained("saved")
    assert tokenizer_hash(load_tokenizer(ModelArguments(tokenizer="saved"))) == first
    hashes = [first]
    tokenizer.chat_template = "{{ messages }}"
    hashes.append(tokenizer_hash(tokenizer))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    hashes.append(tokenizer_hash(tokenizer))
    tokenizer.add_tokens(["more"])
    hashes.append(tokenizer_hash(tokenizer))
    assert len(set(hashes)) == 4


def test_a_tokenizer_without_a_backend() -> None:
    class Letters(PreTrainedTokenizer):
        letters = "abc"

        @property
        def vocab_size(self) -> int:
            return len(self.letters)

        def get_vocab(self) -> dict[str, int]:
            return {letter: at for at, letter in enumerate(self.letters)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self.letters.find(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self.letters[index]

    class Others(Letters):
        letters = "abd"

    assert tokenizer_hash(Letters(eos_token="c")) == tokenizer_hash(Letters(eos_token="c"))
    assert (
        len(
            {
                tokenizer_hash(Letters(eos_token="c")),
                tokenizer_hash(Letters(eos_token="b")),
                tokenizer_hash(Others(eos_token="c")),
            }
        )
        == 3
    )
