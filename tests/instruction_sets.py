"""The tests on every instruction set that this processor has (`make test-isa`).

    python tests/instruction_sets.py [--sets avx2 avx512] [--seeds 10] [--without-suite]

For each set: `make test`, then every test file that uses the rule of numerics.py with ten seeds, on one thread and on two.
Environment variables select a set, and a child process reports the selection: ATen names its set; oneDNN and MKL print
theirs in verbose mode. MKL honours some of the variables on Intel's processors alone. The checksum of an fp32 product, whose
bits depend on the order of its sums, shows such a difference. Logs are in .venv/isa.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LOGS = ROOT / ".venv" / "isa"
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


class InstructionSet(NamedTuple):
    name: str
    flags: str
    """flags of /proc/cpuinfo on a processor that has the set"""
    aten: str
    onednn: str
    mkl: dict[str, str]


SETS = (
    InstructionSet("baseline", "", "default", "SSE41", {"MKL_CBWR": "COMPATIBLE"}),
    InstructionSet("avx2", "avx2 fma", "avx2", "AVX2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    InstructionSet(
        "avx512",
        "avx512f avx512bw avx512dq avx512vl",
        "avx512",
        "AVX512_CORE",
        {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    ),
    InstructionSet("avx512_bf16", "avx512f avx512_bf16", "avx512", "AVX512_CORE_BF16", {}),
    InstructionSet("amx", "avx512f amx_tile amx_bf16", "avx512", "AVX512_CORE_AMX", {}),
)

PROBE = """
import zlib, torch
g = torch.Generator().manual_seed(0)
a, b = torch.randn(193, 70, generator=g), torch.randn(70, 517, generator=g)
image, kernel = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
with torch.backends.mkl.verbose(1):
    product = a @ b
with torch.backends.mkldnn.verbose(1):
    torch.mkldnn_convolution(image, kernel, None, (0, 0), (1, 1), (1, 1), 1)
    a.bfloat16() @ b.bfloat16()
print("aten:", torch.backends.cpu.get_cpu_capability().lower())
print(f"bits: {zlib.crc32(product.numpy().tobytes()):08x}")
"""


class Outcome(NamedTuple):
    of: str
    what: str
    passed: bool
    seconds: float
    said: str


def environment(of: InstructionSet, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("MAKE")}
    return {**plain, "ATEN_CPU_CAPABILITY": of.aten, "ONEDNN_MAX_CPU_ISA": of.onednn, **of.mkl, **more}


def reached(of: InstructionSet) -> tuple[bool, str]:
    """Return whether ATen uses the set, and the sets that all three libraries report."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment(of), capture_output=True, text=True, check=True
    )

    def said(pattern: str, otherwise: str = "nothing") -> str:
        found = re.search(pattern, done.stdout)
        return found[1] if found else otherwise

    aten, onednn, bf16 = said(r"aten: (\S+)"), said(r"cpu,isa:(.*)"), said(r"exec,cpu,matmul,([^,]+)", "not its own")
    mkl, mode, bits = said(r"architecture (.*?),"), said(r"CNR:(\S+)"), said(r"bits: (\S+)")
    answer = f"ATen: {aten}; oneDNN: {onednn}, bf16 products: {bf16}; MKL: {mkl}, CNR {mode}, bits of a product {bits}"
    return aten == of.aten, answer


def run(of: InstructionSet, what: str, command: list[str], **variables: str) -> Outcome:
    """Run one command, with a log file of its own."""
    log, start = LOGS / f"{of.name}, {what}.log", time.monotonic()
    with log.open("w") as out:
        done = subprocess.run(command, cwd=ROOT, env=environment(of, **variables), stdout=out, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    failed = re.findall(r"^(?:FAILED|ERROR) .*", log.read_text(), re.MULTILINE)
    said = f"{len(failed)} failed, see {log}" if failed else "green" if not done.returncode else f"broken, see {log}"
    print(f"  {of.name}, {what}: {said} ({seconds:.0f} s)", *failed[:5], sep="\n    ", flush=True)
    return Outcome(of.name, what, not done.returncode, seconds, said)


def judged_files() -> list[str]:
    """Return the test files that use numerics.py, without the files of a GPU alone."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f) for f in files if "from numerics import" in f.read_text() and "test_gpu" not in f.stem]


def with_seeds(of: InstructionSet, seeds: int) -> list[Outcome]:
    """Run the seeds, one process per core at a time: waiting threads sleep."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", *judged_files()]
    outcomes = []
    for threads in (1, 2):

        def one(seed: int, threads: int = threads) -> Outcome:
            variables = {"GEM_TEST_SEED": str(seed), "GEM_TEST_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
            return run(of, f"seed {seed} on {threads} thread{'s'[: threads - 1]}", command, **variables)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outcomes += pool.map(one, range(seeds))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[s.name for s in SETS], default=[s.name for s in SETS])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--without-suite", action="store_true", help="the seeds alone")
    asked = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    information = Path("/proc/cpuinfo")
    mine = set(information.read_text().split()) if information.exists() else set()
    outcomes, lacking = [], []
    for of in (s for s in SETS if s.name in asked.sets):
        missing = sorted(set(of.flags.split()) - mine)
        if missing:
            lacking.append(f"{of.name}: SKIPPED, this processor lacks {', '.join(missing)}")
            print(lacking[-1], flush=True)
            continue
        taken, said = reached(of)
        print(f"{of.name}: {said}", flush=True)
        outcomes.append(Outcome(of.name, "set reached", taken, 0.0, said))
        if not asked.without_suite:
            outcomes.append(run(of, "the whole suite", ["make", "test"]))
        outcomes += with_seeds(of, asked.seeds)
    print("\n" + "\n".join(lacking))
    for name in dict.fromkeys(o.of for o in outcomes):
        mine_of = [o for o in outcomes if o.of == name]
        bad = [o.what for o in mine_of if not o.passed]
        minutes = sum(o.seconds for o in mine_of) / 60
        print(
            f"{name:12}  {len(mine_of) - len(bad):3} of {len(mine_of)} green  {minutes:6.1f} minutes of runs  {'; '.join(bad)}"
        )
    return 0 if outcomes and all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
