"""Print what an op will do on a GPU, which need not be at hand: products, launches, waves, bytes, memory and predicted time.

    python -m tools.plan N D V dtype device [--op OP ...]      such as 8192 4096 128256 bf16 h200 --op score sega

The op itself is recorded on meta tensors (tools.record), and its time is predicted from counts (tools.plan_model). Nothing is
measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

from gem_kernels import compat
from tools.aot_cases import DTYPES
from tools.plan_model import DEVICES, Device, Work, work
from tools.plan_ops import OPS, Shape
from tools.record import Event, Gemm, Launch, Recording, TorchOp, record

_CALL, _VIEW, _LAUNCH = 10e-6, 3e-6, 40e-6
"""seconds of the host for a torch operation that launches, for one that does not, and for a launch of ours: estimates"""


class Kernel(NamedTuple):
    """All launches of one of our kernels."""

    launches: int
    seconds: float
    bytes: int
    limit: str
    """what most of its time is made of (Work.limit)"""
    first: Launch


class Plan(NamedTuple):
    """What an op does on a device, and what that is predicted to cost."""

    gemms: Counter[Gemm]
    kernels: dict[str, Kernel]
    """ours by name"""
    torch_launches: int
    flops: int
    bytes: int
    extra_bytes: int
    """largest memory beyond operands and results"""
    seconds: dict[str, float]
    """of the GPU, by part: GEMM, fused, rows, other"""
    host_seconds: float
    uses: list[tuple[float, float]]
    """(use of the processors, seconds) of every product, in the GEMM library or fused"""

    @property
    def launches(self) -> int:
        return self.gemms.total() + sum(k.launches for k in self.kernels.values()) + self.torch_launches

    @property
    def predicted(self) -> float:
        """Seconds: the GPU's, or the host's where it cannot launch fast enough."""
        return max(sum(self.seconds.values()), self.host_seconds)

    @property
    def worst_use(self) -> float:
        return min((use for use, _ in self.uses), default=1.0)

    @property
    def mean_use(self) -> float:
        """Mean over time."""
        return sum(use * seconds for use, seconds in self.uses) / (sum(seconds for _, seconds in self.uses) or 1.0)


@cache
def _recorded(op: str, shape: Shape, arch: int, processors: int) -> Recording:
    return record(partial(OPS[op].prepare, shape), arch, processors)


def plan(op: str, shape: Shape, device: Device) -> Plan:
    """Record an op at a shape and predict its cost on a device."""
    events, extra = _recorded(op, shape, device.arch, device.processors)
    works = [work(event, device) for event in events]
    seconds: dict[str, float] = {}
    for w in works:
        seconds[w.part] = seconds.get(w.part, 0.0) + w.seconds
    products = [w for w in works if w.flops]
    return Plan(
        gemms=Counter(e for e in events if isinstance(e, Gemm)),
        kernels=_kernels([(e, w) for e, w in zip(events, works, strict=True) if isinstance(e, Launch)]),
        torch_launches=sum(isinstance(e, TorchOp) and e.bytes > 0 for e in events),
        flops=sum(w.flops for w in works),
        bytes=sum(w.bytes for w in works),
        extra_bytes=extra,
        seconds=seconds,
        host_seconds=sum(_host(e, w) for e, w in zip(events, works, strict=True)),
        uses=[(w.use, w.seconds) for w in products],
    )


def _kernels(launches: Sequence[tuple[Launch, Work]]) -> dict[str, Kernel]:
    found = {}
    for name in dict.fromkeys(launch.kernel for launch, _ in launches):
        works = [w for launch, w in launches if launch.kernel == name]
        longest = max(works, key=lambda w: w.seconds)
        first = next(launch for launch, _ in launches if launch.kernel == name)
        found[name] = Kernel(
            len(works), sum(w.seconds for w in works), sum(w.bytes for w in works), longest.limit, first
        )
    return found


def _host(event: Event, cost: Work) -> float:
    if isinstance(event, Launch):
        return _LAUNCH
    return _CALL if isinstance(event, Gemm) or cost.bytes else _VIEW


# --- the report -------------------------------------------------------------------------------------------------------


def report(op: str, shape: Shape, name: str) -> str:
    """Return what `python -m tools.plan` prints of an op on a device."""
    device = DEVICES[name]
    p = plan(op, shape, device)
    ndv = shape.n * shape.d * shape.v
    counts = {
        "GEMMs": p.gemms.total(),
        **{name: k.launches for name, k in p.kernels.items()},
        "of torch": p.torch_launches,
    }
    launches = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    parts = " + ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in p.seconds.items())
    use = f"worst {p.worst_use:.0%}, mean {p.mean_use:.0%}" if p.uses else "no product"
    lines = [
        f"{op}: {OPS[op].says}, N={shape.n} D={shape.d} V={shape.v} {str(shape.dtype)[6:]} on {name}",
        f"  launches      {p.launches}: {launches}",
        f"  FLOP          {p.flops / 1e12:.4g} T in products, {p.flops / ndv:.3g} NDV",
        f"  processors    {device.processors}; use by products: {use}",
        f"  bytes moved   {p.bytes / 1e9:.3g} GB",
        f"  extra memory  {p.extra_bytes / 2**20:,.1f} MiB beyond operands and results",
        f"  predicted     {1e3 * p.predicted:.2f} ms: {parts}; the host needs {1e3 * p.host_seconds:.1f} ms (estimate)",
    ]
    for g, count in p.gemms.items():
        cost = work(g, device)
        result = f"{'+=' if g.accumulates else '='} {str(g.out_dtype)[6:]}"
        lines.append(
            f"    {count:5} x ({g.m}, {g.k}) ({g.k}, {g.n}) {result}: {1e6 * cost.seconds:.0f} us each, use {cost.use:.0%}"
        )
    return "\n".join(lines)


def unavailable() -> str:
    """Return why nothing can be planned here, "" if it can."""
    if compat.INTERPRETED:
        return "TRITON_INTERPRET=1 is set: the interpreter's tiles are not those of a GPU; unset it"
    return "" if compat.HAS_TRITON else "triton is not installed: pip install triton"


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description=(__doc__ or "").split("\n")[0])
    for name, says in (("N", "tokens"), ("D", "hidden size"), ("V", "vocabulary")):
        parser.add_argument(name, type=_size, help=says)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("device", choices=DEVICES)
    parser.add_argument("--op", nargs="+", choices=OPS, default=["score", "sega"], metavar="OP", help=", ".join(OPS))
    args = parser.parse_args(argv)
    if reason := unavailable():
        parser.error(reason)
    shape = Shape(args.N, args.D, args.V, DTYPES[args.dtype])
    print("\n\n".join(report(op, shape, args.device) for op in args.op))
    return 0


if __name__ == "__main__":
    sys.exit(main())
