"""One line of a groups file: its group, with every field checked, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, fields
from typing import Any

from gem.group import ROLES, Given, Group, Member

_ROUNDING = 1e-3  # by which a log-prob or an entropy may lie on the wrong side of 0
_LARGE = 1e6  # no log-prob or score is beyond, in nats; and it is far within fp32
_MOST_NATS = 20.0  # the entropy of a vocabulary of 485 million
_MOST_WEIGHT = 1e3

_GROUP = {f.name for f in fields(Group)} - {"where"}
_NEEDED = {"role", "ids", "logprobs"}  # of a member
_DEFAULTS = {f.name: f.default for f in fields(Member) if f.compare}  # lists have none, and are set below
_NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("score", -_LARGE, _LARGE),
    ("final_entropy", -_ROUNDING, _MOST_NATS),
    ("branch_entropy", -_ROUNDING, _MOST_NATS),
    ("rank_mean", -_LARGE, _LARGE),
    ("rank_sd", 0.0, _LARGE),
)
"""Numbers of a member that may be null, and their ranges."""


class _Literal:
    """NaN or Infinity, which JSON does not know: of no type that a field may have."""

    def __init__(self, text: str) -> None:
        self.text = text


_DECODER = json.JSONDecoder(parse_constant=_Literal)


def parse_group(line: bytes) -> Group:
    """Return the group of a line of a groups file.

    Raises:
        ValueError: it is not JSON, or a field is missing, unknown, of another type, out of its range, or of another length
            than the tokens.
    """
    row = _json(line)
    if isinstance(row, dict) and "gem_groups" in row:
        raise ValueError("expected a group, got the header of another file: `gem-kernels merge` joins shards")
    _check_fields(row, {"prompt", "prompt_ids", "members", "kept"}, _GROUP)
    _check_types(row, str, "a text", "prompt", "question")
    _check_types(row, bool, "true or false", "kept")
    for name in ("prompt_ids", "sampling_prompt_ids"):
        _check_ids(row.get(name, []), name)
    if not row["prompt_ids"]:
        raise ValueError("prompt_ids must not be empty")
    if type(row["members"]) is not list or not row["members"]:
        raise ValueError(f"members must be a list of at least one member, got {shown_json(row['members'])}")
    for i, member in enumerate(row["members"]):
        try:
            row["members"][i] = _member(member)
        except ValueError as error:
            raise ValueError(f"member {i}: {error}") from None
    group = Group(**row)
    for role in ("chosen", "rejected"):
        if sum(member.role == role for member in group.members) > 1:
            raise ValueError(f"role must be {role} for one member at most, got several")
    if not group.kept and any(member.weight for member in group.members):
        raise ValueError("weight must be 0 for every member of a group that is not kept")
    return group


def _json(line: bytes) -> Any:
    try:
        text = line.decode().rstrip()
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got byte {line[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:  # also of integers with thousands of digits
        raise ValueError(f"expected one JSON object a line, got {text[:60]!r} ({error})") from None


def _check_fields(row: Any, needed: Set[str], known: Set[str]) -> None:
    if type(row) is dict and needed <= row.keys() <= known:
        return
    if type(row) is not dict:
        got = shown_json(row)
    elif missing := needed - row.keys():
        got = f"one without {', '.join(sorted(missing))}"
    else:
        got = f"the unknown field {', '.join(sorted(row.keys() - known))}"
    raise ValueError(f"expected a group written by `gem-kernels score`, got {got}")


def _member(row: Any) -> Member:
    """Return a member whose every field is checked; null becomes NaN."""
    _check_fields(row, _NEEDED, _DEFAULTS.keys())
    if row["role"] not in tuple(ROLES):
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {shown_json(row['role'])}")
    _check_types(row, str, "a text", "completion", "span_rule", "flaw")
    _check_types(row, bool, "true or false", "truncated", "sampled")
    _check_ids(row["ids"], "ids")
    n = len(row["ids"])
    row["logprobs"] = _floats(row["logprobs"], "logprobs", -_LARGE, _ROUNDING)
    if not n or len(row["logprobs"]) != n:
        raise ValueError(f"every member needs ids and as many logprobs, got {n} and {len(row['logprobs'])}")
    row["entropies"] = _floats(row.get("entropies", []), "entropies", -_ROUNDING, _MOST_NATS)
    if len(row["entropies"]) not in (0, n):
        raise ValueError(f"entropies must be as many as ids or none, got {len(row['entropies'])} for {n}")
    for name, low, high in _NUMBERS:
        if name in row and not (type(value := row[name]) is float and low <= value <= high):
            row[name] = math.nan if value is None else _float(value, name, low, high)
    if "weight" in row:
        row["weight"] = _float(row["weight"], "weight", -_MOST_WEIGHT, _MOST_WEIGHT)
    for name in ("branch_span", "answer_span"):
        if name in row:
            row[name] = _span(row[name], name, n)
    row["given"] = _given(row.get("given", []), n)
    return Member(*(row.get(name, default) for name, default in _DEFAULTS.items()))  # by keyword takes twice the time


def _check_types(row: Mapping[str, Any], kind: type, expected: str, *names: str) -> None:
    """Check those of the fields that are there. The type must be this very one: a bool is an int elsewhere."""
    for name in names:
        if name in row and type(row[name]) is not kind:
            raise ValueError(f"{name} must be {expected}, got {shown_json(row[name])}")


def _check_ids(ids: Any, name: str) -> None:
    if type(ids) is not list:
        raise ValueError(f"{name} must be lists of integers >= 0, got {shown_json(ids)}")
    if ids and not (set(map(type, ids)) == {int} and min(ids) >= 0):
        at, wrong = _first(ids, lambda i: type(i) is not int or i < 0)
        raise ValueError(f"{name} must be lists of integers >= 0, got {shown_json(wrong)} (token {at})")


def _floats(values: Any, name: str, low: float, high: float) -> list[float]:
    """Return a list of numbers, each in [low, high], as floats."""
    if type(values) is not list:
        raise ValueError(f"{name} must be a list of numbers, got {shown_json(values)}")
    kinds = set(map(type, values))
    if kinds and not (kinds <= {int, float} and low <= min(values) and max(values) <= high):
        at, wrong = _first(values, lambda v: type(v) not in (int, float) or not low <= v <= high)
        raise ValueError(f"{name} must be numbers{_bound(wrong, low, high)}, got {shown_json(wrong)} (token {at})")
    return list(map(float, values)) if int in kinds else values


def _float(value: Any, name: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number{_bound(value, low, high)}, got {shown_json(value)}")
    return float(value)


def _bound(value: Any, low: float, high: float) -> str:
    """Return the bound that a number breaks, without the allowance for rounding; "" for what is no number."""
    if type(value) not in (int, float):
        return ""
    return f" >= {round(low)}" if value < low else f" <= {round(high)}"


def _span(span: Any, name: str, n: int) -> tuple[int, int]:
    if type(span) is not list or list(map(type, span)) != [int, int] or not 0 <= span[0] <= span[1] <= n:
        raise ValueError(f"{name} must be [start, end) within the {n} tokens, got {shown_json(span)}")
    return span[0], span[1]


def _given(given: Any, n: int) -> Given:
    turns: Given = []
    expected = f"[at, ids] of other roles' turns, in order and within the {n} tokens"
    for turn in given if type(given) is list else [given]:
        if type(turn) is not list or len(turn) != 2 or type(turn[0]) is not int:
            raise ValueError(f"given must hold {expected}, got {shown_json(turn)}")
        _check_ids(turn[1], "ids of given")
        if not (turns[-1][0] if turns else 0) <= turn[0] <= n:
            raise ValueError(f"given must hold {expected}, got at {turn[0]}")
        turns.append((turn[0], turn[1]))
    return turns


def _first(values: Iterable[Any], is_wrong: Callable[[Any], bool]) -> tuple[int, Any]:
    return next((i, value) for i, value in enumerate(values) if is_wrong(value))


def shown_json(value: Any) -> str:
    """Return a value as it stands in the file, cut to a length for messages."""
    text = json.dumps(value, default=lambda literal: literal.text) if not isinstance(value, _Literal) else value.text
    return text if len(text) <= 60 else text[:57] + "..."


def write_group(group: Group) -> bytes:
    """Return a group as a line, NaN as null."""
    row = asdict(group)
    del row["where"]
    for member in row["members"]:
        del member["sampler_logprobs"], member["answer"]
    return json.dumps(_without_nan(row), ensure_ascii=False).encode() + b"\n"


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else (
        [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value
    )  # fmt: skip
