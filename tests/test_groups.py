"""A group: its candidates counted, its members found by role."""

from __future__ import annotations

from typing import Any

from gem.groups import Group, Member, candidates_line


def test_candidates_that_are_not_scored_are_counted_by_reason() -> None:
    said: list[dict[str, Any]] = [
        {},
        {"truncated": True},
        {"flaw": "empty"},
        {"truncated": True},
        {"flaw": "repeats the prompt"},
    ]
    members = [Member("candidate", [1], **more) for more in said]
    group = Group("", [1], [*members, Member("chosen", [1], truncated=True)])
    assert candidates_line([group]) == "5 candidates, 2 cut off, 1 empty, 1 repeats the prompt"
    assert candidates_line([]) == "0 candidates"


def test_members_are_found_by_role() -> None:
    group = Group("", [1], [Member("candidate", [1]), Member("chosen", [2]), Member("candidate", [3])])
    assert group.role("candidate") == 0 and group.role("chosen") == 1 and group.role("rejected") is None
