"""Preference records, chat templates, and the one place where labels are shifted and padding is dropped.

    records = load_records("pairs.jsonl", need=("chosen", "rejected"))
    examples = encode_records(records, tokenizer, prompt_template="{prompt}", max_length=2048)
    batch = pack([[(e.prompt_ids, e.chosen_ids), (e.prompt_ids, e.rejected_ids)] for e in examples], layout="right", pad_id=0)

A batch feeds any layout to the model; its head looks at the N completion tokens only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gem_kernels import IGNORE_INDEX

logger = logging.getLogger(__name__)

Layout = Literal["packed", "right", "left"]
Messages = list[dict[str, str]]
TokenPair = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids


@dataclass(frozen=True)
class Example:
    """A tokenised record. Completions carry their end of sequence; what the record lacks is empty."""

    prompt: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] = field(default_factory=list)
    candidate_ids: list[list[int]] = field(default_factory=list)


def load_records(source: str, *, need: Sequence[str], limit: int = 0) -> list[dict[str, Any]]:
    """Records of a jsonl file, a folder written by datasets.save_to_disk, or the train split of a hub dataset.

    `completion` is read as `chosen` (supervised data). Each record carries its place under "_where" for later messages.

    Raises:
        ValueError: nothing there to read, a line that is no JSON object, or a record without a field of `need` or with
            something else than text or chat messages in it; with file and line number.
    """
    path = Path(source)
    if path.is_file():
        rows = _read_jsonl(path)
    else:
        import datasets

        if path.suffix in (".jsonl", ".json") and not path.exists():
            raise ValueError(f"data must be an existing file, folder or hub dataset, got {source!r}: no such file")
        try:
            loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(source)
        except OSError as error:  # the hub's and the network's are, too
            raise ValueError(f"data must be an existing file, folder or hub dataset, got {source!r}: {error}") from None
        if isinstance(loaded, dict) and "train" not in loaded:
            raise ValueError(f"data must have a train split, got {sorted(loaded)} in {source!r}")
        table = loaded["train"] if isinstance(loaded, dict) else loaded
        rows = [(f"{source}, row {i}", dict(row)) for i, row in enumerate(table)]
    if not rows:
        raise ValueError(f"data must hold at least one record, got none in {source!r}")
    return [_checked(record, where, need) for where, record in (rows[:limit] if limit else rows)]


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    with path.open("rb") as lines:  # as bytes: one line that is not UTF-8 is named, not the block that it came in
        for number, raw in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8 text, got {error}") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: expected one JSON object a line, got {line.strip()[:60]!r} ({error})"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            rows.append((where, record))
    return rows


def _checked(record: dict[str, Any], where: str, need: Sequence[str]) -> dict[str, Any]:
    # A table has no other way to leave a field out.
    record = {name: value for name, value in record.items() if value is not None}
    if "chosen" not in record and "completion" in record:
        record["chosen"] = record["completion"]
    for name in ("prompt", *need):
        if name not in record:
            raise ValueError(f"{where}: expected a record with {name!r}, got the fields {sorted(record)}")
    for name in ("prompt", "chosen", "rejected"):
        if name in record and not _is_text_or_messages(record[name]):
            raise ValueError(f"{where}: {name!r} must be text or chat messages, not empty, got {record[name]!r}")
    candidates = record.get("candidates", [])
    if not isinstance(candidates, list) or not all(map(_is_text_or_messages, candidates)):
        raise ValueError(f"{where}: 'candidates' must be a list of texts or of chat messages, got {candidates!r}")
    return {**record, "_where": where}


def _is_text_or_messages(value: object) -> bool:
    """Text, or a list of {"role": text, "content": text}; neither empty nor with half a surrogate pair in it."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def encode_records(
    records: Sequence[dict[str, Any]], tokenizer: Any, *, prompt_template: str, max_length: int
) -> list[Example]:
    """Tokenise; records longer than max_length tokens (prompt + completion) are left out and counted in a warning.

    Raises:
        ValueError: an empty completion, chat messages without a chat template, all records too long, no end of sequence.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token (pass --eos_token), got None")
    if "{prompt}" not in prompt_template:
        raise ValueError(f"prompt_template must contain {{prompt}}, got {prompt_template!r}")
    examples = [_encode(record, tokenizer, prompt_template) for record in records]
    kept = [e for e in examples if _longest(e) <= max_length]
    if len(kept) < len(examples):
        logger.warning(
            "%d of %d records are longer than max_length=%d", len(examples) - len(kept), len(examples), max_length
        )
    if not kept:
        raise ValueError(
            f"max_length must leave at least one record, got {max_length} and {len(examples)} longer records"
        )
    return kept


def _longest(e: Example) -> int:
    return len(e.prompt_ids) + max(len(c) for c in (e.chosen_ids, e.rejected_ids, *e.candidate_ids))


def _encode(record: dict[str, Any], tokenizer: Any, prompt_template: str) -> Example:
    prompt, where = record["prompt"], record["_where"]
    if isinstance(prompt, list):
        prompt_text, prompt_ids = _chat(prompt, tokenizer, where, generation_prompt=True)
    else:
        prompt_text = prompt_template.replace("{prompt}", prompt)  # not format: other braces are the text's own
        prompt_ids = tokenizer(prompt_text)["input_ids"]
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            prompt_ids = prompt_ids[:-1]
    if not prompt_ids:
        raise ValueError(f"{where}: 'prompt' must be at least one token, got {prompt!r}")

    def completion(value: str | Messages) -> list[int]:
        if not isinstance(value, str) and isinstance(prompt, str):
            raise ValueError(f"{where}: a completion of chat messages needs a prompt of chat messages, got text")
        if isinstance(value, str) and isinstance(prompt, list):
            value = [{"role": "assistant", "content": value}]
        if isinstance(value, str):
            ids = tokenizer(value, add_special_tokens=False)["input_ids"]
            text = value
        else:
            _, whole = _chat(prompt + value, tokenizer, where, generation_prompt=False)
            if whole[: len(prompt_ids)] != prompt_ids:
                raise ValueError(f"{where}: the chat template must render the prompt as a prefix of the conversation")
            ids, text = whole[len(prompt_ids) :], "".join(message["content"] for message in value)
        if not text.strip() or not ids:
            raise ValueError(f"{where}: a completion must not be empty, got {value!r}")
        eos = tokenizer.eos_token_id
        if eos in ids:  # templates end a turn with eos and a newline: the model stops at the first
            return list(ids[: ids.index(eos) + 1])
        return [*ids, eos]

    return Example(
        prompt_text,
        list(prompt_ids),
        completion(record["chosen"]) if "chosen" in record else [],
        completion(record["rejected"]) if "rejected" in record else [],
        [completion(c) for c in record.get("candidates") or []],
    )


def _chat(messages: Messages, tokenizer: Any, where: str, *, generation_prompt: bool) -> tuple[str, list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: chat messages need a tokenizer with a chat template, got one without")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    # The template writes the special tokens itself.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def pack(groups: Sequence[Sequence[TokenPair]], *, layout: Layout, pad_id: int) -> dict[str, Tensor]:
    """Groups of (prompt ids, completion ids) -> the tensors of one batch. R rows of T tokens go through the body.

    layout: "packed": one row, sequences told apart by their position_ids; "right" / "left": one row a sequence, padded.

    Returns:
        input_ids, position_ids (R, T) int64; attention_mask (R, T) int64, absent when packed;
        shift_labels (R, T) int64: the completion token that each position predicts, else -100: the shift, once and for all.
        Of those N tokens, row by row: sequence (N,) int64: the sequence of each, counted within its group;
        cu_seqlens (S+1,), cu_groups (B+1,) int32: offsets of the sequences and of the groups into the N tokens.

    Raises:
        ValueError: an empty group, prompt or completion.
    """
    if not groups:
        raise ValueError("groups must not be empty, got none")
    for g, group in enumerate(groups):
        if not group:
            raise ValueError(f"groups must not be empty, got group {g} without a sequence")
        for s, (prompt, completion) in enumerate(group):
            if not prompt or not completion:
                raise ValueError(f"expected a prompt and a completion of >= 1 token, got {len(prompt)} and "
                                 f"{len(completion)} in sequence {s} of group {g}")  # fmt: skip
    sequences = [pair for group in groups for pair in group]
    lengths = [len(p) + len(c) for p, c in sequences]
    if layout == "packed":
        rows, width = 1, sum(lengths)
        starts = _offsets(torch.tensor(lengths))[:-1].tolist()
    else:
        rows, width = len(sequences), max(lengths)
        starts = [i * width + (width - n if layout == "left" else 0) for i, n in enumerate(lengths)]
    input_ids = torch.full((rows * width,), pad_id)
    position_ids = torch.zeros(rows * width, dtype=torch.int64)
    mask = torch.zeros(rows * width, dtype=torch.int64)
    shift_labels = torch.full((rows * width,), IGNORE_INDEX)
    for (prompt, completion), start, n in zip(sequences, starts, lengths, strict=True):
        at = slice(start, start + n)
        input_ids[at] = torch.tensor([*prompt, *completion])
        position_ids[at] = torch.arange(n)
        mask[at] = 1
        shift_labels[start + len(prompt) - 1 : start + n - 1] = torch.tensor(list(completion))
    completions = torch.tensor([len(c) for _, c in sequences])
    within = torch.cat([torch.arange(len(group)) for group in groups])
    cu_seqlens = _offsets(completions)
    batch = {
        "input_ids": input_ids.view(rows, width),
        "position_ids": position_ids.view(rows, width),
        "attention_mask": mask.view(rows, width),
        "shift_labels": shift_labels.view(rows, width),
        "sequence": within.repeat_interleave(completions),
        "cu_seqlens": cu_seqlens,
        "cu_groups": cu_seqlens[_offsets(torch.tensor([len(group) for group in groups])).long()],
    }
    if layout == "packed":
        del batch["attention_mask"]  # with it, transformers would not look for the sequences in position_ids
    return batch


def _offsets(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n+1,) int32 offsets."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
