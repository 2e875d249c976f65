"""Eq. 1: log-probabilities and entropies of every member of some groups, their spans, and S."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gem.config import LAST_TOKENS, ScoreArguments
from gem.data import TokenPair, pack
from gem.groups import Group, Member
from gem.head import completion_stats, fused_head
from gem.head_check import undisturbed
from gem.spans import find_spans
from gem_kernels import TokenStats, gem_score


def token_stats(
    model: nn.Module, sequences: Sequence[TokenPair], *, batch_tokens: int, progress: str | None = None
) -> list[TokenStats]:
    """Statistics of the completion tokens of every (prompt ids, completion ids), on the CPU, in the order given.

    Args:
        model: from fuse_lm_head; whatever temperature it was given there, the distributions are untempered.
        batch_tokens: tokens (padding included) that go through the model at once; at least one sequence does.
        progress: label of a progress bar, None: no bar.
    """
    fused_head(model)
    device = next(model.parameters()).device
    results: list[TokenStats | None] = [None] * len(sequences)
    with undisturbed(model), tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for at in _batches([len(p) + len(c) for p, c in sequences], batch_tokens):
            batch = pack([[sequences[i] for i in at]], layout="right", pad_id=0)
            _, stats = completion_stats(model, {name: t.to(device) for name, t in batch.items()})
            lengths = batch["cu_seqlens"].diff().tolist()
            for i, *of_sequence in zip(at, *(s.cpu().split(lengths) for s in stats), strict=True):
                results[i] = TokenStats(*of_sequence)
            bar.update(len(at))
    return [r for r in results if r is not None]


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
) -> None:
    """Fill in logprobs, entropies, spans and S of every member, in place.

    scorer: the model whose entropies score. reference: the model of `logprobs`; None: the scorer's own. Both: fused.
    A member that was cut off, or that holds no answer, keeps S = NaN.
    """
    members = [member for group in groups for member in group.members]
    sequences = [(group.prompt_ids, member.ids) for group in groups for member in group.members]
    stats = token_stats(scorer, sequences, batch_tokens=arguments.score_tokens, progress=progress)
    references = stats
    if reference is not None:
        references = token_stats(reference, sequences, batch_tokens=arguments.score_tokens)
    for member, own, ref in zip(members, stats, references, strict=True):
        member.entropies, member.logprobs = own.entropy.tolist(), ref.logprob.tolist()
        member.completion = tokenizer.decode(member.ids, skip_special_tokens=True)
        member.truncated = member.ids[-1] != tokenizer.eos_token_id
        spans = find_spans(member.ids, tokenizer, markers=arguments.markers, last_tokens=LAST_TOKENS)
        member.branch_span, member.answer_span, member.span_rule = spans
    apply_eq1(members, torch.cat([s.entropy for s in stats]), arguments)


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
        member.score = math.nan if member.truncated else s
        member.final_entropy, member.branch_entropy = final, branch
