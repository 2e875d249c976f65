"""Scripts that compare two heads in whole training steps: the heads take turns, and every run is its own process.

Freed memory goes back to the system at once (MALLOC_*), so that the peak of the resident set is memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import MappingProxyType

from benchmarks.results import ROOT, describe_machine, said
from tools.files import Json, read_json, write_json

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


_OF_TREE = (  # the packages of a tree, and the benchmarks of this one
    "import runpy, sys; tree, root, module, *rest = sys.argv[1:]; sys.path.insert(0, tree); import gem, gem_kernels; "
    "sys.path[0] = root; sys.argv[1:] = rest; runpy.run_module(module, run_name='__main__')"
)


def measure(
    module: str,
    kind: str,
    cases: Mapping[str, str],
    heads: Sequence[str],
    rounds: int,
    shape: Json,
    trees: Mapping[str, Path] = MappingProxyType({}),
) -> Json:
    """Run `python -m module --run <argument> <head>`, whose last line is JSON, for all cases and heads; print each row.

    Args:
        kind: the key of a case in its row.
        cases: name -> argument.
        shape: a part of the document.
        trees: head -> the checkout whose gem and gem_kernels it runs; this one if it is not named.
    """
    rows: list[Json] = []
    load = os.getloadavg()
    for number in range(rounds):
        for name, argument in cases.items():
            for head in heads if number % 2 == 0 else heads[::-1]:
                code = ["-c", _OF_TREE, str(trees[head]), str(ROOT), module] if head in trees else ["-m", module]
                command = [sys.executable, *code, "--run", argument, head]
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


def main(
    parser: argparse.ArgumentParser,
    run: Callable[[str, str], Json],
    measure: Callable[[argparse.Namespace], Json],
    table: Callable[[Json], list[str]],
) -> None:
    """Run the command line of a script: measure and write (--out), print the table of a file (--table), or one run (--run)."""
    parser.add_argument("--out", type=Path, help="measure, and write this JSON")
    parser.add_argument("--table", type=Path, help="print the table of a JSON")
    parser.add_argument("--run", nargs=2, metavar=("CASE", "HEAD"), help="one run in this process")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run)))
        return
    if arguments.out:
        write_json(arguments.out, measure(arguments))
    print("\n".join(table(read_json(arguments.table or arguments.out))))
