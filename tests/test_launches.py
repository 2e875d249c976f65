"""What a call launches, and what it reads back from the device: exact numbers, so that one more is seen.

On CPU tensors, with the checks of values switched off, as they are on a GPU. With Triton interpreted the path is a GPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from group_losses import D, N, V, all_three, group_loss, make_case, sega
from numerics import IMPLS, Case, linear_op, make_upstream, weighted_sum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import REFERENCE
from gem_kernels import compat
from gem_kernels.compat import INTERPRETED
from gem_kernels.tiles import tiling
from tools import plan
from tools.plan_ops import OPS as RECORDED
from tools.plan_ops import Shape
from tools.record import Launch, TorchOp, record

READS = {"nonzero": "a size", "masked_select": "a size", "unique": "a size", "equal": "a value"}
READS |= dict.fromkeys(("item", "_local_scalar_dense", "is_nonzero"), "a value")
WORK = {"argsort": "a sort", "sort": "a sort", "topk": "a sort", "masked_fill": "a pass", "masked_fill_": "a pass"}


class Watch(TorchDispatchMode):
    """Counts what torch does inside our operators and outside: reads of the device, and work on ignored tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "gem_kernels":
            with self:  # what the operator is made of, not the operator
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if what := (READS | WORK).get(name):
            # On the CPU the row functions look for the targets in a tile, of fewer rows than the batch.
            self.seen[what] += name != "nonzero" or args[0].shape == (N,)
        masks = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], (list, tuple)) else ()
        self.seen["a size"] += any(t is not None and t.dtype == torch.bool for t in masks)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> Watch:
    for module in ("validation", "inputs"):
        monkeypatch.setattr(f"gem_kernels.{module}.values_are_readable", lambda _: False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    watch, tolist, launch = Watch(), Tensor.tolist, compat.launch

    def watched_tolist(t: Tensor) -> Any:
        watch.seen["a list"] += 1
        return tolist(t)

    def watched_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        watch.seen[kernel.__name__] += 1
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(Tensor, "tolist", watched_tolist)  # torch dispatches no operation for it
    monkeypatch.setattr(compat, "launch", watched_launch)
    return watch


def linear(x: Case, impl: str, **options: Any) -> Tensor:
    return weighted_sum(linear_op(x, impl, **options), make_upstream(N))


def group(x: Case, impl: str, **options: Any) -> Tensor:
    return group_loss(x, impl, all_three, **options).loss


def known_weights(x: Case, impl: str, **options: Any) -> Tensor:
    return sega(x, impl, **options).loss


OPS = {"linear": linear, "group": group, "sega": known_weights}
IGNORED = {"some": make_case(N, D, V, bias=False, rank=0), "none": make_case(N, D, V, bias=False, rank=0, ignored=0.0)}
"""Cases with ignore_index: of tokens some are ignored, or none is, which the op has to find out"""


def run(watch: Watch, op: str, impl: str, case: Case, **options: Any) -> tuple[Counter[str], Counter[str]]:
    """Return what the forward and what the backward did."""
    x, upstream = case.leaves(), torch.ones(())
    watch.seen = forward = Counter()
    with watch:
        loss = OPS[op](x, impl, **options)
    watch.seen = backward = Counter()
    with watch:
        loss.backward(upstream)
    return +forward, +backward  # those above 0


def without_kernels(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if not name.endswith("_kernel")}


# --- reads and work ---------------------------------------------------------------------------------------------------

SEARCH = {"a size": 1}  # how many tokens are kept
LISTS = {"group": {"a list": 1}}  # cu_groups: loss_fn runs on the host, group by group


def expected(op: str, impl: str, ignored: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """Return what forward and backward read and sort: with ignore_index=None nothing but the groups."""
    forward, backward = dict(LISTS.get(op, {})), {}
    if not INTERPRETED and op != "linear":
        backward = {"a value": 2}  # on the CPU the gradient of the loss is read for each gradient: nothing waits for it
    if ignored is None:
        return forward, backward
    if impl == "triton":
        forward |= {"a sort": 1, "a pass": 4}  # kept tokens first; zeros in the statistics
        return (forward, SEARCH) if op == "linear" else (forward | SEARCH, backward)
    if op == "linear":
        if not INTERPRETED:
            return {"a pass": 4} | SEARCH, SEARCH
        return {"a pass": 5}, {"a pass": 5}  # hidden, then statistics; hidden, three upstream gradients, then dhidden
    forward |= SEARCH
    if ignored == "some":
        forward["a list"] = forward.get("a list", 0) + 1  # where the groups begin among the kept tokens
    return forward, backward


@pytest.mark.parametrize("ignored", [*IGNORED, None])
@pytest.mark.parametrize(("op", "impl"), product(OPS, [impl for impl in IMPLS if impl != "reference"]))
def test_what_is_read_back(op: str, impl: str, ignored: str | None, watch: Watch) -> None:
    options = {} if ignored else {"ignore_index": None}
    counts = run(watch, op, impl, IGNORED[ignored or "none"], **options)
    assert tuple(map(without_kernels, counts)) == expected(op, impl, ignored)


def test_the_watch_sees_reads(watch: Watch) -> None:
    t = torch.arange(N)
    reads: dict[str, Callable[[], object]] = {
        "a size": lambda: t[t > 3],
        "a value": lambda: bool(t[3] > 2),
        "a list": lambda: t[:2].tolist(),
        "a sort": lambda: t.argsort(),
        "a pass": lambda: t.masked_fill(t > 3, 0),
    }
    for name, read in reads.items():
        watch.seen = Counter()
        with watch:
            read()
        assert +watch.seen == {name: 1}


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="kernels are launched under TRITON_INTERPRET=1 only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "impl"), product(OPS, ["chunked", "triton"]))
def test_kernels(op: str, impl: str, dtype: torch.dtype, watch: Watch) -> None:
    case = make_case(N, D, V, dtype=dtype, bias=False, rank=0, ignored=0.0)
    tiles = len(list(product(*tiling(case.hidden, V))))
    forward, backward = {"_row_statistics_kernel": tiles}, {"_row_gradient_kernel": tiles}
    if impl == "triton":
        forward = {"_linear_logprob_fwd_kernel": 1, "_merge_partials_kernel": 1}
        backward = {"_linear_logprob_bwd_kernel": tiles}
    elif op != "linear" and dtype == torch.bfloat16:
        forward = {"_row_exponentials_kernel": tiles}
        if op == "sega":  # what they are cached for: a loss of entropies needs the logits again
            backward = {"_fold_target_kernel": 1}
    if op != "linear":
        forward, backward = forward | backward, {"_scale_kernel": 2}
    counts = run(watch, op, impl, case, ignore_index=None)
    kernels = [{name: n for name, n in of_step.items() if name.endswith("_kernel")} for of_step in counts]
    assert kernels == [forward, backward]


@pytest.mark.skipif(bool(plan.unavailable()), reason=plan.unavailable() or "-")
@pytest.mark.skipif(not compat._ADDMM_WIDENS, reason="an older torch adds a product in two steps")
def test_launches_at_the_reference_shape() -> None:
    """What an H200 would launch: the matrix products and kernels of ops that are called as gem calls them."""
    expected = {
        "score": {"Gemm": 64, "_row_statistics_kernel": 64},
        "score-triton": {"_linear_logprob_fwd_kernel": 1, "_merge_partials_kernel": 1},
        "sega": {"Gemm": 97, "_row_exponentials_kernel": 64, "_fold_target_kernel": 1, "_scale_kernel": 2},
        "group": {"Gemm": 97, "_row_exponentials_kernel": 64, "_fold_target_kernel": 1, "_scale_kernel": 2},
    }
    shape = Shape(REFERENCE.n, REFERENCE.d, REFERENCE.v, REFERENCE.dtype)
    for name, launches in expected.items():
        events = record(lambda name=name: RECORDED[name].prepare(shape), arch=90, processors=132).events  # type: ignore[misc]
        counts = Counter(e.kernel if isinstance(e, Launch) else "Gemm" for e in events if not isinstance(e, TorchOp))
        assert counts == launches, name
