"""Decisions as sentences, each computed from rows that a stage has put on file."""

from __future__ import annotations

from collections.abc import Callable

from tools.files import Json

TIES = 0.02
"""a difference of time below which two are equal, and nothing changes"""
TIES_OF_MANY = 0.03
"""the same for the fastest of many, which is partly the luckiest, in its median and in its least time"""

Rows = dict[str, Json]
"""the rows of a stage by name, without those that failed"""


def rows_of(stage: Json) -> Rows:
    return {row["name"]: row for row in stage["rows"] if "name" in row and "error" not in row}


def failures(stage: Json) -> list[str]:
    return [f"{row.get('name')}: {row['error'].splitlines()[0]}" for row in stage["rows"] if "error" in row]


def decision(stage: Json, *sentences: Callable[[Rows], str]) -> str:
    """Join the sentences. One whose rows are missing says so; what failed or was not measured is named at the end."""
    rows, said = rows_of(stage), []
    for sentence in sentences:
        try:
            said.append(sentence(rows))
        except KeyError as missing:
            subject = sentence.__name__.replace("_", " ").strip()
            said.append(f"{subject[0].upper()}{subject[1:]}: undecided, {missing} is missing.")
    said += [f"FAILED: {failure}." for failure in failures(stage)]
    if left_out := stage.get("no time left for"):
        said.append(f"No time was left for {len(left_out)} more, from {left_out[0]} on.")
    return " ".join(said)


def gain(present: Json, row: Json) -> float:
    """Return how much faster a row is than the present entry, by median or by least time, whichever shows less."""
    return float(min(present[what] / row[what] for what in ("ms", "least"))) - 1


def digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def times_as_fast(slower: float, faster: float) -> str:
    return f"{slower / faster:.2f}x as fast"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"
