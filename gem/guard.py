"""Guard rails of a training: warn of an uninformative score, and stop a run that collapses, explodes or learns nothing.

gem/rails.py lists the rails, says what each looks for, and gives their verdicts. The only memory of a guard is the trainer's
log history, so a resumed run stops where an uninterrupted one would. After a stop the best weights that were saved are
restored. Numbers that are not finite are no matter of degree: gem/trainer.py raises.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.checkpoints import manifest_flaw, steps_of
from gem.config import GuardArguments
from gem.distributed import gathered, local_part, whole_norm
from gem.finite import not_finite
from gem.group import Group
from gem.rails import (
    FEW_PAIRS,
    LEAP,
    STREAK,
    WATCHED,
    Entry,
    explosion,
    gate_message,
    has_fallen,
    idle_steps,
    ordered_pairs,
    why_idle,
)
from gem.run_files import BEST_FOLDER, has_manifest, numbered_checkpoints
from gem.stops import Diverged

logger = logging.getLogger(__name__)

LOST = 0.25  # share of the weights that 16 bits keep from moving, from which on a warning comes
LOSES_LITTLE = re.compile(r"sgd|lomo|stable_adamw|(kahan|stochastic)\w*=\s*(1|on|t|true|y|yes)\b", re.IGNORECASE)
"""Optimizers whose steps are not about the learning rate; an optimizer, and settings of others, that make up for rounding."""


class CollapseGuard(TrainerCallback):
    """Stop a training whose numbers say that going on is of no use, and have Trainer load the best weights saved.

    Args:
        guard: the settings.
        online: the groups are made anew at every step.
        guessing: the loss of a model that gives every token the same probability, nats; inf: the loss is another.

    After a stop, `stopped` says why in one line, and `diverged` is True unless the run merely got worse than its best.
    `doubtful` is True while the last logged step lies where three in a row would be an explosion.
    """

    # Evaluations that are equal in one number are told apart by the next; equal in all, the later is the best.
    RANKED = (*WATCHED, "eval_preference_token")

    def __init__(self, guard: GuardArguments, *, online: bool = False, guessing: float = math.inf) -> None:
        self.guard, self.online, self.guessing = guard, online, guessing
        self.stopped, self.diverged, self.doubtful = "", False, False
        self._warned, self._in_training = False, False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._in_training = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._in_training = False  # an evaluation of the final weights stops nothing

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if state.global_step == 0 and "eval_auroc" in metrics:
            warn_below_gate(metrics["eval_auroc"], self.guard)
        for name in WATCHED:
            values = _history(state, name)
            if self._in_training and not self.stopped and has_fallen(values, self.guard):
                self._stop(args, state, control, f"{name} fell to {values[-1]:.3f}")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped or "loss" not in kwargs["logs"]:
            return
        steps = [entry for entry in state.log_history if "loss" in entry]
        self.doubtful = bool(explosion(steps, self.guard, self.guessing, streak=1))
        if exploded := explosion(steps, self.guard, self.guessing):
            self.diverged = True
            # A loss is that of the weights before its step: the last one that was well says nothing of its step's own update.
            well = steps[-STREAK - 1]["step"]
            self._stop(args, state, control, exploded, before=int(well))
        elif self.guard.stop_idle:
            self._check_idle(args, state, control, steps)

    def _check_idle(self, args: Any, state: TrainerState, control: TrainerControl, steps: Sequence[Entry]) -> None:
        """Warn halfway to stop_idle, then stop."""
        idle = idle_steps(steps, self.online)
        said = f"{idle} steps in a row had nothing to learn from: {why_idle(steps[-1], self.online)}"
        if idle >= self.guard.stop_idle:
            self.diverged = True
            self._stop(args, state, control, said)
        elif idle and 2 * idle >= self.guard.stop_idle and not self._warned:
            logger.warning("%s; the run stops after %d", said, self.guard.stop_idle)
        self._warned = 2 * idle >= self.guard.stop_idle

    def is_best(self, state: TrainerState) -> bool:
        """Return True if the evaluation just logged is the best so far, or equal to it."""
        found = [
            tuple(entry.get(name, -math.inf) for name in self.RANKED)
            for entry in state.log_history
            if any(name in entry for name in WATCHED)
        ]
        return bool(found) and self.guard.stop_patience > 0 and found[-1] == max(found)

    def _stop(
        self, args: Any, state: TrainerState, control: TrainerControl, why: str, before: int | None = None
    ) -> None:
        """End the training after this step, and have Trainer load the best weights, or the last ones saved `before` a step."""
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        folder = Path(args.output_dir)
        end = state.global_step + 1 if before is None else before  # an earlier start may have left later checkpoints
        saved = [folder / BEST_FOLDER, *numbered_checkpoints(folder)]
        best = next((path for path in saved if _is_whole(path) and steps_of(path)[0] < end), None)
        self.stopped = f"stopped after step {state.global_step} of {state.max_steps}: {why}"
        if best and not args.load_best_model_at_end:
            args.load_best_model_at_end, state.best_model_checkpoint = True, str(best)
        logger.warning("%s", self.stopped)


def _is_whole(checkpoint: Path) -> bool:
    """Return True if the files of a checkpoint are as its manifest says; warn if they are not."""
    if not has_manifest(checkpoint):
        return False
    if flaw := manifest_flaw(checkpoint):
        logger.warning("%s is not whole and is not restored: %s", checkpoint, flaw)
    return not flaw


class SoundWeights(TrainerCallback):
    """Raise Diverged after an optimizer step that has left a weight NaN, infinite, or far larger, before anything is saved.

    The log says as weight_growth how many times as large a step has made the norm of the weights, at most since the last log.
    """

    def __init__(self, guard: GuardArguments) -> None:
        self.leaps = guard.stop_growth > 0
        self._norm, self._growth = 0.0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._norm, self._growth = check_weights(kwargs["model"], "before the first step, the model has"), 0.0
        if LOSES_LITTLE.search(f"{args.optim.value} {args.optim_args or ''}"):
            return
        if lost := lost_steps(kwargs["model"], args.learning_rate):
            remedy = "dtype=float32 keeps it (bf16=true then computes in bfloat16), and so do adapters (lora_rank)"
            logger.warning("the optimizer changes %s: %s", lost, remedy)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, step = self._norm, f"step {state.global_step}: the optimizer's step"
        self._norm = check_weights(kwargs["model"], f"{step} has left")
        self._growth = max(self._growth, self._norm / before if before else 0.0)
        if self.leaps and 0 < LEAP * before < self._norm:
            grown = f"{step} has made the norm of the weights {self._norm:.3g}, from {before:.3g}"
            raise Diverged(f"{grown} (learning_rate={args.learning_rate:g}; lower it)", "leap")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and self._growth:
            state.log_history[-1]["weight_growth"] = self._growth
            self._growth = 0.0


def lost_steps(model: nn.Module, learning_rate: float) -> str:
    """Return what to say of weights that 16 bits make too coarse for steps of the learning rate; "" below LOST of them.

    The first step of AdamW is about the learning rate, and later ones are as a rule smaller, so that more is lost: "" is no
    proof that nothing is. Added to a weight of 16 bits, a step is rounded away where it is less than half the distance to the
    next number: in bfloat16, 1e-5 is lost on all weights above 0.004. fp32 weights under autocast keep it.

    Args:
        model: its parameters that require a gradient are looked at, of sharded ones the parts of this process.
        learning_rate: the largest of the training. 0 is no step.
    """
    if not learning_rate:
        return ""
    trained = [local_part(p.detach()) for p in model.parameters() if p.requires_grad]
    coarse = [p for p in trained if torch.finfo(p.dtype).bits <= 16]
    lost = sum(int((p + learning_rate == p).sum()) for p in coarse) / max(sum(p.numel() for p in trained), 1)
    if lost < LOST:
        return ""
    dtype = str(coarse[0].dtype).removeprefix("torch.")
    return f"weights in {dtype}, where a step of {learning_rate:g} leaves {lost:.0%} of them as they are"


def check_weights(model: nn.Module, what: str) -> float:
    """Return the norm of the weights that are trained; raise Diverged, beginning with `what`, if one is not finite."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return _finite_norm(trained, f"{what} %s", "weights whose norm overflows")


def check_gradients(model: nn.Module, what: str) -> float:
    """Return the norm of the gradients; raise Diverged, beginning with `what`, if one is not finite."""
    found = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return _finite_norm(found, f"{what} %s", "a norm that overflows")


def _finite_norm(named: Sequence[tuple[str, Tensor]], message: str, overflow: str) -> float:
    """Return the norm of all tensors together: one pass, and one number read back from the device.

    It is taken in fp32 at least: in fp16, that of healthy weights overflows. All processes find the same.
    """
    tensors = [tensor for _, tensor in named]
    parts = [(name, local_part(tensor)) for name, tensor in named]
    wide = [torch.promote_types(part.dtype, torch.float32) for _, part in parts]
    norms = [torch.linalg.vector_norm(part, dtype=dtype) for (_, part), dtype in zip(parts, wide, strict=True)]
    norm = whole_norm(norms, tensors)
    if not math.isfinite(norm):
        found = not_finite(parts)
        if any(part is not tensor for (_, part), tensor in zip(parts, tensors, strict=True)):
            found = next(filter(None, gathered(found)), "")  # the shard of one process may be what is not finite
        raise Diverged(message % (found or overflow))
    return norm


def _history(state: TrainerState, name: str) -> list[float]:
    return [entry[name] for entry in state.log_history if name in entry]


def warn_below_gate(auroc: float, guard: GuardArguments, pairs: float = math.inf) -> None:
    """Log a warning if the AUROC of S is below the gate.

    Args:
        auroc: share of the pairs that S orders rightly. NaN, which means that there were none, passes.
        guard: the gate.
        pairs: number of human pairs; fewer than ten are no reason to warn, and the log says so. inf: as in ordered_pairs.
    """
    if auroc < guard.auroc_gate and pairs < FEW_PAIRS:
        logger.info("AUROC gate: %s", ordered_pairs(auroc, pairs))
    elif auroc < guard.auroc_gate:
        logger.warning("AUROC gate: %s", gate_message(auroc, guard, pairs))


def scored_pairs(groups: Sequence[Group]) -> int:
    """Return the number of groups whose human answers both have a score."""
    human = [[m.score for m in group.members if m.role != "candidate"] for group in groups if group.has_pair]
    return sum(all(map(math.isfinite, scores)) for scores in human)
