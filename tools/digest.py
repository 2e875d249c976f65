"""Prove that a refactoring changed no bit: hash the outputs and gradients of random cases of every op.

    python -m tools.digest [--cases 200] [--seed 0] [--json FILE] [--against FILE]

One hash per op, implementation, dtype and name of an output or gradient, over all cases. --against compares the keys that both
sides have and exits with 1 if a hash differs. TRITON_INTERPRET=1 adds `triton`. The file imports public names of gem_kernels
alone, so it also runs on an older commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import gem_kernels as gk

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Named = Iterable[tuple[str, Tensor | None]]


class Case:
    """Random choices and tensors; the case number alone decides them, so every dtype and implementation gets the same."""

    def __init__(self, seed: int, dtype: torch.dtype, impl: gk.Impl) -> None:
        self.rng, self.torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype, self.impl, self.leaves = dtype, impl, dict[str, Tensor]()
        self.n = self.rng.choice([0, 1, 2, 7, 16, 33, 64, 65, 70])
        self.d, self.v = self.rng.choice([1, 8, 31, 32, 33, 48]), self.rng.choice([1, 5, 64, 127, 128, 129, 209, 300])
        if not INTERPRETED and self.chance(0.05):  # across the borders of the CPU's tiles
            self.n, self.v = self.rng.randint(1025, 1100), self.rng.randint(4097, 4300)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def numbers(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64) * size

    def leaf(self, name: str, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Register an input, frozen with a probability of one in four."""
        t = t.to(dtype or self.dtype).requires_grad_(self.chance(0.75))
        self.leaves[name] = t
        return t

    def offsets(self, empty: bool) -> Tensor:
        """Return offsets 0, ..., n, with empty parts or without."""
        inner = sorted(self.rng.randint(0, self.n) for _ in range(self.rng.randint(0, 5)))
        cuts = [0, *inner, self.n]
        return torch.tensor(cuts if empty else sorted(set(cuts)), dtype=self.rng.choice([torch.int32, torch.int64]))

    def targets(self) -> dict[str, Any]:
        t = torch.randint(0, self.v, (self.n,), generator=self.torch_rng)
        ignore = self.rng.choice([-100, -100, 0])
        ignored = torch.rand(self.n, generator=self.torch_rng) < self.rng.choice([0, 0, 0.3, 1])
        return {"targets": t.masked_fill(ignored, ignore), "ignore_index": ignore, "impl": self.impl} | self.transform()

    def transform(self) -> dict[str, Any]:
        scale, softcap = self.rng.choice([1.0, 0.25, -1.5]), self.rng.choice([None, None, 5.0])
        transform = gk.LogitTransform(scale, softcap, self.rng.choice([1.0, 0.7]))
        return {"transform": transform} if self.chance(0.6) else {}

    def linear(self) -> dict[str, Any]:
        """Return the arguments of an op on hidden states; hidden may be transposed in memory, an adapter fp32 beside bf16."""
        hidden = self.numbers(self.d, self.n).T if self.chance(0.2) else self.numbers(self.n, self.d)
        weight = self.numbers(self.v, self.d, size=4.0 / self.d**0.5)
        arguments: dict[str, Any] = {"hidden": self.leaf("hidden", hidden), "weight": self.leaf("weight", weight)}
        if self.chance(0.4):
            arguments["bias"] = self.leaf("bias", self.numbers(self.v))
        if self.chance(0.4):
            r, dtype = self.rng.choice([1, 3, 16]), torch.float32 if self.chance(0.5) else self.dtype
            a, b = self.numbers(r, self.d, size=0.3), self.numbers(self.v, r)
            arguments["low_rank"] = gk.LowRank(
                self.leaf("low_rank.a", a, dtype), self.leaf("low_rank.b", b, dtype), 0.5
            )
        return arguments | self.targets()

    def differentiate(self, outputs: Sequence[Tensor]) -> Named:
        """Return the gradients of a random combination of some outputs."""
        terms = [(t * self.numbers(*t.shape).to(t.dtype)).sum() for t in outputs if self.chance(0.7)]
        total = torch.stack(terms).sum() if terms else None
        if total is not None and total.requires_grad:
            total.backward()
        return [(f"d{name}", leaf.grad) for name, leaf in self.leaves.items()]


def linear_logprob_entropy(c: Case) -> Named:
    stats = gk.linear_logprob_entropy(**c.linear())
    return [*stats._asdict().items(), *c.differentiate(stats[:3])]


def logprob_entropy(c: Case, inplace: bool = False) -> Named:
    view, arguments = c.n % 2 == 0 and c.chance(0.5), c.targets()
    shape = (2, c.n // 2 + 1, c.v) if view else (c.n, c.v)
    logits = c.leaf("logits", c.numbers(*shape, size=4.0))
    z = logits.clone() if inplace else logits
    if view:
        z, arguments["targets"] = z[:, :-1], arguments["targets"].view(2, -1)
    stats = gk.logprob_entropy(z, **arguments, inplace_backward=inplace)
    return [*stats._asdict().items(), *c.differentiate(stats[:3])]


def _group(c: Case, op: Callable[..., gk.GroupLoss], *extra: Any) -> Named:
    cache = c.rng.choice([1 << 30, 1 << 30, 40_000, 1])
    arguments = c.linear()
    x = (arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"))
    out = op(*x, c.offsets(empty=False), *extra, **arguments, cache_bytes=cache)
    return [("loss", out.loss), *out.stats._asdict().items(), *c.differentiate([out.loss])]


def group_loss_of_logprob(c: Case) -> Named:
    return _group(c, gk.linear_group_loss, lambda s, group: -((group + 1) * s.entropy.detach() * s.logprob).sum())


def group_loss_of_all(c: Case) -> Named:
    return _group(c, gk.linear_group_loss, lambda s, g: (s.logprob.sigmoid() + 0.1 * s.entropy - 0.2 * s.lse**2).sum())


def sega_loss(c: Case) -> Named:
    def op(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, **rest: Any) -> gk.GroupLoss:
        return gk.sega_loss(hidden, weight, targets, cu_seqlens, c.numbers(len(cu_seqlens) - 1).float(), **rest)

    return _group(c, op)


def _values(c: Case, name: str) -> Tensor:
    """Return up to 420 values, often tied, now and then NaN."""
    c.n *= c.rng.choice([1, 6])
    values = c.numbers(c.n)
    values = (values * 2).round() / 2 if c.chance(0.4) else values
    return c.leaf(name, values.masked_fill(values > 2, float("nan")) if c.chance(0.1) else values)


def topm_mean(c: Case) -> Named:
    mean = gk.topm_mean(_values(c, "values"), c.offsets(empty=True), c.rng.choice([1, 3, 200, 0.1, 1.0]), impl=c.impl)
    return [("mean", mean), *c.differentiate([mean])]


def gem_score(c: Case) -> Named:
    entropy = _values(c, "entropy")
    cu = c.offsets(empty=True)
    middle = (cu[:-1] + cu[1:]) // 2
    branch, answer = torch.stack((cu[:-1], middle), 1), torch.stack((middle, cu[1:]), 1)
    score = gk.gem_score(entropy, branch, answer, m=c.rng.choice([2, 0.1, 1.0]), branch_weight=0.5, impl=c.impl)
    return [*score._asdict().items(), *c.differentiate(score)]


OPS: dict[str, Callable[[Case], Named]] = {
    "linear_logprob_entropy": linear_logprob_entropy,
    "logprob_entropy": logprob_entropy,
    "logprob_entropy(inplace_backward)": lambda c: logprob_entropy(c, inplace=True),
    "linear_group_loss(logprob)": group_loss_of_logprob,
    "linear_group_loss(all)": group_loss_of_all,
    "sega_loss": sega_loss,
    "topm_mean": topm_mean,
    "gem_score": gem_score,
}


def serves(op: str, impl: str, dtype: torch.dtype) -> bool:
    if impl == "auto" or ("inplace" in op and impl == "reference"):
        return False
    try:
        return bool(gk.choose_impl(op, impl, torch.empty(0, dtype=dtype)))
    except ValueError:
        return False


def digest(cases: int, seed: int) -> dict[str, str]:
    hashes: dict[str, Any] = {}
    for op, run in OPS.items():
        for impl in get_args(gk.Impl):
            for name, dtype in DTYPES.items():
                if not serves(op, impl, dtype):
                    continue
                start = time.monotonic()
                for case in range(cases):
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64 and case % 10 == 9):
                        outputs = list(run(Case(seed * 1_000_003 + case, dtype, impl)))
                    for output, t in outputs:
                        found = hashes.setdefault(f"{op}, {impl}, {name}, {output}", hashlib.sha256())
                        found.update(f"{case} {None if t is None else (t.dtype, tuple(t.shape))}".encode())
                        if t is not None:
                            found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                print(f"{op}, {impl}, {name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return {key: found.hexdigest()[:16] for key, found in hashes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="of every op, implementation and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the hashes")
    parser.add_argument("--against", type=Path, help="compare with hashes that were written before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"": f"{arguments.cases} cases, seed {arguments.seed}"} | digest(arguments.cases, arguments.seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not arguments.against:
        print(f"{len(found) - 1} hashes of {found['']}")
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    if before[""] != found[""]:
        print(f"{arguments.against} has {before['']}, this run {found['']}: nothing can be compared")
        return 1
    common = before.keys() & found.keys()
    differ = sorted(key for key in common if before[key] != found[key])
    gone, new = sorted(before.keys() - common), sorted(found.keys() - common)
    print(f"{len(common) - 1} hashes in common, {len(differ)} differ", *differ, sep="\n")
    print(f"{len(gone)} are gone", *gone, f"{len(new)} are new", *new, sep="\n")
    return int(bool(differ or gone))


if __name__ == "__main__":
    raise SystemExit(main())
