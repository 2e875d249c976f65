"""The process of one measuring stage: `python -m benchmarks.gpu_stages NAME --seconds S [--dry-run]`; the driver starts it."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.record import Record
from tools.device import LOST, pretend_hopper
from tools.files import Json


def attempt(record: Record, name: str, work: Callable[[], Json]) -> None:
    """Do `work` once in the run, however often its process dies, and put on file what it returns or how it fails.

    Raises RuntimeError if the device is lost afterwards.
    """
    if not record.claim(name):
        return
    began = time.monotonic()
    try:
        results = work()
    except Exception as error:  # the next measurement still runs
        results = {"error": f"{type(error).__name__}: {error}"[:1000]}
    record.finish(name, results)
    print(f"{name}: {shown(results)}; {time.monotonic() - began:.1f} s", flush=True)
    if "error" in results:
        gc.collect()  # its traceback may hold tensors
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def shown(results: Json) -> str:
    """Return the results of a row in one line."""
    if "stats" in results:
        return f"{1e3 * results['stats']['median']:.3g} ms, {results['extra_info'].get('peak extra MiB')} MiB"
    if "reason" in results:
        return str(results["reason"])
    return ", ".join(f"{name} {value}" for name, value in results.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, also where measurements failed, as their rows say; LOST if the device is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--seconds", type=float, required=True, help="no measurement begins later than this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args(argv)
    if args.dry_run:
        pretend_hopper()
    record, deadline = Record.of_environment(), time.monotonic() + args.seconds
    assert record is not None
    module = importlib.import_module(f"benchmarks.gpu_stages.{args.stage}")
    left_out = []
    for name, work in module.measurements(args.dry_run):
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        try:
            attempt(record, name, work)
        except RuntimeError as error:
            print(f"the device is lost: {error}")
            return LOST
    record.put(**{"no time left for": left_out})
    return 0


if __name__ == "__main__":
    sys.exit(main())
