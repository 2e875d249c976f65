"""What the compiler makes of every kernel that the library launches, on a machine without a GPU.

    python -m gem_kernels.aot [--arch 80 90 100] [--dtype bf16 fp16 fp32] [--markdown FILE] [--json FILE] [--jobs N]

The launchers run on meta tensors, so what is compiled is what a GPU would be asked to run: their tiles, their warps, triton's
own specialisation to strides and alignments. A kernel breaks its budget, and the exit status is 1, when it spills registers,
needs more shared or tensor memory than there is, or multiplies matrices without the tensor cores' instruction.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as meta_config
from torch import Tensor

from gem_kernels import compat
from gem_kernels.streaming import Gradients, Transform, padded
from gem_kernels.types import IGNORE_INDEX, LogitTransform, LowRank, Operands, Upstream

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Multiprocessor(NamedTuple):
    """What the blocks on one streaming multiprocessor share. Registers, threads and blocks are the same on all of ours."""

    block_shared: int
    """bytes of shared memory that one block can have"""
    shared: int
    """bytes of shared memory, of which every block costs 1 KiB more than it asks for"""
    instruction: str
    """of its tensor cores; those of an older architecture still run, at a fraction of the speed"""


MULTIPROCESSORS = {
    80: Multiprocessor(163 << 10, 164 << 10, "mma.sync"),
    90: Multiprocessor(227 << 10, 228 << 10, "wgmma.mma_async"),
    100: Multiprocessor(227 << 10, 228 << 10, "tcgen05.mma"),
}
_TENSOR_MEMORY = 512  # columns, on those that have one
_TMA = "cp.async.bulk.tensor"


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    case: str
    variant: str
    """its blocks in the order of its signature, and the flags that are on"""
    dtype: str
    arch: int
    threads: int
    registers: int
    """of a thread"""
    spills: int
    """bytes of a thread's stack: registers spilled to memory"""
    shared: int
    """bytes"""
    tensor_memory: int
    """columns (sm_100)"""
    multiplies: bool
    """whether it holds a matrix product that tensor cores can do"""
    instructions: list[str]
    """matrix instructions, and cp.async.bulk.tensor where the copy engine (TMA) moves tiles"""
    blocks: int
    """that fit on a multiprocessor"""


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many blocks fit on one streaming multiprocessor, by each of its resources.

    Its four partitions hold 16384 registers and 16 warps each; a warp takes registers in units of 256, 8 per thread.
    """
    warps = -(-threads // 32)
    warp_registers = -(-max(registers, 1) // 8) * 256
    limits = [32, 64 // warps, 4 * (16384 // warp_registers) // warps, MULTIPROCESSORS[arch].shared // (shared + 1024)]
    if tensor_memory:
        limits.append(_TENSOR_MEMORY // tensor_memory)
    return min(limits)


def violations(row: Row) -> list[str]:
    """What breaks the budget, each as a sentence that names the kernel."""
    found = []
    sm = MULTIPROCESSORS[row.arch]
    if row.spills:
        found.append(f"spills {row.spills} bytes of registers")
    if row.shared > sm.block_shared:
        found.append(f"needs {row.shared} bytes of shared memory, of {sm.block_shared}")
    if row.tensor_memory > _TENSOR_MEMORY:  # what is compiled then is an empty kernel
        found.append(f"needs {row.tensor_memory} columns of tensor memory, of {_TENSOR_MEMORY}")
    elif row.multiplies and sm.instruction not in row.instructions:
        found.append(f"multiplies matrices without {sm.instruction}")
    return [f"{row.kernel} ({row.case}, {row.variant}, {row.dtype}, sm_{row.arch}) {what}" for what in found]


# --- what is compiled -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Launches of one op at one shape."""

    launch: Callable[[torch.dtype], None]
    dtypes: Sequence[str] = tuple(DTYPES)


class _Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


_ALIGNED = _Shape(8192, 4096, 128256)
_RAGGED_VOCABULARY = _Shape(2047, 4096, 50257)
_RAGGED = _Shape(2047, 1001, 50257)  # triton compiles another kernel where no stride and no size is divisible by 16


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _transform(softcap: float | None) -> Transform:
    return Transform.of(LogitTransform(softcap=softcap))


def _linear_arguments(shape: _Shape, everything: bool, dtype: torch.dtype) -> tuple[Operands, Tensor, Transform]:
    """Operands, targets and transform; with bias, adapter and softcap if `everything`."""
    n, d, v = shape
    x = Operands(_meta(n, d, dtype=dtype), _meta(v, d, dtype=dtype), None, None)
    if everything:
        adapter = LowRank(_meta(16, d, dtype=dtype), _meta(v, 16, dtype=dtype), 2.0)
        x = x._replace(bias=_meta(v, dtype=dtype), low_rank=adapter)
    return x, _meta(n, dtype=torch.int64), _transform(30.0 if everything else None)


def _upstreams(n: int) -> list[Upstream]:
    """Of a loss of entropies too, and of one of log-probabilities alone."""
    return [Upstream(_meta(n), _meta(n), None), Upstream(_meta(n), None, None)]


def _linear(impl: str, shape: _Shape, everything: bool, dtype: torch.dtype) -> None:
    """Forward and backward of linear_logprob_entropy."""
    backend = import_module(f"gem_kernels.linear_logprob.{impl}")
    x, targets, transform = _linear_arguments(shape, everything, dtype)
    online = backend.forward(x, targets, transform, IGNORE_INDEX)
    for upstream in _upstreams(shape.tokens)[: 1 if everything else 2]:
        backend.backward(x, targets, online, upstream, transform, IGNORE_INDEX, (True,) * 5, "")


def _group(shape: _Shape, everything: bool, dtype: torch.dtype) -> None:
    """A slab of a group loss, whose cache holds exponentials; other dtypes launch what `chunked` does."""
    from gem_kernels.group_loss.exponentials import Exponentials, follow_maximum_

    x, targets, transform = _linear_arguments(shape, everything, dtype)
    slab = Exponentials(x, targets, transform, _meta(shape.tokens * padded(shape.vocabulary), dtype=dtype), "")
    follow_maximum_(slab.cache, slab.reference, slab.online)
    slab.backward(Upstream(_meta(shape.tokens), None, None), Gradients(x, (True,) * 5, passes=1), 0)


def _logits(shape: _Shape, softcap: float | None, dtype: torch.dtype) -> None:
    """Forward and backward of logprob_entropy, on a view that leaves out the last position of each of two sequences."""
    from gem_kernels.logprob import triton as backend

    n = 2 * shape.tokens
    logits = _meta(2, shape.tokens + 1, shape.vocabulary, dtype=dtype)[:, :-1]
    transform, targets = _transform(softcap), _meta(n, dtype=torch.int64)
    online = backend.forward(logits, targets, transform, IGNORE_INDEX)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for upstream in _upstreams(n):
        backend.backward(logits, targets, online, upstream, transform, IGNORE_INDEX, out)


def _spans(tokens: int, dtype: torch.dtype) -> None:
    """Forward and backward of topm_mean and gem_score."""
    from gem_kernels.scoring import triton as backend

    values, spans, counts = _meta(tokens, dtype=dtype), _meta(64, 2, dtype=torch.int32), _meta(64, dtype=torch.int64)
    mean, threshold, cut = backend.forward(values, spans, counts)
    backend.backward(mean, values, spans, counts, threshold, cut)


CASES = {
    "linear": Case(partial(_linear, "triton", _ALIGNED, False)),
    "linear, everything": Case(partial(_linear, "triton", _ALIGNED, True)),
    "linear, ragged vocabulary": Case(partial(_linear, "triton", _RAGGED_VOCABULARY, False)),
    "linear, ragged": Case(partial(_linear, "triton", _RAGGED, True)),
    "chunked": Case(partial(_linear, "chunked", _ALIGNED, False)),
    "chunked, everything": Case(partial(_linear, "chunked", _ALIGNED, True)),
    "chunked, ragged": Case(partial(_linear, "chunked", _RAGGED, True)),
    "group": Case(partial(_group, _ALIGNED, False), ("bf16",)),
    "group, ragged": Case(partial(_group, _RAGGED, True), ("bf16",)),
    "logits": Case(partial(_logits, _ALIGNED, None)),
    "logits, ragged": Case(partial(_logits, _RAGGED, 30.0)),
    "spans": Case(partial(_spans, _ALIGNED.tokens), ("fp32",)),
    "spans, ragged": Case(partial(_spans, _RAGGED.tokens), ("fp32",)),
}


class _Driver:
    """What triton asks of a driver before it compiles. The device index is the architecture: it keys triton's caches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_case(name: str, dtype: str, arch: int) -> tuple[list[Row], str | None]:
    """The kernels that a case launches; and why not all of them, if so."""
    import triton

    triton.runtime.driver.set_active(_Driver(arch))
    rows: dict[str, Row] = {}

    def compile_kernel(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        if compiled.hash not in rows:
            rows[compiled.hash] = _row(compiled, name, dtype, arch, meta)

    # No value of a meta tensor is known: where kept tokens are looked up, all are.
    all_kept = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    failure = None
    try:
        with compat.compiling(arch, compile_kernel), all_kept:
            CASES[name].launch(DTYPES[dtype])
    except Exception as error:  # one kernel that does not compile must not hide what the others need
        failure = f"{name} ({dtype}, sm_{arch}) does not compile: {type(error).__name__}: {error}"
    return list(rows.values()), failure


def _row(compiled: Any, case: str, dtype: str, arch: int, meta: dict[str, Any]) -> Row:
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    threads = int(_only(r"\.reqntid (\d+)", ptx))
    usage = _resource_usage(compiled.asm["cubin"])
    registers, shared = int(_only(r"REG:(\d+)", usage)), compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Row(
        kernel=compiled.name,
        case=case,
        variant=" ".join(
            ["x".join(str(size) for key, size in meta.items() if key.startswith("BLOCK"))]
            + [key for key, on in meta.items() if on is True]
        ),
        dtype=dtype,
        arch=arch,
        threads=threads,
        registers=registers,
        spills=int(_only(r"STACK:(\d+)", usage)),
        shared=shared,
        tensor_memory=tensor_memory,
        # A product of fp32 as such ("ieee", printed as nothing) is done without tensor cores; everything else is theirs.
        multiplies=any("inputPrecision" in dot or "xf32> *" not in dot for dot in re.findall(r"tt\.dot .*", ttir)),
        instructions=[name for name in (*(sm.instruction for sm in MULTIPROCESSORS.values()), _TMA) if name in ptx],
        blocks=blocks_per_multiprocessor(arch, threads, registers, shared, tensor_memory),
    )


def _cuobjdump() -> Any:
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text[:2000]}"
    return match[1]


# --- the report -------------------------------------------------------------------------------------------------------


def compile_all(archs: Iterable[int], dtypes: Iterable[str], jobs: int) -> tuple[list[Row], list[str]]:
    """All cases, in parallel processes, with a line on stderr for each: the rows, and what did not compile."""
    todo = [(name, dtype, arch) for name in CASES for dtype in dtypes if dtype in CASES[name].dtypes for arch in archs]
    start = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, *job): job for job in todo}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()  # raises where the compiler aborts its process; with --jobs 1, in the case after the last line
            name, dtype, arch = futures[future]
            seconds = time.monotonic() - start
            print(f"[{done}/{len(todo)}, {seconds:.0f} s] {name}, {dtype}, sm_{arch}", file=sys.stderr, flush=True)
    results = [future.result() for future in futures]
    return [row for rows, _ in results for row in rows], [failure for _, failure in results if failure]


def _cells(row: Row) -> dict[str, str]:
    return {
        "kernel": row.kernel,
        "case": row.case,
        "variant": row.variant,
        "dtype": row.dtype,
        "arch": f"sm_{row.arch}",
        "threads": str(row.threads),
        "registers": str(row.registers),
        "spills": str(row.spills),
        "shared KiB": f"{row.shared / 1024:.1f}",
        "tensor memory": str(row.tensor_memory),
        "instructions": " ".join("TMA" if name == _TMA else name for name in row.instructions),
        "blocks/SM": str(row.blocks),
    }


def worst(rows: Iterable[Row]) -> list[Row]:
    """One row of each kernel, case, variant, dtype and architecture: they differ in what triton specialises on."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row[: Row._fields.index("arch") + 1]
        found[key] = max(found.get(key, row), row, key=lambda r: (len(violations(r)), r.spills, r.registers))
    kernels = list(dict.fromkeys(row.kernel for row in found.values()))
    return sorted(found.values(), key=lambda r: (list(CASES).index(r.case), kernels.index(r.kernel)))


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table that is also aligned to read as text."""
    cells = [_cells(row) for row in rows]
    lines = [list(cells[0]), *(list(row.values()) for row in cells)] if cells else [["no kernel"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _replace(path: Path, text: str) -> None:
    """By rename: the file is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gem_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if compat.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted and nothing is compiled; unset it")
    if not compat.HAS_TRITON:
        parser.error("triton is not installed: pip install triton")
    try:
        _cuobjdump()
    except RuntimeError as error:
        parser.error(f"{error}: it comes with triton (triton/backends/nvidia/bin); or set TRITON_CUOBJDUMP_PATH")

    rows, failures = compile_all(args.arch, args.dtype, args.jobs)
    rows = worst(rows)
    head = f"triton {version('triton')}, torch {version('torch')}"
    broken = failures + [what for row in rows for what in violations(row)]
    if args.json:
        _replace(args.json, json.dumps({"versions": head, "rows": [row._asdict() for row in rows], "broken": broken}))
    if args.markdown:
        _replace(args.markdown, f"{head}\n\n{table(rows)}\n")
    print(f"{head}\n{table(rows)}")
    for what in broken:
        print(f"BROKEN: {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
