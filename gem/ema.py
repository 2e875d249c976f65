"""Exponential moving average of the weights in training: the scorer of `score_with: ema`.

    average <- decay * average + (1 - decay) * weight        after every optimizer step, from the weights before the first

A policy that scores itself can raise its score in one step by being surer of itself. The average follows it decay / (1 - decay)
steps behind on average, 19 with the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.run_files import AVERAGE_FILE


class WeightAverage(TrainerCallback):
    """Average the weights of a model that are trained: with LoRA, those of the adapters alone. It is held in fp32, or wider.

    It is saved with every checkpoint that a run can go on from, so it must come before KeepWhole among the callbacks, which
    writes the manifest. Each process of DistributedDataParallel has the same weights, and keeps the same average.

    Args:
        decay: share of the average that a step leaves, ema_decay.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}  # empty before training

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = _trained(kwargs["model"])
        begun = self._averages or {name: p.detach().to(_wide(p.dtype), copy=True) for name, p in weights.items()}
        self._averages = {name: average.to(weights[name].device) for name, average in begun.items()}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = dict(kwargs["model"].named_parameters())  # some may be frozen by now
        for name, average in self._averages.items():
            average.lerp_(weights[name].detach().to(average.dtype), 1 - self.decay)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and not args.save_only_model:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE_FILE
            save_file({name: average.cpu() for name, average in self._averages.items()}, path)

    def restart(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Go on from the average of a checkpoint; without one, from the weights that the next training begins with.

        Raises:
            ValueError: the checkpoint has no average, or one of other weights.
        """
        self._averages = {}
        if checkpoint is None:
            return
        path = checkpoint / AVERAGE_FILE
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint must hold {AVERAGE_FILE} with score_with=ema, got {checkpoint}, which has none"
            )
        saved, weights = load_file(path), _trained(model)
        expected = {name: (p.shape, _wide(p.dtype)) for name, p in weights.items()}
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
        if found != expected:
            name = sorted(n for n in {**found, **expected} if found.get(n) != expected.get(n))[0]
            raise ValueError(
                f"{path} must hold an average of each weight that is trained, got {_described(found, name)}, "
                f"expected {_described(expected, name)}"
            )
        self._averages = saved

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the model with the averaged weights, and give it its own back at the end of the block.

        The block must neither train nor keep a graph for a backward. The tensors are exchanged, not copied, so every
        bit comes back. Before training the average is the model itself.

        Args:
            model: the model that is trained.
        """
        weights = {name: p for name, p in model.named_parameters() if name in self._averages}
        own = {name: p.data for name, p in weights.items()}
        try:
            for name, p in weights.items():
                p.data = self._averages[name].to(p.device, p.dtype)
            yield model
        finally:
            for name, p in weights.items():
                p.data = own[name]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an average: in fp16 or bf16, steps of 1 - decay would be lost in rounding."""
    return torch.promote_types(dtype, torch.float32)


def _described(tensors: dict[str, tuple[torch.Size, torch.dtype]], name: str) -> str:
    if name not in tensors:
        return f"none of {name}"
    shape, dtype = tensors[name]
    return f"{name} of shape {tuple(shape)} and {dtype}"
