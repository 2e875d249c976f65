"""The other libraries: their features, their calls, and the code that a user would add for a missing feature.

A library that does not support a task raises DoesNotError, and its row shows the reason. Libraries are imported when they run.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DoesNotError
from benchmarks.results import EAGER, OURS
from benchmarks.shapes import DEVICE, Inputs
from gem_kernels import Impl

OURS_TRITON = f"{OURS}, triton"  # next to the choice of "auto" on a GPU
ENTROPY_FIRST = f"{EAGER}, entropy without a graph"  # careful eager code for entropies that are weights

# (hidden, weight, targets, with entropy) -> log-probability and entropy of every token
PerToken = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
# (hidden, weight, targets) -> the sum of the log-probabilities
Total = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    load: Callable[[], Any]  # PerToken, or Total where it reduces
    package: str | None = None
    entropy: bool = False
    per_token: bool = True
    gpu_only: bool = False
    kernels: str | None = None
    """the distribution with which its kernels are written; it is imported at the first call"""
    kernels_on: tuple[int, int] | None = None
    """the one compute capability that gets these kernels; None: every GPU"""


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the statistics in common eager style: logits in the operands' dtype, log_softmax in fp32."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    logprob = log_p.gather(-1, targets[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1) if entropy else None


def _compiled() -> PerToken:
    torch._dynamo.reset()
    fn: PerToken = torch.compile(eager, dynamic=False)
    return fn


def _torch_fused() -> PerToken:
    if not hasattr(F, "linear_cross_entropy"):
        raise DoesNotError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # On a CPU its default chunk is 2.5 to 9 times as slow.
    rows = None if DEVICE.type == "cuda" else 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)  # type: ignore[attr-defined]

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, None]:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None  # type: ignore[attr-defined]

    return per_token


def _trl_chunk() -> int:
    """Return the vocabulary chunk of TRL's trainers. Their module imports `datasets`, which the kernel does not need."""
    try:
        chunk: int = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    except (ImportError, RuntimeError):  # transformers' lazy modules turn the first into the second
        return 32_768
    return chunk


def _trl() -> PerToken:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    chunk = _trl_chunk()
    known = {"bias": None, "temperature": 1.0, "chunk_size": chunk, "final_logit_softcapping": None, "logit_scale": 1.0}
    names = list(inspect.signature(function.forward).parameters)[1:]  # the order differs between versions

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        outputs = ("entropy",) if entropy else ()
        given = {**known, "hidden": hidden, "weight": weight, "targets": targets, "outputs": outputs}
        logprob, second, *_ = function.apply(*(given[name] for name in names))
        return logprob, second if entropy else None

    return per_token


def _liger_scaled() -> PerToken:
    """Return Liger's fused op for RL: CuTe on sm_90, elsewhere blocks of 512 tokens in torch."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        out = function.apply(hidden, weight, targets, return_entropy=entropy)
        nll, second = out if entropy else (out, None)
        return -nll, second

    return per_token


def _liger_cross_entropy() -> PerToken:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, None]:
        return -function(hidden, weight, targets, reduction="none"), None

    return per_token


def _cce() -> PerToken:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, None]:
        return -function(hidden, weight, targets, reduction="none"), None

    return per_token


def _quack() -> Total:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def total(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = -function(hidden, weight, targets, reduction="sum")
        return loss

    return total


def _verl() -> PerToken:
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def per_token(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logprob, second = function(hidden, weight, targets, 1.0, "none")
        return logprob, second if entropy else None

    return per_token


PEERS = {
    EAGER: Peer(lambda: eager, entropy=True),
    "torch.compile": Peer(_compiled, entropy=True),
    "F.linear_cross_entropy": Peer(_torch_fused),
    "TRL": Peer(_trl, "trl", entropy=True),
    "Liger scaled CE": Peer(
        _liger_scaled, "liger-kernel", entropy=True, kernels="nvidia-cutlass-dsl", kernels_on=(9, 0)
    ),
    "Liger CE": Peer(_liger_cross_entropy, "liger-kernel", gpu_only=True),
    "CCE": Peer(_cce, "cut-cross-entropy", gpu_only=True),
    "quack": Peer(_quack, "quack-kernels", per_token=False, gpu_only=True, kernels="nvidia-cutlass-dsl"),
    "verl": Peer(_verl, "verl", entropy=True, gpu_only=True),
}
LIBRARIES = [OURS, *([OURS_TRITON] if DEVICE.type == "cuda" else []), *PEERS]
HEADLINE = [OURS, EAGER, "TRL", "Liger scaled CE"]
"""the libraries that are timed before all others on a GPU"""
PACKAGES = sorted({peer.package for peer in PEERS.values() if peer.package})
_DISTRIBUTIONS = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
"""modules whose distribution has another name"""


def impl_of(library: str) -> Impl:
    """Return the implementation in the name of a row of ours, "gem-kernels, triton"; else "auto"."""
    named = library.removeprefix(f"{OURS}, ")
    return named if named in get_args(Impl) else "auto"  # type: ignore[return-value]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def available(package: str | None, gpu_only: bool) -> None:
    if package and installed(package) is None:
        raise DoesNotError("not installed")
    if gpu_only and DEVICE.type != "cuda":
        raise DoesNotError("does not run without a GPU")


def _unmet(package: str | None, distribution: str) -> str | None:
    """Return what a package lacks, in the words of its own metadata; None if the distribution is there and recent enough."""
    from packaging.requirements import Requirement

    stated = (line.split(";")[0].strip() for line in (requires(package) if package else None) or ())
    wanted = next((text for text in stated if re.split(r"[^\w.-]", text)[0] == distribution), distribution)
    present = installed(distribution)
    if present is None:
        return f"needs {wanted}, which is not installed"
    if not Requirement(wanted).specifier.contains(present, prereleases=True):
        return f"needs {wanted}, and {present} is installed"
    return None


def lacking(error: ImportError, library: str) -> str:
    """Return why a library cannot be imported: what is not installed, or else the error's own words."""
    module = (error.name or "").split(".")[0]
    package = PEERS[library].package if library in PEERS else None
    missing = _unmet(package, _DISTRIBUTIONS.get(module, module)) if module else None
    return missing or f"cannot be imported: {error}"


def load(library: str) -> Any:
    peer = PEERS[library]
    available(peer.package, peer.gpu_only)
    here = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
    if peer.kernels and here is not None and peer.kernels_on in (None, here):
        reason = _unmet(peer.package, peer.kernels)
        if reason is not None:
            raise DoesNotError(reason)
    try:
        return peer.load()
    except ImportError as error:
        raise DoesNotError(lacking(error, library)) from error


def per_token(library: str, *, entropy: bool) -> PerToken:
    peer = PEERS[library]
    if not peer.per_token:
        raise DoesNotError("gives sums only, nothing per token")
    if entropy and not peer.entropy:
        raise DoesNotError("gives no entropy")
    fn: PerToken = load(library)
    return fn


@torch.no_grad()
def entropy_by_blocks(hidden: Tensor, weight: Tensor, rows: int = 256) -> Tensor:
    """Compute entropies without a gradient, for a library that has none: enough where they are weights."""
    parts = []
    for block in hidden.split(rows):
        log_p = (block @ weight.T).float().log_softmax(-1)
        parts.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(parts)


def weighted(library: str) -> Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]:
    """Return a loss (x, hidden, weight, token_weight (N,)) -> - Σ token_weight logprob.

    All tokens of a sequence have the same weight, so a library that returns only sums is called once per sequence.
    """
    fn, peer = load(library), PEERS[library]

    def loss(x: Inputs, hidden: Tensor, weight: Tensor, token_weight: Tensor) -> Tensor:
        if peer.per_token:
            logprob: Tensor = fn(hidden, weight, x.targets, False)[0]
            return -(token_weight * logprob).sum()
        total: Tensor = hidden.new_zeros((), dtype=torch.float32)
        for tokens in x.sequences:
            total = total - token_weight[tokens.start] * fn(hidden[tokens], weight, x.targets[tokens])
        return total

    return loss
