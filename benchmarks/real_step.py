"""One training step of a pretrained model with its own head and with ours, on a CPU: peak memory, time and loss.

    python -m benchmarks.real_step --out benchmarks/results/real_step-<device>-<date>.json MODEL [MODEL ...]
    python -m benchmarks.real_step --table benchmarks/results/real_step-<device>-<date>.json     the rows of docs/models.md

MODEL is a folder or a GGUF file. The step is forward, backward and AdamW in fp32 on 4 sequences of 256 random tokens. Every run
is its own process, the heads take turns, and the table shows medians. The peak is the highest resident set in the second step
minus what was resident before it: without weights and optimizer states, with gradients and activations, for both heads.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.measure import forget_peak, resident

BATCH, LENGTH, ROUNDS = 4, 256, 3
HEADS = ("own", "gem-kernels")


def run(source: str, head: str) -> dict[str, Any]:
    """Run once, in this process."""
    import torch

    from gem.doctor import load
    from gem.head import fuse_lm_head

    logging.disable(logging.WARNING)
    model: Any = load(source).float().train()
    vocab, hidden = model.get_output_embeddings().weight.shape
    fused = {} if head == "own" else {"fused_lm_head": True}
    if fused:
        fuse_lm_head(model)
    torch.manual_seed(0)
    ids = torch.randint(0, vocab, (BATCH, LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    losses = []
    for _ in range(2):  # the first step creates the optimizer's states
        before, start = forget_peak(), time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False, **fused).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
        losses.append(float(loss.detach()))
        del loss
    return {"vocab": vocab, "hidden": hidden, "peak_mib": peak, "seconds": seconds, "losses": losses}


def measure(models: list[str]) -> dict[str, Any]:
    cases = {Path(source).stem: source for source in models}
    shape = {"batch": BATCH, "length": LENGTH, "rounds": ROUNDS}
    return turns.measure("benchmarks.real_step", "model", cases, HEADS, ROUNDS, shape)


def table(document: dict[str, Any]) -> list[str]:
    lines = [
        "| model | V | head | peak MiB | seconds | loss of the second step |",
        "|---|---:|---|---:|---:|---:|",
    ]
    runs = document["runs"]
    for model in dict.fromkeys(r["model"] for r in runs):
        for head in HEADS:
            mine = [r for r in runs if (r["model"], r["head"]) == (model, head)]
            peak, seconds = (statistics.median(r[name] for r in mine) for name in ("peak_mib", "seconds"))
            what = (model, f"{mine[0]['vocab']:,}") if head == HEADS[0] else ("", "")
            lines.append(
                f"| {what[0]} | {what[1]} | {head} | {peak:,.0f} | {seconds:.1f} | {mine[0]['losses'][1]:.6f} |"
            )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders or GGUF files")
    turns.main(parser, run, lambda arguments: measure(arguments.models), table)
