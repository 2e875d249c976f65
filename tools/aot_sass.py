"""Read the machine code (SASS) of a kernel that walks a row in steps: what a step issues, and how often its block waits.

A step reads a block of logits, takes their exponentials, may write as much, and jumps back. Code that runs rarely is no part of
it: what a rising maximum makes necessary, and the ragged end of a row. The compiler may put such code anywhere, so the step is
looked for among the ways around a loop: it is the shortest of those that do the work of a whole block. An instruction that its
predicate turns off is issued all the same.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@\S+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"0x[0-9a-f]+$")
_BITS = re.compile(r"\.[US]?(8|16|64|128|256)\b")
_BARRIERS = ("BAR.SYNC", "BAR.RED", "UCGABAR_WAIT")


class Work(NamedTuple):
    """What a thread does in a step."""

    read: int
    """bytes of global memory"""
    exponentials: int
    written: int = 0
    """bytes of global memory"""


class Instruction(NamedTuple):
    """One instruction of a function."""

    address: int
    predicate: str
    """such as @!P0, or nothing"""
    opcode: str
    """with its modifiers, such as LDG.E.128"""
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def work(self) -> Work:
        bits = _BITS.search(self.opcode)
        size = int(bits[1]) // 8 if bits else 4
        return Work(
            read=size if self.name in ("LDG", "LDGSTS") else 0,
            exponentials=int(self.opcode == "MUFU.EX2"),
            written=size if self.name == "STG" else 0,
        )


class Step(NamedTuple):
    """What a step costs."""

    per_logit: float
    """instructions that a thread issues, over the logits that it takes"""
    barriers: int
    """at which the whole block waits"""


def parse(sass: str) -> list[Instruction]:
    """Return the instructions that `cuobjdump -sass` prints of one function."""
    return [Instruction(int(address, 16), *rest) for address, *rest in _LINE.findall(sass)]


def step(code: Sequence[Instruction], logits: int, work: Work) -> Step | None:
    """Return the cost of a step in which a thread takes some logits and does this work; None if the code has no such step."""
    path = usual_path(code, work)
    steps, rest = divmod(sum(i.work.read for i in path), work.read)  # several where the compiler unrolled the loop
    if not path or rest:  # it reads something besides, so nobody knows how many steps it takes
        return None
    issued = sum(i.name != "NOP" for i in path)
    barriers = sum(i.opcode.startswith(_BARRIERS) for i in path)
    return Step(issued / steps / logits, -(-barriers // steps))


def usual_path(code: Sequence[Instruction], work: Work) -> list[Instruction]:
    """Return the shortest way around a loop that does this work, or more; [] if there is none."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    after = [_after(code, places, place) for place in range(len(code))]
    starts = {to for place, following in enumerate(after) for to in following if to <= place}
    ways = [_around(code, after, start, work) for start in sorted(starts)]
    return min(filter(None, ways), key=len, default=[])


def _after(code: Sequence[Instruction], places: dict[int, int], place: int) -> list[int]:
    """Return the places of the instructions that can follow the one at `place`."""
    instruction = code[place]
    jumps = instruction.name in ("BRA", "JMP", "CALL")
    # A condition is a predicate, or an operand before the target. A call under one is a jump that is far; any other call ends
    # the way, because what it costs is written elsewhere.
    always = not instruction.predicate and "," not in instruction.operands
    found = [] if always and (jumps or instruction.name in ("EXIT", "RET", "BRX", "JMX")) else [place + 1]
    target = _TARGET.search(instruction.operands) if jumps else None
    if target is not None and int(target[0], 16) in places:
        found.append(places[int(target[0], 16)])
    return [to for to in found if to < len(code)]


def _around(code: Sequence[Instruction], after: Sequence[Sequence[int]], start: int, work: Work) -> list[Instruction]:
    """Return the shortest way from a place back to it that does this work, or more; [] if there is none.

    A breadth-first search over pairs of a place and the work done before it.
    """
    done = [instruction.work for instruction in code]
    first = start, Work(0, 0, 0)
    before: dict[tuple[int, Work], tuple[int, Work]] = {}
    queue = deque([first])
    while queue:
        here = place, so_far = queue.popleft()
        total = Work(*(min(n, a + b) for n, a, b in zip(work, so_far, done[place], strict=True)))
        for to in after[place]:
            if to == start and total == work:
                way = [here]
                while way[-1] != first:
                    way.append(before[way[-1]])
                return [code[passed] for passed, _ in reversed(way)]
            if to != start and (to, total) not in before:
                before[to, total] = here
                queue.append((to, total))
    return []
