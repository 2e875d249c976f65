"""A policy-gradient step whose weights are known beforehand (GRPO, SEGA on stored scores); every library supports it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.contest import Exact, Step, Task, train_step
from benchmarks.gold import Gold
from benchmarks.peers import LIBRARIES, available, impl_of, weighted
from benchmarks.results import OURS
from benchmarks.shapes import SMALL
from gem_kernels import sega_loss

LIGER_GRPO = "Liger GRPO"


def _known(gold: Gold, library: str) -> Step:
    x = gold.x
    if library.startswith(OURS):
        impl = impl_of(library)

        def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = sega_loss(hidden, weight, x.targets, x.cu_seqlens, x.seq_weight, impl=impl)
            return out.loss, out.stats.logprob, out.stats.entropy

        return train_step(gold, ours)
    if library == LIGER_GRPO:
        return train_step(gold, _liger_grpo(gold))
    loss, token_weight = weighted(library), x.token_weight
    return train_step(gold, lambda hidden, weight: (loss(x, hidden, weight, token_weight), None, None))


def _liger_grpo(gold: Gold) -> Callable[[Tensor, Tensor], tuple[Tensor, None, None]]:
    """Call Liger's GRPO loss on padded rows.

    On policy its ratio is 1 and its gradient is -A Σ dlogprob / (B L), so A = weight B L gives the gradient of our loss.
    """
    available("liger-kernel", gpu_only=False)
    x = gold.x
    lengths = x.cu_seqlens.diff().tolist()
    rows, longest = len(lengths), max(lengths)
    module = importlib.import_module("liger_kernel.chunked_loss")
    # It compiles by default. On a CPU that would take longer than all its rounds.
    op = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=x.hidden.is_cuda,
        use_ref_model=False,
        loss_type="dr_grpo",
        max_completion_length=longest,
    )
    targets = pad_sequence(x.targets.split(lengths), batch_first=True)
    mask = pad_sequence(torch.ones_like(x.targets).split(lengths), batch_first=True)

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None, None]:
        padded = pad_sequence(hidden.split(lengths), batch_first=True)
        value, *_ = op(padded, weight, targets, mask, x.seq_weight * rows * longest)
        return value, None, None

    return loss


def _exact(gold: Gold) -> Exact:
    return Exact(gold.logprob, gold.entropy, *gold.gradients(-gold.x.token_weight))


KNOWN = Task("SEGA, weights known", _known, _exact, 3, [*LIBRARIES, LIGER_GRPO])


@pytest.mark.over(shapes=SMALL, libraries=KNOWN.libraries)
def test_known_weights(bench: Callable[[Task], None]) -> None:
    bench(KNOWN)
