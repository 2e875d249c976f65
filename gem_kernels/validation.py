"""Shape, dtype, device and range checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gem_kernels.types import LogitTransform, LowRank, VocabShard

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _shape(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype}".replace("torch.", "")


def values_are_readable(t: Tensor) -> bool:
    """True if values may be checked: on the CPU, elsewhere with GEM_KERNELS_CHECK=1 (it synchronises), never in a graph."""
    if torch.compiler.is_compiling():
        return False
    return t.device.type == "cpu" or os.environ.get("GEM_KERNELS_CHECK") == "1"


def check_tensor(name: str, t: object) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    return t


def check_float(name: str, t: object) -> Tensor:
    tensor = check_tensor(name, t)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {_shape(tensor)}")
    return tensor


def check_same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {t.device}")


def check_transform(transform: object) -> None:
    if not isinstance(transform, LogitTransform):
        raise TypeError(f"transform must be a gem_kernels.LogitTransform, got {type(transform).__name__}")


def check_cache_bytes(cache_bytes: object) -> None:
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 1:
        raise ValueError(f"cache_bytes must be an int >= 1, got {cache_bytes!r}")


def check_seq_weight(seq_weight: object, sequences: int, source: Tensor) -> Tensor:
    """Check seq_weight: (S,) floating, finite, constant."""
    w = check_float("seq_weight", seq_weight)
    if w.shape != (sequences,):
        raise ValueError(f"seq_weight must be (S={sequences},), got {tuple(w.shape)}")
    if w.requires_grad:
        raise ValueError("seq_weight must not require a gradient (the weights of Eq. 2 are constants), pass .detach()")
    check_same_device("seq_weight", w, "the inputs", source)
    if values_are_readable(w):
        bad = ~w.isfinite()
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"seq_weight must be finite, got {float(w[at])} at sequence {at}")
    return w


def check_targets(
    targets: object, batch_shape: torch.Size, vocab: int, ignore_index: int | None, source: Tensor
) -> None:
    """Check targets: integers of the batch shape, each in [0, vocab) or ignore_index, which may lie in [0, vocab) itself."""
    if isinstance(ignore_index, bool) or not (ignore_index is None or isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index must be an int, or None, got {type(ignore_index).__name__}")
    t = check_tensor("targets", targets)
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32 token ids, got {_shape(t)}")
    if t.shape != batch_shape:
        raise ValueError(f"targets must have the leading shape of the inputs {tuple(batch_shape)}, got {_shape(t)}")
    check_same_device("targets", t, "the inputs", source)
    if t.numel() and values_are_readable(t):
        bad = (t < 0) | (t >= vocab)
        if ignore_index is not None:
            bad &= t != ignore_index
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            ignored = "(ignore_index is None)" if ignore_index is None else f"or ignore_index={ignore_index}"
            raise ValueError(f"targets must be in [0, V={vocab}) {ignored}, got {int(t.flatten()[at])} at token {at}")


def check_shard(shard: object) -> None:
    """Check that shard is a VocabShard of an initialised process group; check_linear checks its rows."""
    import torch.distributed as dist

    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a gem_kernels.VocabShard, got {type(shard).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("shard needs torch.distributed.init_process_group to have run, and it has not")
    if not isinstance(shard.group, dist.ProcessGroup):
        raise TypeError(
            f"shard.group must be a torch.distributed.ProcessGroup with this rank in it, got {type(shard.group).__name__}"
        )
    for name, value in (("start", shard.start), ("total", shard.total)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"shard.{name} must be an int, got {type(value).__name__}")


def check_linear(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    low_rank: LowRank | None,
    ignore_index: int | None,
    shard: VocabShard | None,
) -> None:
    """Check hidden (..., D), weight (V, D), bias (V,), low_rank a (r, D) and b (V, r): one dtype and one device.

    With a shard V are the rows of this rank, perhaps none, and the targets are indices in the vocabulary of all ranks.
    """
    h, w = check_float("hidden", hidden), check_float("weight", weight)
    if h.ndim < 1 or w.ndim != 2 or h.shape[-1] != w.shape[1]:
        raise ValueError(f"expected hidden (..., D) and weight (V, D), got hidden {_shape(h)} and weight {_shape(w)}")
    if w.shape[1] < 1 or (w.shape[0] < 1 and shard is None):
        raise ValueError(f"weight must have at least one row and one column (V >= 1, D >= 1), got {_shape(w)}")
    if h.dtype != w.dtype:
        raise TypeError(
            f"hidden and weight must have one dtype (cast one, or run under torch.autocast), "
            f"got hidden {_shape(h)} and weight {_shape(w)}"
        )
    check_same_device("weight", w, "hidden", h)
    if bias is not None:
        b = check_float("bias", bias)
        if b.shape != w.shape[:1] or b.dtype != h.dtype:
            raise ValueError(f"bias must be (V={w.shape[0]},) {h.dtype}, got {_shape(b)}")
        check_same_device("bias", b, "hidden", h)
    if low_rank is not None:
        if not isinstance(low_rank, LowRank):
            raise TypeError(f"low_rank must be a gem_kernels.LowRank, got {type(low_rank).__name__}")
        a, b = check_float("low_rank.a", low_rank.a), check_float("low_rank.b", low_rank.b)
        r = a.shape[0] if a.ndim == 2 else -1
        if a.shape != (r, h.shape[-1]) or b.shape != (w.shape[0], r):
            raise ValueError(
                f"expected low_rank.a (r, D={h.shape[-1]}) and low_rank.b (V={w.shape[0]}, r), "
                f"got a {_shape(a)} and b {_shape(b)}"
            )
        # peft keeps its factors in fp32 beside a bf16 model; the low-rank product runs in fp32 anyway.
        allowed = (h.dtype, torch.float32)
        if a.dtype != b.dtype or a.dtype not in allowed:
            raise TypeError(f"low_rank.a and .b must both be {h.dtype} or float32, got a {_shape(a)}, b {_shape(b)}")
        check_same_device("low_rank.a", a, "hidden", h)
        check_same_device("low_rank.b", b, "hidden", h)
    if shard is not None and not 0 <= shard.start <= shard.start + w.shape[0] <= shard.total:
        raise ValueError(
            f"shard must satisfy 0 <= start <= start + rows of weight <= total, got start={shard.start}, "
            f"total={shard.total} and weight {_shape(w)}"
        )
    check_targets(targets, h.shape[:-1], w.shape[0] if shard is None else shard.total, ignore_index, h)


def check_offsets(name: str, offsets: object, total: int, *, allow_empty: bool) -> None:
    """Check offsets: (S+1,) integers rising from 0 to `total` (flash-attn's cu_seqlens)."""
    t = check_tensor(name, offsets)
    if t.dtype not in (torch.int32, torch.int64) or t.ndim != 1 or t.numel() < 1:
        raise ValueError(f"{name} must be a 1-D int32 or int64 tensor of offsets [0, ..., {total}], got {_shape(t)}")
    if not values_are_readable(t):
        return
    if int(t[0]) != 0 or int(t[-1]) != total:
        raise ValueError(f"{name} must start at 0 and end at the number of tokens {total}, got {t.tolist()[:8]}...")
    steps = t.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise ValueError(f"{name} must not fall, got {int(t[at])} then {int(t[at + 1])} at index {at}")
    if not allow_empty and bool((steps == 0).any()):
        at = int((steps == 0).nonzero()[0])
        raise ValueError(f"{name} must not hold an empty group, got offset {int(t[at])} twice for group {at}")


def check_spans(name: str, spans: object, total: int) -> None:
    """Check spans: (S, 2) integers [start, end) with 0 <= start <= end <= total."""
    t = check_tensor(name, spans)
    if t.dtype not in (torch.int32, torch.int64) or t.ndim != 2 or t.shape[1] != 2:
        raise ValueError(f"{name} must be (S, 2) int32 or int64 [start, end) offsets, got {_shape(t)}")
    if values_are_readable(t):
        bad = (t[:, 0] < 0) | (t[:, 1] < t[:, 0]) | (t[:, 1] > total)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"{name} must satisfy 0 <= start <= end <= {total}, got {t[at].tolist()} at sequence {at}")


def check_m(m: object) -> None:
    """Check m: a count (int >= 1) or a fraction (float in (0, 1])."""
    if isinstance(m, bool) or not isinstance(m, (int, float)):
        raise TypeError(f"m must be an int (count) or a float (fraction), got {type(m).__name__}")
    if isinstance(m, int) and m < 1:
        raise ValueError(f"m as a count must be >= 1, got {m}")
    if isinstance(m, float) and not 0 < m <= 1:
        raise ValueError(f"m as a fraction must be in (0, 1], got {m} (pass an int for a count)")
