"""Collect the bad records of a source by reason, then stop or leave them out and count them.

    problems = Problems("auto")
    try:
        ...
    except BadRecord as error:
        problems.add("pairs.jsonl, line 3", error)
    problems.settle(total=10)  # a ValueError that lists every reason, or a warning that counts them

One pass over the data reports everything that is wrong with it, not only the first error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("auto", "skip", "stop")
_NAMED = 5  # rows listed for each reason: enough to look them up, few enough to read


class BadRecord(ValueError):  # noqa: N818 - it names the record, not the program's failure
    """A record that cannot be used.

    kind: the reason, the same text for all records that are counted together ("'prompt' must not be blank").
    detail: the value in this record. Both read well after "FILE, line 3: ".
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}, got {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


class Minor(BadRecord):
    """A valid record that is of no use here: it is too long or a tie. It is left out by default."""


class Problems:
    """The records of one source that cannot be used, by reason.

    on_bad_row: "auto": stop at invalid records, leave out those that are too long or a tie; "skip": leave all of
    them out; "stop": stop at all of them.

    Raises:
        ValueError: another on_bad_row.
    """

    def __init__(self, on_bad_row: str = "auto") -> None:
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row must be one of {', '.join(ON_BAD_ROW)}, got {on_bad_row!r}")
        self.on_bad_row = on_bad_row
        self._stopping: list[tuple[str, BadRecord]] = []
        self._left_out: list[tuple[str, BadRecord]] = []
        self._notes: dict[str, list[str]] = {}

    @property
    def count(self) -> int:
        """The number of records that cannot be used, whether they stop the run or not."""
        return len(self._stopping) + len(self._left_out)

    def add(self, where: str, error: BadRecord) -> None:
        """Keep the error of the record at `where` ("FILE, line 3") until settle."""
        leave_out = self.on_bad_row == "skip" or (self.on_bad_row == "auto" and isinstance(error, Minor))
        (self._left_out if leave_out else self._stopping).append((where, error))

    def note(self, where: str, text: str) -> None:
        """Keep a remark on a valid record for the log; records with the same `text` are counted together."""
        self._notes.setdefault(text, []).append(where)

    def settle(self, total: int) -> None:
        """Log the records left out and the notes, out of `total` records, by reason and with the first rows of each.

        Raises:
            ValueError: a problem stops the run, or no record is left; the message lists every reason.
        """
        for text, rows in self._notes.items():
            logger.info("%d of %d records: %s (%s)", len(rows), total, text, _first(rows))
        if self._stopping:
            raise ValueError(self._stopped(total))
        if not self._left_out:
            return
        if len(self._left_out) >= total:
            raise ValueError(f"at least one record must be usable, got none of {total}: {_reasons(self._left_out)}")
        logger.warning("%d of %d records are left out: %s", len(self._left_out), total, _reasons(self._left_out))

    def _stopped(self, total: int) -> str:
        if len(self._stopping) == 1:
            where, error = self._stopping[0]
            return f"{where}: {error}" + (" (on_bad_row=skip leaves it out)" if self.count < total else "")
        way_out = " (on_bad_row=skip leaves them out)" if self.count < total else ""
        return f"{len(self._stopping)} of {total} records cannot be used{way_out}: {_reasons(self._stopping)}"


def shown(value: object, width: int = 60) -> str:
    """Return repr(value), cut to `width` characters to keep messages short."""
    text = repr(value)  # repr escapes half surrogates, so the message can be printed
    return text if len(text) <= width else text[: width - 3] + "..."


def _reasons(errors: Iterable[tuple[str, BadRecord]]) -> str:
    """List the errors as "2 x <kind> (FILE, line 3, got ...; FILE, line 7, got ...), 1 x ...", most frequent first.

    A detail that all rows of a kind share is written once.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for where, error in errors:
        by_kind.setdefault(error.kind, []).append((where, error.detail))
    reasons = []
    for kind, rows in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        details = {detail for _, detail in rows}
        if len(rows) > 1 and len(details) == 1:
            got = f", got {detail}" if (detail := details.pop()) else ""
            reasons.append(f"{len(rows)} x {kind}{got} ({_first([where for where, _ in rows])})")
        else:
            reasons.append(
                f"{len(rows)} x {kind} ({_first([f'{where}, got {d}' if d else where for where, d in rows])})"
            )
    return ", ".join(reasons)


def _first(rows: list[str]) -> str:
    return "; ".join(rows[:_NAMED]) + (f"; and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
