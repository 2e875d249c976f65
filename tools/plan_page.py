"""Write the predicted tables of docs/costs.md: what the ops do on a GPU, recorded and counted by tools.plan.

    python -m tools.plan_page [--check]

Each table stands between the markers `<!-- plan: NAME -->` and `<!-- end of plan -->`. With --check nothing is written, and the
exit status is 1 if the page differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.shapes import HEADS, REFERENCE
from gem.files import replacing
from tools.plan import Plan, plan, unavailable
from tools.plan_model import DEVICES, EPILOGUE, Device, instructions
from tools.plan_ops import OPS, Shape
from tools.record import Launch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "costs.md"
MARKER, END = "<!-- plan: {} -->", "<!-- end of plan -->"
_TOKENS = (1024, 2048, 4096, 8192, 16_384, 65_536)
_HEADS = ("llama-3-8b", "qwen2.5-0.5b", "gemma-2-2b", "llama-3.2-1b")
_SHAPE = Shape(REFERENCE.n, REFERENCE.d, REFERENCE.v, REFERENCE.dtype)
_KERNELS = {
    "score": "_row_statistics_kernel",
    "score-backward": "_row_gradient_kernel",
    "sega": "_row_exponentials_kernel",
    "logprob": "_row_statistics_kernel",
    "logprob-backward": "_row_gradient_kernel",
    "score-triton": "_linear_logprob_fwd_kernel",
    "score-backward-triton": "_linear_logprob_bwd_kernel",
}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _memory(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.01 else f"{1e3 * seconds:,.0f} ms"


def passes() -> list[str]:
    """Return the table of every op at the reference shape."""
    rows = []
    for name, op in OPS.items():
        plans = {device: plan(name, _SHAPE, DEVICES[device]) for device in DEVICES}
        p = plans["h200"]
        flop = f"{2 * op.products}NDV" if op.products else ""
        predicted = [_milliseconds(of_device.predicted) for of_device in plans.values()]
        counts = [str(p.gemms.total() or ""), str(p.launches)]
        rows.append([op.says, flop, _memory(p.extra_bytes), *counts, *predicted, "not measured yet"])
    devices = [f"{name.upper()}, predicted" for name in DEVICES]
    return _table(["pass", "FLOP", "extra memory", "GEMMs", "launches", *devices, "measured"], rows)


def kernels() -> list[str]:
    """Return the table of the kernels that pass over all logits of the reference shape: all launches of each in one op."""
    rows = []
    for op, name in _KERNELS.items():
        of_devices = [plan(op, _SHAPE, device).kernels[name] for device in DEVICES.values()]
        counts = sorted(
            {_instructions(kernel.first, device) for kernel, device in zip(of_devices, DEVICES.values(), strict=True)}
        )
        times = [f"{_milliseconds(kernel.seconds)}, {kernel.limit}" for kernel in of_devices]
        moved = f"{of_devices[-1].bytes / 1e9:.1f} GB"
        rows.append([f"`{name}` in {OPS[op].says}", " to ".join(counts), moved, *times])
    return _table(["kernel", "instructions/logit", "bytes", *(f"{name.upper()}, predicted" for name in DEVICES)], rows)


def _instructions(launch: Launch, device: Device) -> str:
    fused = launch.kernel.startswith("_linear")
    return f"{EPILOGUE}, after the product" if fused else f"{instructions(launch, device):.1f}"


def heads() -> list[str]:
    """Return the table of SEGA and score over heads and tokens on an H200."""

    def cells(p: Plan) -> list[str]:
        return [
            str(p.gemms.total()),
            str(p.launches),
            f"{p.worst_use:.0%}",
            _memory(p.extra_bytes),
            f"{1e3 * p.predicted:,.1f}",
        ]

    rows = []
    for head in (shape for shape in HEADS if shape.name in _HEADS):
        for n in _TOKENS:
            shape = Shape(n, head.d, head.v, head.dtype)
            of = [cells(plan(op, shape, DEVICES["h200"])) for op in ("sega", "score")]
            rows.append([head.name, f"{n:,}", *of[0], *of[1]])
    columns = ("GEMMs", "launches", "worst use", "extra", "ms")
    return _table(["head", "N", *(f"{op}: {column}" for op in ("SEGA", "score") for column in columns)], rows)


TABLES = {"passes": passes, "kernels": kernels, "heads": heads}


def page(text: str) -> str:
    """Return the page with every table computed anew."""
    for name, table in TABLES.items():
        before, rest = text.split(MARKER.format(name), 1)
        text = "\n".join([before + MARKER.format(name), "", *table(), "", END]) + rest.split(END, 1)[1]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan_page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    args = parser.parse_args(argv)
    if reason := unavailable():
        parser.error(reason)
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text)
    if wanted == text:
        return 0
    if args.check:
        print(f"{PAGE.name} differs from what the planner predicts: run `python -m tools.plan_page`")
        return 1
    with replacing(PAGE) as out:
        out.write(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
