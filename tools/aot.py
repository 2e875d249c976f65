"""Compile every kernel that the library launches, without a GPU, and report registers, spills and memory.

    python -m tools.aot [--arch 80 90 100] [--dtype bf16 fp16 fp32] [--case NAME ...] [--markdown FILE] [--json FILE] [--jobs N]

The launchers run on meta tensors, so the compiler gets the same tiles, warps, and specialisation to strides and alignments as
on a GPU. A kernel breaks its budget, and the exit status is 1, when it spills registers, needs more shared or tensor memory
than there is, or multiplies matrices without the tensor cores' instruction; and a kernel that walks rows of logits, when it
issues more instructions a logit, or waits at more barriers a step, than aot_budget.BUDGETS says.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.fx.experimental._config as meta_config

from gem.files import replacing
from gem_kernels import compat
from tools import aot_sass
from tools.aot_budget import MULTIPROCESSORS, TMA, Row, blocks_per_multiprocessor, violations
from tools.aot_cases import CASES, DTYPES
from tools.aot_sass import Step, Work
from tools.files import write_json
from tools.record import WithoutProducts


class _Driver:
    """The driver that triton calls before it compiles. The device index is the architecture: it keys triton's caches."""

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
    """Return a row for every kernel that a case launches, and the reason if some of them do not compile."""
    import triton

    triton.runtime.driver.set_active(_Driver(arch))
    rows: dict[str, Row] = {}

    def compile_kernel(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        if compiled.hash not in rows:
            step = _step(compiled.asm["cubin"], dict(zip(kernel.arg_names, args, strict=False)), meta)
            rows[compiled.hash] = _row(compiled, name, dtype, arch, meta, step)

    # A meta tensor has no values, so the lookup of kept tokens assumes that all are kept.
    all_kept = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    failure = None
    try:
        with compat.compiling(arch, compile_kernel), all_kept, WithoutProducts():
            CASES[name].launch(DTYPES[dtype])
    except Exception as error:  # the other cases are still reported
        failure = f"{name} ({dtype}, sm_{arch}) does not compile: {type(error).__name__}: {error}"
    return list(rows.values()), failure


def _step(cubin: bytes, arguments: dict[str, Any], meta: dict[str, Any]) -> Step | None:
    """Return what a step costs if the kernel walks rows of logits: such a kernel has a z_ptr.

    A thread reads its share of the logits and of the bias, takes one exponential of a logit, and another one for the softcap,
    and writes what the kernel makes of a logit.
    """
    if "z_ptr" not in arguments:
        return None
    columns = meta["BLOCK_V"] // (32 * meta["num_warps"])
    logits = columns * meta["BLOCK_N"]
    work = Work(
        read=logits * arguments["z_ptr"].element_size()
        + (columns * arguments["bias_ptr"].element_size() if meta["HAS_BIAS"] else 0),
        exponentials=logits * (2 if meta.get("SOFTCAP") else 1),
        written=logits * sum(arguments[out].element_size() for out in ("out_ptr", "cache_ptr") if out in arguments),
    )
    return aot_sass.step(aot_sass.parse(_cuobjdump_prints("-sass", cubin)), logits, work)


def variant(meta: dict[str, Any]) -> str:
    """Return the block sizes of a launch in the order of the signature, then the flags that are on."""
    blocks = "x".join(str(size) for key, size in meta.items() if key.startswith("BLOCK"))
    return " ".join([blocks, *(key for key, on in meta.items() if on is True or (key == "DEGREE" and on))])


def _row(compiled: Any, case: str, dtype: str, arch: int, meta: dict[str, Any], step: Step | None) -> Row:
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    threads = int(_only(r"\.reqntid (\d+)", ptx))
    usage = _cuobjdump_prints("--dump-resource-usage", compiled.asm["cubin"])
    registers, shared = int(_only(r"REG:(\d+)", usage)), compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Row(
        kernel=compiled.name,
        case=case,
        variant=variant(meta),
        dtype=dtype,
        arch=arch,
        threads=threads,
        registers=registers,
        spills=int(_only(r"STACK:(\d+)", usage)),
        shared=shared,
        tensor_memory=tensor_memory,
        # Only a full fp32 product ("ieee", which triton prints as nothing) runs without tensor cores.
        multiplies=any("inputPrecision" in dot or "xf32> *" not in dot for dot in re.findall(r"tt\.dot .*", ttir)),
        instructions=[name for name in (*(sm.instruction for sm in MULTIPROCESSORS.values()), TMA) if name in ptx],
        instructions_per_logit=step.per_logit if step else None,
        barriers=step.barriers if step else None,
        blocks=blocks_per_multiprocessor(arch, threads, registers, shared, tensor_memory),
    )


def _cuobjdump() -> Any:
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def _cuobjdump_prints(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_cuobjdump(), option, file.name], capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text[:2000]}"
    return match[1]


# --- the report -------------------------------------------------------------------------------------------------------


def compile_all(
    archs: Iterable[int], dtypes: Iterable[str], cases: Iterable[str], jobs: int
) -> tuple[list[Row], list[str]]:
    """Compile the cases in parallel processes, with a line on stderr for each; return rows and failures."""
    todo = [(name, dtype, arch) for name in cases for dtype in dtypes if dtype in CASES[name].dtypes for arch in archs]
    start = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, *job): job for job in todo}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()  # raises if the compiler aborts its process; --jobs 1 shows in which case
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
        "instructions": " ".join("TMA" if name == TMA else name for name in row.instructions),
        "instructions/logit": "" if row.instructions_per_logit is None else f"{row.instructions_per_logit:.1f}",
        "barriers": "" if row.barriers is None else str(row.barriers),
        "blocks/SM": str(row.blocks),
    }


def worst(rows: Iterable[Row]) -> list[Row]:
    """Keep one row per kernel, case, variant, dtype and architecture: the worst of triton's specialisations.

    What a kernel that walks rows costs first is what it issues; what any other does, registers, which decide what fits.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row[: Row._fields.index("arch") + 1]
        found[key] = max(found.get(key, row), row, key=_badness)
    kernels = list(dict.fromkeys(row.kernel for row in found.values()))
    return sorted(found.values(), key=lambda r: (list(CASES).index(r.case), kernels.index(r.kernel)))


def _badness(row: Row) -> tuple[float, ...]:
    return len(violations(row)), row.spills, row.instructions_per_logit or 0, row.barriers or 0, row.registers


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table with aligned columns."""
    cells = [_cells(row) for row in rows]
    lines = [list(cells[0]), *(list(row.values()) for row in cells)] if cells else [["no kernel"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def read_page(path: Path) -> list[dict[str, str]]:
    """Read the rows of a page that main wrote (docs/aot.md): the text of every cell, by the name of its column."""
    _, _, header, _, *rows = path.read_text(encoding="utf-8").splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, *rows)]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="default: all; names are quoted")
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

    rows, failures = compile_all(args.arch, args.dtype, args.case, args.jobs)
    rows = worst(rows)
    head = f"triton {version('triton')}, torch {version('torch')}"
    broken = failures + [what for row in rows for what in violations(row)]
    if args.json:
        write_json(args.json, {"versions": head, "rows": [row._asdict() for row in rows], "broken": broken})
    if args.markdown:
        with replacing(args.markdown) as out:
            out.write(f"{head}\n\n{table(rows)}\n")
    print(f"{head}\n{table(rows)}")
    for what in broken:
        print(f"BROKEN: {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
