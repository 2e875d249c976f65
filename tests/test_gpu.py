"""What only a GPU shows: compiled kernels, GEMM libraries with bf16 operands and fp32 results, the copy engine, addresses
beyond 2^31, races, CUDA graphs, host synchronisation. `make gpu` runs this file; every other property of the ops is tested
on the CPU. The rule is the one of numerics.py: gold is the reference on the same device in fp64.

GEM_KERNELS_TEST_DEVICE=cpu with TRITON_INTERPRET=1 is a dry run of the file itself.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# conftest asks for deterministic algorithms, and cuBLAS is deterministic with this alone; it is read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from numerics import (
    DTYPES,
    STATS,
    TRANSFORMS,
    Case,
    assert_all_close,
    assert_close,
    make_case,
    make_upstream,
    run_linear,
    weighted_sum,
)
from op_bounds import group_bounds, linear_bounds, logits_bounds, score_bounds, topm_bounds
from torch import Tensor

from gem_kernels import (
    IGNORE_INDEX,
    LogitTransform,
    LowRank,
    TokenStats,
    VocabShard,
    compat,
    gem_score,
    linear_group_loss,
    linear_logprob_entropy,
    logprob_entropy,
    sega_loss,
    topm_mean,
)

ROOT = Path(__file__).parent.parent
DEVICE = torch.device(os.environ.get("GEM_KERNELS_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
LOST = 77  # the exit status by which benchmarks/gpu.py knows that a process lost its device, and starts another

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="not part of a dry run")
each_impl = pytest.mark.parametrize("impl", ["chunked", "triton"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

BF16, FP32 = torch.bfloat16, torch.float32
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """fp32 GEMMs in fp32, as the bounds have it; and a lost device ends the process at the test that lost it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = reduced
    torch.set_float32_matmul_precision(precision)
    if ON_GPU:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # several processes share the device
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=LOST)


def on(case: Case, device: torch.device = DEVICE) -> Case:
    return replace(case._map(lambda _, t: t.to(device)), targets=case.targets.to(device))


def upstream_of(n: int, names: Sequence[str] = STATS, device: torch.device = DEVICE) -> dict[str, Tensor]:
    return {name: u.to(device) for name, u in make_upstream(n, names).items()}


def op(case: Case, impl: str) -> TokenStats:
    return linear_logprob_entropy(
        case.hidden,
        case.weight,
        case.targets,
        bias=case.bias,
        transform=case.transform,
        low_rank=case.low_rank,
        impl=impl,  # type: ignore[arg-type]
    )


def check(case: Case, impl: str, names: Sequence[str] = STATS, device: torch.device = DEVICE) -> None:
    """linear_logprob_entropy by `impl` keeps the rule, every statistic and every gradient."""
    case, upstream = on(case, device), upstream_of(case.targets.shape[0], names, device)
    gold = run_linear(case.double(), "reference", upstream)
    assert_all_close(run_linear(case, impl, upstream), gold, linear_bounds(case, upstream))


def assert_same(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None], at: Tensor | None = None) -> None:
    """The same bits, at these rows of the per-token results if asked."""
    for name, x in a.items():
        y = b[name]
        if x is None or y is None:
            assert x is y, name
        elif at is None or name not in (*STATS, "dhidden"):
            assert torch.equal(x, y), name
        else:
            assert torch.equal(x[at], y[at]), name


# --- linear_logprob_entropy by the one rule ---------------------------------------------------------------------------

# Rows of 64, 128 and 256 can be read by the copy engine (TMA), the others cannot.
SHAPES = [(17, 31, 257), (193, 70, 517), (252, 123, 507), (256, 128, 1024), (300, 256, 50257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@each_impl
def test_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(make_case(*shape, dtype=dtype), impl)


@pytest.mark.parametrize("shape", [(193, 70, 517), (256, 128, 1024)], ids=str)
@each_dtype
@each_impl
def test_plain_head(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(make_case(*shape, dtype=dtype, bias=False, rank=0, ignored=0.0), impl)


@each_dtype
@each_impl
def test_one_row_at_a_time(impl: str, dtype: torch.dtype) -> None:
    """Against the batch of them."""
    case, upstream = on(make_case(30, 64, 1000, dtype=dtype, bias=False, rank=0)), upstream_of(30)
    names = (*STATS, "dhidden")
    rows = []
    for i in range(30):
        row = replace(case, hidden=case.hidden[i : i + 1], targets=case.targets[i : i + 1])
        rows.append(run_linear(row, impl, {name: u[i : i + 1] for name, u in upstream.items()}))
    got = {name: torch.cat([row[name] for row in rows]) for name in names}  # type: ignore[misc]
    gold = run_linear(case.double(), "reference", upstream)
    assert_all_close(got, {name: gold[name] for name in names}, linear_bounds(case, upstream))


@pytest.mark.parametrize("names", [("logprob",), ("entropy",), ("lse",), ("logprob", "entropy")], ids="+".join)
@each_impl
def test_each_statistic_alone(impl: str, names: tuple[str, ...]) -> None:
    check(make_case(256, 128, 1024, dtype=BF16, bias=False, rank=0), impl, names)


@pytest.mark.parametrize("peaky", [None, 30.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_impl
def test_transforms(impl: str, transform: LogitTransform, peaky: float | None) -> None:
    check(make_case(252, 128, 507, dtype=BF16, bias=False, rank=0, transform=transform, peaky=peaky), impl)


@each_impl
def test_everything_at_once_in_fp32(impl: str) -> None:
    check(make_case(193, 70, 517, transform=TRANSFORMS["combined"], peaky=30.0, rank=17), impl)


@each_dtype
@each_impl
def test_peaky(impl: str, dtype: torch.dtype) -> None:
    check(make_case(120, 64, 50257, dtype=dtype, peaky=30.0, bias=False, rank=0), impl)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@each_impl
def test_wide_vocabulary(impl: str, dtype: torch.dtype) -> None:
    check(make_case(33, 64, 262_144, dtype=dtype, bias=False, rank=0), impl)


@each_impl
def test_more_rows_than_a_grid_axis(impl: str) -> None:
    check(make_case(70_000, 16, 40, dtype=BF16, bias=False, rank=0), impl)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@each_impl
def test_adapter_in_fp32_beside_a_narrow_model(impl: str, dtype: torch.dtype) -> None:
    case = make_case(130, 64, 517, dtype=dtype, rank=8)
    check(replace(case, low_rank=make_case(130, 64, 517, rank=8).low_rank), impl)


@each_impl
def test_adapter_that_cancels_the_weight(impl: str) -> None:
    case = make_case(44, 16, 190, dtype=BF16)
    check(replace(case, low_rank=LowRank(torch.eye(16).to(BF16), -0.99 * case.weight, 1.0)), impl)


@each_dtype
@each_impl
def test_all_logits_strongly_negative(impl: str, dtype: torch.dtype) -> None:
    case = make_case(140, 64, 505, dtype=dtype, rank=0)
    case = replace(case, bias=torch.full((505,), -1e4, dtype=dtype))
    assert all(bool(s.isfinite().all()) for s in op(on(case), impl))
    check(case, impl)


@each_impl
def test_masked_vocabulary(impl: str) -> None:
    """-inf in the bias: whole tiles first, single columns in between, a ragged tail."""
    case = make_case(150, 64, 901, dtype=BF16, ignored=0.1)
    mask = torch.zeros(901, dtype=torch.bool)
    mask[:300], mask[400:403], mask[850:] = True, True, True
    assert case.bias is not None
    kept = (~mask).nonzero()[:, 0]
    targets = kept[torch.arange(150) % kept.shape[0]].where(case.targets != IGNORE_INDEX, IGNORE_INDEX)
    case = replace(case, bias=case.bias.masked_fill(mask, -math.inf), targets=targets)
    got = run_linear(on(case), impl, upstream_of(150))
    for name in ("dweight", "dbias", "db"):
        grad = got[name]
        assert grad is not None and not grad[mask.to(DEVICE)].any(), name
    check(case, impl)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@each_impl
def test_default_settings_of_torch(impl: str, dtype: torch.dtype) -> None:
    """GEMMs may reduce in bf16 unless told otherwise. Ours ask for fp32 results: not a digit may be lost by it."""
    case, upstream = on(make_case(64, 4096, 1024, dtype=dtype, bias=False, rank=0)), upstream_of(64)
    gold, bounds = run_linear(case.double(), "reference", upstream), linear_bounds(case, upstream)
    assert_all_close(run_linear(case, impl, upstream), gold, bounds)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    assert_all_close(run_linear(case, impl, upstream), gold, bounds)


# --- ignored tokens, bad values ---------------------------------------------------------------------------------------


@each_impl
def test_no_token_ignored_is_the_same_as_a_batch_of_the_others(impl: str) -> None:
    check(make_case(70, 64, 300, dtype=BF16, ignored=0.0), impl)
    check(make_case(70, 64, 300, dtype=BF16, ignored=0.97), impl)


@each_impl
def test_all_ignored(impl: str) -> None:
    for name, value in run_linear(on(make_case(70, 64, 300, dtype=BF16, ignored=1.0)), impl, upstream_of(70)).items():
        assert value is not None and not value.any(), name


@each_impl
def test_nan_in_an_ignored_row_stays_there(impl: str) -> None:
    case, upstream = on(make_case(141, 64, 350, dtype=BF16)), upstream_of(141)
    ignored = case.targets == IGNORE_INDEX
    dirty = replace(case, hidden=case.hidden.masked_fill(ignored[:, None], math.nan))
    assert_same(run_linear(dirty, impl, upstream), run_linear(case, impl, upstream))


@each_impl
def test_nan_in_a_kept_row_stays_in_its_row(impl: str) -> None:
    case, upstream = on(make_case(141, 64, 350, dtype=BF16, ignored=0.0, rank=0)), upstream_of(141)
    hidden = case.hidden.clone()
    hidden[77, 5] = math.nan
    clean, dirty = run_linear(case, impl, upstream), run_linear(replace(case, hidden=hidden), impl, upstream)
    others = torch.arange(141, device=DEVICE) != 77
    for name in (*STATS, "dhidden"):
        good, bad = clean[name], dirty[name]
        assert good is not None and bad is not None
        assert bool(bad[77].isnan().all()) and torch.equal(bad[others], good[others]), name


@needs_cuda  # on the CPU the values are checked
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@each_impl
def test_target_out_of_range_gives_nan(impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads and writes nothing outside, in the ops that have a cache too."""
    monkeypatch.delenv("GEM_KERNELS_CHECK", raising=False)
    case = on(make_case(140, 64, 350, dtype=dtype, ignored=0.0, bias=False, rank=0))
    wild = torch.tensor([350, -1, -7, 1 << 40, -(1 << 40), 2**31, 352], device=DEVICE)
    targets, bad = case.targets.clone(), torch.zeros(140, dtype=torch.bool, device=DEVICE)
    targets[3:10], bad[3:10] = wild, True
    broken = replace(case, targets=targets)
    stats, good = op(broken, impl), op(case, impl)
    assert bool(stats.logprob[bad].isnan().all())
    for name in ("entropy", "lse"):
        assert torch.equal(getattr(stats, name), getattr(good, name)), name
    assert torch.equal(stats.logprob[~bad], good.logprob[~bad])
    upstream = upstream_of(140)
    got, clean = run_linear(broken, impl, upstream)["dhidden"], run_linear(case, impl, upstream)["dhidden"]
    assert got is not None and clean is not None and torch.equal(got[~bad], clean[~bad])
    logits = (case.hidden.float() @ case.weight.float().T).to(dtype).requires_grad_()
    of_logits = logprob_entropy(logits, targets, impl=impl)  # type: ignore[arg-type]
    assert torch.equal(of_logits.logprob.isnan(), bad)
    of_logits.entropy.sum().backward()
    sega = run_sega(broken, impl, torch.ones(2, device=DEVICE), [0, 70, 140])
    assert torch.equal(sega["logprob"].isnan(), bad)
    torch.cuda.synchronize()


# --- gradients, bits, layouts -----------------------------------------------------------------------------------------


@each_impl
def test_every_pattern_of_needed_gradients(impl: str) -> None:
    case, upstream = on(make_case(40, 64, 300, dtype=BF16)), upstream_of(40)
    full = run_linear(case, impl, upstream)
    for needs in itertools.product([False, True], repeat=5):
        got = run_linear(case, impl, upstream, needs)
        for (name, value), need in zip(list(got.items())[len(STATS) :], needs, strict=True):
            assert (value is not None) == need, f"{name} with needs={needs}"
            assert value is None or torch.equal(value, full[name]), f"{name} with needs={needs}"


@each_dtype
@each_impl
def test_same_input_same_bits(impl: str, dtype: torch.dtype) -> None:
    case, upstream = on(make_case(300, 128, 5003, dtype=dtype)), upstream_of(300)
    first = run_linear(case, impl, upstream)
    for _ in range(3):
        assert_same(run_linear(case, impl, upstream), first)


@each_impl
def test_strided_inputs(impl: str) -> None:
    """Transposed hidden states, every second row of a weight whose other rows are NaN, int32 targets of a table."""
    case = on(make_case(50, 64, 230, dtype=BF16, rank=0))
    noise = torch.full_like(case.weight, float("nan"))
    assert case.bias is not None
    strided = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        weight=torch.stack((case.weight, noise), 1).flatten(0, 1)[::2],
        targets=torch.stack((case.targets, case.targets), 1)[:, 0].int(),
        bias=case.bias[:1].expand(230),
    )
    dense = replace(case, bias=strided.bias)
    for got, want in zip(op(strided, impl), op(dense, "reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    hidden, weight = strided.hidden.detach().requires_grad_(), strided.weight.detach().requires_grad_()
    weighted_sum(op(replace(strided, hidden=hidden, weight=weight), impl), upstream_of(50)).backward()
    want = run_linear(dense, "reference", upstream_of(50))
    for leaf, name in ((hidden, "dhidden"), (weight, "dweight")):
        exact = want[name]
        assert leaf.grad is not None and exact is not None
        torch.testing.assert_close(leaf.grad, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def shifted(t: Tensor) -> Tensor:
    """The same matrix one element further on: its address is a multiple of 16 no more."""
    buffer = t.new_empty(t.numel() + 1)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


@each_dtype
@each_impl
def test_addresses_that_are_not_aligned(impl: str, dtype: torch.dtype) -> None:
    case = on(make_case(130, 64, 300, dtype=dtype))
    moved = replace(case, hidden=shifted(case.hidden), weight=shifted(case.weight))
    assert not compat.takes_descriptors(moved.hidden, moved.weight)
    upstream = upstream_of(130)

    def run(x: Case, which: str) -> dict[str, Tensor | None]:
        leaves = [t.detach().requires_grad_() for t in (x.hidden, x.weight)]  # not cloned: a clone is aligned again
        stats = op(replace(x, hidden=leaves[0], weight=leaves[1]), which)
        grads = torch.autograd.grad(weighted_sum(stats, upstream), leaves)
        return {**{k: s.detach() for k, s in stats._asdict().items()}, "dhidden": grads[0], "dweight": grads[1]}

    assert_all_close(run(moved, impl), run(moved.double(), "reference"), linear_bounds(moved, upstream))


@needs_cuda
def test_which_matrices_the_copy_engine_reads() -> None:
    hopper = compat.arch(DEVICE) >= 90
    for d, dtype, readable in [
        (64, BF16, True),
        (70, BF16, False),
        (72, BF16, True),
        (31, FP32, False),
        (36, FP32, True),
    ]:
        matrix = torch.empty(50, d, dtype=dtype, device=DEVICE)
        assert compat.takes_descriptors(matrix) == (hopper and readable), (d, dtype)


@each_impl
def test_leading_batch_shape_and_empty_batch(impl: str) -> None:
    case = on(make_case(42, 64, 130, dtype=BF16))
    flat = op(case, impl)
    shaped = op(replace(case, hidden=case.hidden.view(2, 3, 7, 64), targets=case.targets.view(2, 3, 7)), impl)
    for f, s in zip(flat, shaped, strict=True):
        assert torch.equal(s.flatten(), f)
    nothing = run_linear(on(make_case(0, 64, 130, dtype=BF16)), impl, upstream_of(0))
    assert all(t is not None and not t.any() for t in nothing.values())


# --- beyond 2^31 logits -----------------------------------------------------------------------------------------------

N, D, V = 20_000, 64, 131_072


def needs_memory(gib: float) -> None:
    if ON_GPU and torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory")


def reference_in_blocks(case: Case, upstream: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The reference in fp64, 500 rows at a time."""
    wide = case.double().leaves()
    parts = []
    for start in range(0, case.targets.shape[0], 500):
        rows = slice(start, start + 500)
        stats = op(replace(wide, hidden=wide.hidden[rows], targets=case.targets[rows]), "reference")
        weighted_sum(stats, {name: u[rows] for name, u in upstream.items()}).backward()
        parts.append([s.detach() for s in stats])
    return {**dict(zip(STATS, map(torch.cat, zip(*parts, strict=True)), strict=True)), **wide.gradients()}


@each_impl
def test_more_logits_than_an_int32_can_count(impl: str) -> None:
    needs_memory(12)
    assert N * V > 2**31
    case, upstream = on(make_case(N, D, V, dtype=BF16, bias=False, rank=0)), upstream_of(N)
    got = run_linear(case, impl, upstream)
    assert_all_close(got, reference_in_blocks(case, upstream), linear_bounds(case, upstream))


def test_logprob_entropy_of_more_logits_than_an_int32_can_count() -> None:
    """A sample of rows, those around the 2^31st logit among them, against the reference on these rows alone."""
    needs_memory(16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(N, V, dtype=BF16, device=DEVICE).normal_(0, 3, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator, device=DEVICE)
    upstream = upstream_of(N)
    edge = 2**31 // V
    sample = torch.cat(
        (torch.arange(0, N, N // 40), torch.tensor([1, edge - 1, edge, edge + 1, N - 2, N - 1]))
    ).unique()
    sample = sample[sample < N].to(DEVICE)
    stats = logprob_entropy(logits, targets)
    (dlogits,) = torch.autograd.grad(weighted_sum(stats, upstream), logits)
    got = {**{name: s.detach()[sample] for name, s in stats._asdict().items()}, "dlogits": dlogits[sample]}
    del dlogits
    rows, of_sample = logits.detach()[sample], {name: u[sample] for name, u in upstream.items()}
    gold = run_logits(rows.double(), targets[sample], "reference", of_sample)
    assert_all_close(got, gold, logits_bounds(rows, targets[sample], LogitTransform(), of_sample))


# --- logprob_entropy --------------------------------------------------------------------------------------------------


def run_logits(
    logits: Tensor, targets: Tensor, impl: str, upstream: Mapping[str, Tensor], **kwargs: object
) -> dict[str, Tensor | None]:
    leaf = logits.detach().requires_grad_()
    stats = logprob_entropy(leaf, targets, impl=impl, **kwargs)  # type: ignore[arg-type]
    flat = TokenStats(*(s.flatten() for s in stats))
    (dlogits,) = torch.autograd.grad(weighted_sum(flat, upstream), leaf)
    return {**{name: s.detach() for name, s in flat._asdict().items()}, "dlogits": dlogits}


def check_logits(
    logits: Tensor,
    targets: Tensor,
    impl: str,
    names: Sequence[str] = STATS,
    transform: LogitTransform = TRANSFORMS["identity"],
) -> None:
    upstream = upstream_of(targets.numel(), names)
    gold = run_logits(logits.double(), targets, "reference", upstream, transform=transform)
    bounds = logits_bounds(logits, targets.flatten(), transform, upstream)
    assert_all_close(run_logits(logits, targets, impl, upstream, transform=transform), gold, bounds)


def make_logits(n: int, v: int, dtype: torch.dtype, size: float = 2.0) -> tuple[Tensor, Tensor]:
    logits, targets = size * torch.randn(n, v), torch.randint(0, v, (n,))
    targets[::2] = logits.argmax(1)[::2]
    targets[torch.rand(n) < 0.2] = IGNORE_INDEX
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


@pytest.mark.parametrize("shape", [(17, 257), (193, 517), (128, 512), (33, 128_256)], ids=str)
@each_dtype
@each_impl
def test_logprob_entropy_matches_gold(impl: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_logits(*make_logits(*shape, dtype), impl)
    check_logits(*make_logits(*shape, dtype, size=8.0), impl, ("logprob",))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_impl
def test_logprob_entropy_transforms(impl: str, transform: LogitTransform) -> None:
    check_logits(*make_logits(150, 511, BF16, size=8.0), impl, transform=transform)


@each_impl
def test_logprob_entropy_of_a_view_in_place(impl: str) -> None:
    """logits[:, :-1] of a batch is read where it lies; in place its gradient stands there."""
    batch, targets = make_logits(2 * 40, 1003, BF16)
    view, targets = batch.view(2, 40, 1003)[:, :-1], targets.view(2, 40)[:, 1:]
    check_logits(view, targets, impl)
    upstream = upstream_of(targets.numel())
    want = run_logits(view, targets, impl, upstream)["dlogits"]
    leaf = batch.clone().requires_grad_()
    computed = (leaf * 1).view(2, 40, 1003)[:, :-1]
    stats = logprob_entropy(computed, targets, inplace_backward=True, impl=impl)  # type: ignore[arg-type]
    weighted_sum(TokenStats(*(s.flatten() for s in stats)), upstream).backward()
    assert leaf.grad is not None and want is not None
    assert torch.equal(leaf.grad.view(2, 40, 1003)[:, :-1], want) and not leaf.grad.view(2, 40, 1003)[:, -1].any()


@each_impl
def test_logprob_entropy_same_bits_many_rows(impl: str) -> None:
    logits, targets = make_logits(70_000, 40, BF16)
    upstream = upstream_of(70_000)
    assert_same(run_logits(logits, targets, impl, upstream), run_logits(logits, targets, impl, upstream))
    check_logits(logits, targets, impl)


# --- group losses -----------------------------------------------------------------------------------------------------

OFFSETS = [0, 11, 12, 140, 141, 277, 290]
WEIGHTS = [0.5, -1.0, 0.75, -0.5, 0.0, 0.25]
VOCABULARY = 1003
CACHES = {"one slab": 1 << 30, "slabs": 4 * VOCABULARY * 20, "recompute": 1}
each_cache = pytest.mark.parametrize("cache_bytes", CACHES.values(), ids=CACHES)


def run_sega(
    case: Case, impl: str, weights: Tensor, offsets: Sequence[int] = OFFSETS, cache_bytes: int = 1 << 30
) -> dict[str, Tensor]:
    x = case.leaves()
    out = sega_loss(
        x.hidden,
        x.weight,
        x.targets,
        torch.tensor(offsets, device=x.hidden.device),
        weights,
        bias=x.bias,
        transform=x.transform,
        low_rank=x.low_rank,
        cache_bytes=cache_bytes,
        impl=impl,  # type: ignore[arg-type]
    )
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.stats._asdict(), **x.gradients()}  # type: ignore[dict-item]


def check_sega(case: Case, impl: str, cache_bytes: int) -> None:
    case, weights = on(case), torch.tensor(WEIGHTS, device=DEVICE)
    bounds = group_bounds(case, lambda stats, sequence: -WEIGHTS[sequence] * stats.logprob.sum(), OFFSETS)
    got = run_sega(case, impl, weights, cache_bytes=cache_bytes)
    assert_all_close(got, run_sega(case.double(), "reference", weights), bounds)


@pytest.mark.parametrize("cache_bytes", [CACHES["one slab"], CACHES["slabs"]], ids=["one slab", "slabs"])
@each_dtype
@each_impl
def test_sega_matches_gold(impl: str, dtype: torch.dtype, cache_bytes: int) -> None:
    check_sega(make_case(290, 64, VOCABULARY, dtype=dtype, bias=False, rank=0), impl, cache_bytes)


@each_impl
def test_sega_without_a_cache(impl: str) -> None:
    """Then a piece is one token."""
    check_sega(make_case(290, 64, VOCABULARY, dtype=BF16, bias=False, rank=0), impl, CACHES["recompute"])


@pytest.mark.parametrize("transform", [TRANSFORMS["identity"], TRANSFORMS["combined"]], ids=["identity", "combined"])
@pytest.mark.parametrize("peaky", [None, 30.0], ids=["flat", "peaky"])
@each_impl
def test_sega_with_everything(impl: str, peaky: float | None, transform: LogitTransform) -> None:
    check_sega(make_case(290, 72, VOCABULARY, dtype=BF16, peaky=peaky, transform=transform), impl, CACHES["slabs"])


@each_impl
def test_sega_at_a_real_vocabulary(impl: str) -> None:
    """Several tiles of the table in both directions, and logits that rise from tile to tile."""
    case = make_case(290, 64, 50_257, dtype=BF16, bias=True, rank=0)
    check_sega(replace(case, bias=torch.linspace(-150, 0, 50_257).to(BF16)), impl, 1 << 30)


def of_its_entropies(stats: TokenStats, group: int) -> Tensor:
    """What makes a group loss more than a cross-entropy: weights from the entropies of this very pass."""
    weight = stats.entropy.detach()
    return -((weight - weight.mean()) * stats.logprob).sum()


def of_all_three(stats: TokenStats, group: int) -> Tensor:
    return (stats.entropy * stats.logprob).sum() + 0.1 * stats.entropy.square().sum() + 0.01 * stats.lse.square().sum()


def run_group(
    case: Case, impl: str, loss_fn: Callable[[TokenStats, int], Tensor], cache_bytes: int
) -> dict[str, Tensor]:
    x = case.leaves()
    out = linear_group_loss(
        x.hidden,
        x.weight,
        x.targets,
        torch.tensor(OFFSETS, dtype=torch.int32, device=x.hidden.device),
        loss_fn,
        bias=x.bias,
        transform=x.transform,
        low_rank=x.low_rank,
        cache_bytes=cache_bytes,
        impl=impl,  # type: ignore[arg-type]
    )
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.stats._asdict(), **x.gradients()}  # type: ignore[dict-item]


@each_cache
@pytest.mark.parametrize("loss_fn", [of_its_entropies, of_all_three])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@each_impl
def test_group_loss_matches_gold(
    impl: str, dtype: torch.dtype, loss_fn: Callable[[TokenStats, int], Tensor], cache_bytes: int
) -> None:
    case = on(make_case(290, 64, VOCABULARY, dtype=dtype, rank=4))
    gold, got = run_group(case.double(), "reference", loss_fn, cache_bytes), run_group(case, impl, loss_fn, cache_bytes)
    assert_all_close(got, gold, group_bounds(case, loss_fn, OFFSETS))


@each_cache
@each_impl
def test_group_losses_give_the_same_bits(impl: str, cache_bytes: int) -> None:
    case, weights = on(make_case(290, 64, VOCABULARY, dtype=BF16)), torch.tensor(WEIGHTS, device=DEVICE)
    assert_same(*(run_sega(case, impl, weights, cache_bytes=cache_bytes) for _ in range(2)))
    assert_same(*(run_group(case, impl, of_all_three, cache_bytes) for _ in range(2)))


@each_impl
def test_sega_frozen_head_has_the_same_dhidden(impl: str) -> None:
    case, weights = (
        on(make_case(290, 64, VOCABULARY, dtype=BF16, bias=False, rank=0)),
        torch.tensor(WEIGHTS, device=DEVICE),
    )
    hidden = case.hidden.clone().requires_grad_()
    cu = torch.tensor(OFFSETS, device=DEVICE)
    sega_loss(hidden, case.weight, case.targets, cu, weights, impl=impl).loss.backward()  # type: ignore[arg-type]
    assert hidden.grad is not None and torch.equal(hidden.grad, run_sega(case, impl, weights)["dhidden"])


# --- scoring ----------------------------------------------------------------------------------------------------------


def ragged(sequences: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """values (N,) with many ties, cu_seqlens: lengths 0, 1, 2 and `longest` among them."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 3 * longest // 10 + 2, (sequences,), generator=g)
    lengths[:4] = torch.tensor([0, 1, 2, longest])
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    values = torch.randn(int(cu[-1]), generator=g)
    return values.where(torch.rand(values.shape, generator=g) < 0.7, values.round()).to(DEVICE), cu.to(DEVICE)


def run_topm(values: Tensor, cu: Tensor, m: int | float, impl: str) -> dict[str, Tensor | None]:
    leaf = values.detach().clone().requires_grad_()
    means = topm_mean(leaf, cu, m, impl=impl)  # type: ignore[arg-type]
    upstream = torch.randn(means.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)
    (means * upstream.to(means.dtype)).sum().backward()
    return {"means": means.detach(), "dvalues": leaf.grad}


@pytest.mark.parametrize("m", [1, 7, 0.1, 1.0])
@each_impl
def test_topm_mean_matches_gold(impl: str, m: int | float) -> None:
    values, cu = ragged(60, 5000)
    got, gold = run_topm(values, cu, m, impl), run_topm(values.double(), cu, m, "reference")
    assert_all_close(got, gold, topm_bounds(values, cu, m, gold["dvalues"]))  # type: ignore[arg-type]
    assert_same(run_topm(values, cu, m, impl), got)


@pytest.mark.parametrize("m", [0.1, 5])
@each_impl
def test_gem_score_matches_gold(impl: str, m: int | float) -> None:
    values, cu = ragged(200, 3000)
    entropy = values.abs()
    third = (cu[:-1] + (cu[1:] - cu[:-1]) * 2 // 3).int()
    branch, answer = torch.stack((cu[:-1].int(), third), 1), torch.stack((third, cu[1:].int()), 1)
    kept = answer[:, 1] > answer[:, 0]  # an empty answer scores NaN

    def run(source: Tensor, which: str) -> dict[str, Tensor | None]:
        leaf = source.detach().clone().requires_grad_()
        score = gem_score(leaf, branch, answer, m=m, impl=which)  # type: ignore[arg-type]
        score.score[kept].sum().backward()
        return {**{name: s.detach() for name, s in score._asdict().items()}, "dentropy": leaf.grad}

    upstream = torch.zeros(3, kept.shape[0], dtype=torch.float64, device=DEVICE)
    upstream[0, kept] = 1
    bounds = score_bounds(entropy, branch, answer, m, upstream=upstream)
    assert_all_close(run(entropy, impl), run(entropy.double(), "reference"), bounds)


@needs_cuda
@each_impl
def test_spans_out_of_range_read_nothing_outside(impl: str) -> None:
    if impl == "chunked":
        pytest.skip("chunked indexes with what it is given, and torch asserts on the device")
    values = torch.rand(1000, device=DEVICE)
    topm_mean(values, torch.tensor([0, -500, 1 << 40, 1000], device=DEVICE), 3, impl=impl)  # type: ignore[arg-type]
    torch.cuda.synchronize()


# --- models, and a vocabulary spread over ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True], ids=["statistics", "group loss"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_fused_model(name: str, dtype: torch.dtype, grouped: bool) -> None:
    """What the head makes of the body's hidden states, against fp64; every parameter gets a gradient."""
    pytest.importorskip("transformers")
    from architectures import build

    from gem.head import fuse_lm_head

    model = build(name).to(DEVICE, dtype)
    ids = torch.randint(10, 97, (3, 11), device=DEVICE)
    labels = ids.masked_fill(torch.rand(3, 11, device=DEVICE) < 0.3, IGNORE_INDEX)
    kept = labels[:, 1:] != IGNORE_INDEX
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    fuse_lm_head(model)
    words = {"loss_fn": of_its_entropies, "cu_groups": torch.tensor([0, 5, int(kept.sum())], device=DEVICE)}
    out = model(ids, labels=labels, fused_lm_head=True, **(words if grouped else {}))
    z = seen[-1][:, :-1].double() @ model.lm_head.weight.detach().double().T
    log_p = (z if name == "llama" else 5 * torch.tanh(z / 5)).log_softmax(-1)
    expected = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * kept
    torch.testing.assert_close(out.log_probs.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.entropy.double(), -(log_p.exp() * log_p).sum(-1) * kept, atol=1e-4, rtol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@each_impl
def test_a_vocabulary_of_one_rank_is_a_vocabulary(impl: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The collectives run on this device, and with one rank they change nothing."""
    import torch.distributed as dist

    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = on(make_case(120, 64, 1003, dtype=dtype, bias=False, rank=0))
        group = dist.group.WORLD
        assert group is not None
        found: list[dict[str, Tensor | None]] = []
        for shard in (None, VocabShard(group, 0, 1003)):
            x = case.leaves()
            cu_groups = torch.tensor([0, 50, 120], device=DEVICE)
            arguments = {"impl": impl, "shard": shard}
            result = linear_group_loss(x.hidden, x.weight, x.targets, cu_groups, of_its_entropies, **arguments)  # type: ignore[arg-type]
            stats = linear_logprob_entropy(x.hidden, x.weight, x.targets, **arguments)  # type: ignore[arg-type]
            (result.loss + stats.logprob.sum() + stats.entropy.sum()).backward()
            found.append({"loss": result.loss.detach(), **stats._asdict(), **x.gradients()})
        assert_same(*found)
    finally:
        dist.destroy_process_group()


def test_cached_exponentials_follow_a_maximum_of_other_ranks() -> None:
    from gem_kernels.group_loss.exponentials import follow_maximum_
    from gem_kernels.streaming import OnlineStats

    cache, reference = torch.rand(70, 300, device=DEVICE).to(BF16), torch.randn(70, device=DEVICE)
    gap = torch.where(torch.arange(70, device=DEVICE) % 3 == 0, 80.0, 3.0)  # beyond 60, and within
    online = OnlineStats(torch.zeros(70, dtype=torch.int64, device=DEVICE), torch.stack([reference + gap] * 4))
    factor = torch.where(gap > 60, (-gap).exp(), 1.0)
    expected, expected_reference = (
        (cache.float() * factor[:, None]).to(BF16),
        reference + torch.where(gap > 60, gap, 0.0),
    )
    follow_maximum_(cache, reference, online)
    torch.testing.assert_close(cache, expected, atol=1e-37, rtol=2**-7)  # below that numbers are subnormal
    torch.testing.assert_close(reference, expected_reference)


# --- how it behaves on a device ---------------------------------------------------------------------------------------


@needs_cuda
@each_impl
def test_another_device_than_the_current_one(impl: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    check(make_case(130, 64, 1003, dtype=BF16), impl, device=other)
    logits = torch.randn(20, 300, device=other, requires_grad=True)
    logprob_entropy(logits, torch.arange(20, device=other)).entropy.sum().backward()
    topm_mean(torch.rand(30, device=other), torch.tensor([0, 10, 30], device=other), 0.2)
    assert torch.cuda.current_device() == 0


@needs_cuda
@each_impl
def test_another_thread_and_another_stream(impl: str) -> None:
    """What triton keeps per thread is there in every thread."""
    case, upstream = on(make_case(256, 128, 1024, dtype=BF16)), upstream_of(256)
    want, got, stream = run_linear(case, impl, upstream), {}, torch.cuda.Stream()
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(stream):
            got.update(run_linear(case, impl, upstream))
        stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert got.keys() == want.keys()
    assert_same(got, want)


class Call:
    """An op on inputs that stay where they are, for graphs: `renew` writes other numbers into them."""

    def __init__(self, inputs: Sequence[Tensor], op: Callable[..., tuple[Tensor, ...]]) -> None:
        self.inputs, self.op = inputs, op

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(self.op(*self.inputs))

    def renew(self) -> None:
        for t in self.inputs:
            if t.is_floating_point():
                t.copy_(torch.randn_like(t))


def calls() -> dict[str, Callable[[], Call]]:
    def linear(impl: str, d: int) -> Call:
        case = on(make_case(140, d, 1003, dtype=BF16))
        return Call(
            (case.hidden, case.weight, case.targets),
            lambda h, w, t: linear_logprob_entropy(h, w, t, impl=impl),  # type: ignore[arg-type,return-value]
        )

    def logits() -> Call:
        return Call(make_logits(140, 1003, BF16), logprob_entropy)

    def spans(score: bool) -> Call:
        values, cu = ragged(50, 3000)
        span = torch.stack((cu[:-1], cu[1:]), 1)
        if score:
            return Call((values, span, span), gem_score)
        return Call((values, cu), lambda v, c: (topm_mean(v, c, 0.1),))

    return {
        "linear chunked": lambda: linear("chunked", 64),
        "linear triton, TMA": lambda: linear("triton", 64),
        "linear triton, no TMA": lambda: linear("triton", 70),
        "logprob_entropy": logits,
        "topm_mean": lambda: spans(False),
        "gem_score": lambda: spans(True),
    }


each_call = pytest.mark.parametrize("make", calls().values(), ids=calls())


@each_call
def test_the_calls_of_the_next_tests(make: Callable[[], Call]) -> None:
    call = make()
    first = call()
    call.renew()
    assert not torch.equal(call()[0], first[0])


@needs_cuda
@each_call
def test_graph_capture_and_replay(make: Callable[[], Call]) -> None:
    call = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        call.renew()
        graph.replay()
        for got, want in zip(captured, call(), strict=True):
            assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_call
def test_forward_does_not_wait_for_the_device(make: Callable[[], Call]) -> None:
    call = make()
    call()
    with no_synchronisation():
        call()


@needs_cuda
@pytest.mark.parametrize("name", ["linear chunked", "logprob_entropy", "topm_mean", "gem_score"])
def test_backward_does_not_wait_for_the_device(name: str) -> None:
    call = calls()[name]()
    leaves = [t.requires_grad_() for t in call.inputs if t.is_floating_point()]
    upstream = [torch.ones_like(s) for s in call()]

    def step() -> None:
        torch.autograd.grad(call(), leaves, upstream)

    step()
    with no_synchronisation():
        step()


COMPILED: dict[str, Callable[[Case, str], Tensor]] = {
    "linear": lambda x, impl: sum(
        (s.square().sum() for s in linear_logprob_entropy(x.hidden * 2, x.weight, x.targets, bias=x.bias, impl=impl)),  # type: ignore[arg-type]
        torch.zeros((), device=x.hidden.device),
    ),
    "logits": lambda x, impl: logprob_entropy(x.hidden * 2, x.targets, impl=impl).entropy.square().sum(),  # type: ignore[arg-type]
    "sega": lambda x, impl: (
        2
        * sega_loss(
            x.hidden * 2,
            x.weight,
            x.targets,
            torch.tensor([0, 9, 40], device=x.hidden.device),
            torch.ones(2, device=x.hidden.device),
            impl=impl,  # type: ignore[arg-type]
        ).loss
    ),
    "spans": lambda x, impl: (
        topm_mean(x.hidden[:, 0] * 2, torch.tensor([0, 9, 40], device=x.hidden.device), 0.3, impl=impl).square().sum()  # type: ignore[arg-type]
        + gem_score(
            x.hidden[:, 1] * 2,
            torch.tensor([[0, 9]], device=x.hidden.device),
            torch.tensor([[9, 12]], device=x.hidden.device),
            impl=impl,  # type: ignore[arg-type]
        ).score.sum()
    ),
}


@pytest.mark.parametrize("name", COMPILED)
@each_impl
def test_compiles_to_one_graph(impl: str, name: str) -> None:
    if name == "spans" and impl == "chunked":
        pytest.skip("auto never chooses it on CUDA")
    torch._dynamo.reset()
    fn = COMPILED[name]
    compiled = torch.compile(fn, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    case = on(make_case(40, 64, 300, dtype=BF16, ignored=0.0, rank=0))
    case = replace(case, targets=case.targets % 64) if name == "logits" else case
    results = []
    for which in (fn, compiled):
        x = case.leaves()
        out = which(x, impl)
        out.backward()
        assert x.hidden.grad is not None
        results.append((out.detach(), x.hidden.grad))
    (want, dwant), (got, dgot) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dgot, dwant, rtol=0.02, atol=0.02 * float(dwant.abs().max()))


@needs_cuda
@each_impl
@pytest.mark.parametrize("what", ["scoring", "frozen head", "sega"])
def test_peak_memory(what: str, impl: str) -> None:
    """Beside inputs and gradients, far below the bf16 logits (512 MiB here)."""
    n, d, v = 4096, 512, 65_536
    case = on(make_case(n, d, v, dtype=BF16, bias=False, rank=0))
    cu, weights = torch.tensor([0, 1000, n], device=DEVICE), torch.ones(2, device=DEVICE)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(what != "frozen head")

    def step() -> None:
        hidden.grad = weight.grad = None
        if what == "sega":
            cache = 64 * MIB
            loss = sega_loss(hidden, weight, case.targets, cu, weights, cache_bytes=cache, impl=impl).loss  # type: ignore[arg-type]
        else:
            stats = linear_logprob_entropy(hidden, weight, case.targets, impl=impl)  # type: ignore[arg-type]
            loss = (stats.logprob + 0.1 * stats.entropy).sum()
        loss.backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    gradients = hidden.nbytes + (weight.nbytes if weight.requires_grad else 0)
    extra = torch.cuda.max_memory_allocated() - before - gradients
    # sega: its cache, and the fp32 sum of dweight that several slabs add to
    allowed = n * v * 2 // 4 + (64 * MIB + 4 * d * v if what == "sega" else 0)
    assert extra < allowed, f"{extra / MIB:.0f} MiB beside the gradients, allowed {allowed / MIB:.0f}"


SANITIZED = """
import sys, torch, gem_kernels as g
torch.manual_seed(0)
def run(d, impl):
    h = torch.randn(37, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(301, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(0, 301, (37,), device="cuda")
    t[::5] = -100
    stats = g.linear_logprob_entropy(h, w, t, impl=impl)
    (stats.logprob + stats.entropy).sum().backward()
    cu = torch.tensor([0, 20, 37], device="cuda")
    g.sega_loss(h, w, t, cu, torch.ones(2, device="cuda"), cache_bytes=8000, impl=impl).loss.backward()
    z = torch.randn(37, 301, device="cuda", requires_grad=True)
    g.logprob_entropy(z, t).entropy.sum().backward()
    v = torch.rand(37, device="cuda", requires_grad=True)
    g.topm_mean(v, cu, 0.3).sum().backward()
for d in (20,) if sys.argv[1] == "racecheck" else (20, 64):  # racecheck does not follow the copy engine
    for impl in ("chunked", "triton"):
        run(d, impl)
torch.cuda.synchronize()
print("all ran")
"""


def compute_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [
        os.environ.get("PATH", ""),
        *(f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@needs_cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    path = compute_sanitizer()
    if path is None:
        pytest.skip("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, tool]
    # The caching allocator would hide what lies between two tensors.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=75)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer takes more than 75 s here")
    said = done.stdout + done.stderr
    if done.returncode != 9 and "all ran" not in done.stdout:
        pytest.skip(f"compute-sanitizer does not run here: {said[-500:]}")
    ours = re.search(r"at _\w+_kernel\b.*", said)  # other libraries' kernels read padding that nobody wrote
    assert done.returncode == 0 or ours is None, f"{ours and ours[0]}\n{said[:4000]}"
    assert done.returncode == 0 or tool != "memcheck", said[:4000]


def test_the_rule_sees_a_bf16_result() -> None:
    """The tests above can fail: statistics of logits that were rounded to bf16 break the rule."""
    case = on(make_case(120, 64, 1003, dtype=BF16, peaky=30.0, bias=False, rank=0, ignored=0.0))
    gold, bounds = op(case.double(), "reference"), linear_bounds(case, {})
    rounded = logprob_entropy(case.hidden @ case.weight.T, case.targets, impl="reference")
    with pytest.raises(AssertionError, match="entropy: error"):
        assert_close("entropy", rounded.entropy, gold.entropy, bounds["entropy"])
