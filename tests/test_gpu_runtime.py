"""How the ops behave on a GPU: devices, streams, threads, CUDA graphs, synchronisation, torch.compile, memory, races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import GPU, ON_GPU, PLAIN, each_impl, needs_cuda
from numerics import Case, assert_same, check_linear, make_case, make_upstream, run_linear
from test_logprob import make_logits
from test_scoring import ragged
from torch import Tensor

from gem_kernels import gem_score, linear_logprob_entropy, logprob_entropy, sega_loss, topm_mean

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
BF16 = torch.bfloat16
MIB = 1 << 20


# --- devices, threads and streams -------------------------------------------------------------------------------------


@needs_cuda
@each_impl
def test_another_device_than_the_current_one(impl: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    check_linear(make_case(130, 64, 1003, dtype=BF16, device=other), impl)
    logits = torch.randn(20, 300, device=other, requires_grad=True)
    logprob_entropy(logits, torch.arange(20, device=other)).entropy.sum().backward()
    topm_mean(torch.rand(30, device=other), torch.tensor([0, 10, 30], device=other), 0.2)
    assert torch.cuda.current_device() == 0


@needs_cuda
@each_impl
def test_another_thread_and_another_stream(impl: str) -> None:
    """Triton keeps state per thread; an op must find it in every thread."""
    case, upstream = make_case(256, 128, 1024, dtype=BF16, device=GPU), make_upstream(256, device=GPU)
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


# --- CUDA graphs and host synchronisation -----------------------------------------------------------------------------


class Call:
    """An op on inputs at fixed addresses, for graphs; `renew` writes other numbers into them."""

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
        case = make_case(140, d, 1003, dtype=BF16, device=GPU)
        return Call(
            (case.hidden, case.weight, case.targets),
            lambda h, w, t: linear_logprob_entropy(h, w, t, impl=impl),  # type: ignore[arg-type,return-value]
        )

    def logits() -> Call:
        return Call(make_logits(140, 1003, BF16, device=GPU), logprob_entropy)

    def spans(score: bool) -> Call:
        values, cu = (t.to(GPU) for t in ragged(50, 3000))
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


# --- torch.compile, memory, races -------------------------------------------------------------------------------------

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
    case = make_case(40, 64, 300, dtype=BF16, ignored=0.0, rank=0, device=GPU)
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
    """Beside inputs and gradients, an op allocates far less than the bf16 logits (1 GiB here)."""
    n, d, v = 8192, 512, 65_536
    case = make_case(n, d, v, dtype=BF16, device=GPU, **PLAIN)
    cu, weights = torch.tensor([0, 1000, n], device=GPU), torch.ones(2, device=GPU)
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
    # sega: its cache, and the fp32 dweight to which several slabs add
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
    # The caching allocator would hide accesses between two tensors.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=75)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer takes more than 75 s here")
    said = done.stdout + done.stderr
    if done.returncode != 9 and "all ran" not in done.stdout:
        pytest.skip(f"compute-sanitizer does not run here: {said[-500:]}")
    ours = re.search(r"at _\w+_kernel\b.*", said)  # kernels of other libraries read padding that is never written
    assert done.returncode == 0 or ours is None, f"{ours and ours[0]}\n{said[:4000]}"
    assert done.returncode == 0 or tool != "memcheck", said[:4000]
