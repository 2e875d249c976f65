"""LoRA on the lm_head: hidden states and adapter train, the head is frozen.

No peer takes an adapter. A user would wrap one as [h, s h A^T] [W, B]^T. That is exact, but it copies the weight every step and
computes the gradient of all of [W, B], because no library computes the gradient of some columns alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Exact, Result, Step, Task, taken
from benchmarks.gold import Gold, make_gold
from benchmarks.peers import PEERS, impl_of, per_token, weighted
from benchmarks.results import EAGER, OURS
from benchmarks.shapes import SMALL
from gem_kernels import LowRank, sega_loss

SCALE = 2.0


def _lowrank(gold: Gold, library: str) -> Step:
    x = gold.x
    hidden, a, b = (t.detach().requires_grad_() for t in (x.hidden, x.low_a, x.low_b))
    fn = None if library.startswith(OURS) else _of(library)
    adapter = LowRank(a, b, SCALE)

    def step() -> Result:
        if fn is None:
            known = (x.targets, x.cu_seqlens, x.seq_weight)
            out = sega_loss(hidden, x.weight, *known, low_rank=adapter, impl=impl_of(library))
            out.loss.backward()
            logprob: Tensor | None = out.stats.logprob
        else:
            loss, logprob = fn(gold, hidden, a, b)
            loss.backward()
        dhidden, *others = taken(hidden, a, b)
        return Result(logprob, None, dhidden, others=tuple(others))

    return step


_Fn = Callable[[Gold, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _of(library: str) -> _Fn:
    if library == EAGER:

        def plain(gold: Gold, hidden: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            logits = hidden @ gold.x.weight.T + SCALE * (hidden @ a.T) @ b.T
            logprob = logits.float().log_softmax(-1).gather(-1, gold.x.targets[:, None])[:, 0]
            return -(gold.x.token_weight * logprob).sum(), logprob.detach()

        return plain
    peer = PEERS[library]
    tokens = per_token(library, entropy=False) if peer.per_token else None
    loss = None if tokens is not None else weighted(library)

    def wider(gold: Gold, hidden: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        h, w = torch.cat((hidden, SCALE * (hidden @ a.T)), 1), torch.cat((gold.x.weight, b), 1)
        if tokens is not None:
            logprob, _ = tokens(h, w, gold.x.targets, False)
            return -(gold.x.token_weight * logprob).sum(), logprob.detach()
        assert loss is not None
        return loss(gold.x, h, w, gold.x.token_weight), None

    return wider


def _exact(gold: Gold) -> Exact:
    """Return the fp64 results of the head with the adapter merged into it."""
    x = gold.x
    merged = x._replace(weight=x.weight.double() + SCALE * x.low_b.double() @ x.low_a.double())
    of_merged = make_gold(merged)
    dhidden, _ = of_merged.gradients(-x.token_weight)
    return Exact(of_merged.logprob, None, dhidden)


LOWRANK = Task("SEGA, weights known, LoRA on the frozen head", _lowrank, _exact, 2)


@pytest.mark.over(shapes=SMALL, libraries=LOWRANK.libraries)
def test_lowrank(bench: Callable[[Task], None]) -> None:
    bench(LOWRANK)
