"""Encode preference records, and pack them into batches: the one place that shifts labels and drops padding.

    records = load_records("pairs.jsonl", need=("chosen", "rejected"))
    examples = encode_records(records, tokenizer, prompt_template="{prompt}", max_length=2048)
    batch = pack([[(e.prompt_ids, e.chosen_ids), (e.prompt_ids, e.rejected_ids)] for e in examples], layout="right", pad_id=0)

A batch feeds any layout to the model; its head reads the N completion tokens only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gem.chat_template import ChatTemplate, squeezed
from gem.config import CHOICES, DataArguments, RolloutArguments
from gem.conversation import Part, Rendered, take_apart
from gem.encoding import Encoded, encode_completion, encode_prompt, gives_back
from gem.ends import Ends, ends_of
from gem.group import Given
from gem.problems import BadRecord, Minor, Problems, shown
from gem.records import load_records
from gem_kernels import IGNORE_INDEX

__all__ = ["Example", "Layout", "TokenPair", "encode_records", "load_records", "pack", "read_examples"]

logger = logging.getLogger(__name__)

Layout = Literal["packed", "right", "left"]
Messages = list[dict[str, str]]
TokenPair = tuple[Sequence[int], Sequence[int]] | tuple[Sequence[int], Sequence[int], Given]
"""prompt ids, completion ids, and [(at, ids)] of the text of other roles within the completion"""


@dataclass(frozen=True)
class Example:
    """A tokenised record; absent fields are empty. The ids of a completion are the assistant's tokens, with its ends."""

    prompt: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] = field(default_factory=list)
    candidate_ids: list[list[int]] = field(default_factory=list)
    # Text of other roles within a completion: (at, ids) stands before the completion's token `at`.
    chosen_given: Given = field(default_factory=list)
    rejected_given: Given = field(default_factory=list)
    candidates_given: list[Given] = field(default_factory=list)
    question: str = ""  # the user's last message
    sampling_prompt_ids: list[int] = field(default_factory=list)  # prompt for sampling candidates; empty: prompt_ids
    where: str = field(default="", compare=False)  # "pairs.jsonl, line 3", for messages

    @property
    def has_pair(self) -> bool:
        """True if the record has a human chosen and a human rejected answer."""
        return bool(self.chosen_ids and self.rejected_ids)

    @property
    def sampled_from(self) -> list[int]:
        """The prompt from which candidates are sampled."""
        return self.sampling_prompt_ids or self.prompt_ids


def encode_records(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    prompt_template: str,
    max_length: int,
    prompt_format: str = "text",
    system: str = "",
    cot_prompt: str = "",
    cot_pairs: bool = False,
    ends: Ends | None = None,
    on_bad_row: str = "auto",
    problems: Problems | None = None,
) -> list[Example]:
    """Tokenise records for training on the assistant's text alone, and check each row by decoding it.

    Args:
        records: from load_records.
        tokenizer: of transformers, with an end of sequence.
        prompt_template: text around a plain prompt, with {prompt} in it.
        max_length: limit on prompt and completion together, in tokens.
        prompt_format: "text": a plain prompt is used as it is; "chat": it becomes the user's turn in the chat template;
            "auto": chat if the tokenizer has a template and the prompt is not rendered yet.
        system: the system message for chats without one.
        cot_prompt: request for a chain of thought, appended to the user's words in the prompt for sampling candidates.
        cot_pairs: True to append it in the human pair's prompt too.
        ends: what ends a completion; None: the tokenizer's end of sequence.
        on_bad_row: "stop", "skip", or "auto": stop at a record that cannot be used, leave out one that is too long.
        problems: collects bad records for a caller that settles them; None: they are settled here.

    Returns:
        One example for each usable record, in order.

    Raises:
        ValueError: a wrong argument, or no end of sequence; and, depending on on_bad_row: text that the template or the
            tokenizer loses or changes, an end of sequence inside a completion, a chat without a template.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token (pass --eos_token), got None")
    if "{prompt}" not in prompt_template:
        raise ValueError(f"prompt_template must contain {{prompt}}, got {prompt_template!r}")
    if prompt_format not in CHOICES["prompt_format"]:
        raise ValueError(f"prompt_format must be one of {', '.join(CHOICES['prompt_format'])}, got {prompt_format!r}")
    encoder = _Encoder(
        tokenizer, ends or ends_of(tokenizer), prompt_template, max_length, prompt_format, system, cot_prompt, cot_pairs
    )
    mine = problems is None
    found = Problems(on_bad_row) if problems is None else problems
    examples = []
    for record in records:
        try:
            examples.append(encoder.example(record))
            if not gives_back(examples[-1].prompt, examples[-1].prompt_ids, tokenizer):
                found.note(record["_where"], "the tokenizer changes the text of the prompt")
            if prompt_format == "auto" and isinstance(record["prompt"], str) and encoder.is_chat(record):
                found.note(
                    record["_where"],
                    "a plain prompt is the user's turn of a chat (prompt_format=text leaves it as it is)",
                )
        except BadRecord as error:
            found.add(record["_where"], error)
    if mine:
        found.settle(len(records))
    return examples


def read_examples(
    arguments: DataArguments,
    tokenizer: Any,
    *,
    need: Sequence[str],
    source: str = "",
    split: str | None = None,
    rollout: RolloutArguments | None = None,
    ends: Ends | None = None,
    answers: bool = True,
) -> list[Example]:
    """Run load_records and encode_records with the settings of a command, and report all bad records together.

    Args:
        arguments: the settings of the data.
        tokenizer: of transformers, with an end of sequence.
        need: fields that each record must have beside the prompt.
        source, split: replace those of `arguments`, whose split belongs to its own data.
        rollout: its cot_prompt goes into the prompts of candidates; None: no cot_prompt.
        ends: what ends a completion; None: the tokenizer's end of sequence.
        answers: False to leave the human answers of the records out; the log counts the records that had some.

    Raises:
        ValueError: no source; and as load_records and encode_records.
    """
    if not (source or arguments.data):
        raise ValueError("data must be a file, a folder or a hub dataset, got nothing")
    problems = Problems(arguments.on_bad_row)
    records = load_records(
        source or arguments.data,
        need=need,
        limit=arguments.limit,
        # The split of `arguments` may not exist in another source.
        split=split or (arguments.split if source in ("", arguments.data) else None),
        problems=problems,
        data_format=arguments.data_format,
    )
    total = len(records) + problems.count
    if not answers:
        records = _without_answers(records, problems)
    framed = arguments.prompt_template != "{prompt}" or arguments.prompt_format == "text"
    if framed and records and all(isinstance(record["prompt"], list) for record in records):
        logger.warning(
            "prompt_template and prompt_format are for plain prompts, and all here are chats: they change nothing"
        )
    examples = encode_records(
        records,
        tokenizer,
        prompt_template=arguments.prompt_template,
        max_length=arguments.max_length,
        prompt_format=arguments.prompt_format,
        system=arguments.system,
        cot_prompt=(rollout and rollout.cot_prompt) or "",
        cot_pairs=bool(rollout and rollout.cot_pairs),
        ends=ends,
        problems=problems,
    )
    problems.settle(total)
    return examples


def _without_answers(records: Sequence[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    human = {"chosen", "rejected"}
    for record in records:
        if human & record.keys():
            problems.note(record["_where"], "human answers, which are not read")
    return [{name: value for name, value in record.items() if name not in human} for record in records]


@dataclass
class _Encoder:
    tokenizer: Any
    ends: Ends
    prompt_template: str
    max_length: int
    prompt_format: str
    system: str
    cot_prompt: str
    cot_pairs: bool

    def example(self, record: dict[str, Any]) -> Example:
        names = [name for name in ("chosen", "rejected") if name in record]
        completions = [*(record[name] for name in names), *record.get("candidates", [])]
        for completion in completions:
            self._check(completion)
        chat = self.is_chat(record)
        prompt = self._with_cot(record["prompt"]) if self.cot_pairs and self.cot_prompt else record["prompt"]
        render = self._chat if chat else self._text
        rendered = render(record, prompt, completions)
        ids = encode_prompt(rendered.prompt, self.tokenizer, special=not chat)
        encoded = [
            encode_completion(rendered.prompt, ids, parts, self.tokenizer, self.ends, special=not chat)
            for parts in rendered.completions
        ]
        sampling: list[int] = []
        if self.cot_prompt and not self.cot_pairs and "candidates" not in record:
            with_cot = render(record, self._with_cot(record["prompt"]), [])
            sampling = encode_prompt(with_cot.prompt, self.tokenizer, special=not chat)
        longest = max(len(sampling), len(ids) + max([e.length for e in encoded], default=0))
        if longest > self.max_length:
            raise Minor(f"longer than max_length={self.max_length} tokens", str(longest))
        human = {name: encoded[i] for i, name in enumerate(names)}
        chosen, rejected = (human.get(name, Encoded([], [])) for name in ("chosen", "rejected"))
        if rejected.ids and chosen == rejected:
            raise BadRecord("chosen and rejected must not be the same", shown(self.tokenizer.decode(chosen.ids)))
        candidates = encoded[len(names) :]
        return Example(
            prompt=rendered.prompt,
            prompt_ids=ids,
            chosen_ids=chosen.ids,
            rejected_ids=rejected.ids,
            candidate_ids=[e.ids for e in candidates],
            chosen_given=chosen.given,
            rejected_given=rejected.given,
            candidates_given=[e.given for e in candidates],
            question=_last_user_text(record["prompt"]),
            sampling_prompt_ids=sampling,
            where=str(record.get("_where", "")),
        )

    def _check(self, completion: str | Messages) -> None:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        answers: list[Any] = [message for message in turns if message["role"] == "assistant"]
        if answers and not any(message["content"].strip() or message.get("tool_calls") for message in answers):
            raise BadRecord("a completion must not be empty", shown(completion))
        bos, single = self.tokenizer.bos_token, self.tokenizer.bos_token_id not in self.ends.ids
        if bos and single and any(bos in message["content"] for message in answers):
            raise BadRecord("a completion must not hold a beginning of sequence", shown(bos))

    def is_chat(self, record: dict[str, Any]) -> bool:
        prompt = record["prompt"]
        if isinstance(prompt, list) or self.prompt_format != "auto":
            return isinstance(prompt, list) or self.prompt_format == "chat"
        return bool(getattr(self.tokenizer, "chat_template", None)) and not self._is_rendered(prompt)

    def _is_rendered(self, prompt: str) -> bool:
        """True if a plain prompt is rendered already: it starts with BOS, or contains the template's generation prompt."""
        bos, request = self.tokenizer.bos_token, self._template.request
        return bool((bos and prompt.lstrip().startswith(bos)) or (request and request in squeezed(prompt)))

    def _chat(self, record: dict[str, Any], prompt: Any, completions: Sequence[Any]) -> Rendered:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": self._framed(prompt)}]
        system = record.get("system") or self.system
        if system and prompt[0]["role"] not in ("system", "developer"):
            prompt = [{"role": "system", "content": system}, *prompt]
        turns = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        options = dict(record.get("chat_template_kwargs", {}))
        if record.get("tools"):
            options["tools"] = record["tools"]
        return take_apart(self._template, prompt, turns, options)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _text(self, record: dict[str, Any], prompt: Any, completions: Sequence[Any]) -> Rendered:
        framed = self.prompt_template != "{prompt}" or prompt != record["prompt"]
        template = getattr(self.tokenizer, "chat_template", None)
        if framed and self.prompt_format == "auto" and template and self._is_rendered(record["prompt"]):
            raise BadRecord("prompt_template and cot_prompt need a prompt that is not rendered yet", shown(prompt))
        if self.system or record.get("system"):
            raise BadRecord("a system message needs a prompt of chat messages (prompt_format=chat), got text")
        if not all(isinstance(completion, str) for completion in completions):
            raise BadRecord("a completion of chat messages needs a prompt of chat messages, got text")
        # Blanks behind an end of sequence belong to no turn.
        end = self.tokenizer.eos_token
        texts = [text.rstrip() if text.rstrip().endswith(end) else text for text in completions]
        return Rendered(self._framed(prompt), [[Part(text, True)] for text in texts])

    def _framed(self, prompt: str) -> str:
        return self.prompt_template.replace("{prompt}", prompt)  # not str.format: other braces belong to the text

    def _with_cot(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return f"{prompt}\n\n{self.cot_prompt}"
        last_user = max((k for k, message in enumerate(prompt) if message["role"] == "user"), default=None)
        if last_user is None:
            raise BadRecord("cot_prompt needs a turn of the user in the prompt", str([m["role"] for m in prompt]))
        message = {**prompt[last_user], "content": f"{prompt[last_user]['content']}\n\n{self.cot_prompt}"}
        return [*prompt[:last_user], message, *prompt[last_user + 1 :]]


def _last_user_text(prompt: str | Messages) -> str:
    """Return the text of the user's last turn."""
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")


def pack(groups: Sequence[Sequence[TokenPair]], *, layout: Layout, pad_id: int) -> dict[str, Tensor]:
    """Pack groups of (prompt ids, completion ids) into the tensors of one batch of R rows of T tokens.

    Args:
        groups: for each group its sequences. A third entry, [(at, ids)], has tokens of other roles that stand before the
            completion's token `at`; they are read and not trained on.
        layout: "packed": one row, sequences separated by their position_ids; "right" / "left": one padded row a sequence.
        pad_id: the padding token.

    Returns:
        input_ids, position_ids (R, T) int64; attention_mask (R, T) int64, absent when packed;
        shift_labels (R, T) int64: the completion token that each position predicts, else -100; labels are shifted here only.
        For those N tokens, row by row: sequence (N,) int64: the index of each token's sequence within its group;
        cu_seqlens (S+1,), cu_groups (B+1,) int32: offsets of the sequences and of the groups into the N tokens.

    Raises:
        ValueError: an empty group, prompt or completion.
    """
    if not groups:
        raise ValueError("groups must not be empty, got none")
    for g, group in enumerate(groups):
        if not group:
            raise ValueError(f"groups must not be empty, got group {g} without a sequence")
        for s, (prompt, completion, *_) in enumerate(group):
            if not prompt or not completion:
                raise ValueError(f"expected a prompt and a completion of >= 1 token, got {len(prompt)} and "
                                 f"{len(completion)} in sequence {s} of group {g}")  # fmt: skip
    sequences = [_with_labels(*sequence) for group in groups for sequence in group]
    lengths = [len(ids) for ids, _ in sequences]
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
    for (ids, labels), start, n in zip(sequences, starts, lengths, strict=True):
        at = slice(start, start + n)
        input_ids[at] = torch.tensor(ids)
        position_ids[at] = torch.arange(n)
        mask[at] = 1
        shift_labels[start : start + n - 1] = torch.tensor(labels[1:])
    completions = torch.tensor([len(completion) for group in groups for _, completion, *_ in group])
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
        del batch["attention_mask"]  # with a mask, transformers would not find the sequences by position_ids
    return batch


def _with_labels(prompt: Sequence[int], completion: Sequence[int], given: Given = ()) -> tuple[list[int], list[int]]:  # type: ignore[assignment]
    """Return all tokens of a sequence, and the labels: each token itself if it is trained on, else -100."""
    ids, labels, done = list(prompt), [IGNORE_INDEX] * len(prompt), 0
    for at, others in [*given, (len(completion), [])]:
        own = completion[done:at]
        ids += [*own, *others]
        labels += [*own, *[IGNORE_INDEX] * len(others)]
        done = at
    return ids, labels


def _offsets(lengths: Tensor) -> Tensor:
    """Return the int32 offsets (n+1,) of (n,) lengths."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
