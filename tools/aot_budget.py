"""What one compiled kernel may use on a streaming multiprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Resources of one streaming multiprocessor that differ between architectures (registers, threads and blocks do not)."""

    block_shared: int
    """bytes of shared memory that one block can have"""
    shared: int
    """bytes of shared memory; a block occupies 1 KiB more than it requests"""
    instruction: str
    """matrix instruction of its tensor cores; older ones still run, at a fraction of the speed"""


MULTIPROCESSORS = {
    80: Multiprocessor(163 << 10, 164 << 10, "mma.sync"),
    90: Multiprocessor(227 << 10, 228 << 10, "wgmma.mma_async"),
    100: Multiprocessor(227 << 10, 228 << 10, "tcgen05.mma"),
}
_TENSOR_MEMORY = 512  # columns, on those that have one
TMA = "cp.async.bulk.tensor"


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    case: str
    variant: str
    """block sizes in the order of the signature, then the flags that are on"""
    dtype: str
    arch: int
    threads: int
    registers: int
    """per thread"""
    spills: int
    """bytes of stack per thread: registers spilled to memory"""
    shared: int
    """bytes"""
    tensor_memory: int
    """columns (sm_100)"""
    multiplies: bool
    """True if the kernel has a matrix product that tensor cores can compute"""
    instructions: list[str]
    """matrix instructions, and cp.async.bulk.tensor where the copy engine (TMA) moves tiles"""
    instructions_per_logit: float | None
    """issued by each thread in a step of a kernel that walks rows of logits, over the logits that it takes (tools.aot_sass)"""
    barriers: int | None
    """at which the whole block waits in such a step"""
    blocks: int
    """blocks that fit on a multiprocessor"""


class Budget(NamedTuple):
    """What a kernel that walks rows may cost: five instructions a logit take an H200 about as long as one byte a logit."""

    barriers: int
    """in a step"""
    instructions: Mapping[str, float]
    """per logit, by case; in the other cases a bias, a softcap or ragged rows have their price"""


BUDGETS = {
    "_row_statistics_kernel": Budget(barriers=3, instructions={"chunked": 14, "logits": 14}),
    "_row_gradient_kernel": Budget(barriers=0, instructions={"chunked": 10, "logits": 10}),
    "_row_exponentials_kernel": Budget(barriers=3, instructions={"group": 14}),
}


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Return how many blocks fit on one streaming multiprocessor.

    Each of its four partitions holds 16384 registers and 16 warps; a warp takes registers in units of 256, 8 per thread.
    """
    warps = -(-threads // 32)
    warp_registers = -(-max(registers, 1) // 8) * 256
    limits = [32, 64 // warps, 4 * (16384 // warp_registers) // warps, MULTIPROCESSORS[arch].shared // (shared + 1024)]
    if tensor_memory:
        limits.append(_TENSOR_MEMORY // tensor_memory)
    return min(limits)


def violations(row: Row) -> list[str]:
    """Return one sentence for each limit that the kernel exceeds."""
    found = []
    sm = MULTIPROCESSORS[row.arch]
    if row.spills:
        found.append(f"spills {row.spills} bytes of registers")
    if row.shared > sm.block_shared:
        found.append(f"needs {row.shared} bytes of shared memory, of {sm.block_shared}")
    if row.tensor_memory > _TENSOR_MEMORY:  # triton then compiles an empty kernel
        found.append(f"needs {row.tensor_memory} columns of tensor memory, of {_TENSOR_MEMORY}")
    elif row.multiplies and sm.instruction not in row.instructions:
        found.append(f"multiplies matrices without {sm.instruction}")
    if row.kernel in BUDGETS:
        found += _over(BUDGETS[row.kernel], row)
    return [f"{row.kernel} ({row.case}, {row.variant}, {row.dtype}, sm_{row.arch}) {what}" for what in found]


def _over(budget: Budget, row: Row) -> list[str]:
    if row.instructions_per_logit is None or row.barriers is None:
        return ["has no loop in which a step of a row was found"]
    found = []
    if row.barriers > budget.barriers:
        found.append(f"waits at {row.barriers} barriers a step, of {budget.barriers}")
    limit = budget.instructions.get(row.case)
    if limit is not None and row.instructions_per_logit > limit:
        found.append(f"issues {row.instructions_per_logit:.1f} instructions a logit, of {limit}")
    return found
