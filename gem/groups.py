"""A group: a prompt with its candidates and the human pair, scored, ranked and weighted. The file between score and train.

One JSON object a line; every number that training uses can be read, and edited, there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from gem.files import write_lines

Role = Literal["candidate", "chosen", "rejected"]


@dataclass
class Member:
    """One completion of a group. Lists have one entry a completion token; nats throughout."""

    role: Role
    ids: list[int]
    completion: str = ""
    truncated: bool = False  # cut off before its end of sequence: not scored
    logprobs: list[float] = field(default_factory=list)  # under the reference, the model before training
    entropies: list[float] = field(default_factory=list)  # of the scoring model
    branch_span: tuple[int, int] = (0, 0)  # [start, end) of the reasoning in the completion tokens
    answer_span: tuple[int, int] = (0, 0)  # of the final answer
    span_rule: str = ""  # marker | last_line | last_tokens
    score: float = math.nan  # S, Eq. 1
    final_entropy: float = math.nan
    branch_entropy: float = math.nan
    rank_mean: float = math.nan  # Bradley-Terry posterior of theta
    rank_sd: float = math.nan
    weight: float = 0.0  # w of Eq. 2
    sampled: bool = False  # drawn from the scoring policy, not read from the record


@dataclass
class Group:
    prompt: str
    prompt_ids: list[int]
    members: list[Member]
    kept: bool = True  # False: dropped from Eq. 2 (all weights 0); its human answer still feeds the supervised term

    def role(self, role: Role) -> int | None:
        """Index of the first member of a role."""
        return next((i for i, member in enumerate(self.members) if member.role == role), None)


def save_groups(path: Path, groups: Iterable[Group]) -> None:
    """One JSON object a line, NaN as null; the file appears when all of it is there."""
    write_lines(path, (json.dumps(_without_nan(asdict(group)), ensure_ascii=False) for group in groups))


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else (
        [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value
    )  # fmt: skip


def load_groups(path: Path) -> list[Group]:
    """Read save_groups' file.

    Raises:
        ValueError: no such file, or a line that is no group; with its number.
    """
    if not path.is_file():
        raise ValueError(f"groups must be a file written by `gem-kernels score`, got {str(path)!r}: no such file")
    groups = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                members = [_member(m) for m in row["members"]]
                groups.append(Group(row["prompt"], row["prompt_ids"], members, row["kept"]))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected one JSON object a line, got {line[:60]!r} ({error})") from None
            except (KeyError, TypeError) as error:
                raise ValueError(f"{where}: expected a group written by `gem-kernels score`, got {error!r}") from None
            unknown = sorted({str(m.role) for m in members} - set(get_args(Role)))
            if unknown:
                raise ValueError(f"{where}: role must be one of {', '.join(get_args(Role))}, got {', '.join(unknown)}")
            if not members or any(not m.ids or len(m.logprobs) != len(m.ids) for m in members):
                raise ValueError(f"{where}: every member needs ids and as many logprobs")
    if not groups:
        raise ValueError(f"groups must hold at least one group, got none in {path}")
    return groups


def _member(row: dict[str, object]) -> Member:
    member = Member(**row)  # type: ignore[arg-type]
    for f in fields(Member):
        value = getattr(member, f.name)
        if value is None:
            setattr(member, f.name, math.nan)
        elif isinstance(value, list):
            whole = [math.nan if v is None else v for v in value]
            setattr(member, f.name, tuple(whole) if f.name.endswith("_span") else whole)
    return member
