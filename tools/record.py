"""Record what a call would do on a GPU: its launches, its matrix products and its memory. Nothing is computed.

The public functions run on meta tensors, which have shapes and no values. `gem_kernels.compat` hands over every Triton launch
in place of running it, and a dispatch mode sees every torch operation, those of autograd too. So what is recorded is what the
code does: there is no second list of its steps that could differ from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as meta_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gem_kernels import compat


class Shaped(NamedTuple):
    """What a launch says of a tensor, which is free to go."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return self.itemsize * prod(self.shape)


class Launch(NamedTuple):
    """A launch of one of our kernels."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """by name, constants and launch options too; a Shaped for each tensor"""


class Gemm(NamedTuple):
    """A product (m, k) x (k, n) in the GEMM library."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    """of the operands"""
    out_dtype: torch.dtype
    accumulates: bool
    """True if the result is added to what is there"""

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


class TorchOp(NamedTuple):
    """Another operation of torch."""

    name: str
    bytes: int
    """read and written; 0 if it launches nothing (a view, an allocation)"""


Event = Launch | Gemm | TorchOp


class Recording(NamedTuple):
    """What one call did."""

    events: list[Event]
    """in their order"""
    extra_bytes: int
    """largest memory at any time, beyond the operands and the results"""


_FIRST_FACTOR = {"mm": 0, "addmm": 1, "addmm_": 1}  # position of the left factor in the arguments
_WRITE_ONLY = ("copy_", "fill_", "zero_")
_SELECT = ("index", "index_select", "gather")  # read as much as they return
_SCATTER = ("index_put_", "index_copy_", "scatter_")  # write as much as their last argument has


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of each; an expanded dimension has those of one entry."""
    return sum(
        t.element_size() * prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {(s := t.untyped_storage())._cdata: s for t in tensors if t.is_meta}


class WithoutProducts(TorchDispatchMode):
    """Skip matrix products on meta tensors: before 2.10 torch has none there whose result is wider than its operands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _FIRST_FACTOR and args[0].is_meta:
            if "out" in kwargs:
                return kwargs["out"]
            if func is torch.ops.aten.mm.dtype:
                a, b, dtype = args
                return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
        return func(*args, **kwargs)


class _Recorder(WithoutProducts):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.live: dict[int, int] = {}
        """bytes of each storage that was allocated here and is not freed"""
        self.peak = 0

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | meta
        shapes = {
            name: Shaped(tuple(value.shape), value.element_size()) if isinstance(value, Tensor) else value
            for name, value in named.items()
        }
        if 0 not in grid:
            self.events.append(Launch(kernel.fn.__name__, grid, shapes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "gem_kernels":
            with self:  # on meta tensors its fake would run: this is the implementation
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs, results = _tensors((args, kwargs)), _tensors(out)
        if any(t.is_meta for t in (*inputs, *results)):
            name = func.overloadpacket.__name__
            new = {key: storage for key, storage in _storages(results).items() if key not in _storages(inputs)}
            self._allocate(new)
            if name in _FIRST_FACTOR:
                self._gemm(name, args, results[0])
            else:
                writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
                launches = not name.startswith(("empty", "new_empty")) and (writes or bool(new))
                self.events.append(TorchOp(name, _traffic(name, args, kwargs, inputs, results) if launches else 0))
        return out

    def _gemm(self, name: str, args: Any, out: Tensor) -> None:
        a, b = args[_FIRST_FACTOR[name] :][:2]
        self.events.append(Gemm(a.shape[0], b.shape[1], a.shape[1], a.dtype, out.dtype, accumulates=name != "mm"))

    def _allocate(self, storages: dict[int, torch.UntypedStorage]) -> None:
        for key, storage in storages.items():
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))


def _traffic(name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], results: list[Tensor]) -> int:
    """Return the bytes that an operation reads and writes."""
    if name in _SELECT:
        return 2 * _bytes(results)
    if name in _SCATTER:
        return 2 * _bytes([t for t in inputs if t.is_meta][-1:])
    written = _tensors(kwargs.get("out")) or (_tensors(args[:1]) if name in _WRITE_ONLY else [])
    read = [t for t in inputs if all(t is not w for w in written)]
    return _bytes(read) + _bytes(results)


def record(prepare: Callable[[], Callable[[], Any]], arch: int, processors: int) -> Recording:
    """Record a call on meta tensors for a GPU of this compute capability and number of streaming multiprocessors.

    prepare: makes the inputs and returns the call. The results of the call, in any nesting, are not counted as extra memory.
    """
    recorder = _Recorder()
    # A meta tensor has no values, so the lookup of kept tokens assumes that all are kept.
    all_kept = meta_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with compat.compiling(arch, recorder.launch, processors), all_kept:
        call = prepare()
        with recorder:
            results = call()
    # A result that is an operand, overwritten, was there before.
    kept = sum(recorder.live.get(key, 0) for key in _storages(_tensors(results)))
    return Recording(recorder.events, recorder.peak - kept)
