"""Eq. 1: log-probabilities and entropies of every member of some groups, their spans, and S."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gem.config import LAST_TOKENS, ScoreArguments
from gem.data import Example, TokenPair, pack
from gem.ends import Ends, model_ends
from gem.groups import Group, Member
from gem.head import completion_stats, fused_head
from gem.head_check import undisturbed
from gem.models import check_positions
from gem.spans import find_spans
from gem_kernels import TokenStats, gem_score


def token_stats(
    model: nn.Module, sequences: Sequence[TokenPair], *, batch_tokens: int, progress: str | None = None
) -> list[TokenStats]:
    """Statistics of the completion tokens of every sequence of `gem.data.pack`, on the CPU, in the order given.

    Args:
        model: from fuse_lm_head; whatever temperature it was given there, the distributions are untempered.
        sequences: (prompt ids, completion ids), or with what others wrote in between; that has no statistics.
        batch_tokens: tokens (padding included) that go through the model at once; at least one sequence does.
        progress: label of a progress bar, None: no bar.

    Raises:
        ValueError: a sequence longer than the model has positions for.
    """
    fused_head(model)
    device = next(model.parameters()).device
    results: list[TokenStats | None] = [None] * len(sequences)
    lengths = [sequence_length(sequence) for sequence in sequences]
    check_positions(model, max(lengths, default=0), "max_length: prompt and completion")
    with undisturbed(model), tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for at in _batches(lengths, batch_tokens):
            batch = pack([[sequences[i] for i in at]], layout="right", pad_id=0)
            _, stats = completion_stats(model, {name: t.to(device) for name, t in batch.items()})
            scored = batch["cu_seqlens"].diff().tolist()
            for i, *of_sequence in zip(at, *(s.cpu().split(scored) for s in stats), strict=True):
                results[i] = TokenStats(*of_sequence)
            bar.update(len(at))
    return [r for r in results if r is not None]


def sequence_length(sequence: Sequence[Any]) -> int:
    """Tokens of (prompt ids, completion ids) or (prompt ids, completion ids, given), all of them."""
    prompt, completion, *given = sequence
    return len(prompt) + len(completion) + sum(len(ids) for _, ids in (given[0] if given else ()))


def longest_row(items: Sequence[Group] | Sequence[Example]) -> int:
    """Tokens of the longest sequence of groups or examples, prompt and completion; 0 of none."""
    lengths = [0]
    for item in items:
        if isinstance(item, Group):
            lengths += [sequence_length(item.sequence(member)) for member in item.members]
        else:
            completions = [(item.chosen_ids, item.chosen_given), (item.rejected_ids, item.rejected_given)]
            completions += zip(item.candidate_ids, item.candidates_given or [[]] * len(item.candidate_ids), strict=True)
            lengths += [sequence_length((item.prompt_ids, *completion)) for completion in completions]
    return max(lengths)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length whose padded size stays below batch_tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_groups(
    groups: Sequence[Group],
    tokenizer: Any,
    scorer: nn.Module,
    reference: nn.Module | None,
    arguments: ScoreArguments,
    progress: str | None = None,
    *,
    ends: Ends | None = None,
) -> None:
    """Fill in logprobs, entropies, spans, flaws and S of every member, in place.

    A member that was cut off, that holds no answer, or that has a flaw keeps S = NaN.

    Args:
        groups: of prompts and members with their ids.
        tokenizer: the model's.
        scorer: the model whose entropies score, fused.
        reference: the model of `logprobs`, fused; None: the scorer's own.
        arguments: of Eq. 1.
        progress: label of a progress bar, None: no bar.
        ends: what ends a completion; None: the ends of the scorer and the tokenizer.
    """
    members = [member for group in groups for member in group.members]
    sequences = [group.sequence(member) for group in groups for member in group.members]
    stats = token_stats(scorer, sequences, batch_tokens=arguments.score_tokens, progress=progress)
    references = stats
    if reference is not None:
        references = token_stats(reference, sequences, batch_tokens=arguments.score_tokens)
    for member, own, ref in zip(members, stats, references, strict=True):
        member.entropies, member.logprobs = own.entropy.tolist(), ref.logprob.tolist()
    ends = model_ends(scorer, tokenizer) if ends is None else ends
    for group in groups:
        for member in group.members:
            _read(member, group.question or group.prompt, tokenizer, ends, arguments)
    apply_eq1(members, torch.cat([s.entropy for s in stats]), arguments)


def _read(member: Member, question: str, tokenizer: Any, ends: Ends, arguments: ScoreArguments) -> None:
    """Fill in what a member's tokens say: its text, whether it came to an end, a candidate's flaw, and its spans."""
    member.completion = tokenizer.decode(member.ids, skip_special_tokens=True)
    member.truncated = not ends.has_ended(member.ids, tokenizer)
    start = max((at for at, _ in member.given if at < len(member.ids)), default=0)  # the answer is the last turn's
    said = ends.content(member.ids[start:], tokenizer)
    if member.role == "candidate":
        member.flaw = flaw_of(tokenizer.decode(said, skip_special_tokens=True), question)
    found = find_spans(said, tokenizer, markers=arguments.markers, last_tokens=LAST_TOKENS)
    spans = [(first + start, last + start) for first, last in (found.branch, found.answer)]
    member.branch_span, member.answer_span, member.span_rule = spans[0], spans[1], found.rule


def flaw_of(completion: str, question: str) -> Literal["", "empty", "repeats the prompt"]:
    """Why a candidate cannot be judged: no visible text, or nothing but the question's words, however often."""
    if not any(unicodedata.category(c)[0] not in "CZ" for c in completion):
        return "empty"
    words, asked = _words(completion), _words(question)
    while asked and not _is_word(asked[-1]):  # "3+4" is all of "3+4=?"
        asked.pop()
    if not asked:
        return ""
    rest, i = [], 0
    while i < len(words):
        repeated = words[i : i + len(asked)] == asked
        rest += [] if repeated else [words[i]]
        i += len(asked) if repeated else 1
    return "repeats the prompt" if len(rest) < len(words) and not any(map(_is_word, rest)) else ""


def _words(text: str) -> list[str]:
    """The words and signs of a text in lower case, without blanks and punctuation; scripts without blanks by letter."""
    words: list[str] = []
    for word in re.findall(r"\w+|[^\w\s]", text.casefold()):
        if unicodedata.category(word[0]) == "Lo":
            words += word
        elif _is_word(word) or not unicodedata.category(word[0]).startswith("P"):
            words.append(word)
    return words


def _is_word(word: str) -> bool:
    return any(c.isalnum() for c in word)


def apply_eq1(members: Sequence[Member], entropy: Tensor, arguments: ScoreArguments) -> None:
    """Fill in S and its two terms, nats, in place, of members with their spans; entropy (N,): of all their tokens in a row."""
    if arguments.entropy_clip < 1:
        entropy = entropy.clamp(max=float(entropy.quantile(arguments.entropy_clip)))
    lengths = torch.tensor([len(member.ids) for member in members])
    start = (lengths.cumsum(0) - lengths)[:, None]
    score = gem_score(
        entropy,
        torch.tensor([member.branch_span for member in members]) + start,
        torch.tensor([member.answer_span for member in members]) + start,
        m=arguments.top_m if arguments.top_m < 1 else int(arguments.top_m),
        branch_weight=arguments.branch_weight,
        final_weight=arguments.final_weight,
    )
    for member, s, final, branch in zip(members, *(t.tolist() for t in score), strict=True):
        member.score = math.nan if member.truncated or member.flaw else s
        member.final_entropy, member.branch_entropy = final, branch
