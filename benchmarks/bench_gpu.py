"""Times beside the peers on a GPU: N=8192, D=4096, V=128256 in bf16, all libraries in one process on the same inputs.

    pytest -m gpu benchmarks/bench_gpu.py -s

The unit is the bare bf16 GEMM of 2NDV FLOP. Everything is compared with fp64 before it is timed; a peer that is not installed,
does not do a task or fails at it has a row that says so. GEM_KERNELS_BENCH_JSON: a file for the rows, as they come in;
GEM_KERNELS_BENCH_SECONDS: no new row is begun after that many.

Loss of the scoring tasks: Σ a_n logprob_n + b_n entropy_n. Of the SEGA tasks: -Σ a_n logprob_n, a_n one of 8 sequence weights.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gpu import LOST, Rows, milliseconds
from torch import Tensor

from gem_kernels import linear_logprob_entropy, logprob_entropy, sega_loss, topm_mean

N, D, V = 8192, 4096, 128_256
LOGIT_ROWS = N // 2
SEQUENCES = 8
GEMM = 2.0 * N * D * V
"""FLOP"""
SAMPLE = 64
MIB = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_path = os.environ.get("GEM_KERNELS_BENCH_JSON")
ROWS = Rows(Path(_path) if _path else None)
DEADLINE = time.monotonic() + float(os.environ.get("GEM_KERNELS_BENCH_SECONDS", "1e9"))


class DoesNotError(Exception):
    """The library has no such thing; the message says what is missing."""


class Inputs(NamedTuple):
    hidden: Tensor  # (N, D) bf16
    weight: Tensor  # (V, D) bf16
    targets: Tensor  # (N,)
    a: Tensor  # (N,) fp32: dL/dlogprob of the scoring tasks
    b: Tensor  # (N,) fp32: dL/dentropy
    seq_weight: Tensor  # (SEQUENCES,)
    cu: Tensor  # (SEQUENCES + 1,)

    def token_weight(self) -> Tensor:
        return self.seq_weight.repeat_interleave(self.cu.diff(), output_size=N)


class Gold(NamedTuple):
    """fp64 on the same inputs: statistics of every token, gradients of a sample of tokens and of vocabulary entries."""

    logprob: Tensor
    entropy: Tensor
    sample: Tensor  # tokens
    columns: Tensor  # vocabulary entries
    scoring: tuple[Tensor, Tensor]  # dhidden[sample], dweight[columns]
    sega: tuple[Tensor, Tensor]


class Result(NamedTuple):
    """What a library computed; None: it does not, or was not asked for it."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


Step = Callable[[], Result]


# --- inputs, gold -----------------------------------------------------------------------------------------------------


def make_inputs() -> Inputs:
    """Peaky logits (standard deviation 4.5, mean entropy about 3 nats), as of a trained model."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype).normal_(0, size, generator=g)

    hidden, weight = normal(N, D, dtype=torch.bfloat16), normal(V, D, size=4.5 / D**0.5, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (N,), generator=g, device="cuda")
    cu = torch.linspace(0, N, SEQUENCES + 1, device="cuda").long()
    return Inputs(hidden, weight, targets, normal(N), 0.3 * normal(N), normal(SEQUENCES), cu)


def make_gold(x: Inputs) -> Gold:
    weight = x.weight.double()
    g = torch.Generator("cuda").manual_seed(1)
    sample = torch.randint(0, N, (SAMPLE,), generator=g, device="cuda").unique()
    columns = torch.cat((torch.randint(0, V, (SAMPLE,), generator=g, device="cuda"), x.targets[:SAMPLE])).unique()
    token_weight = x.token_weight()
    logprob, entropy = torch.empty(2, N, device="cuda", dtype=torch.float64)
    dweight = torch.zeros(2, len(columns), D, device="cuda", dtype=torch.float64)

    def dlogits(log_p: Tensor, h: Tensor, rows: Tensor, cols: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a (1[v = y] - p) - b p (log p + H) for these columns of log_p."""
        p = log_p[:, cols].exp()
        hit = cols[None] == x.targets[rows, None]
        return a[rows, None] * (hit.double() - p) - b[rows, None] * p * (log_p[:, cols] + h[:, None])

    zero = torch.zeros_like(x.b)
    losses = ((x.a, x.b), (-token_weight, zero))
    dhidden: list[Tensor] = []
    everything = torch.arange(V, device="cuda")
    for rows in [*torch.arange(N, device="cuda").split(512), sample]:
        log_p = (x.hidden[rows].double() @ weight.T).log_softmax(1)
        h = -(log_p.exp() * log_p).sum(1)
        if rows is sample:
            dhidden = [dlogits(log_p, h, rows, everything, *ab) @ weight for ab in losses]
        else:
            logprob[rows], entropy[rows] = log_p.gather(1, x.targets[rows, None])[:, 0], h
            for total, ab in zip(dweight, losses, strict=True):
                total += dlogits(log_p, h, rows, columns, *ab).T @ x.hidden[rows].double()
        del log_p
    return Gold(logprob, entropy, sample, columns, (dhidden[0], dweight[0]), (dhidden[1], dweight[1]))


def gradient_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|."""
    return float((got.double() - exact).norm() / exact.norm())


def errors(result: Result, gold: Gold, sega: bool) -> dict[str, float]:
    """Largest errors of the statistics (nats), relative errors of the gradients."""
    found = {}
    for name in ("logprob", "entropy"):
        value = getattr(result, name)
        if value is not None:
            found[name] = float((value.double() - getattr(gold, name)).abs().max())
    dhidden, dweight = gold.sega if sega else gold.scoring
    if result.dhidden is not None:
        found["dhidden"] = gradient_error(result.dhidden[gold.sample], dhidden)
    if result.dweight is not None:
        found["dweight"] = gradient_error(result.dweight[gold.columns], dweight)
    return found


# --- the tasks, one function per library ------------------------------------------------------------------------------

# What computes (logprob, entropy or None) of all tokens from hidden, weight and targets; `entropy`: whether it is wanted.
Statistics = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def ours(impl: str) -> Statistics:
    def statistics_of(h: Tensor, w: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        stats = linear_logprob_entropy(h, w, t, impl=impl)  # type: ignore[arg-type]
        return stats.logprob, stats.entropy

    return statistics_of


def naive_statistics(h: Tensor, w: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """What is usually written: bf16 logits, log_softmax in fp32."""
    log_p = (h @ w.T).float().log_softmax(-1)
    logprob = log_p.gather(-1, t[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1) if entropy else None


def naive() -> Statistics:
    return naive_statistics


def compiled() -> Statistics:
    torch._dynamo.reset()
    fn: Statistics = torch.compile(naive_statistics)
    return fn


def trl() -> Statistics:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    # Its signature differs between versions: by name, in its order.
    known = {"bias": None, "temperature": 1.0, "chunk_size": 8192, "final_logit_softcapping": None, "logit_scale": 1.0}
    names = list(inspect.signature(function.forward).parameters)[1:]

    def statistics_of(h: Tensor, w: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        given = {**known, "hidden": h, "weight": w, "targets": t, "outputs": ("entropy",) if entropy else ()}
        logprob, second, *_ = function.apply(*(given[name] for name in names))
        return logprob, second if entropy else None

    return statistics_of


def liger() -> Statistics:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def statistics_of(h: Tensor, w: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, None]:
        if entropy:
            raise DoesNotError("fused linear cross-entropy gives no entropy")
        return -function(h, w, t, reduction="none"), None

    return statistics_of


def cce() -> Statistics:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def statistics_of(h: Tensor, w: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, None]:
        if entropy:
            raise DoesNotError("cut cross-entropy gives no entropy")
        return -function(h, w, t, reduction="none"), None

    return statistics_of


LIBRARIES: dict[str, Callable[[], Statistics]] = {
    "ours, chunked": lambda: ours("chunked"),
    "ours, triton": lambda: ours("triton"),
    "TRL": trl,
    "Liger": liger,
    "CCE": cce,
    "naive": naive,
    "naive, compiled": compiled,
}
PACKAGES = {"TRL": "trl", "Liger": "liger-kernel", "CCE": "cut-cross-entropy"}


def blocks_of(library: str) -> int:
    """Naive holds five fp32 tensors of the size of the logits: in how many parts of the rows it must be run."""
    if not library.startswith("naive"):
        return 1
    free = torch.cuda.mem_get_info()[0]
    parts = 1
    while 5 * 4 * N * V / parts > 0.8 * free:
        parts *= 2
    return parts


def scoring_forward(x: Inputs, library: str) -> Step:
    of, rows = LIBRARIES[library](), N // blocks_of(library)

    @torch.no_grad()
    def step() -> Result:
        parts = [of(h, x.weight, t, True) for h, t in zip(x.hidden.split(rows), x.targets.split(rows), strict=True)]
        logprobs, entropies = zip(*parts, strict=True)
        return Result(torch.cat(logprobs), torch.cat(entropies))

    return step


def trained(x: Inputs, library: str, entropy: bool, train_head: bool) -> Step:
    """Forward and backward of the scoring loss (with entropy), or of SEGA's from log-probabilities."""
    of, rows = LIBRARIES[library](), N // blocks_of(library)
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_(train_head)
    a = x.a if entropy else -x.token_weight()

    def step() -> Result:
        hidden.grad = weight.grad = None
        kept = []
        for part in torch.arange(N).split(rows):
            at = slice(int(part[0]), int(part[-1]) + 1)
            logprob, h = of(hidden[at] if rows < N else hidden, weight, x.targets[at], entropy)
            loss = (a[at] * logprob).sum() + (0 if h is None else (x.b[at] * h).sum())
            loss.backward()
            kept.append((logprob.detach(), None if h is None else h.detach()))
        logprobs, entropies = zip(*kept, strict=True)
        of_all = torch.cat(entropies) if entropy else None
        return Result(torch.cat(logprobs), of_all, hidden.grad, weight.grad)

    return step


def sega(x: Inputs, library: str, train_head: bool) -> Step:
    """Ours in one pass; the peers as log-probabilities weighted by hand."""
    if not library.startswith("ours"):
        return trained(x, library, False, train_head)
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_(train_head)
    impl: Any = library.removeprefix("ours, ")

    def step() -> Result:
        hidden.grad = weight.grad = None
        out = sega_loss(hidden, weight, x.targets, x.cu, x.seq_weight, impl=impl)
        out.loss.backward()
        return Result(out.stats.logprob, out.stats.entropy, hidden.grad, weight.grad)

    return step


class Task(NamedTuple):
    make: Callable[[Inputs, str], Step]
    gemms: int
    """of 2NDV FLOP that the task cannot do without: what its share of the GEMM rate is reckoned from"""
    sega: bool = False


TASKS = {
    "scoring forward": Task(scoring_forward, 1),
    "scoring forward + backward": Task(lambda x, lib: trained(x, lib, True, True), 3),
    "sega, head trained": Task(lambda x, lib: sega(x, lib, True), 3, sega=True),
    "sega, head frozen": Task(lambda x, lib: sega(x, lib, False), 2, sega=True),
}


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """Memory is given back after every row; a lost device ends the process, and the driver starts another."""
    yield
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        pytest.exit(f"the device is lost: {error}", returncode=LOST)


@pytest.fixture(scope="module")
def x() -> Inputs:
    return make_inputs()


@pytest.fixture(scope="module")
def gold(x: Inputs) -> Gold:
    found = make_gold(x)
    torch.cuda.empty_cache()
    return found


@pytest.fixture(scope="module")
def unit(x: Inputs) -> float:
    """Milliseconds of the bare GEMM."""
    out = torch.empty(N, V, device="cuda", dtype=torch.bfloat16)
    torch.mm(x.hidden, x.weight.t(), out=out)
    times = milliseconds(lambda: torch.mm(x.hidden, x.weight.t(), out=out))
    median = statistics.median(times)
    shape = {"N": N, "D": D, "V": V, "dtype": "bf16"}
    ROWS.document |= {"shape": shape, "bare mm ms": median, "bare mm TFLOP/s": GEMM / median / 1e9}
    ROWS.save()
    print(f"\nbare mm: {median:.2f} ms, {GEMM / median / 1e9:.0f} TFLOP/s")
    return median


def measure(step: Callable[[], object]) -> dict[str, Any]:
    """Median and least time, and the most memory in use beyond what was there before (gradients included)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    times = milliseconds(step)
    return {
        "ms": round(statistics.median(times), 3),
        "least ms": round(min(times), 3),
        "runs": len(times),
        "peak MiB": round(peak / MIB),
    }


def record(task: str, library: str, work: Callable[[], dict[str, Any]]) -> None:
    """A row, whatever becomes of it. Ours must work; a peer that does not is skipped, with the reason in its row."""
    row = ROWS.claim(task=task, library=library)
    if row is None:
        pytest.skip("has a row already")
    mine = library.startswith("ours")
    if time.monotonic() > DEADLINE:
        ROWS.put(row, error="no time left")
        pytest.skip("no time left")
    try:
        ROWS.put(row, **work())
        print(
            f"\n{task} | {library} | " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("task", "library"))
        )
    except DoesNotError as error:
        ROWS.put(row, error=f"does not: {error}")
        pytest.skip(row["error"])
    except BaseException as error:
        missing = isinstance(error, ImportError) and not mine and not has_package(library)
        said = "not installed" if missing else f"{type(error).__name__}: {error}"[:600]
        ROWS.put(row, error=said)
        if mine or not isinstance(error, Exception):
            raise
        pytest.skip(said)


def has_package(library: str) -> bool:
    try:
        return bool(version(PACKAGES.get(library, library)))
    except PackageNotFoundError:
        return False


# --- logits that exist, and scores ------------------------------------------------------------------------------------


def naive_of_logits(logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, t[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def trl_of_logits() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    fn = importlib.import_module("trl.kernels").selective_log_softmax_and_entropy
    return fn


OF_LOGITS: dict[str, Callable[[], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]] = {
    "ours, triton": lambda: lambda z, t: logprob_entropy(z, t, impl="triton"),
    "TRL": trl_of_logits,
    "naive": lambda: naive_of_logits,
}


@pytest.mark.parametrize("library", OF_LOGITS)
def test_time_of_logits(library: str, x: Inputs, gold: Gold) -> None:
    """Forward + backward from bf16 logits: they are read twice and written once, so GB/s is what counts."""

    def work() -> dict[str, Any]:
        fn, rows = OF_LOGITS[library](), LOGIT_ROWS
        logits = (x.hidden[:rows] @ x.weight.T).requires_grad_()

        def step() -> tuple[Tensor, ...]:
            logits.grad = None
            logprob, entropy, *_ = fn(logits, x.targets[:rows])
            ((x.a[:rows] * logprob).sum() + (x.b[:rows] * entropy).sum()).backward()
            return logprob.detach(), entropy.detach()

        got = step()
        exact: list[list[Tensor]] = [[], []]
        for z, t in zip(logits.detach().split(512), x.targets[:rows].split(512), strict=True):
            log_p = z.double().log_softmax(-1)
            exact[0].append(log_p.gather(-1, t[:, None])[:, 0])
            exact[1].append(-(log_p.exp() * log_p).sum(-1))
        found = [float((g.double() - torch.cat(e)).abs().max()) for g, e in zip(got, exact, strict=True)]
        assert not library.startswith("ours") or max(found) < 1e-4, found
        times = measure(step)
        moved = 3 * logits.nbytes / times["ms"] / 1e6
        return {**times, "GB/s": round(moved), "error of logprob": found[0], "error of entropy": found[1]}

    record("logprob_entropy from logits, forward + backward", library, work)


def padded_topm(values: Tensor, cu: Tensor, m: float) -> Tensor:
    """What is usually written: pad, sort, mask."""
    lengths = cu.diff()
    width = torch.arange(int(lengths.max()), device=values.device)
    inside = width < lengths[:, None]
    table = values.new_full(inside.shape, float("-inf"))
    table[inside] = values
    counts = (lengths * m).ceil().clamp(min=1)
    largest = table.sort(1, descending=True).values
    return largest.masked_fill(width >= counts[:, None], 0.0).sum(1) / counts


OF_SPANS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "ours, triton": lambda v, cu, m: topm_mean(v, cu, m, impl="triton"),
    "ours, chunked": lambda v, cu, m: topm_mean(v, cu, m, impl="chunked"),
    "naive": padded_topm,
}


@pytest.mark.parametrize("library", OF_SPANS)
def test_time_of_topm_mean(library: str) -> None:
    """The mean of the largest tenth of 5000 sequences of up to 2000 tokens, forward + backward."""

    def work() -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 2000, (5000,), generator=g)
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).cuda()
        values = torch.rand(int(cu[-1]), generator=g).cuda().requires_grad_()

        def step() -> Tensor:
            values.grad = None
            means = OF_SPANS[library](values, cu, 0.1)
            means.sum().backward()
            return means.detach()

        error = float((step().double() - padded_topm(values.detach().double(), cu, 0.1)).abs().max())
        assert error < 1e-5, error
        return {**measure(step), "error of mean": error}

    record("topm_mean of 5000 sequences, forward + backward", library, work)


# --- hidden states and lm_head, library by library: what is slow to compile comes last -----------------------------------

# Ours: fp32 logits; the rest is what a GEMM's order of summation moves at |z| up to 25, and the rounding of a bf16 gradient.
LIMITS = {"logprob": 1e-3, "entropy": 1e-3, "dhidden": 1e-2, "dweight": 1e-2}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_time(task: str, library: str, x: Inputs, gold: Gold, unit: float) -> None:
    def work() -> dict[str, Any]:
        make, gemms, of_sega = TASKS[task]
        step = make(x, library)
        found = errors(step(), gold, of_sega)
        if library.startswith("ours"):
            wrong = {name: value for name, value in found.items() if not value < LIMITS[name]}
            assert not wrong, f"{task} by {library} disagrees with fp64: {wrong}"
        times = measure(step)
        return {
            **times,
            "of bare mm": round(times["ms"] / unit, 2),
            "TFLOP/s": round(gemms * GEMM / times["ms"] / 1e9),
            "share": round(gemms * unit / times["ms"], 3),
            **{f"error of {name}": float(f"{value:.2e}") for name, value in found.items()},
            **({"parts": blocks_of(library)} if blocks_of(library) > 1 else {}),
        }

    record(task, library, work)
