"""Where a test computes: its cases on the CPU, and its cases on a GPU, for one body that takes the fixture `device`.

A case marked `gpu` computes on the GPU, every other case on the CPU; each_case writes both lists beside the check. `make gpu`
runs the files of GPU_FILES with `-m gpu`. On a machine without a GPU these cases are skipped.

GEM_KERNELS_TEST_DEVICE=cpu with TRITON_INTERPRET=1 is a dry run: the cases of a GPU on the CPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from numerics import IMPLS, Case, make_case

from gem_kernels.compat import INTERPRETED
from gem_kernels.tiles import ChunkTile

CPU, GPU = torch.device("cpu"), torch.device(os.environ.get("GEM_KERNELS_TEST_DEVICE", "cuda"))
ON_GPU = GPU.type == "cuda"
GPU_IMPLS = ("chunked", "triton")
LOST = 77  # the exit status by which `make gpu` recognises a process that lost its device, and starts another

Axis = Mapping[str, Any] | Sequence[Any]
"""Values of a parameter, under their ids or under their names"""

needs_cuda = pytest.mark.skipif(not ON_GPU, reason="not part of a dry run")
each_impl = pytest.mark.parametrize("impl", GPU_IMPLS)


PLAIN = {"bias": False, "rank": 0}  # settings of make_case: a head without bias and adapter


def drawn(n: int, d: int, v: int, **settings: Any) -> dict[str, Callable[..., Case]]:
    """Return an axis of one value: a function that draws this case on a device."""
    return {f"{n}x{d}x{v}": partial(make_case, n, d, v, **settings)}


def use_small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Set the CPU's tile in every module that holds it."""
    for module in ("tiles", "rows_torch", "logprob.chunked", "scoring.chunked"):
        patch.setattr(f"gem_kernels.{module}.CHUNKED", ChunkTile(rows=37, cols=48, block=523))


def no_gpu() -> str | None:
    """Return why the cases of a GPU cannot run here, or None."""
    if ON_GPU and not torch.cuda.is_available():
        return "needs a CUDA device"
    return "the kernels are interpreted" if ON_GPU and INTERPRETED else None


def _named(axis: Axis) -> list[tuple[str, Any]]:
    items = axis.items() if isinstance(axis, Mapping) else [(getattr(v, "__name__", str(v)), v) for v in axis]
    return [(str(name), value) for name, value in items]


def _product(axes: Mapping[str, Axis], prefix: str = "", **settings: Any) -> list[Any]:
    points = itertools.product(*map(_named, axes.values()))
    return [
        pytest.param(*(value for _, value in point), id=prefix + "-".join(name for name, _ in point), **settings)
        for point in points
    ]


def each_case(*, gpu: Mapping[str, Axis] | Sequence[Mapping[str, Axis]] = (), **axes: Axis) -> pytest.MarkDecorator:
    """Parametrize a test by the product of `axes` on the CPU, and by that of each mapping in `gpu` on a GPU.

    `impl` is the first axis: IMPLS on the CPU unless given, GPU_IMPLS on a GPU. An axis that a mapping leaves out is the CPU's.
    """
    axes = {"impl": IMPLS, **axes}
    cases = _product(axes)
    for other in [gpu] if isinstance(gpu, Mapping) else gpu:
        unknown = other.keys() - axes.keys()
        assert not unknown, f"axes of the GPU alone: {unknown}"
        cases += _product({**axes, "impl": GPU_IMPLS, **other}, "gpu-", marks=pytest.mark.gpu)
    return pytest.mark.parametrize(tuple(axes), cases)
