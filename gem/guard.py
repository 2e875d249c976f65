"""Guard rails of a training: warn of an uninformative score, and stop a run that collapses, explodes or learns nothing.

    collapse    held-out accuracy or AUROC of S has fallen and stays down     (stop_patience, stop_margin)
    explosion   gradient norm or |loss| is far above its level at the start   (stop_growth)
    leap        one optimizer step makes the weights ten times as large       (stop_growth)
    idle        the gradient is 0 or, online, no group is of use, many times  (stop_idle)

For `sft`, an explosion is also a loss twice as large as that of guessing and of the start.

The only memory of a guard is the trainer's log history, so a resumed run stops where an uninterrupted one would. After a stop
the best weights that were saved are restored. Numbers that are not finite are no matter of degree: gem/trainer.py raises.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.checkpoints import manifest_flaw, steps_of
from gem.config import GuardArguments
from gem.finite import not_finite
from gem.run_files import BEST_FOLDER, has_manifest, numbered_checkpoints
from gem.stops import Diverged

logger = logging.getLogger(__name__)

FIRST, LEVEL = 10, 20  # least and most logged steps from the start whose largest value is the level of the run
STREAK = 3  # logged steps in a row far above it: one may be a bad batch, which max_grad_norm clips
LEAP = 10.0  # growth of the norm of the weights in one step, which no useful learning rate gives
Entry = Mapping[str, float]


class CollapseGuard(TrainerCallback):
    """Stop a training whose numbers say that going on is of no use, and have Trainer load the best weights saved.

    Args:
        guard: the settings.
        online: the groups are made anew at every step.
        guessing: the loss of a model that gives every token the same probability, nats; inf: the loss is another.

    After a stop, `stopped` says why in one line, and `diverged` is True unless the run merely got worse than its best.
    `doubtful` is True while the last logged step lies where three in a row would be an explosion.
    """

    WATCHED = ("eval_accuracy_sampled", "eval_auroc")
    # Evaluations that are equal in one number are told apart by the next; equal in all, the later is the best.
    RANKED = (*WATCHED, "eval_preference_token")

    def __init__(self, guard: GuardArguments, *, online: bool = False, guessing: float = math.inf) -> None:
        self.guard, self.online, self.guessing = guard, online, guessing
        self.stopped, self.diverged, self.doubtful = "", False, False
        self._warned = False

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if state.global_step == 0 and "eval_auroc" in metrics:
            warn_below_gate(metrics["eval_auroc"], self.guard)
        for name in self.WATCHED:
            values = _history(state, name)
            if not self.stopped and has_fallen(values, self.guard):
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
        said = f"{idle} steps in a row had nothing to learn from: {_why_idle(steps[-1], self.online)}"
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
            if any(name in entry for name in self.WATCHED)
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
    """Raise Diverged after an optimizer step that has left a weight NaN, infinite, or far larger, before anything is saved."""

    def __init__(self, guard: GuardArguments) -> None:
        self.leaps = guard.stop_growth > 0
        self._norm = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._norm = check_weights(kwargs["model"], "before the first step, the model has")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before, step = self._norm, f"step {state.global_step}: the optimizer's step"
        self._norm = check_weights(kwargs["model"], f"{step} has left")
        if self.leaps and 0 < LEAP * before < self._norm:
            grown = f"{step} has made the norm of the weights {self._norm:.3g}, from {before:.3g}"
            raise Diverged(f"{grown} (learning_rate={args.learning_rate:g}; lower it)")


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

    It is taken in fp32 at least: in fp16, that of healthy weights overflows.
    """
    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for _, tensor in named]
    norms = [torch.linalg.vector_norm(t, dtype=dtype) for (_, t), dtype in zip(named, dtypes, strict=True)]
    norm = float(torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))) if norms else 0.0
    if not math.isfinite(norm):
        raise Diverged(message % (not_finite(named) or overflow))
    return norm


def explosion(
    steps: Sequence[Entry], guard: GuardArguments, guessing: float = math.inf, *, streak: int = STREAK
) -> str:
    """Return what has been far above its level at the start for `streak` logged steps, in one line; "" if nothing has.

    Args:
        steps: logged steps, with `loss` and `grad_norm`. The level is the largest value of the first ones, at least ten, and
            for |loss| at least 1 nat.
        guard: stop_growth, the factor; 0: never.
        guessing: as in CollapseGuard.
    """
    if not guard.stop_growth or len(steps) <= streak:
        return ""
    limit = 2 * max(guessing, abs(steps[0]["loss"]))
    if _lowest(steps, "loss", streak) > limit:
        return f"loss is above {limit:.3g} nats a token, twice that of guessing and of the start (lower learning_rate)"
    for name, least in (("grad_norm", 0.0), ("loss", 1.0)):
        first = list(islice(_values(steps[:-streak], name), LEVEL))
        level = max([least, *first])
        if len(first) >= FIRST and _lowest(steps, name, streak) > guard.stop_growth * level > 0:
            return (
                f"{name} has been above {guard.stop_growth * level:.3g} for {streak} logged steps, its level at the start was "
                f"{level:.3g} (stop_growth={guard.stop_growth:g}; lower learning_rate)"
            )
    return ""


def _values(steps: Sequence[Entry], name: str) -> Iterator[float]:
    """Yield the sizes of a logged number. fp16 skips steps whose gradient is infinite, and they count nowhere."""
    return (abs(entry[name]) for entry in steps if math.isfinite(entry.get(name, math.nan)))


def _lowest(steps: Sequence[Entry], name: str, streak: int) -> float:
    last = list(_values(steps[-streak:], name))
    return min(last) if len(last) == streak else 0.0


def idle_steps(steps: Sequence[Entry], online: bool) -> int:
    """Return for how many steps up to the last logged one there was nothing to learn from."""
    active = next((int(entry["step"]) for entry in reversed(steps) if not _why_idle(entry, online)), 0)
    return int(steps[-1]["step"]) - active if steps else 0


def _why_idle(entry: Entry, online: bool) -> str:
    """Return why the groups of a logged step hold nothing to learn from; "" if they do.

    The groups of a file may have no weights on purpose, for the supervised term alone; fresh ones never.
    """
    if online and entry.get("truncated", 0) + entry.get("flawed", 0) >= 1:
        return "every candidate is cut off, empty or repeats the prompt (raise max_new_tokens, or train with sft first)"
    if online and entry.get("kept") == 0:
        return "no group is kept (the candidates of a group agree, or too few have a score)"
    if online and entry.get("weight_positive") == 0 and entry.get("weight_negative") == 0:
        return "every weight is 0"
    return "the gradient is 0" if entry.get("no_gradient") == 1 else ""


def _history(state: TrainerState, name: str) -> list[float]:
    return [entry[name] for entry in state.log_history if name in entry]


def warn_below_gate(auroc: float, guard: GuardArguments) -> None:
    """Log a warning if the AUROC of S is below the gate; NaN, which means that there were no pairs, passes."""
    if auroc < guard.auroc_gate:
        logger.warning("AUROC gate: %s", gate_message(auroc, guard))


def gate_message(auroc: float, guard: GuardArguments) -> str:
    """Return the text of the gate's warning."""
    return (
        f"S orders {auroc:.2f} of the pairs rightly, below auroc_gate={guard.auroc_gate}: "
        "training on it may teach the wrong thing"
    )


def has_fallen(values: Sequence[float], guard: GuardArguments) -> bool:
    """Return True if each of the last stop_patience values lies more than stop_margin below the best before them."""
    patience = guard.stop_patience
    if not patience or len(values) <= patience:
        return False
    best = max(values[:-patience])
    return all(value < best - guard.stop_margin for value in values[-patience:])
