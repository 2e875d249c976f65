"""Guard rails of a training: the AUROC gate warns about an uninformative score, and the guard stops a collapsing run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from gem.config import GuardArguments

logger = logging.getLogger(__name__)


class CollapseGuard(TrainerCallback):
    """Warn when S hardly tells right from wrong, and stop when held-out accuracy or AUROC has fallen for good.

    Its only memory is the trainer's log history, so a resumed run stops where an uninterrupted one would.
    """

    WATCHED = ("eval_accuracy_sampled", "eval_auroc")

    def __init__(self, guard: GuardArguments) -> None:
        self.guard = guard

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if state.global_step == 0 and "eval_auroc" in metrics:
            warn_below_gate(metrics["eval_auroc"], self.guard)
        for name in self.WATCHED:
            values = [entry[name] for entry in state.log_history if name in entry]
            if has_fallen(values, self.guard):
                logger.warning("stopping at step %d: %s fell to %.3f", state.global_step, name, values[-1])
                control.should_training_stop = True


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
