"""A group: a prompt with its candidates and the human pair, scored, ranked and weighted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["candidate", "chosen", "rejected"]
ROLES: dict[Role, int] = {"candidate": 0, "chosen": 1, "rejected": 2}  # as numbers, for a batch
Given = list[tuple[int, list[int]]]
"""Tokens inside a completion that the policy did not write (a user's turn): (at, ids), with ids before token `at`."""


@dataclass
class Member:
    """One completion of a group. Lists hold one entry per completion token, in nats."""

    role: Role
    ids: list[int]
    completion: str = ""
    truncated: bool = False  # cut off before its end of sequence, so not scored
    logprobs: list[float] = field(default_factory=list)  # under the reference, the model before training
    entropies: list[float] = field(default_factory=list)  # of the scoring model
    branch_span: tuple[int, int] = (0, 0)  # [start, end) of the reasoning in the completion tokens
    answer_span: tuple[int, int] = (0, 0)  # [start, end) of the final answer
    span_rule: str = ""  # marker | last_line | last_tokens
    score: float = math.nan  # S, Eq. 1
    final_entropy: float = math.nan
    branch_entropy: float = math.nan
    rank_mean: float = math.nan  # Bradley-Terry posterior of theta: its mean and standard deviation
    rank_sd: float = math.nan
    weight: float = 0.0  # w of Eq. 2
    sampled: bool = False  # drawn from the scoring policy, not read from the record
    flaw: str = ""  # why a candidate is not scored: "empty", "repeats the prompt"
    given: Given = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list, compare=False)  # under what sampled it; not in the file
    answer: str = field(default="", compare=False)  # as gem.answers reads it from the tokens; not in the file


@dataclass
class Group:
    """A prompt and the completions that are compared with one another."""

    prompt: str
    prompt_ids: list[int]
    members: list[Member]
    kept: bool = True  # False: dropped from Eq. 2 (all weights 0); its human answer still feeds the supervised term
    question: str = ""  # the user's own words in the prompt
    sampling_prompt_ids: list[int] = field(default_factory=list)  # prompt of the sampled members; empty: prompt_ids
    where: str = field(default="", compare=False)  # "pairs.jsonl, line 3", for messages; not in the file

    def sequence(self, member: Member) -> tuple[list[int], list[int], Given]:
        """Return a member's prompt ids, completion ids and the turns of others inside the completion.

        A sampled member gets the prompt that it was sampled from.
        """
        prompt = self.sampling_prompt_ids if member.sampled and self.sampling_prompt_ids else self.prompt_ids
        return prompt, member.ids, member.given

    @property
    def votes(self) -> list[str]:
        """The answer of every candidate that ended, has no flaw and gives one; "" for the other members, which do not vote."""
        return [
            member.answer if member.role == "candidate" and not member.truncated and not member.flaw else ""
            for member in self.members
        ]

    @property
    def name(self) -> str:
        """Where the group comes from and how its prompt begins, for messages."""
        words = " ".join((self.question or self.prompt).split())
        return f"{self.where or 'a group'} ({words[:60]!r})"

    @property
    def has_pair(self) -> bool:
        """True if the group has a human chosen and a human rejected answer."""
        return self.role("chosen") is not None and self.role("rejected") is not None

    def role(self, role: Role) -> int | None:
        """Return the index of the first member of a role, None if there is none."""
        return next((i for i, member in enumerate(self.members) if member.role == role), None)


def candidates_line(groups: Iterable[Group]) -> str:
    """Return one line that counts the candidates, and by reason those that are not scored."""
    candidates = [member for group in groups for member in group.members if member.role == "candidate"]
    flaws = Counter(member.flaw or "cut off" for member in candidates if member.flaw or member.truncated)
    counts = "".join(f", {n} {flaw}" for flaw, n in flaws.most_common())
    return f"{len(candidates)} candidates{counts}"
