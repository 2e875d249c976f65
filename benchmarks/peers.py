"""The other libraries: their features, their calls, and the code that a user would add for a missing feature.

A library that does not support a task raises DoesNotError, and its row shows the reason. Libraries are imported when they run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, NamedTuple

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


def _trl() -> PerToken:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE  # the value of its trainers
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
    "Liger scaled CE": Peer(_liger_scaled, "liger-kernel", entropy=True),
    "Liger CE": Peer(_liger_cross_entropy, "liger-kernel", gpu_only=True),
    "CCE": Peer(_cce, "cut-cross-entropy", gpu_only=True),
    "quack": Peer(_quack, "quack-kernels", per_token=False, gpu_only=True),
    "verl": Peer(_verl, "verl", entropy=True, gpu_only=True),
}
LIBRARIES = [OURS, *([OURS_TRITON] if DEVICE.type == "cuda" else []), *PEERS]
PACKAGES = sorted({peer.package for peer in PEERS.values() if peer.package})


def impl_of(library: str) -> Impl:
    return "triton" if library == OURS_TRITON else "auto"


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


def load(library: str) -> Any:
    peer = PEERS[library]
    available(peer.package, peer.gpu_only)
    try:
        return peer.load()
    except ImportError as error:
        raise DoesNotError(f"cannot be imported: {error}") from error


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
        for start, end in pairwise(x.cu_seqlens.tolist()):
            total = total - token_weight[start] * fn(hidden[start:end], weight, x.targets[start:end])
        return total

    return loss
