"""The shapes and inputs of every benchmark.

N tokens, D hidden size, V vocabulary. Probabilities are as peaked as in a trained model. Three numbers of every shape show it:
mean entropy, vocabulary entries with a probability above 2^-12, largest |logit|. Uniform or zero inputs would flatter every
library in time (sparse gradients, cheap exponentials) and in error (small logits have small rounding errors).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    name: str
    n: int
    d: int
    v: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.name

    @property
    def gemm(self) -> float:
        """Return the FLOP of one product of the hidden states with the head."""
        return 2.0 * self.n * self.d * self.v


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_CPU = Shape("1024x512x128256", 1024, 512, 128_256, torch.float32)
_CPU_SMALL = [Shape(f"{n}x256x32000", n, 256, 32_000, torch.float32) for n in (512, 32, 128)]
_CPU_BF16 = Shape("512x512x128256-bf16", 512, 512, 128_256, torch.bfloat16)
HEADS = [
    Shape("llama-3-8b", 8192, 4096, 128_256, torch.bfloat16),
    Shape("qwen3-8b", 8192, 4096, 151_936, torch.bfloat16),
    Shape("qwen2.5-0.5b", 8192, 896, 151_936, torch.bfloat16),
    Shape("gemma-2-2b", 8192, 2304, 256_000, torch.bfloat16),
    Shape("llama-3.2-1b", 8192, 2048, 128_256, torch.bfloat16),
]
"""heads of models, with the reference shape first: what a GPU measures, and what the planner is tested on anywhere"""
REFERENCE = HEADS[0]
TINY = Shape("tiny", 96, 16, 250, torch.float32)
"""The shape of `--benchmark-disable`, which checks the code and times nothing."""
DRY = Shape("dry run", 8, 64, 250, torch.bfloat16)
"""The shape of a dry run of the stages for a GPU: the kernels are interpreted, and every row takes a millisecond."""


def _tokens(shape: Shape, *counts: int) -> list[Shape]:
    return [shape._replace(name=f"{shape.name}-{n}-tokens", n=n) for n in counts]


# The claims and the README's tables use the first shape of each list.
if DEVICE.type == "cuda":
    MAIN = HEADS
    OVER_TOKENS = [*MAIN, *_tokens(REFERENCE, 1024, 4096, 16_384, 65_536)]
    NARROW = [REFERENCE]
    SMALL = [REFERENCE]
else:
    MAIN = [_CPU]
    OVER_TOKENS = [_CPU, *_CPU_SMALL]
    NARROW = [_CPU_BF16]
    SMALL = _CPU_SMALL[:1]


class Group(NamedTuple):
    """A group's tokens, and its sequences as SEGA scores them: what a step would otherwise read back from the device."""

    tokens: slice  # of the batch
    lengths: Tensor  # (S,) int64: tokens of its sequences
    branch: Tensor  # (S, 2) int32: spans of the group's tokens
    answer: Tensor  # (S, 2) int32: the last quarter of each sequence

    def per_token(self, of_sequences: Tensor) -> Tensor:
        return of_sequences.repeat_interleave(self.lengths, output_size=self.tokens.stop - self.tokens.start)


class Inputs(NamedTuple):
    """The tensors; and on the host what calls of any library need to know of them, so that no timed step reads it back."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    a: Tensor  # (N,) fp32: dL/dlogprob of the scoring loss
    b: Tensor  # (N,) fp32: dL/dentropy
    cu_seqlens: Tensor  # (S+1,) int32
    cu_groups: Tensor  # (B+1,) int32: groups of up to 5 sequences
    seq_weight: Tensor  # (S,) fp32, centred
    token_weight: Tensor  # (N,) fp32: the weight of each token's sequence
    sequences: list[slice]  # their tokens
    groups: list[Group]
    low_a: Tensor  # (RANK, D): an adapter of the head after a little training
    low_b: Tensor  # (V, RANK)


RANK = 16
GROUP = 5
_SPREAD = 4.0
"""standard deviation of the logits of a token"""


def make_groups(cu_seqlens: Tensor, cu_groups: Tensor, device: torch.device) -> list[Group]:
    """Return the groups of a batch from offsets (S+1,) and (B+1,) on the host, with tensors on the device."""
    cu_seqlens, found = cu_seqlens.int(), []
    for start, end in pairwise(cu_groups.tolist()):
        offsets = cu_seqlens[(cu_seqlens >= start) & (cu_seqlens <= end)] - start
        starts, ends, lengths = offsets[:-1], offsets[1:], offsets.diff()
        answers = ends - (lengths // 4).clamp(min=1)
        spans = (torch.stack((starts, answers), 1), torch.stack((answers, ends), 1))
        found.append(Group(slice(start, end), lengths.long().to(device), *(span.to(device) for span in spans)))
    return found


def make_inputs(shape: Shape, device: torch.device = DEVICE) -> Inputs:
    """Return inputs with normal logits, of which the target's is raised by 8 to 34: from unlikely to certain.

    hidden contains the target's row of the weight as a direction, so the operands alone produce the raise.
    """
    n, d, v = shape.n, shape.d, shape.v
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, device=device, dtype=dtype).normal_(0, std, generator=g)

    weight = normal(v, d, std=1 / math.sqrt(d), dtype=shape.dtype)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    raised = torch.empty(n, 1, device=device).uniform_(8, 34, generator=g)
    direction = weight[targets].float()
    hidden = _SPREAD * normal(n, d) + raised * direction / direction.square().sum(1, keepdim=True)
    cu_seqlens, cu_groups = ragged(n)
    lengths = cu_seqlens.diff().long()
    weights = normal(lengths.shape[0])
    weights -= weights.mean()
    return Inputs(
        hidden.to(shape.dtype),
        weight,
        targets,
        normal(n),
        0.3 * normal(n),
        cu_seqlens.to(device),
        cu_groups.to(device),
        weights,
        weights.repeat_interleave(lengths.to(device), output_size=n),
        [slice(*ends) for ends in pairwise(cu_seqlens.tolist())],
        make_groups(cu_seqlens, cu_groups, device),
        normal(RANK, d, std=1 / math.sqrt(d), dtype=shape.dtype),
        normal(v, RANK, std=0.1, dtype=shape.dtype),
    )


def ragged(n: int) -> tuple[Tensor, Tensor]:
    """Return offsets of sequences of 64 to 1024 tokens (shorter if n is small), and of groups of five sequences."""
    longest = max(2, min(1024, n // 8))
    shortest = max(1, min(64, longest // 2))
    g = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while (left := n - sum(lengths)) > 0:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=g))
        lengths.append(left if left - length < shortest else length)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    starts = cu_seqlens[:-1:GROUP]
    return cu_seqlens, torch.cat((starts, cu_seqlens[-1:]))
