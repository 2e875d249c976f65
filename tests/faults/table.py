"""The table of docs/reliability.md: a row for each fault that the suite tries, with the line that its user really saw."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by FAULTS_TABLE=1 make test-faults -->", "<!-- end of faults -->"
HEAD = "| fault | what the user sees | what is kept |\n|---|---|---|\n"

# What differs from run to run -> what the table shows.
SHORTENED = (
    (r"\b[0-9a-f]{16,64}\b", "HASH"),
    (r"process \d+ on \S+", "process PID on HOST"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|[+-]\d\d:?\d\d)?( UTC)?", "TIME"),
)


@dataclass(frozen=True)
class Row:
    """One fault, the line that the user sees, and what is kept."""

    fault: str
    sees: str
    kept: str


def shortened(text: str) -> str:
    """Return a line without what differs from run to run, as it stands in a cell of the table."""
    for pattern, shown in SHORTENED:
        text = re.sub(pattern, shown, text)
    return text.replace("|", "\\|").strip()


def written(page: str, rows: list[Row]) -> str:
    """Return a page with the rows as its table, sorted; of those of one fault the first is shown."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    first = {row.fault: row for row in reversed(rows)}
    lines = [f"| {row.fault} | {row.sees} | {row.kept} |" for _, row in sorted(first.items())]
    return before + BEGIN + "\n" + HEAD + "\n".join(lines) + "\n" + END + after
