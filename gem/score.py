"""Eq. 1: log-probs and entropies of the members of groups, their spans, and the score S."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gem.answers import read_answer
from gem.config import LAST_TOKENS, SAMPLER_GAP, ScoreArguments
from gem.data import Example, TokenPair, pack
from gem.distributed import gathered, is_sharded, most, processes, reshard
from gem.ends import Ends, model_ends
from gem.finite import not_finite
from gem.group import Group, Member
from gem.head import HeadStats, completion_stats, fused_head, undisturbed
from gem.positions import check_positions
from gem.spans import find_spans
from gem.stops import Diverged
from gem_kernels import gem_score

logger = logging.getLogger(__name__)


def token_stats(
    model: nn.Module,
    sequences: Sequence[TokenPair],
    *,
    batch_tokens: int,
    progress: str | None = None,
    names: Sequence[str] = (),
    apart: Sequence[int] = (),
    shared: bool = False,
) -> list[HeadStats]:
    """Return the statistics of the completion tokens of each sequence, on the CPU, in the order of the sequences.

    Args:
        model: from fuse_lm_head. The distributions are untempered, whatever temperature the head was given.
        sequences: (prompt ids, completion ids), or (prompt ids, completion ids, turns of others), as gem.data.pack takes
            them. Tokens of the prompt and of the others' turns get no statistics.
        batch_tokens: most tokens, padding included, that go through the model at once; a longer sequence goes alone.
        progress: label of a progress bar; None: no bar.
        names: of the sequences, for the message of Diverged; none: their numbers.
        apart: sizes of runs of sequences whose batches hold no others, such as the answers of a pair; none: one run.
        shared: every process has these sequences, and each computes the statistics of some batches for all. Collective.

    A model that FSDP2 has sharded makes as many forwards on each process, so that all of them must call this, also without a
    sequence.

    Raises:
        ValueError: a sequence is longer than the model has positions for.
        Diverged: the model gives a log-prob or an entropy that is not finite.
    """
    fused_head(model)
    lengths = [sequence_length(sequence) for sequence in sequences]
    check_positions(model, max(lengths, default=0), "max_length: prompt and completion")
    runs = _runs(apart or [len(sequences)])
    batches = [[run[i] for i in at] for run in runs for at in _batches([lengths[i] for i in run], batch_tokens)]
    rank, count = processes() if shared else (0, 1)
    own = batches[rank::count]
    # Forwards that the others make, and this process must too.
    idle = most(len(own)) - len(own) if is_sharded(model) else 0
    results: dict[int, HeadStats] = {}
    with undisturbed(model), tqdm(total=len(sequences), desc=progress, disable=progress is None, leave=False) as bar:
        for at in own:
            for i, stats in zip(at, _batch_stats(model, [sequences[i] for i in at]), strict=True):
                results[i] = stats
                if found := not_finite(stats._asdict().items()):
                    raise Diverged(f"the model gives {found} for {names[i] if names else f'sequence {i}'}")
            bar.update(len(at))
        for _ in range(idle):
            _batch_stats(model, [([0], [0])])
    reshard(model)
    for part in gathered(results) if shared else ():
        results |= part
    return [results[i] for i in range(len(sequences))]


def _batch_stats(model: nn.Module, sequences: Sequence[TokenPair]) -> list[HeadStats]:
    """Return the statistics of each sequence of a batch, on the CPU."""
    device = next(model.parameters()).device
    batch = pack([list(sequences)], layout="right", pad_id=0)
    _, stats = completion_stats(model, {name: t.to(device) for name, t in batch.items()})
    scored = batch["cu_seqlens"].diff().tolist()
    return [HeadStats(*pieces) for pieces in zip(*(field.cpu().split(scored) for field in stats), strict=True)]


def sequence_length(sequence: Sequence[Any]) -> int:
    """Return the number of tokens of (prompt ids, completion ids) or (prompt ids, completion ids, turns of others)."""
    prompt, completion, *given = sequence
    return len(prompt) + len(completion) + sum(len(ids) for _, ids in (given[0] if given else ()))


def longest_row(items: Iterable[Group | Example]) -> int:
    """Return the tokens of the longest sequence, prompt and completion, of groups or examples; 0 if there are none."""
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
    """Yield batches of indices: sequences of similar length, at most batch_tokens tokens with padding, or one sequence."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _runs(sizes: Sequence[int]) -> list[list[int]]:
    """Return the indices of consecutive runs of these sizes."""
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def score_groups(
    groups: Sequence[Group],
    tokenizer: Any,
    scorer: nn.Module,
    reference: nn.Module | None,
    arguments: ScoreArguments,
    progress: str | None = None,
    *,
    ends: Ends | None = None,
    shared: bool = False,
) -> None:
    """Fill in logprobs, entropies, spans, flaws and S of every member, in place.

    S stays NaN for a member that was cut off, gives no answer, or has a flaw.

    Args:
        groups: prompts, and members with their token ids.
        tokenizer: the models' tokenizer.
        scorer: fused model whose entropies enter Eq. 1.
        reference: fused model whose log-probs are stored; None: the scorer.
        arguments: settings of Eq. 1.
        progress: label of a progress bar; None: no bar.
        ends: ends of a completion; None: the ends of the scorer and the tokenizer.
        shared: every process has these groups, see token_stats.

    Raises:
        Diverged: a log-prob or an entropy is not finite; the message names the group.
    """
    read_members(groups, tokenizer, model_ends(scorer, tokenizer) if ends is None else ends, arguments)
    members = [member for group in groups for member in group.members]
    stats = group_stats(scorer, groups, arguments.score_tokens, progress, shared=shared)
    references = stats if reference is None else group_stats(reference, groups, arguments.score_tokens, shared=shared)
    for member, own, ref in zip(members, stats, references, strict=True):
        member.entropies, member.logprobs = own.entropy.tolist(), ref.logprob.tolist()
    apply_eq1(members, torch.cat([s.entropy for s in stats]), arguments)


def group_stats(
    model: nn.Module,
    groups: Sequence[Group],
    batch_tokens: int,
    progress: str | None = None,
    *,
    wanted: Callable[[Member], bool] = lambda _: True,
    apart: bool = False,
    shared: bool = False,
) -> list[HeadStats]:
    """Return `token_stats` of the wanted members of groups, one after the other; Diverged names the member and its group.

    apart: each group goes through the model alone.
    """
    pairs = [(group, member) for group in groups for member in group.members if wanted(member)]
    names = [f"the {member.role} answer of {group.name}" for group, member in pairs]
    sequences = [group.sequence(member) for group, member in pairs]
    sizes = [sum(map(wanted, group.members)) for group in groups] if apart else []
    return token_stats(
        model, sequences, batch_tokens=batch_tokens, progress=progress, names=names, apart=sizes, shared=shared
    )


def read_members(groups: Sequence[Group], tokenizer: Any, ends: Ends, arguments: ScoreArguments) -> None:
    """Fill in what the tokens of every member alone determine: text, truncated, flaw, the spans of Eq. 1, the answer."""
    for group in groups:
        for member in group.members:
            _read(member, group.question or group.prompt, tokenizer, ends, arguments)


def sampler_gap(members: Sequence[Member], logprob: Tensor) -> float:
    """Return the mean over tokens of |log-prob under the sampler - log-prob under the policy|, nats; NaN if none is known.

    It is rounding where the two run the same weights at the same precision. Another model, older weights or another prompt
    are far above `SAMPLER_GAP`: the KL term and Eq. 2 then take samples of one model for those of another.

    Args:
        members: those with sampler_logprobs count.
        logprob: (N,) log-probs of the members' tokens under the policy, one member after the other.
    """
    pieces = logprob.detach().cpu().split([len(member.ids) for member in members])
    gaps = [
        (torch.tensor(member.sampler_logprobs) - own).abs()
        for member, own in zip(members, pieces, strict=True)
        if member.sampler_logprobs
    ]
    return float(torch.cat(gaps).mean()) if gaps else math.nan


def warn_of_gap(gap: float) -> bool:
    """Log a warning if a sampler is too far from the policy, and return whether it is. NaN, which means unknown, is not."""
    if gap > SAMPLER_GAP:
        logger.warning(
            "the sampler's log-probs are %.3g nats a token from those of the model here, above %g: does it run the same "
            "weights, tokenizer and prompt?",
            gap,
            SAMPLER_GAP,
        )
    return gap > SAMPLER_GAP


def _read(member: Member, question: str, tokenizer: Any, ends: Ends, arguments: ScoreArguments) -> None:
    """Fill in what a member's tokens alone determine: its text, truncated, the flaw of a candidate, spans, answer."""
    member.completion = tokenizer.decode(member.ids, skip_special_tokens=True)
    member.truncated = not ends.has_ended(member.ids, tokenizer)
    start = max((at for at, _ in member.given if at < len(member.ids)), default=0)  # the last turn holds the answer
    content = ends.content(member.ids[start:], tokenizer)
    if member.role == "candidate":
        member.flaw = flaw_of(tokenizer.decode(content, skip_special_tokens=True), question)
    found = find_spans(content, tokenizer, markers=arguments.markers, last_tokens=LAST_TOKENS)
    spans = [(first + start, last + start) for first, last in (found.branch, found.answer)]
    member.branch_span, member.answer_span, member.span_rule = spans[0], spans[1], found.rule
    member.answer = read_answer(content, found, tokenizer)


def flaw_of(completion: str, question: str) -> Literal["", "empty", "repeats the prompt"]:
    """Return why a candidate cannot be judged: it has no visible text, or only repeats the question's words."""
    if not any(unicodedata.category(c)[0] not in "CZ" for c in completion):
        return "empty"
    words, asked = _words(completion), _words(question)
    while asked and not _is_word(asked[-1]):  # "3+4" repeats all of "3+4=?"
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
    """Return the lower-case words and signs of a text without punctuation; scripts without blanks are split by letter."""
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
    """Fill in S of Eq. 1 and its two terms, in nats, in place.

    Args:
        members: with their token ids and spans.
        entropy: (N,) entropies of the members' tokens, one member after the other.
        arguments: settings of Eq. 1.
    """
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
