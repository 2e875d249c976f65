"""Write groups files: batch by batch, going on after a kill; and merge the files of shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from tqdm.auto import tqdm

from gem.files import replacing
from gem.group import Group, Member
from gem.group_lines import parse_group, write_group
from gem.groups import (
    BIG,
    DONE,
    NO_INPUT,
    OPEN,
    START,
    WHOLE,
    Header,
    check_finished,
    checked_lines,
    differences,
    header_line,
    parse_shard,
    read_header,
)
from gem.stops import Diverged


def check_same(path: Path, header: Header) -> bool:
    """Check that `gem-kernels score` may make a file, or go on with it.

    Args:
        path: the groups file; one that does not exist passes.
        header: the parts that are known so far; a file that exists must have been begun with the same.

    Returns:
        True if the file was begun: its header is there.

    Raises:
        ValueError: the file is something else, or was begun with something else; the message gives both.
    """
    if (theirs := _begun(path)) is None:
        return False
    changed = [f"{name}: {there} there, {mine} now" for name, mine, there in differences(header, theirs)]
    if changed:
        raise ValueError(f"output must be new or a file of the same run, got {path} with {', '.join(changed[:5])}")
    return True


def _begun(path: Path) -> Header | None:
    """Return the header of a file that was begun; None if there is no file, or no more than a part of a header."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n") and (line.startswith(START) or START.startswith(line)):
        return None
    if not line.startswith(START):
        raise ValueError(f"output must be a new file, got {path}, which exists")
    return read_header(path)


def batches(records: int, step: int, shard: str) -> range:
    """Return the first record of each batch of a shard: its part of the batches that one run would make of all records.

    Args:
        records: number of records of the whole run.
        step: records of a batch.
        shard: "i/n", the i-th of n parts, from 0.

    Raises:
        ValueError: `shard` is not of that form, or i is not below n.
    """
    i, n = parse_shard(shard)
    count = -(-records // step)
    return range(count * i // n * step, min(records, count * (i + 1) // n * step), step)


class GroupsWriter:
    """Groups file that grows by whole batches, and goes on where a killed run left it.

    Every batch is on the disk before the next is made, and the header says at the end that the file is finished. A kill leaves
    whole batches and perhaps the beginning of one more, which is cut off: the finished file has the same bytes, however
    often that happened. The file begins with its first batch; before it nothing is made.

        with GroupsWriter(path, header, prompts, step) as out:
            for batch in batches[out.batches :]:
                out.append(make(batch))
            out.finish()

    Args:
        path: the file. One that exists must be of the same run.
        header: its header, without `groups`.
        prompts: the prompt ids of every group of the file.
        step: groups of a batch.

    Attributes:
        batches: number of batches that are there.
        summary: the groups that are there, without text and tokens.
        finished: True if all are there and the header says so.

    Raises:
        ValueError: from check_same; or a batch before the last was changed.
    """

    def __init__(self, path: Path, header: Header, prompts: Sequence[Sequence[int]], step: int) -> None:
        self.path, self.header, self.prompts, self.step = path, {**header, "groups": len(prompts)}, prompts, step
        self.batches, self.summary, self.finished = 0, list[Group](), False
        self._file: IO[bytes] | None = None
        self._end = 0  # of the last whole batch, in bytes
        if check_same(path, self.header):
            self._go_on()

    def __enter__(self) -> GroupsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is not None and self.summary:
            there = f"{len(self.summary)} of {len(self.prompts)} groups"
            error.kept = f"{self.path} holds {there}, and the same command goes on from there"  # type: ignore[attr-defined]

    def append(self, groups: Sequence[Group]) -> None:
        """Append a batch.

        Raises:
            Diverged: a group holds what no reader would take, such as a log-prob that is not finite. Nothing is written.
        """
        lines = [write_group(group) for group in groups]
        for group, line in zip(groups, lines, strict=True):
            try:
                parse_group(line)
            except ValueError as error:
                raise Diverged(f"{group.name}: {error}") from None
        self._write(b"".join(lines))
        self._count(groups)

    def finish(self) -> None:
        """Say in the header that all groups are there."""
        self._write(b"")  # a shard may be empty
        assert len(self.summary) == len(self.prompts)
        self._put(len(START), DONE)
        self.finished = True

    def _go_on(self) -> None:
        """Count the whole batches of the file, and check them."""
        changed = f"output must be a new file, got {self.path}, which was changed since it was written"
        with self.path.open("rb") as file:
            line = file.readline()
            if not line.startswith((START + OPEN, START + DONE)):
                raise ValueError(f"{changed}: line 1")
            finished, self._end = line.startswith(START + DONE), len(line)
            if not finished:  # a file that cannot be written is found now, not after a batch
                self.path.open("r+b").close()
            big = self.path.stat().st_size >= BIG
            starts = range(0, len(self.prompts), self.step)
            for start in tqdm(starts, desc=f"reading {self.path.name}", disable=not big, leave=False):
                lines = [file.readline() for _ in self.prompts[start : start + self.step]]
                if not lines[-1].endswith(b"\n"):
                    break  # the beginning of a batch
                groups: list[Group] = []
                try:
                    for line in lines:
                        groups.append(self._group(line, start + len(groups)))
                except ValueError as error:
                    if finished or file.read(1):
                        raise ValueError(f"{changed}: line {start + len(groups) + 2}: {error}") from None
                    break  # the last batch, which a power cut may leave at its length without its content
                self._end += sum(map(len, lines))
                self._count(groups)
            else:
                self.finished = finished
            if file.read(1):
                raise ValueError(f"{changed}: more than {len(self.prompts)} groups")

    def _group(self, line: bytes, i: int) -> Group:
        """Return the group of a line, which must be that of record i."""
        group = parse_group(line)
        if group.prompt_ids != self.prompts[i]:
            raise ValueError("the group is of another record")
        return group

    def _count(self, groups: Sequence[Group]) -> None:
        self.batches += 1
        self.summary += map(bare, groups)

    def _write(self, lines: bytes) -> None:
        """Append lines, and wait until they are on the disk. If that fails, the file stays as it was."""
        try:
            if self._file is None:
                self.path.touch()
                self._file = self.path.open("r+b")
                if self._end:
                    self._put(len(START), OPEN)  # it may be a finished file that was cut off since
                self._file.truncate(self._end)
            lines = lines if self._end else header_line(self.header) + lines
            self._put(self._end, lines)
        except BaseException:
            self._cut_back()
            raise
        self._end += len(lines)

    def _put(self, at: int, data: bytes) -> None:
        assert self._file is not None
        self._file.seek(at)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _cut_back(self) -> None:
        """Leave whole batches only, or no file if there are none."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()  # it may try to write once more
        with suppress(OSError):
            if self.summary:
                os.truncate(self.path, self._end)
            else:
                self.path.unlink()


def bare(group: Group) -> Group:
    """Return what a summary needs of a group: roles, scores, and why candidates are not scored; no text and no tokens."""
    members = [Member(m.role, [], truncated=m.truncated, flaw=m.flaw, score=m.score) for m in group.members]
    return Group("", [], members, group.kept)


def merge_groups(paths: Sequence[Path], output: Path) -> list[Group]:
    """Write the file that one run would have written, from the files of its shards, in any order.

    Returns:
        The groups, without text and tokens.

    Raises:
        ValueError: the files are not each shard of one run once, or one of them is not finished, or was changed.
    """
    shards = _check_shards(paths)
    (_, header), *_ = shards
    whole = {**header, "shard": WHOLE, "groups": sum(header["groups"] for _, header in shards)}
    summary: list[Group] = []
    with replacing(output) as out:
        out.write(header_line(whole, complete=True).decode())
        for path, header in shards:
            before = len(summary)
            for line, group in checked_lines(path):
                out.write(line.decode().rstrip("\r\n") + "\n")
                summary.append(bare(group))
            if (there := len(summary) - before) != header["groups"]:
                raise ValueError(
                    f"shards must be whole, got {path} with {there} groups, and {header['groups']} by its header"
                )
    return summary


def _check_shards(paths: Sequence[Path]) -> list[tuple[Path, Header]]:
    """Return the files of a run's shards with their headers, in order."""
    shards: list[tuple[Path, Header]] = []
    for path in paths:
        header = read_header(path)
        if header is None:
            raise ValueError(
                f"shards must be files of `gem-kernels score --shard i/n`, got {path}, which has no header"
            )
        check_finished(path, header)
        shards.append((path, header))
    first, one = shards[0]
    for path, header in shards:
        alike = {"unlabeled": NO_INPUT, **header, "shard": one["shard"], "groups": one["groups"]}
        for name, there, here in differences(alike, one):
            raise ValueError(f"shards must be of one run, got {name}: {here} in {first}, {there} in {path}")
    shards.sort(key=lambda found: parse_shard(found[1]["shard"]))
    names, n = [header["shard"] for _, header in shards], parse_shard(one["shard"])[1]
    if len(names) != n or any(name != f"{i}/{n}" for i, name in enumerate(names)):
        raise ValueError(f"shards must be each of 0/{n} to {n - 1}/{n} once, got {', '.join(names)}")
    return shards
