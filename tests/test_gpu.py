"""Numbers that only a GPU can get wrong: tiles at real sizes, addresses, reduced-precision GEMMs, unchecked values, models.

The checks that a GPU shares with the CPU are in the files of the ops, as cases marked `gpu` (devices.py); streams, graphs,
synchronisation and memory are in test_gpu_runtime.py. `make gpu` runs all of them. Gold is the reference on the device in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import GPU, ON_GPU, PLAIN, each_impl, needs_cuda
from group_losses import run_sega, sega_with_its_own_entropies
from numerics import (
    DTYPES,
    STATS,
    TRANSFORMS,
    Case,
    assert_all_close,
    assert_close,
    assert_same,
    check_linear,
    linear_op,
    make_case,
    make_upstream,
    run_linear,
    weighted_sum,
)
from op_bounds import linear_bounds, logits_bounds
from torch import Tensor

from gem_kernels import (
    IGNORE_INDEX,
    LogitTransform,
    VocabShard,
    compat,
    linear_group_loss,
    linear_logprob_entropy,
    logprob_entropy,
    topm_mean,
)

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- sizes ------------------------------------------------------------------------------------------------------------

CASES = {
    "everything at once": {"n": 193, "d": 70, "v": 517, "transform": TRANSFORMS["combined"], "peaky": 30.0, "rank": 17},
    "a wide vocabulary, bf16": {"n": 33, "d": 64, "v": 262_144, "dtype": BF16, **PLAIN},
    "a wide vocabulary, fp32": {"n": 33, "d": 64, "v": 262_144, **PLAIN},
    "no token ignored": {"n": 70, "d": 64, "v": 300, "dtype": BF16, "ignored": 0.0},
    "few tokens kept": {"n": 70, "d": 64, "v": 300, "dtype": BF16, "ignored": 0.97},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@each_impl
def test_matches_gold(impl: str, settings: dict) -> None:
    check_linear(make_case(**settings, device=GPU), impl)


@each_dtype
@each_impl
def test_one_row_at_a_time(impl: str, dtype: torch.dtype) -> None:
    """Calls of one token each keep the bounds of the batch."""
    case, upstream = make_case(30, 64, 1000, dtype=dtype, device=GPU, **PLAIN), make_upstream(30, device=GPU)
    names = (*STATS, "dhidden")
    rows = []
    for i in range(30):
        row = replace(case, hidden=case.hidden[i : i + 1], targets=case.targets[i : i + 1])
        rows.append(run_linear(row, impl, {name: u[i : i + 1] for name, u in upstream.items()}))
    got = {name: torch.cat([row[name] for row in rows]) for name in names}  # type: ignore[misc]
    gold = run_linear(case.double(), "reference", upstream)
    assert_all_close(got, {name: gold[name] for name in names}, linear_bounds(case, upstream))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@each_impl
def test_default_settings_of_torch(impl: str, dtype: torch.dtype) -> None:
    """torch lets GEMMs reduce in bf16 by default. Ours request fp32 results, so the setting must not cost a digit."""
    case, upstream = make_case(64, 4096, 1024, dtype=dtype, device=GPU, **PLAIN), make_upstream(64, device=GPU)
    gold, bounds = run_linear(case.double(), "reference", upstream), linear_bounds(case, upstream)
    assert_all_close(run_linear(case, impl, upstream), gold, bounds)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    assert_all_close(run_linear(case, impl, upstream), gold, bounds)


def test_the_rule_sees_a_bf16_result() -> None:
    """The tests above can fail: statistics of logits that were rounded to bf16 break the rule."""
    case = make_case(120, 64, 1003, dtype=BF16, peaky=30.0, ignored=0.0, device=GPU, **PLAIN)
    gold, bounds = linear_op(case.double(), "reference"), linear_bounds(case, {})
    rounded = logprob_entropy(case.hidden @ case.weight.T, case.targets, impl="reference")
    with pytest.raises(AssertionError, match="entropy: error"):
        assert_close("entropy", rounded.entropy, gold.entropy, bounds["entropy"])


# --- values that nobody checked ---------------------------------------------------------------------------------------


@needs_cuda  # on the CPU the values are checked
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("ignore_index", [-1, None])
@each_impl
def test_target_out_of_range_gives_nan(
    impl: str, ignore_index: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ops, those with a cache included, read and write nothing outside."""
    monkeypatch.delenv("GEM_KERNELS_CHECK", raising=False)
    case = make_case(140, 64, 350, dtype=dtype, ignored=0.0, device=GPU, **PLAIN)
    wild = torch.tensor([350, IGNORE_INDEX, -7, 1 << 40, -(1 << 40), 2**31, 352], device=GPU)
    ignores = {"ignore_index": ignore_index}
    targets, bad = case.targets.clone(), torch.zeros(140, dtype=torch.bool, device=GPU)
    targets[3:10], bad[3:10] = wild, True
    broken = replace(case, targets=targets)
    stats, good = linear_op(broken, impl, **ignores), linear_op(case, impl, **ignores)
    assert bool(stats.logprob[bad].isnan().all())
    for name in ("entropy", "lse", "max_logprob"):
        assert torch.equal(getattr(stats, name), getattr(good, name)), name
    assert torch.equal(stats.logprob[~bad], good.logprob[~bad])
    upstream = make_upstream(140, device=GPU)
    got, clean = (run_linear(c, impl, upstream, **ignores)["dhidden"] for c in (broken, case))
    assert got is not None and clean is not None and torch.equal(got[~bad], clean[~bad])
    logits = (case.hidden.float() @ case.weight.float().T).to(dtype).requires_grad_()
    of_logits = logprob_entropy(logits, targets, impl=impl, **ignores)  # type: ignore[arg-type]
    assert torch.equal(of_logits.logprob.isnan(), bad)
    of_logits.entropy.sum().backward()
    sega = run_sega(broken, impl, torch.ones(2), offsets=[0, 70, 140], **ignores)
    assert sega["logprob"] is not None and torch.equal(sega["logprob"].isnan(), bad)
    torch.cuda.synchronize()


@needs_cuda
@each_impl
def test_spans_out_of_range_read_nothing_outside(impl: str) -> None:
    if impl == "chunked":
        pytest.skip("chunked indexes with these offsets, and torch asserts on the device")
    values = torch.rand(1000, device=GPU)
    topm_mean(values, torch.tensor([0, -500, 1 << 40, 1000], device=GPU), 3, impl=impl)  # type: ignore[arg-type]
    torch.cuda.synchronize()


# --- addresses --------------------------------------------------------------------------------------------------------


def shifted(t: Tensor) -> Tensor:
    """Copy a matrix to an address that is not a multiple of 16 bytes: one element further on."""
    buffer = t.new_empty(t.numel() + 1)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


@each_dtype
@each_impl
def test_addresses_that_are_not_aligned(impl: str, dtype: torch.dtype) -> None:
    case = make_case(130, 64, 300, dtype=dtype, device=GPU)
    moved = replace(case, hidden=shifted(case.hidden), weight=shifted(case.weight))
    assert not compat.takes_descriptors(moved.hidden, moved.weight)
    upstream = make_upstream(130, device=GPU)

    def run(x: Case, which: str) -> dict[str, Tensor | None]:
        leaves = [t.detach().requires_grad_() for t in (x.hidden, x.weight)]  # not cloned: a clone is aligned again
        stats = linear_op(replace(x, hidden=leaves[0], weight=leaves[1]), which)
        grads = torch.autograd.grad(weighted_sum(stats, upstream), leaves)
        return {**{k: s.detach() for k, s in stats._asdict().items()}, "dhidden": grads[0], "dweight": grads[1]}

    assert_all_close(run(moved, impl), run(moved.double(), "reference"), linear_bounds(moved, upstream))


@needs_cuda
def test_which_matrices_the_copy_engine_reads() -> None:
    hopper = compat.arch(GPU) >= 90
    for d, dtype, readable in [
        (64, BF16, True),
        (70, BF16, False),
        (72, BF16, True),
        (31, FP32, False),
        (36, FP32, True),
    ]:
        matrix = torch.empty(50, d, dtype=dtype, device=GPU)
        assert compat.takes_descriptors(matrix) == (hopper and readable), (d, dtype)


# --- beyond 2^31 elements ---------------------------------------------------------------------------------------------

N, D, V = 20_000, 64, 131_072


def needs_memory(gib: float) -> None:
    if ON_GPU and torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free device memory")


def reference_in_blocks(case: Case, upstream: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Run the reference in fp64, 500 rows at a time."""
    wide = case.double().leaves()
    parts = []
    for start in range(0, case.targets.shape[0], 500):
        rows = slice(start, start + 500)
        stats = linear_op(replace(wide, hidden=wide.hidden[rows], targets=case.targets[rows]), "reference")
        weighted_sum(stats, {name: u[rows] for name, u in upstream.items()}).backward()
        parts.append([s.detach() for s in stats])
    return {**dict(zip(STATS, map(torch.cat, zip(*parts, strict=True)), strict=True)), **wide.gradients()}


@each_impl
def test_more_logits_than_an_int32_can_count(impl: str) -> None:
    needs_memory(12)
    assert N * V > 2**31
    case, upstream = make_case(N, D, V, dtype=BF16, device=GPU, **PLAIN), make_upstream(N, device=GPU)
    got = run_linear(case, impl, upstream)
    assert_all_close(got, reference_in_blocks(case, upstream), linear_bounds(case, upstream))


def run_logits(
    logits: Tensor, targets: Tensor, impl: str, upstream: Mapping[str, Tensor], at: Tensor
) -> dict[str, Tensor | None]:
    """Return statistics and dlogits of the rows `at`."""
    leaf = logits.detach().requires_grad_()
    stats = logprob_entropy(leaf, targets, impl=impl)  # type: ignore[arg-type]
    (dlogits,) = torch.autograd.grad(weighted_sum(stats, upstream), leaf)
    return {**{name: s.detach()[at] for name, s in stats._asdict().items()}, "dlogits": dlogits[at]}


@needs_cuda
def test_scaling_more_elements_than_an_int32_can_count() -> None:
    needs_memory(5)
    gradient = torch.ones(2**31 + 3, dtype=BF16, device=GPU)
    torch.ops.gem_kernels.scale_gradient_(gradient, torch.tensor(2.0, device=GPU))
    assert gradient.amin() == gradient.amax() == 2


def test_logprob_entropy_of_more_logits_than_an_int32_can_count() -> None:
    """A sample of rows, those around the 2^31st logit among them, against the reference on these rows alone."""
    needs_memory(16)
    generator = torch.Generator(GPU).manual_seed(0)
    logits = torch.empty(N, V, dtype=BF16, device=GPU).normal_(0, 3, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator, device=GPU)
    upstream = make_upstream(N, device=GPU)
    edge = 2**31 // V
    around = torch.tensor([1, edge - 1, edge, edge + 1, N - 2, N - 1])
    sample = torch.cat((torch.arange(0, N, N // 40), around)).unique()
    sample = sample[sample < N].to(GPU)
    got = run_logits(logits, targets, "auto", upstream, sample)
    rows, of_sample = logits[sample], {name: u[sample] for name, u in upstream.items()}
    everything = torch.arange(len(sample), device=GPU)
    gold = run_logits(rows.double(), targets[sample], "reference", of_sample, everything)
    assert_all_close(got, gold, logits_bounds(rows, targets[sample], LogitTransform(), of_sample))


# --- models, and a vocabulary spread over ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True], ids=["statistics", "group loss"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_fused_model(name: str, dtype: torch.dtype, grouped: bool) -> None:
    """The head's statistics of the body's hidden states, against fp64; every parameter gets a gradient."""
    pytest.importorskip("transformers")
    from architectures import build

    from gem.head import fuse_lm_head

    model = build(name).to(GPU, dtype)
    ids = torch.randint(10, 97, (3, 11), device=GPU)
    labels = ids.masked_fill(torch.rand(3, 11, device=GPU) < 0.3, IGNORE_INDEX)
    kept = labels[:, 1:] != IGNORE_INDEX
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    fuse_lm_head(model)
    cu_groups = torch.tensor([0, 5, int(kept.sum())], device=GPU)
    options = {"loss_fn": sega_with_its_own_entropies, "cu_groups": cu_groups} if grouped else {}
    out = model(ids, labels=labels, fused_lm_head=True, **options)
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
        case = make_case(120, 64, 1003, dtype=dtype, device=GPU, **PLAIN)
        group = dist.group.WORLD
        assert group is not None
        found: list[dict[str, Tensor | None]] = []
        for shard in (None, VocabShard(group, 0, 1003)):
            x = case.leaves()
            inputs, options = (x.hidden, x.weight, x.targets), {"impl": impl, "shard": shard}
            cu_groups = torch.tensor([0, 50, 120], device=GPU)
            result = linear_group_loss(*inputs, cu_groups, sega_with_its_own_entropies, **options)  # type: ignore[arg-type]
            stats = linear_logprob_entropy(*inputs, **options)  # type: ignore[arg-type]
            (result.loss + stats.logprob.sum() + stats.entropy.sum()).backward()
            found.append({"loss": result.loss.detach(), **stats._asdict(), **x.gradients()})
        assert_same(*found)
    finally:
        dist.destroy_process_group()


def test_cached_exponentials_follow_a_maximum_of_other_ranks() -> None:
    from gem_kernels.group_loss.exponentials import follow_maximum_
    from gem_kernels.softmax import State

    cache, reference = torch.rand(70, 300, device=GPU).to(BF16), torch.randn(70, device=GPU)
    gap = torch.where(torch.arange(70, device=GPU) % 3 == 0, 80.0, 3.0)  # beyond 60, and within
    state = State.fresh(torch.zeros(70, dtype=torch.int64, device=GPU))
    state.values[0] = reference + gap
    factor = torch.where(gap > 60, (-gap).exp(), 1.0)
    expected = (cache.float() * factor[:, None]).to(BF16)
    expected_reference = reference + torch.where(gap > 60, gap, 0.0)
    follow_maximum_(cache, reference, state)
    torch.testing.assert_close(cache, expected, atol=1e-37, rtol=2**-7)  # below 1e-37 numbers are subnormal
    torch.testing.assert_close(reference, expected_reference)
