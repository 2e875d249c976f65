"""Two heads in turns, every run in a process of its own, for scripts that measure memory and time of whole training steps.

What is freed goes back to the system at once (MALLOC_*): the peak of the resident set is what is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, describe_machine, said

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> float:
    """VmHWM starts again from here; what is resident now, MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def measure(
    module: str, kind: str, cases: Mapping[str, str], heads: Sequence[str], rounds: int, shape: dict[str, Any]
) -> dict[str, Any]:
    """All runs, `python -m module --run <argument> <head>`, whose last line is JSON; each row is printed as it comes.

    Args:
        kind: what a case is called in a row. cases: name -> argument.
        shape: goes into the document.
    """
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()
    for number in range(rounds):
        for name, argument in cases.items():
            for head in heads if number % 2 == 0 else heads[::-1]:
                command = [sys.executable, "-m", module, "--run", argument, head]
                environment = {**os.environ, **_ENVIRONMENT}
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                rows.append({kind: name, "head": head, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    return {
        "machine": describe_machine(),
        "date": date.today().isoformat(),
        "commit": said("git", "rev-parse", "HEAD"),
        "load": {"before": load, "after": os.getloadavg()},
        "shape": shape,
        "runs": rows,
    }
