"""Results of a run: their file, their table, and the comparison with newer ones.

    python -m benchmarks.results        prints the path of today's results on this machine

A file is pytest-benchmark's JSON: `benchmarks`, each with `stats` (seconds) and `extra_info` (task, shape, library, memory,
errors), `machine_info`, `commit_info`; and `does_not`, the rows without a time, each with a reason.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
OURS, EAGER = "gem-kernels", "eager"
DEADLINE = "GEM_KERNELS_BENCH_DEADLINE"
"""environment: the time.time() after which no benchmark starts"""
SLOWER, LARGER, WORSE = 1.15, 1.15, 2.0
"""Factors by which a ratio to eager, in (least) time and in memory, and an error may grow before they count as worse."""
NOISE_MIB = 32
"""Memory that the allocator kept from before does not show in a peak, so a smaller difference does not count."""


def said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return re.sub(r"\((R|TM)\)", "", next(names, platform.machine()))


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else _cpu()


def describe_machine() -> Json:
    """Return device, driver and versions."""
    import torch

    found: Json = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "driver, power limit, max clock, clock, temperature": said("nvidia-smi", query, "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    packages = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    return found | {package: _installed(package) for package in packages}


def path_of_today() -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name()).strip("-").lower()
    return FOLDER / f"{name}-{date.today().isoformat()}.json"


def read(path: Path) -> Json:
    document: Json = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" not in document:
        raise ValueError(f"{path} is not a result of `pytest benchmarks/ --benchmark-json`: it has no 'benchmarks'")
    return document


def rows(document: Json) -> list[Json]:
    """Return every row, timed or not: the timed ones in the order of the run, then the others."""
    timed = []
    for b in document["benchmarks"]:
        stats = b["stats"]
        times = {"median s": stats["median"], "least s": stats["min"], "rounds": stats["rounds"]}
        timed.append({**b["extra_info"], **times})
    missing: list[Json] = document.get("does_not", [])
    return timed + missing


# --- tables -----------------------------------------------------------------------------------------------------------


def by_task(found: Iterable[Json]) -> dict[tuple[str, str], list[Json]]:
    """Map (task, shape) to its rows: ours first, then by time, rows without a time last."""
    tasks: dict[tuple[str, str], list[Json]] = {}
    for row in found:
        tasks.setdefault((row["task"], row["shape"]), []).append(row)
    for of_task in tasks.values():
        of_task.sort(key=lambda r: (not r["library"].startswith(OURS), r.get("median s", 1e9)))
    return tasks


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def cells(row: Json, eager: Json | None) -> list[str]:
    """Return the cells of a timed row in the order of HEADER."""

    def of(name: str, form: str) -> str:
        return form.format(row[name]) if row.get(name) is not None else ""

    relative = row["median s"] / eager["median s"] if eager else None
    return [
        row["library"],
        seconds(row["median s"]),
        "" if relative is None else f"{relative:.2f}",
        of("of bare mm", "{:.2f}"),
        of("share of GEMM rate", "{:.0%}"),
        of("peak extra MiB", "{:,.0f}"),
        *(of(f"error of {name}", "{:.0e}") for name in ("logprob", "entropy", "dhidden", "dweight")),
    ]


HEADER = [
    "",
    "time",
    "/ eager",
    "/ bare mm",
    "of GEMM rate",
    "extra MiB",
    "Δ logprob",
    "Δ entropy",
    "Δ dhidden",
    "Δ dweight",
]


def filled(of_task: Sequence[Json]) -> list[list[str]]:
    """Return the cells of the timed rows."""
    timed = [row for row in of_task if "median s" in row]
    eager = next((row for row in timed if row["library"] == EAGER), None)
    return [cells(row, eager) for row in timed]


def reasons(of_task: Sequence[Json]) -> str:
    """Return the libraries without a time and the reasons, grouped by reason."""
    why: dict[str, list[str]] = {}
    for row in of_task:
        if "reason" in row:
            why.setdefault(row["reason"], []).append(row["library"])
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())


def title(row: Mapping[str, Any]) -> str:
    sizes = [f"{name}={row[name]}" for name in ("N", "D", "V") if name in row]
    facts = [f"{name} {row[name]}" for name in row if name.startswith(("mean ", "largest "))]
    return ", ".join([" ".join(sizes), *([row["dtype"]] if "dtype" in row else []), *facts])


def table(found: Iterable[Json]) -> str:
    """Return the tables as text for a terminal."""
    lines = []
    for (task, shape), of_task in by_task(found).items():
        lines += ["", f"{task} ({shape}: {title(of_task[0])})"]
        grid = [HEADER, *filled(of_task)]
        used = [i for i in range(len(HEADER)) if any(row[i] for row in grid[1:])]
        widths = {i: max(len(row[i]) for row in grid) for i in used}
        for row in grid:
            lines.append("  " + "  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used))
        if said := reasons(of_task):
            lines.append(f"  does not: {said}")
    return "\n".join(lines)


# --- compare ----------------------------------------------------------------------------------------------------------


def compare(old: Json, new: Json) -> tuple[str, list[str]]:
    """Compare our rows by their ratios to eager, so that machines may differ; return a report and what got worse."""
    tasks = [by_task(rows(document)) for document in (old, new)]
    lines, worse = [], []
    for key in tasks[0]:
        pair = [{row["library"]: row for row in of.get(key, ()) if "median s" in row} for of in tasks]
        for library, was in pair[0].items():
            if not library.startswith(OURS):
                continue
            now, name = pair[1].get(library), f"{key[0]} ({key[1]}), {library}"
            if now is None:
                worse.append(f"{name}: no longer there")
                continue
            # The least time is the one with the least disturbance.
            for what, allowed, noise in (("least s", SLOWER, 0.0), ("peak extra MiB", LARGER, NOISE_MIB)):
                before, after = (_of_eager(row, of.get(EAGER), what) for row, of in zip((was, now), pair, strict=True))
                if before is None or after is None:
                    continue
                line = f"{name}: {what} / eager {before:.3f} -> {after:.3f}"
                lines.append(line)
                if after > allowed * before and now[what] * (1 - allowed * before / after) > noise:
                    worse.append(line)
            for what in was:
                if what.startswith("error of ") and now.get(what, 0.0) > WORSE * was[what]:
                    worse.append(f"{name}: {what} {was[what]:.1e} -> {now[what]:.1e}")
    if not lines and not worse:
        worse.append("the two files have no row of ours in common")
    return "\n".join([*lines, "", *(f"WORSE {line}" for line in worse), f"{len(worse)} worse"]), worse


def _of_eager(row: Json, eager: Json | None, what: str) -> float | None:
    if eager is None or not row.get(what) or not eager.get(what):
        return None
    return float(row[what]) / float(eager[what])


if __name__ == "__main__":
    print(path_of_today())
