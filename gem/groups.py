"""A group: a prompt with its candidates and the human pair, scored, ranked and weighted; and the file that holds groups.

The file stands between `score` and `train`: one JSON object a line, with every number that training uses, to read and edit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from gem.files import read_text, write_lines

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


@dataclass
class Group:
    """A prompt and the completions that are compared with one another."""

    prompt: str
    prompt_ids: list[int]
    members: list[Member]
    kept: bool = True  # False: dropped from Eq. 2 (all weights 0); its human answer still feeds the supervised term
    question: str = ""  # the user's own words in the prompt
    sampling_prompt_ids: list[int] = field(default_factory=list)  # prompt of the sampled members; empty: prompt_ids

    def sequence(self, member: Member) -> tuple[list[int], list[int], Given]:
        """Return a member's prompt ids, completion ids and the turns of others inside the completion.

        A sampled member gets the prompt that it was sampled from.
        """
        prompt = self.sampling_prompt_ids if member.sampled and self.sampling_prompt_ids else self.prompt_ids
        return prompt, member.ids, member.given

    def role(self, role: Role) -> int | None:
        """Return the index of the first member of a role, None if there is none."""
        return next((i for i, member in enumerate(self.members) if member.role == role), None)


def candidates_line(groups: Iterable[Group]) -> str:
    """Return one line that counts the candidates, and by reason those that are not scored."""
    candidates = [member for group in groups for member in group.members if member.role == "candidate"]
    flaws = Counter(member.flaw or "cut off" for member in candidates if member.flaw or member.truncated)
    counts = "".join(f", {n} {flaw}" for flaw, n in flaws.most_common())
    return f"{len(candidates)} candidates{counts}"


def save_groups(path: Path, groups: Iterable[Group]) -> None:
    """Write one JSON object a line, NaN as null. The file appears only once it is complete."""
    write_lines(path, (json.dumps(_without_nan(asdict(group)), ensure_ascii=False) for group in groups))


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else (
        [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value
    )  # fmt: skip


def load_groups(path: Path) -> list[Group]:
    """Read the file that save_groups writes.

    Raises:
        ValueError: the file does not exist, or a line is not a group; the message gives the line's number.
    """
    if not path.is_file():
        raise ValueError(f"groups must be a file written by `gem-kernels score`, got {str(path)!r}: no such file")
    groups = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            members = [_member(m) for m in row["members"]]
            known = {name: row[name] for name in ("question", "sampling_prompt_ids") if name in row}
            groups.append(Group(row["prompt"], row["prompt_ids"], members, row["kept"], **known))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected one JSON object a line, got {line[:60]!r} ({error})") from None
        except (KeyError, TypeError) as error:
            names = sorted(row) if isinstance(row, dict) and "members" not in row else None
            what = repr(error) if names is None else f"the fields {names} without members"
            raise ValueError(f"{where}: expected a group written by `gem-kernels score`, got {what}") from None
        unknown = sorted({str(m.role) for m in members} - set(get_args(Role)))
        if unknown:
            raise ValueError(f"{where}: role must be one of {', '.join(get_args(Role))}, got {', '.join(unknown)}")
        if not members or any(not m.ids or len(m.logprobs) != len(m.ids) for m in members):
            raise ValueError(f"{where}: every member needs ids and as many logprobs")
        _check_numbers(groups[-1], where)
    if not groups:
        raise ValueError(f"groups must hold at least one group, got none in {path}")
    return groups


def _check_numbers(group: Group, where: str) -> None:
    """Raise ValueError for text where a number belongs, as an edit may leave it: torch's error would not name the line."""
    for ids in (group.prompt_ids, group.sampling_prompt_ids, *(m.ids for m in group.members)):
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(f"{where}: ids must be lists of integers >= 0, got {str(ids)[:60]}")
    if not group.prompt_ids:
        raise ValueError(f"{where}: prompt_ids must not be empty")
    for member in group.members:
        for value in (member.weight, member.score, *member.logprobs, *member.entropies):
            if not isinstance(value, int | float):
                raise ValueError(f"{where}: weight, score, logprobs and entropies must be numbers, got {value!r}")


def check_learnable(groups: Sequence[Group], vocabulary: int, file: str) -> None:
    """Check that a model can train on the groups of a file.

    A token id of another tokenizer would end in a nameless assertion on a GPU.

    Args:
        groups: read from `file`, which the messages name.
        vocabulary: rows of the model's input embeddings.

    Raises:
        ValueError: no group has a weight or a chosen answer, or a token id is not below `vocabulary`.
    """
    if not any(member.weight or member.role == "chosen" for group in groups for member in group.members):
        raise ValueError(f"groups must hold a weight or a chosen answer to learn from, got neither in {file}")
    largest = max(max([*g.prompt_ids, *g.sampling_prompt_ids, *(i for m in g.members for i in m.ids)]) for g in groups)
    if largest >= vocabulary:
        raise ValueError(
            f"groups must be of this model's tokenizer, got token {largest} in {file}; the model has {vocabulary}"
        )


def _member(row: dict[str, object]) -> Member:
    member = Member(**row)  # type: ignore[arg-type]
    for f in fields(Member):
        value = getattr(member, f.name)
        if value is None:
            setattr(member, f.name, math.nan)
        elif f.name == "given":
            member.given = [(int(at), list(ids)) for at, ids in value]
        elif isinstance(value, list):
            whole = [math.nan if v is None else v for v in value]
            setattr(member, f.name, tuple(whole) if f.name.endswith("_span") else whole)
    return member
