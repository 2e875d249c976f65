"""The plan of a run in words and numbers, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gem.launch import FSDP2
from gem.plan import GIB, Plan, Work, plan

DEVICE_GIB = 80.0  # of an A100 or H100
# What a plan does not know of: the allocator's free blocks between those in use (6 %), and the CUDA context, NCCL's buffers and
# the workspaces of the libraries (1 GiB). Both are our choice; no GPU has confirmed them.
RESERVE_SHARE, RESERVE_GIB = 0.06, 1.0


def usable(device_gib: float) -> float:
    """Return the GiB of a device that a plan may fill."""
    return device_gib * (1 - RESERVE_SHARE) - RESERVE_GIB


def lines(of: Plan, device_gib: float | None = None) -> list[str]:
    """Return the plan as the lines of a table: GiB a device by part and phase, then what a step does.

    Args:
        of: the plan.
        device_gib: memory of a device, GiB; None: nothing is said of it.
    """
    work, shards, names = of.work, of.shards, [phase.name for phase in of.phases]
    table = [["GiB a device", *names]]
    for part in dict.fromkeys(part for phase in of.phases for part in phase.parts):
        table.append([part, *(_gib(phase.parts.get(part, 0)) for phase in of.phases)])
    table.append(["total", *(_gib(phase.total) for phase in of.phases)])
    first = max(len(row[0]) for row in table)
    rows = [row[0].ljust(first) + "".join(cell.rjust(12) for cell in row[1:]) for row in table]
    said = [f"parameters    {shards.numel:,}, {shards.numel_trained:,} of them trained; on {_processes(work)}"]
    tokens = work.rows * work.length * work.accumulation
    said.append(
        f"step          {work.accumulation} x {_count(work.groups, 'group')} of {_count(work.members, 'sequence')} of at most "
        f"{work.length:,} tokens a device: at most {tokens * work.launch.processes:,} tokens on all"
    )
    sent = ", ".join(f"{name} {_three(size / 1e9)} GB" for name, size in of.sent.items())
    said.append(f"work          {_three(of.flop / 1e12)} TFLOP a device and step{'; it sends ' + sent if sent else ''}")
    said.append(
        f"logits        {of.unfused / GIB:,.2f} GiB with their log-probs and gradients, a micro-batch, are never made"
    )
    if device_gib is not None:
        worst = max(of.phases, key=lambda phase: phase.total)
        said.append(
            f"device        {device_gib:g} GiB, of which {usable(device_gib):.1f} are for the plan; {worst.name} takes "
            f"{worst.total / GIB:.1f}"
        )
    return [*rows, "", *said]


def _three(number: float) -> str:
    """Return a number with three digits at least."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _processes(work: Work) -> str:
    number = work.launch.processes
    if work.sharded:
        return f"{_count(number, 'device')} by FSDP2"
    return "one device" if number == 1 else f"{number} devices, a whole model on each (DistributedDataParallel)"


def check_fits(of: Plan, device_gib: float) -> None:
    """Check that a plan fits a device.

    Raises:
        ValueError: it does not; the message names the first setting whose change lets it fit, or the one that helps most.
    """
    room = usable(device_gib) * GIB
    if of.total <= room:
        return
    worst = max(of.phases, key=lambda phase: phase.total)
    tried = []
    for change, work in _remedies(of):
        total = plan(work).total
        tried.append((total, change))
        if total <= room:
            break
    total, change = tried[-1] if tried and tried[-1][0] <= room else min(tried, default=(of.total, ""))
    advice = ""
    if change:
        advice = f"{'with' if total <= room else 'no one change is enough; it is least with'} {change}: {total / GIB:.1f} GiB"
    raise ValueError(
        f"device_memory must hold the plan, got {device_gib:g} GiB, of which {usable(device_gib):.1f} are for it, and "
        f"{worst.total / GIB:.1f} GiB needed for {worst.name}; {advice or 'a smaller model'}"
    )


def _remedies(of: Plan) -> Iterator[tuple[str, Work]]:
    """Yield changes of settings, what costs least first, each with the work that it makes."""
    work, worst = of.work, max(of.phases, key=lambda phase: phase.total).name
    # A phase of its own is what a server takes away, and only then.
    if worst == "generation" and work.sharded and of.shards.numel * 2 > 20 * GIB:
        served = replace(work, rollouts=0)
        yield "`gem-kernels score --server` to sample, and train on its groups", served
    if worst == "generation" and work.rollouts > 1:
        fewer = max(1, work.rollouts // 4)
        yield f"rollout_batch_size={fewer}", replace(work, rollouts=fewer)
    if not work.sharded and work.launch.processes > 1:
        yield "accelerate_config of FSDP (fsdp_version 2)", replace(work, launch=replace(work.launch, fsdp=FSDP2))
        both = replace(work, launch=replace(work.launch, fsdp=FSDP2), checkpointing=True)
        yield "accelerate_config of FSDP with fsdp_activation_checkpointing", both
    if not work.checkpointing:
        name = "fsdp_activation_checkpointing" if work.sharded else "activation_checkpointing"
        yield f"{name}=true", replace(work, checkpointing=True)
    if work.groups > 1:
        smaller = replace(work, groups=1, accumulation=work.accumulation * work.groups)
        accumulated = f"gradient_accumulation_steps={smaller.accumulation}"
        yield f"per_device_train_batch_size=1 and {accumulated}", smaller
        if not work.checkpointing:
            yield (
                f"checkpointing, per_device_train_batch_size=1 and {accumulated}",
                replace(smaller, checkpointing=True),
            )
    if work.cache_bytes > 64 << 20:
        yield "cache_mib=64", replace(work, cache_bytes=64 << 20)
    for factor in (2, 4, 8):
        number = factor * work.launch.processes
        fsdp = work.launch.fsdp or FSDP2
        more = replace(work, launch=replace(work.launch, processes=number, fsdp=fsdp))
        yield f"{number} processes{'' if work.sharded else ' under FSDP'}", more
