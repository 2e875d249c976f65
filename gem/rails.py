"""What each guard rail looks for in the log of a training, and its verdict in the end: functions of log and settings alone.

    auroc_gate    the score S orders too few pairs rightly before the first step  (auroc_gate)
    collapse      held-out accuracy or AUROC of S has fallen and stays down       (stop_patience, stop_margin)
    explosion     gradient norm or |loss| is far above its level at the start     (stop_growth)
    leap          one optimizer step makes the weights ten times as large         (stop_growth)
    idle          the gradient is 0 or, online, no group is of use, many times    (stop_idle)
    finite        a log-prob, loss, gradient or weight is NaN or infinite         (always on)
    sampler_gap   the sampler's log-probs are not those of the policy             (always on, warns)

gem/guard.py acts on them while the training runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from gem.config import SAMPLER_GAP, GuardArguments
from gem.files import write_lines
from gem.run_files import RAILS_FILE
from gem.stops import Diverged

FIRST, LEVEL = 10, 20  # least and most logged steps from the start whose largest value is the level of the run
FEW_PAIRS = 10  # below so many, the share of the pairs that S orders rightly is a matter of luck
STREAK = 3  # logged steps in a row far above it: one may be a bad batch, which max_grad_norm clips
LEAP = 10.0  # growth of the norm of the weights in one step, which no useful learning rate gives
WATCHED = ("eval_accuracy_sampled", "eval_auroc")  # of a collapse
PASSED, FIRED, OFF, NOT_WATCHED = "passed", "fired", "off", "not watched"
Entry = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """What a rail has found: passed, fired, off (by its setting), or not watched (what it reads was not logged)."""

    rail: str
    verdict: str
    said: str  # the worst value beside the limit, what happened and when, or why it watched nothing
    worst: float | None = None
    limit: float | None = None


# --- what they look for -----------------------------------------------------------------------------------------------


def ordered_pairs(auroc: float, pairs: float = math.inf) -> str:
    """Return in words the share of pairs that S orders rightly: of how many human ones, and if they are too few to tell.

    Args:
        auroc: the share.
        pairs: number of human pairs; inf: the pairs are those of right and wrong answers of an evaluation.
    """
    of = "the pairs" if math.isinf(pairs) else f"{pairs:g} human pairs" if pairs != 1 else "1 human pair"
    few = f" (fewer than {FEW_PAIRS} pairs are too few to tell)" if pairs < FEW_PAIRS else ""
    return f"S orders {auroc:.2f} of {of} rightly{few}"


def gate_message(auroc: float, guard: GuardArguments, pairs: float = math.inf) -> str:
    """Return the text of the gate's warning; `pairs` as in ordered_pairs."""
    return (
        f"{ordered_pairs(auroc, pairs)}, below auroc_gate={guard.auroc_gate}: training on it may teach the wrong thing"
    )


def has_fallen(values: Sequence[float], guard: GuardArguments) -> bool:
    """Return True if each of the last stop_patience values lies more than stop_margin below the best before them."""
    patience = guard.stop_patience
    if not patience or len(values) <= patience:
        return False
    best = max(values[:-patience])
    return all(value < best - guard.stop_margin for value in values[-patience:])


def explosion(
    steps: Sequence[Entry], guard: GuardArguments, guessing: float = math.inf, *, streak: int = STREAK
) -> str:
    """Return what has been far above its level at the start for `streak` logged steps, in one line; "" if nothing has.

    Args:
        steps: logged steps, with `loss` and `grad_norm`. The level is the largest value of the first ones, at least ten, and
            for |loss| at least 1 nat.
        guard: stop_growth, the factor; 0: never.
        guessing: the loss of a model that gives every token the same probability, nats; inf: the loss is another. A loss
            twice as large, and twice that of the start, is an explosion too.
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
    active = next((int(entry["step"]) for entry in reversed(steps) if not why_idle(entry, online)), 0)
    return int(steps[-1]["step"]) - active if steps else 0


def why_idle(entry: Entry, online: bool) -> str:
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


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdicts(
    history: Sequence[Entry],
    guard: GuardArguments,
    *,
    online: bool = False,
    guessing: float = math.inf,
    pairs: float = math.nan,
    number: float = math.inf,
    error: Diverged | None = None,
) -> list[Verdict]:
    """Return the verdict of each rail on a training.

    Args:
        history: its log, up to its end; the evaluation of what it restored afterwards is no part of it.
        guard: the settings.
        online: the groups were made anew at every step.
        guessing: as in `explosion`.
        pairs: share of the pairs of a groups file that S orders rightly; NaN: there is no file, or no score in it.
        number: of these pairs. Fewer than FEW_PAIRS tell nothing.
        error: what ended the training, if something was raised: a number that is not finite, or a leap.
    """
    steps = [entry for entry in history if "loss" in entry]
    return [
        _gate(history, guard, pairs, number),
        _collapse(history, guard),
        _explosion(steps, guard, guessing),
        _leap(steps, guard, error),
        _idle(steps, guard, online),
        _finite(error),
        _sampler_gap(steps, online),
    ]


def _gate(history: Sequence[Entry], guard: GuardArguments, pairs: float, number: float) -> Verdict:
    rail, limit = "auroc_gate", guard.auroc_gate
    if not limit:
        return Verdict(rail, OFF, "auroc_gate=0")
    start = [entry for entry in history if entry.get("step") == 0 and any(name.startswith("eval_") for name in entry)]
    found = [(entry["eval_auroc"], math.inf) for entry in start if "eval_auroc" in entry][:1]
    found += [(pairs, number)] if number >= FEW_PAIRS and not math.isnan(pairs) else []
    if not found and not math.isnan(pairs):
        return Verdict(rail, NOT_WATCHED, ordered_pairs(pairs, number))
    if not found:
        why = "the evaluation before step 1 has no AUROC of S: no answers were sampled, or all were right, or all wrong"
        return Verdict(rail, NOT_WATCHED, why if start else "nothing was evaluated before step 1 (eval_on_start)")
    worst, of = min(found)
    if worst < limit:
        return Verdict(rail, FIRED, f"before the first step: {gate_message(worst, guard, of)}", worst, limit)
    return Verdict(rail, PASSED, f"{ordered_pairs(worst, of)}, at least {limit:g}", worst, limit)


def _collapse(history: Sequence[Entry], guard: GuardArguments) -> Verdict:
    rail, patience, limit = "collapse", guard.stop_patience, guard.stop_margin
    if not patience:
        return Verdict(rail, OFF, "stop_patience=0")
    series = {name: [(int(e["step"]), e[name]) for e in history if name in e] for name in WATCHED}
    most = max(map(len, series.values()))
    if not most:
        evaluated = any(name.startswith("eval_") for entry in history for name in entry)
        why = "no answers were sampled (eval_samples)" if evaluated else "nothing was evaluated (eval_strategy)"
        return Verdict(rail, NOT_WATCHED, why)
    if most <= patience:
        return Verdict(rail, NOT_WATCHED, f"{most} evaluations are too few for stop_patience={patience}")
    falls = []
    for name, values in series.items():
        for n in range(patience + 1, len(values) + 1):
            seen = [value for _, value in values[:n]]
            falls.append((max(seen[:-patience]) - max(seen[-patience:]), name, values[n - 1], has_fallen(seen, guard)))
    worst, name, (step, value), fired = max(falls, key=lambda fall: (fall[3], fall[0]))
    if fired:
        said = f"step {step}: {name} fell to {value:.3f}, and has been {worst:.3f} below its best for {patience} evaluations"
        return Verdict(rail, FIRED, said, worst, limit)
    said = f"largest lasting fall {worst:.3f}, of {name}" if worst > 0 else f"no fall lasted {patience} evaluations"
    return Verdict(rail, PASSED, f"{said}; limit {limit:g}", max(worst, 0.0), limit)


def _explosion(steps: Sequence[Entry], guard: GuardArguments, guessing: float) -> Verdict:
    rail, limit = "explosion", guard.stop_growth
    if not limit:
        return Verdict(rail, OFF, "stop_growth=0")
    growths = [(x, name) for name, least in (("grad_norm", 0.0), ("loss", 1.0)) for x in _growths(steps, name, least)]
    worst, name = max(growths, default=(0.0, ""))
    if exploded := explosion(steps, guard, guessing):
        by_growth = worst > limit  # else the loss is above twice that of guessing, which the words say
        return Verdict(
            rail, FIRED, f"step {int(steps[-1]['step'])}: {exploded}", *((worst, limit) if by_growth else ())
        )
    if not growths:
        return Verdict(rail, NOT_WATCHED, f"{len(steps)} logged steps are too few: it needs {FIRST} and {STREAK} more")
    said = f"{name} at most {worst:.3g} times its level at the start for {STREAK} logged steps; limit {limit:g}"
    return Verdict(rail, PASSED, said, worst, limit)


def _growths(steps: Sequence[Entry], name: str, least: float) -> Iterator[float]:
    """Yield what `explosion` compares with stop_growth at each logged step: the lowest of the last values over the level."""
    values = [abs(entry.get(name, math.nan)) for entry in steps]
    level, seen = least, 0
    for i in range(len(values) - STREAK):
        if math.isfinite(values[i]) and seen < LEVEL:
            level, seen = max(level, values[i]), seen + 1
        last = values[i + 1 : i + 1 + STREAK]
        if seen >= FIRST and level > 0 and all(map(math.isfinite, last)):
            yield min(last) / level


def _leap(steps: Sequence[Entry], guard: GuardArguments, error: Diverged | None) -> Verdict:
    rail = "leap"
    if not guard.stop_growth:
        return Verdict(rail, OFF, "stop_growth=0")
    if error is not None and error.rail == rail:
        return Verdict(rail, FIRED, str(error), None, LEAP)
    found = [(entry["weight_growth"], int(entry["step"])) for entry in steps if "weight_growth" in entry]
    if not found:
        return Verdict(rail, NOT_WATCHED, "no step was logged")
    worst, step = max(found)
    said = f"the norm of the weights grew {worst:.4g} times at most, in step {step}; limit {LEAP:g}"
    return Verdict(rail, PASSED, said, worst, LEAP)


def _idle(steps: Sequence[Entry], guard: GuardArguments, online: bool) -> Verdict:
    rail, limit = "idle", guard.stop_idle
    if not limit:
        return Verdict(rail, OFF, "stop_idle=0")
    if not steps:
        return Verdict(rail, NOT_WATCHED, "no step was logged")
    active, worst, at, why = 0, 0, 0, ""
    for entry in steps:
        step, reason = int(entry["step"]), why_idle(entry, online)
        active = active if reason else step
        if step - active > worst:
            worst, at, why = step - active, step, reason
    if worst >= limit:
        return Verdict(rail, FIRED, f"step {at}: {worst} steps in a row had nothing to learn from: {why}", worst, limit)
    said = f"at most {worst} steps in a row had nothing to learn from" if worst else "no step had nothing to learn from"
    return Verdict(rail, PASSED, f"{said}; limit {limit}", worst, limit)


def _finite(error: Diverged | None) -> Verdict:
    if error is not None and error.rail == "finite":
        return Verdict("finite", FIRED, str(error))
    return Verdict("finite", PASSED, "every log-prob, loss, gradient and weight was finite")


def _sampler_gap(steps: Sequence[Entry], online: bool) -> Verdict:
    rail = "sampler_gap"
    largest = ((entry.get("sampler_gap_max", entry.get(rail, math.nan)), int(entry["step"])) for entry in steps)
    found = [(gap, step) for gap, step in largest if not math.isnan(gap)]
    if not found:
        why = "no log-probs of a sampler and the policy were there to compare" if steps else "no step was logged"
        why = why if online else "nothing was sampled in training"
        return Verdict(rail, NOT_WATCHED, why)
    worst, step = max(found)
    said = f"of a group, sampler and policy were at most {worst:.3g} nats a token apart, in step {step}; limit {SAMPLER_GAP:g}"
    return Verdict(rail, FIRED if worst > SAMPLER_GAP else PASSED, said, worst, SAMPLER_GAP)


def as_metrics(found: Sequence[Verdict]) -> dict[str, float]:
    """Return rail_<name> of each rail that watched: 1.0 passed, 0.0 fired."""
    return {f"rail_{v.rail}": float(v.verdict == PASSED) for v in found if v.verdict in (PASSED, FIRED)}


def write_rails(folder: Path, found: Sequence[Verdict]) -> None:
    """Write rails.json: the verdicts with their words."""
    write_lines(folder / RAILS_FILE, [json.dumps({"rails": [asdict(verdict) for verdict in found]}, indent=1)])
