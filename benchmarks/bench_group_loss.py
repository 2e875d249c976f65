"""SEGA, forward + backward, with weights from the entropies of the same pass: the use case of linear_group_loss.

The second task freezes the head, as LoRA elsewhere in the model does: dweight is neither computed nor allocated.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from benchmarks.contest import Exact, Step, Task, train_step
from benchmarks.gold import Gold
from benchmarks.peers import ENTROPY_FIRST, LIBRARIES, PEERS, entropy_by_blocks, impl_of, per_token, weighted
from benchmarks.results import EAGER, OURS
from benchmarks.sega import batch_weights, group_weights
from benchmarks.shapes import DEVICE, MAIN, OVER_TOKENS
from gem_kernels import TokenStats, linear_group_loss

SMALL_CACHE = f"{OURS}, cache 128 MiB"
# On a CPU the frozen head is timed for few libraries, to keep the run short: test_group_loss shows that the others are slower.
FROZEN_HEAD = [*LIBRARIES, ENTROPY_FIRST] if DEVICE.type == "cuda" else [OURS, EAGER, "TRL"]


def _sega(gold: Gold, library: str, *, train_head: bool = True) -> Step:
    x = gold.x
    if library.startswith(OURS):
        cache_bytes, impl = 128 << 20 if library == SMALL_CACHE else 1 << 30, impl_of(library)

        def loss_fn(stats: TokenStats, group: int) -> Tensor:
            return -(group_weights(stats.entropy.detach(), x.groups[group]) * stats.logprob).sum()

        def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = linear_group_loss(hidden, weight, x.targets, x.cu_groups, loss_fn, cache_bytes=cache_bytes, impl=impl)
            return out.loss, out.stats.logprob, out.stats.entropy

        return train_step(gold, ours, train_head)
    if library == ENTROPY_FIRST:
        return train_step(gold, lambda hidden, weight: _entropy_without_graph(gold, hidden, weight), train_head)
    if PEERS[library].entropy:
        fn = per_token(library, entropy=True)

        def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            logprob, entropy = fn(hidden, weight, x.targets, True)
            assert entropy is not None
            return -(batch_weights(entropy.detach(), x.groups) * logprob).sum(), logprob, entropy

        return train_step(gold, both, train_head)
    loss = weighted(library)

    def composed(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None, Tensor]:
        entropy = entropy_by_blocks(hidden, weight)
        return loss(x, hidden, weight, batch_weights(entropy, x.groups)), None, entropy

    return train_step(gold, composed, train_head)


def _entropy_without_graph(gold: Gold, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss in eager torch with care: the entropy is a weight, so nothing of it is kept for the backward."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    plain = log_p.detach()
    entropy = -(plain.exp() * plain).sum(-1)
    logprob = log_p.gather(-1, gold.x.targets[:, None])[:, 0]
    return -(batch_weights(entropy, gold.x.groups) * logprob).sum(), logprob, entropy


def _exact(gold: Gold) -> Exact:
    return Exact(gold.logprob, gold.entropy, *gold.gradients(-batch_weights(gold.entropy, gold.x.groups)))


def _frozen(gold: Gold, library: str) -> Step:
    return _sega(gold, library, train_head=False)


def _exact_frozen(gold: Gold) -> Exact:
    return _exact(gold)._replace(dweight=None)


SEGA = Task("SEGA, weights from the pass", _sega, _exact, 3, [*LIBRARIES, SMALL_CACHE, ENTROPY_FIRST])
FROZEN = Task("SEGA, frozen head", _frozen, _exact_frozen, 2, FROZEN_HEAD)


@pytest.mark.over(shapes=OVER_TOKENS, libraries=SEGA.libraries)
def test_group_loss(bench: Callable[[Task], None]) -> None:
    bench(SEGA)


@pytest.mark.over(shapes=MAIN, libraries=FROZEN.libraries)
def test_frozen_head(bench: Callable[[Task], None]) -> None:
    bench(FROZEN)
