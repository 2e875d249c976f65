"""The groups file between `score` and `train`: its header, and reading it with every field checked.

The first line is a header, {"gem_groups": 1, "complete": true , "shard": "0/1", "groups": 884, ...}: what the groups were made
with. Then comes one JSON object a line for each group, with every number that training uses, to read and edit. A file without
a header, of an older release or written by hand, is read too. In messages, members and tokens count from 0.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gem.files import seems_to_be, write_lines
from gem.fingerprint import tokenizer_hash
from gem.group import ROLES, Given, Group, Member, Role, candidates_line
from gem.group_lines import parse_group, shown_json, write_group

__all__ = [
    "ROLES", "Given", "Group", "Header", "Member", "Role", "candidates_line", "check_finished", "check_header",
    "check_learnable", "checked_lines", "differences", "header_line", "load_groups", "parse_shard", "read_header",
    "save_groups",
]  # fmt: skip

logger = logging.getLogger(__name__)

Header = dict[str, Any]
"""shard, groups, settings (name -> value), and model, tokenizer, data and, if there were prompts without human answers,
unlabeled (each {"name", "hash"}); as it is read also complete"""

WHOLE = "0/1"
"""the shard that is all of a run"""

# `complete` stands at a fixed place with a fixed length, so that it can be changed without moving what follows.
START, OPEN, DONE = b'{"gem_groups": 1, "complete": ', b"false", b"true "
BIG = 1 << 26  # bytes: from here on reading takes seconds and shows a bar
_BOM = b"\xef\xbb\xbf"
_PARTS: dict[str, type] = {
    "shard": str,
    "groups": int,
    "settings": dict,
    "model": dict,
    "tokenizer": dict,
    "data": dict,
}
_INPUTS = ("model", "tokenizer", "data", "unlabeled")
NO_INPUT = {"name": "", "hash": ""}  # of a run without unlabeled prompts, whose file does not name them


# --- reading ----------------------------------------------------------------------------------------------------------


def load_groups(path: Path) -> list[Group]:
    """Read a groups file, and check every field of it.

    Raises:
        ValueError: the file does not exist, is not finished, or a line is not a group; the message gives the line's number.
    """
    header = read_header(path)
    if header is not None:
        check_finished(path, header)
    with _without_gc():
        groups = [group for _, group in checked_lines(path)]
    if not groups:
        raise ValueError(f"groups must hold at least one group, got none in {path}")
    if header is not None and len(groups) != header["groups"]:
        logger.warning("%s holds %d groups, and %d by its header", path, len(groups), header["groups"])
    if header is not None and header["shard"] != WHOLE:
        logger.warning("%s is shard %s of a run: `gem-kernels merge` joins them", path, header["shard"])
    return groups


def check_finished(path: Path, header: Header) -> None:
    """Raise ValueError unless a header says that its file is finished; the message says what finishes it."""
    if not header["complete"]:
        with path.open("rb") as file:
            there = sum(line.endswith(b"\n") for line in file) - 1
        inputs = ("model", "data", "unlabeled")
        flags: dict[str, str] = {name: header[name]["name"] for name in inputs if name in header}
        flags |= {"output": str(path)}
        flags |= {"shard": header["shard"]} if header["shard"] != WHOLE else {}
        command = shlex.join(["gem-kernels", "score", *(word for k, v in flags.items() for word in (f"--{k}", v))])
        raise ValueError(
            f"groups must be a finished file, got {path} with {there} of {header['groups']} groups: "
            f"`{command}`, with the other settings as they were, goes on"
        )


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keep the garbage collector from walking over millions of numbers again and again while they are read."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def checked_lines(path: Path) -> Iterator[tuple[bytes, Group]]:
    """Yield each line of a groups file with its group, but the header and blank lines.

    A wrong line ends what is yielded, and the rest of the file is checked too, to say how many lines are wrong.

    Raises:
        ValueError: a line is not a group.
    """
    size, first, more = path.stat().st_size, "", 0
    with (
        path.open("rb", buffering=1 << 20) as file,
        tqdm(
            desc=f"reading {path.name}", total=size, unit="B", unit_scale=True, disable=size < BIG, leave=False
        ) as bar,
    ):
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            if line.isspace() or (number == 1 and _header(line) is not None):
                continue
            try:
                group = parse_group(line.removeprefix(_BOM) if number == 1 else line)
                group.where = f"{path}, line {number}"
            except ValueError as error:
                more += bool(first)
                first = first or f"{path}, line {number}: {error}"
            else:
                if not first:
                    yield line, group
    if first:
        raise ValueError(first + (f" (and {more} more lines)" if more else ""))


def check_header(path: Path, tokenizer: Any) -> None:
    """Check that a groups file was made with this tokenizer, if it has a header that says so.

    Raises:
        ValueError: it was made with another one.
    """
    header = read_header(path)
    if header is not None and header["tokenizer"]["hash"] != (mine := tokenizer_hash(tokenizer)):
        theirs = header["tokenizer"]
        raise ValueError(
            f"groups must be of this model's tokenizer, got {path} of {theirs['name']} with hash {theirs['hash']}; "
            f"the model's has {mine}"
        )


def check_learnable(
    groups: Sequence[Group], vocabulary: int, file: str, supervised: bool = True, loss: str = "sega"
) -> None:
    """Check that a model can train on the groups of a file.

    A token id of another tokenizer would end in a nameless assertion on a GPU.

    Args:
        groups: read from `file`, which the messages name.
        vocabulary: rows of the model's input embeddings.
        supervised: False if the loss learns nothing from a chosen answer alone.
        loss: its name. All but sega learn from the human answers, which each group must then have.

    Raises:
        ValueError: no group has anything to learn from, a group lacks what the loss learns from, or a token id is not below
            `vocabulary`.
    """
    what = "chosen answer" if loss == "sft" else "human pair"
    without = sum((group.role("chosen") is None) if loss == "sft" else not group.has_pair for group in groups)
    if without and loss != "sega":
        raise ValueError(
            f"loss must be sega to learn from groups without a {what}, got {loss}, and {without} of {len(groups)} groups "
            f"without one in {file}"
        )
    learnt = (m.weight or (supervised and m.role == "chosen") for group in groups for m in group.members)
    if not any(learnt):
        what, neither = ("a weight or a chosen answer", "neither") if supervised else ("a weight", "none")
        raise ValueError(f"groups must hold {what} to learn from, got {neither} in {file}")
    largest = max(
        max(chain(g.prompt_ids, g.sampling_prompt_ids, *(chain(m.ids, *(t for _, t in m.given)) for m in g.members)))
        for g in groups
    )
    if largest >= vocabulary:
        raise ValueError(
            f"groups must be of this model's tokenizer, got token {largest} in {file}; the model has {vocabulary}"
        )


def save_groups(path: Path, groups: Iterable[Group]) -> None:
    """Write groups to a file without a header, which appears only once it is complete."""
    write_lines(path, (write_group(group).decode().removesuffix("\n") for group in groups))


# --- the header -------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header | None:
    """Return the header of a groups file; None if it has none.

    Raises:
        ValueError: the file does not exist, or its header is not one that `gem-kernels score` writes.
    """
    if not path.is_file():
        raise ValueError(f"groups must be a file written by `gem-kernels score`, got {str(path)!r}: no such file")
    with path.open("rb") as file:
        if kind := seems_to_be(file.read(64)):
            raise ValueError(
                f"groups must be a file written by `gem-kernels score`, got {path}, which seems to be {kind}"
            )
        file.seek(0)
        header = _header(file.readline())
    if header is not None and (problem := _problem(header)):
        raise ValueError(f"{path}, line 1: expected a header written by `gem-kernels score`, got {problem}")
    return header


def _header(line: bytes) -> Header | None:
    """Return the header in the first line of a file; None if it is something else."""
    if b'"gem_groups"' not in line[:64]:
        return None
    try:
        header = json.loads(line.removeprefix(_BOM))
    except ValueError:
        return None
    return header if isinstance(header, dict) and "gem_groups" in header else None


def _problem(header: Header) -> str:
    """Return what is wrong with a header; "" if it is as written."""
    if type(header["gem_groups"]) is not int or header["gem_groups"] != 1:
        return f"gem_groups: {shown_json(header['gem_groups'])}, and this release reads 1"
    for name, kind in {"complete": bool, **_PARTS, **({"unlabeled": dict} if "unlabeled" in header else {})}.items():
        if type(header.get(name)) is not kind:
            return f"{name}: {shown_json(header.get(name))}"
    if header["groups"] < 0:
        return f"groups: {header['groups']}"
    for name in _INPUTS:
        if name in header and {key: type(value) for key, value in header[name].items()} != {"name": str, "hash": str}:
            return f"{name}: {shown_json(header[name])}"
    try:
        parse_shard(header["shard"])
    except ValueError as error:
        return str(error)
    return ""


def parse_shard(shard: str) -> tuple[int, int]:
    """Return i and n of "i/n".

    Raises:
        ValueError: the text is not of that form, or i is not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, found.groups()) if found else (0, 0)
    if i >= n:
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, such as 0/4, got {shard!r}")
    return i, n


def header_line(header: Header, *, complete: bool = False) -> bytes:
    """Return the first line of a file."""
    parts = {name: header[name] for name in _PARTS}
    if header.get("unlabeled", NO_INPUT) != NO_INPUT:
        parts["unlabeled"] = header["unlabeled"]
    rest = json.dumps(parts)
    return START + (DONE if complete else OPEN) + b", " + rest.removeprefix("{").encode() + b"\n"


def differences(these: Header, those: Header) -> Iterator[tuple[str, str, str]]:
    """Yield name and both values of every part of `these` that is another in `those`; of inputs, the hash counts."""
    for name, value in these.items():
        other = those.get(name, NO_INPUT) if name == "unlabeled" else those[name]
        if name == "settings":
            for key in {**other, **value}:
                if value.get(key) != other.get(key):
                    yield key, repr(value.get(key)), repr(other.get(key))
        elif name in _INPUTS:
            if value["hash"] != other["hash"]:
                mine, theirs = (
                    "none" if part == NO_INPUT else f"{part['name']} with hash {part['hash']}"
                    for part in (value, other)
                )
                yield name, mine, theirs
        elif value != other:
            yield name, repr(value), repr(other)
