"""Plant faults of a given size into a model, and find the smallest that fuse_lm_head refuses.

    python tests/planted_faults.py --model FOLDER --out benchmarks/results/planted_faults-<device>-<date>.json
    python tests/planted_faults.py --table JSON     the table of docs/models.md

FOLDER: a pretrained model with a small head; three tiny architectures are tried beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from architectures import build
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results import describe_machine, said
from gem.doctor import load
from gem.head import fuse_lm_head, unfuse

Plant = Callable[[Any, float], None]  # a model, a size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = ("llama", "gemma2", "granite")
SIZES = [2.0**-i for i in range(1, 31)]


def one_entry(z: Tensor, size: float) -> Tensor:
    return torch.cat([z[..., :-1], z[..., -1:] + size], -1)


def softcap(z: Tensor, size: float) -> Tensor:
    return torch.tanh(z * size) / size


def after_the_head(change: Callable[[Tensor, float], Tensor]) -> Plant:
    """Return a fault in what the model does to its logits, and so to its loss."""

    def plant(model: Any, size: float) -> None:
        inner = model.forward

        def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            out.logits = change(out.logits, size)
            if labels is not None:
                out.loss = model.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
            return out

        model.forward = forward

    return plant


def in_the_head(change: Callable[[Tensor, float], Tensor]) -> Plant:
    def plant(model: Any, size: float) -> None:
        inner = model.lm_head.forward
        model.lm_head.forward = lambda hidden: change(inner(hidden), size)

    return plant


def one_weight(model: Any, size: float) -> None:
    """Let the head multiply with another weight than it shows: `size` is added to one entry."""
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: torch.cat(
        [(z := inner(hidden))[..., :-1], z[..., -1:] + size * hidden[..., 1:2]], -1
    )


def in_the_loss(change: Callable[[Any, Tensor, float], Tensor]) -> Plant:
    """Return a fault in the loss: change(output, labels, size) -> loss."""

    def plant(model: Any, size: float) -> None:
        inner = model.forward

        def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            out = inner(*args, labels=labels, **kwargs)
            if labels is not None:
                out.loss = change(out, labels, size)
            return out

        model.forward = forward

    return plant


def unshifted(out: Any, labels: Tensor, size: float) -> Tensor:
    return torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten())


FAULTS: dict[str, Plant] = {
    "logits times 1 + x": after_the_head(lambda z, size: z * (1 + size)),
    "a softcap of 1 / x": after_the_head(softcap),
    "x added to one logit": after_the_head(one_entry),
    "the head's product times 1 + x": in_the_head(lambda z, size: z * (1 + size)),
    "a softcap of 1 / x in the head": in_the_head(softcap),
    "x added to one entry of its bias": in_the_head(one_entry),
    "x added to one entry of its weight": one_weight,
    "a z-loss, x lse²": in_the_loss(
        lambda out, labels, size: out.loss + size * out.logits.float().logsumexp(-1).square().mean()
    ),
    "the loss times 1 + x": in_the_loss(lambda out, labels, size: out.loss * (1 + size)),
    "labels that are not shifted": in_the_loss(unshifted),
}


@contextmanager
def planted(model: Any, fault: str, size: float) -> Iterator[Any]:
    try:
        FAULTS[fault](model, size)
        yield model
    finally:
        for owner in (model, model.lm_head):
            vars(owner).pop("forward", None)


def refusal(model: Any, fault: str, size: float) -> str | None:
    """Return the message with which fuse_lm_head refuses the model with this fault, or None. The model is left unchanged."""
    with planted(model, fault, size):
        try:
            fuse_lm_head(model)
        except ValueError as error:
            return str(error)
        unfuse(model)
    return None


def smallest_refused(model: Any, fault: str) -> float | None:
    """Return the last of SIZES before the first that passes; None if 1/2 passes."""
    if fault == "labels that are not shifted":
        return SIZES[0] if refusal(model, fault, SIZES[0]) else None
    last = None
    for size in SIZES:
        if refusal(model, fault, size) is None:
            break
        last = size
    return last


def measure(folder: str) -> dict[str, Any]:
    models: dict[str, Callable[[], Any]] = {"SmolLM2-135M-Instruct": lambda: load(folder)}
    models |= {f"tiny {name}": lambda name=name: build(name) for name in TINY}  # type: ignore[misc]
    rows = []
    for name, make in models.items():
        for dtype, torch_dtype in DTYPES.items():
            model = make().to(torch_dtype)
            for fault in FAULTS:
                rows.append({"model": name, "dtype": dtype, "fault": fault, "smallest": smallest_refused(model, fault)})
                print(rows[-1], flush=True)
    about = {"date": date.today().isoformat(), "commit": said("git", "rev-parse", "HEAD")}
    return {"machine": describe_machine(), **about, "rows": rows}


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of a table with faults as rows and models as columns, fp32 / bf16."""
    rows = document["rows"]
    models, found = (
        list(dict.fromkeys(r["model"] for r in rows)),
        {(r["model"], r["dtype"], r["fault"]): r for r in rows},
    )
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for fault in dict.fromkeys(r["fault"] for r in rows):
        cells = []
        for model in models:
            sizes = [found[model, dtype, fault]["smallest"] for dtype in DTYPES]
            shown = ["-" if s is None else "refused" if "labels" in fault else f"{s:.1e}" for s in sizes]
            cells.append(" / ".join(shown))
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model")
    parser.add_argument("--out", type=Path, help="measure, and write this JSON")
    parser.add_argument("--table", type=Path, help="print the table of a JSON")
    arguments = parser.parse_args()
    if arguments.out:
        document = measure(arguments.model)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(json.loads((arguments.table or arguments.out).read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
