"""The curves of runs over their training steps: the panels, how to read them, and how they are drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gem.results import Run, by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito without its yellow, which vanishes on white; 7 colours and 4 line styles give 28 distinct pairs
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
# fixed limits of the y axis by unit: a small change must not look large, nor a low value like zero
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "share": (-0.02, 1.02),
    "nats per token": (0, None),
    "tokens": (0, None),
    "answers": (0, None),
}


@dataclass(frozen=True)
class Panel:
    """A key of the history as a curve over the training steps."""

    key: str
    title: str
    unit: str
    look_for: str  # how to read the panel, for the page
    chance: float | None = None  # the value of guessing, drawn as a dotted line


# The figures in the order of the page: signs of a collapse come first.
FIGURES = {
    "outcome": (
        Panel("eval_accuracy_greedy", "Task accuracy, greedy", "share", "A rise and then a fall is a collapse."),
        Panel(
            "eval_accuracy_sampled", "Task accuracy, sampled", "share", "Leaving the greedy one: only the mode holds."
        ),
        Panel("eval_auroc", "AUROC of the score S", "share", "Below 0.55, S hardly tells right from wrong.", 0.5),
        Panel("score", "Score S of the candidates", "nats", "Rising while accuracy falls: S is being gamed."),
        Panel(
            "eval_final_entropy",
            "Entropy of the answer, held out",
            "nats per token",
            "Falling to zero while accuracy falls too: the policy pleases itself.",
        ),
        Panel(
            "final_entropy",
            "Entropy of the answer, training",
            "nats per token",
            "The same on the candidates of each batch, so it shows between two evaluations.",
        ),
    ),
    "preference": (
        Panel(
            "eval_preference_sum",
            "Preference, summed log-prob",
            "share",
            "Compare with length alone: a sum favours the shorter answer.",
            0.5,
        ),
        Panel(
            "eval_preference_token",
            "Preference, log-prob per token",
            "share",
            "Should rise with the sum; if only the sum does, look at the lengths.",
            0.5,
        ),
        Panel(
            "eval_preference_reference",
            "Preference, against the reference",
            "share",
            "High while task accuracy falls: the pairs are learnt, the task is not.",
            0.5,
        ),
        Panel(
            "eval_preference_length",
            "Preference, length alone",
            "share",
            "The baseline: what does no better than this may have learnt nothing but length.",
            0.5,
        ),
        Panel(
            "logprob_chosen",
            "Log-prob of the chosen answer",
            "nats",
            "Falling: the margin grows only because the rejected answer falls faster.",
        ),
        Panel(
            "logprob_rejected",
            "Log-prob of the rejected answer",
            "nats",
            "A plunge: the update pushes down without end, and not only this answer.",
        ),
    ),
    "entropy and length": (
        Panel(
            "branch_entropy",
            "Top-m entropy of the reasoning, training",
            "nats per token",
            "Rising without end: the reasoning turns to noise. At zero it no longer branches.",
        ),
        Panel(
            "length",
            "Length, training",
            "tokens",
            "A steady drift that accuracy does not follow: length is what is rewarded.",
        ),
        Panel(
            "truncated",
            "Cut off, training",
            "share",
            "What is cut off is not scored: the higher, the less there is to learn from.",
        ),
        Panel(
            "eval_branch_entropy",
            "Top-m entropy of the reasoning, held out",
            "nats per token",
            "Should follow training; if it does not, the batches are not typical.",
        ),
        Panel(
            "eval_length",
            "Length, held out",
            "tokens",
            "A drop: the reasoning is skipped. A climb to the limit: it never ends.",
        ),
        Panel(
            "eval_truncated",
            "Cut off, held out",
            "share",
            "Rising while accuracy falls: answers do not end, they need not be wrong.",
        ),
    ),
    "groups without a human pair": (
        Panel(
            "unlabeled", "Groups without a human pair", "share", "What unlabeled_share asks for, as the batches fall."
        ),
        Panel(
            "unlabeled_kept",
            "Kept by the filter, without a human pair",
            "share",
            "Near zero, the training rests on the human pairs alone.",
        ),
        Panel(
            "unlabeled_score",
            "Score S, without a human pair",
            "nats",
            "Rising faster than that of all groups: S is gamed where no human answer holds it.",
        ),
        Panel(
            "unlabeled_distinct",
            "Distinct answers, without a human pair",
            "answers",
            "At one before the other groups are: the policy agrees with itself, and with nobody else.",
        ),
    ),
    "batch health": (
        Panel(
            "distinct",
            "Distinct answers per group",
            "answers",
            "At one, all the candidates agree and there is nothing left to rank.",
        ),
        Panel(
            "agreement",
            "Candidates that give the commonest answer",
            "share",
            "Rising while accuracy does not: the candidates agree on wrong answers.",
        ),
        Panel(
            "flawed",
            "Empty, or repeats the prompt",
            "share",
            "Like what is cut off, these candidates are not scored: at one, there is nothing to learn from.",
        ),
        Panel("kept", "Groups kept by the filter", "share", "Near zero, training rests on a few odd groups."),
        Panel(
            "trust_final", "Trust in the answer's entropy", "factor", "Below zero, surer answers are the wrong ones."
        ),
        Panel(
            "trust_branch",
            "Trust in the branch entropy",
            "factor",
            "Below zero, the answers with more choices on their way are the wrong ones.",
        ),
        Panel("trust_agreement", "Trust in agreement", "factor", "Below zero, the rarer answers are the right ones."),
        Panel(
            "span_fallback",
            "Answers found without a marker",
            "share",
            "Rising: the entropy of the answer is read at a guessed place.",
        ),
        Panel(
            "weight_positive",
            "Positive weight of a group",
            "sum of weights",
            "At most 1 by default. Shrinking to zero: the members of a group score alike.",
        ),
        Panel(
            "weight_negative",
            "Negative weight of a group",
            "sum of weights",
            "Should mirror the positive weight; if it outweighs it, training mostly pushes down.",
        ),
        Panel(
            "sampler_gap",
            "Gap of sampler and policy",
            "nats per token",
            "Above 0.1, the candidates are those of another model: stale weights, another dtype, or a cut distribution.",
        ),
        Panel("kl", "KL to the reference", "nats", "A climb that speeds up: the policy is running away."),
        Panel("loss", "Training loss", "nats", "With weights of both signs its level says little; jumps and gaps do."),
        Panel("eval_loss", "Held-out loss", "nats", "Rising while the training loss falls: over-fitting."),
        Panel("grad_norm", "Gradient norm", "L2 norm", "Spikes that grow: the learning rate may be too high."),
        Panel(
            "weight_growth",
            "Growth of the weights in a step",
            "ratio of norms",
            "Near one. A jump: a step has thrown away what the weights held; ten ends the run.",
        ),
    ),
}
# fmt: on


def plot_curves(runs: Sequence[Run]) -> dict[str, bytes]:
    """Draw every panel of FIGURES for which at least one run has values; return name of the figure -> png."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    methods = by_method(runs)
    styles: list[dict[str, Any]] = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)], "linewidth": 1.6}
        for i in range(len(methods))
    ]
    figures = {}
    for name, panels in panels_of(runs).items():
        columns = columns_of(len(panels))
        rows = math.ceil(len(panels) / columns)
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
        # 11 inches fill the page's 1100 px: one point of type is 1.4 px
        figure = Figure(figsize=(11, 2.75 * rows + 0.4), dpi=160, layout=layout, facecolor="white")
        for index, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, index)
            for seeds, style in zip(methods.values(), styles, strict=True):
                _draw(axes, seeds, panel.key, style)
            if panel.chance is not None:
                axes.axhline(panel.chance, color="#888888", linewidth=1, linestyle=":", zorder=1)
            axes.set_title(panel.title, fontsize=9.5, loc="left", fontweight="bold")
            axes.set_xlabel("training step", fontsize=8.5)
            axes.set_ylabel(panel.unit, fontsize=8.5)
            axes.set_ylim(*LIMITS.get(panel.unit, (None, None)))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.tick_params(labelsize=8, color="#bbbbbb")
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.spines[:].set_color("#bbbbbb")
            axes.spines[["top", "right"]].set_visible(False)
        handles = [Line2D([], [], **style) for style in styles]
        fitting = max(1, 120 // (max(map(len, methods)) + 8))  # a line of the legend has room for about 120 letters
        legend = figure.legend(
            handles, list(methods), loc="outside upper left", ncols=fitting, frameon=False, handlelength=3
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" in a name must not start a formula
        png = io.BytesIO()
        figure.savefig(png, format="png")
        figures[name] = png.getvalue()
    return figures


def panels_of(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the figures without panels for which no run has values, and without empty figures."""
    logged = {key for run in runs for entry in run.history for key in entry}
    chosen = {name: [panel for panel in panels if panel.key in logged] for name, panels in FIGURES.items()}
    return {name: panels for name, panels in chosen.items() if panels}


def columns_of(panels: int) -> int:
    return 2 if panels == 4 else min(panels, 3)


def _draw(axes: Axes, seeds: Sequence[Run], key: str, style: dict[str, Any]) -> None:
    """Draw the mean over the seeds as a line, and the range from their lowest to their highest value as a band."""
    curves = [{entry["step"]: entry[key] for entry in run.history if key in entry} for run in seeds]
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    # The line ends with the shortest seed: if a collapsed seed was stopped, the mean of the others would rise. The band
    # continues, as a hair line if one seed is left.
    shared = sorted(set.intersection(*map(set, curves)))
    means = [sum(curve[step] for curve in curves) / len(curves) for step in shared]
    axes.plot(shared, means, marker="o" if len(shared) <= 25 else "", markersize=3, **style)
    if len(curves) > 1:
        steps = sorted(set().union(*curves))
        values = [[c[step] for c in curves if math.isfinite(c.get(step, math.nan))] for step in steps]
        low, high = ([pick(v, default=math.nan) for v in values] for pick in (min, max))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.16, linewidth=0.8)
