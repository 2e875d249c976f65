"""The records of `gem-kernels evidence` as a page of tables and a plot. Nothing is trained, and torch is not imported.

write_page(Path("docs/evidence.md"), Plan(config), records)        # and docs/evidence.png
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gem.config import GuardArguments
from gem.curves import COLOURS, LINE_STYLES
from gem.evidence.plan import Job, Plan, Record, validation_accuracy
from gem.files import read_text, replacing
from gem.report import Table, markdown, signed, t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "accuracy_greedy": "greedy",
    "accuracy_sampled": "sampled",
    "accuracy_majority": "majority",
    "preference_sum": "preference, sum",
    "preference_token": "preference, per token",
    "preference_reference": "preference, vs start",
}
ACCURACIES = ("accuracy_sampled", "accuracy_greedy", "accuracy_majority")
BASES = ("GEM", "GEM + agreement")  # the others are compared with them
IN_PLOT = len(COLOURS)  # more lines could not be told apart
MARKERS = "osD^vPX"
GATE, COLLAPSE = GuardArguments().auroc_gate, GuardArguments().stop_margin
MARK = "<!-- What follows is written by gem-kernels evidence; what stands above is kept. -->"


class Results:
    """What the records say of the cells of a plan; the records of a cell are those at the chosen rate."""

    def __init__(self, plan: Plan, records: Mapping[Job, Record]) -> None:
        self.plan, self.records = plan, records
        # by task, method and pairs: the seeds that are asked for
        self.seeds: dict[tuple[str, str, int], list[int]] = {}
        for cell in plan.cells:
            self.seeds.setdefault((cell.task, cell.method, cell.pairs), []).append(cell.seed)
        jobs = ((cell, plan.job(cell, records)) for cell in plan.cells)
        self.runs = {
            (cell.task, cell.method, cell.pairs, cell.seed): records[job]
            for cell, job in jobs
            if job and job in records
        }

    def methods(self, task: str, *, ablations: bool) -> list[str]:
        """Return the methods that the studies of one kind compare on a task, in their order."""
        studies = [study for study in self.plan.config.studies if study.ablations == ablations and task in study.tasks]
        named = dict.fromkeys(method for study in studies for method in study.methods)
        return [method for method in named if (task, method) in self.plan.compared]

    def pairs(self, task: str, methods: Sequence[str]) -> list[int]:
        """Return the numbers of pairs with which a method is asked for on a task."""
        return sorted({pairs for of, method, pairs in self.seeds if of == task and method in methods})

    def of(self, task: str, method: str, pairs: int) -> dict[int, Record]:
        """Return the records of a cell of the tables by seed."""
        asked = self.seeds.get((task, method, pairs), [])
        found = {seed: self.runs.get((task, method, pairs, seed)) for seed in asked}
        return {seed: record for seed, record in found.items() if record}

    def starts(self, task: str) -> dict[int, Record]:
        """Return the records of the starts of a task by seed."""
        return {job.seed: self.records[job] for job in self.plan.starts if job.task == task and job in self.records}

    def start_of(self, record: Record) -> Record:
        """Return the record of the start of a run."""
        return self.records[self.plan.start(record["task"], record["seed"])]


def write_page(path: Path, plan: Plan, records: Mapping[Job, Record]) -> None:
    """Write the page, and the plot beside it as a png. What is there already is kept, up to MARK."""
    results = Results(plan, records)
    kept = read_text(path).partition(MARK)[0].rstrip() if path.exists() else "# Evidence"
    picture = path.with_suffix(".png")
    body = page(results, picture.name)
    with replacing(picture, binary=True) as out:
        out.write(plot(results))
    with replacing(path) as out:
        out.write(f"{kept}\n\n{MARK}\n\n{body}")


def page(results: Results, picture: str) -> str:
    """Return the markdown below MARK; `picture` is the name of the plot."""
    plan = results.plan
    tasks = list(dict.fromkeys(task for task, _ in plan.compared))
    command = f"gem-kernels evidence --config {plan.config.path.as_posix()}"
    parts = [_introduction(results), f"![Sampled accuracy against the number of human pairs]({picture})"]
    for task in tasks:
        if methods := results.methods(task, ablations=False):
            only = f"`{command} --only '{task}/*'` makes these runs."
            parts += [f"## {task}", " ".join(filter(None, (_summary(results, task), only)))]
            parts += _task_tables(results, task, methods)
            parts += _comparisons(results, task, methods, BASES)
    if any(results.methods(task, ablations=True) for task in tasks):
        parts += ["## Ablations", ABLATIONS_NOTE]
    for task in tasks:
        if methods := results.methods(task, ablations=True):
            shown = list(dict.fromkeys([*(base for base in BASES if (task, base) in plan.compared), *methods]))
            parts += [f"### {task}: ablations", *_task_tables(results, task, shown, level="####", among=methods)]
            parts += _comparisons(results, task, shown, BASES, level="####", among=methods)
    parts += ["## Does the gate predict a collapse?", GATE_NOTE, markdown(gate_table(results))]
    parts += [
        "## Making this page",
        f"`{command}` makes the runs that are missing; `--page FILE` this page from the records.",
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: Results) -> str:
    config, plan = results.plan.config, results.plan
    budgets = [record["settings"]["budget"] for record in results.runs.values()]
    said = "{steps} steps of {prompts} prompts, {group_size} completions of a prompt"
    spent = " or ".join(sorted({said.format(**budget) for budget in budgets})) or "none yet"
    starts = sum(job in results.records for job in plan.starts)
    return (
        f"{plan.done(results.records)} of {plan.total} runs are done, {starts} of them starts, on {len(config.seeds)} seeds. "
        f"A run: {spent}. "
        f"Accuracy is that of the test questions, sampled with {config.eval_samples} completions of each. ± is the "
        "half-width of the 95 % t-interval of the mean over the seeds; a difference is paired by seed, and bold where its "
        "interval excludes 0: where there is no difference, one in twenty is bold by chance."
    )


def _summary(results: Results, task: str) -> str:
    """Return what the task is, and what S and the length tell about its answers before any training."""
    starts = list(results.starts(task).values())
    about = next((str(start.get("summary", "")) for start in starts), "")
    area = [start["validation"]["auroc"] for start in starts if "auroc" in start["validation"]]
    length = [start["test"]["preference_length"] for start in starts if "preference_length" in start["test"]]
    said = [f"S has an AUROC of {mean(area)} on the start's answers to the validation questions"] if area else []
    said += [f"length alone orders {mean(length)} of the test pairs"] if length else []
    return " ".join(filter(None, (about, f"{'; '.join(said)}." if said else "", _retrained(results, task))))


def _retrained(results: Results, task: str) -> str:
    """Return which seeds have runs from several trainings of their start, "" if none has."""
    starts: dict[int, set[str]] = {}
    for (of, _, _, seed), record in results.runs.items():
        if of == task:
            starts.setdefault(seed, set()).add(record["start"]["model"])
    seeds = [str(seed) for seed, hashes in sorted(starts.items()) if len(hashes) > 1]
    return (
        f"The start of seed {', '.join(seeds)} was trained on several machines, which round otherwise." if seeds else ""
    )


RATES_NOTE = (
    "Sampled accuracy on the validation questions in the sweep, with {pairs}; the bold rate is the best, and used with every "
    "number of pairs."
)
ABLATIONS_NOTE = "Each leaves out or changes a part of GEM, at the best rate of a sweep of its own."
GATE_NOTE = (
    f"The gate warns if the AUROC of S at the start, on the validation questions, is below {GATE:g}. A run has collapsed if it "
    f"diverged, or if its sampled test accuracy is more than {COLLAPSE:g} below that of its start. Precision: the share of the "
    "warnings that a collapse followed; recall: the share of the collapses that a warning preceded."
)


# --- tables -----------------------------------------------------------------------------------------------------------


def _task_tables(
    results: Results, task: str, methods: Sequence[str], level: str = "###", among: Sequence[str] = ()
) -> list[str]:
    """Return a heading and a table for each number of pairs with which one of `among` (default: all) is asked for."""
    parts = []
    for pairs in results.pairs(task, among or methods):
        asked = [method for method in methods if (task, method, pairs) in results.seeds]
        begun = [method for method in asked if results.of(task, method, pairs)]
        parts.append(f"{level} {task}, {counted(pairs)}")
        parts += [markdown(results_table(results, task, begun, pairs))] if begun else []
        parts += [f"Not run yet: {', '.join(m for m in asked if m not in begun)}."] if len(begun) < len(asked) else []
    return parts


def counted(pairs: int) -> str:
    return "1 pair" if pairs == 1 else f"{pairs} pairs"


def _comparisons(
    results: Results,
    task: str,
    methods: Sequence[str],
    bases: Sequence[str],
    level: str = "###",
    among: Sequence[str] = (),
) -> list[str]:
    """Return the differences from each base, the sweep and the costs of the methods (of `among`) that have been run."""
    parts, own = [], among or methods
    begun = [m for m in methods if any(results.of(task, m, pairs) for pairs in results.pairs(task, [m]))]
    made = [m for m in own if m in begun]
    for base in (base for base in bases if base in begun and {*made} - {base}):
        parts += [f"{level} {base} minus the others", markdown(differences(results, task, base, made))]
    swept = [m for m in own if any(job in results.records for job in results.plan.sweep(task, m))]
    if swept:
        note = RATES_NOTE.format(pairs=counted(results.plan.config.sweep_pairs)) + _edges(results, task, swept)
        parts += [f"{level} Learning rates", note, markdown(rates_table(results, task, swept))]
    parts += [f"{level} What a run spends", markdown(spent_table(results, task, made))] if made else []
    return parts


def results_table(results: Results, task: str, methods: Sequence[str], pairs: int) -> Table:
    """Return the test metrics of the start and of every method that is asked for, a row each."""
    starts = list(results.starts(task).values())
    asked = sum(job.task == task for job in results.plan.starts)
    rows = [["start", *_cells(starts, METRICS), _seeds(starts, asked)]]
    for method in methods:
        if seeds := results.seeds.get((task, method, pairs)):
            records = list(results.of(task, method, pairs).values())
            rows.append([method, *_cells(records, METRICS), _seeds(records, len(seeds))])
    return Table(["method", *METRICS.values(), "seeds"], rows)


def _cells(records: Sequence[Record], metrics: Mapping[str, str]) -> list[str]:
    if not records:
        return ["not run"] * len(metrics)
    return [mean([r["test"][key] for r in records if key in r.get("test", {})]) for key in metrics]


def _seeds(records: Sequence[Record], asked: int) -> str:
    """Return how many seeds there are, of how many if some are missing, and how many of them diverged."""
    diverged = sum(record["outcome"] == "diverged" for record in records)
    counted = str(asked) if len(records) == asked else f"{len(records)} of {asked} seeds"
    return f"{counted}, {diverged} diverged" if diverged else counted


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean ± the half-width of its 95 % t-interval; a single value alone, nothing as a dash."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "—"
    return " ± ".join(f"{value:.{digits}f}" for value in t_interval(values))


def differences(results: Results, task: str, base: str, methods: Sequence[str]) -> Table:
    """Return base minus each method, paired by seed: a row per accuracy and method, a column per number of pairs."""
    columns = [pairs for pairs in results.pairs(task, methods) if results.of(task, base, pairs)]
    others = [m for m in methods if m != base and any(results.of(task, m, pairs) for pairs in columns)]
    rows = [
        [other, METRICS[key], *(_difference(results, task, base, other, key, pairs) for pairs in columns)]
        for key, other in product(ACCURACIES, others)
    ]
    return Table([f"{base} minus", "accuracy", *map(counted, columns)], rows)


def _difference(results: Results, task: str, base: str, other: str, key: str, pairs: int) -> str:
    ours, theirs = (
        {seed: r["test"][key] for seed, r in results.of(task, method, pairs).items() if key in r.get("test", {})}
        for method in (base, other)
    )
    asked = {*results.seeds.get((task, base, pairs), ())} & {*results.seeds.get((task, other, pairs), ())}
    paired = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not paired:
        return "not run" if asked else "—"
    text = f"{paired[0]:+.3f}"
    if len(paired) > 1:
        centre, half = t_interval(paired)
        text = f"**{signed(paired)}**" if abs(centre) > half else signed(paired)
    return text if len(paired) == len(asked) else f"{text} ({len(paired)} of {len(asked)} seeds)"


def rates_table(results: Results, task: str, methods: Sequence[str]) -> Table:
    """Return the mean validation accuracy of each rate in the sweep, the chosen one in bold."""
    plan = results.plan
    rows = []
    for method in methods:
        chosen, row = plan.rate(task, method, results.records), [method]
        for rate in plan.config.rates:
            swept = [results.records.get(job) for job in plan.sweep(task, method) if job.rate == rate]
            text = _swept([record for record in swept if record], len(swept))
            row.append(f"**{text}**" if rate == chosen else text)
        rows.append(row)
    return Table(["method", *(f"{rate:g}" for rate in plan.config.rates)], rows)


def _edges(results: Results, task: str, methods: Sequence[str]) -> str:
    """Return a sentence on the methods whose best rate is the lowest or the highest of the sweep, "" without one."""
    rates = results.plan.config.rates
    said = []
    for edge, rate in (("lowest", min(rates)), ("highest", max(rates))):
        at = [method for method in methods if results.plan.rate(task, method, results.records) == rate]
        said += [f"the {edge} for {', '.join(at)}"] if at else []
    return f" It is {', and '.join(said)}: a rate beyond might be better there." if said else ""


def _swept(records: Sequence[Record], asked: int) -> str:
    if not records:
        return "not run" if asked else "not swept"
    text = f"{sum(map(validation_accuracy, records)) / len(records):.3f}"
    diverged = sum(record["outcome"] == "diverged" for record in records)
    text = "diverged" if diverged == len(records) else f"{text}, {diverged} diverged" if diverged else text
    return text if len(records) == asked else f"{text} ({len(records)} of {asked} seeds)"


def spent_table(results: Results, task: str, methods: Sequence[str]) -> Table:
    """Return the means of what the finished runs of a method spent, over all numbers of pairs."""
    names = {"optimizer_steps": "optimizer steps", "sampled_tokens": "sampled tokens", "seconds": "seconds"}
    rows = []
    for method in methods:
        records = [r for pairs in results.pairs(task, [method]) for r in results.of(task, method, pairs).values()]
        spent = [record["spent"] for record in records if "spent" in record]
        means = [f"{sum(s[name] for s in spent) / len(spent):,.0f}" if spent else "not run" for name in names]
        rows.append([method, *means])
    return Table(["method", *names.values()], rows)


def gate_table(results: Results) -> Table:
    """Return how well the AUROC of S at the start predicts a collapse, a row for each set of runs."""
    chosen = list(results.runs.values())
    plan = results.plan
    swept = [results.records[job] for job in plan.sweeps if job in results.records]
    everything = [*chosen, *(record for record in swept if not any(record is run for run in chosen))]
    rows = []
    for name, runs in (("chosen rate", chosen), ("every rate", everything)):
        for whose, uses in (
            ("methods that use S", (True,)),
            ("methods that do not use S", (False,)),
            ("all methods", (True, False)),
        ):
            rows.append([f"{whose}, {name}", *_gate([run for run in runs if run["uses_score"] in uses], results)])
    return Table(["runs", "number", "warned of", "collapsed", "both", "precision", "recall", "no AUROC"], rows)


def _gate(runs: Sequence[Record], results: Results) -> list[str]:
    judged = [(start["validation"]["auroc"] < GATE, collapsed(run, start)) for run, start in
              ((run, results.start_of(run)) for run in runs) if "auroc" in start["validation"]]  # fmt: skip
    warned, fell = sum(w for w, _ in judged), sum(c for _, c in judged)
    both = sum(w and c for w, c in judged)
    shares = [f"{both / of:.2f}" if of else "—" for of in (warned, fell)]
    return [str(len(judged)), str(warned), str(fell), str(both), *shares, str(len(runs) - len(judged))]


def collapsed(run: Record, start: Record) -> bool:
    """Return True if a run diverged, or answers the test questions worse than its start by more than COLLAPSE."""
    if run["outcome"] == "diverged":
        return True
    return bool(start["test"]["accuracy_sampled"] - run["test"]["accuracy_sampled"] > COLLAPSE)


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot(results: Results, metric: str = "accuracy_sampled") -> bytes:
    """Return a png: a metric against the number of pairs, a panel per task, a line per method with its t-intervals.

    The methods are those that the config's `plot` names, else the first IN_PLOT of the studies.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tasks = [
        task
        for task in dict.fromkeys(task for task, _ in results.plan.compared)
        if results.methods(task, ablations=False)
    ]
    named = dict.fromkeys(method for task in tasks for method in results.methods(task, ablations=False))
    methods = [m for m in results.plan.config.plot or [*named][:IN_PLOT] if m in named]
    columns = min(3, max(1, len(tasks)))
    rows = math.ceil(max(1, len(tasks)) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(3.8 * columns + 0.6, 3.6 * rows + 0.7), dpi=160, layout=layout, facecolor="white")
    handles: dict[str, Any] = {}
    for index, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(rows, columns, index)
        for i, method in enumerate(methods):
            if line := _draw(axes, results, task, method, metric, i, len(methods)):
                handles.setdefault(method, line)
        starts = [s["test"][metric] for s in results.starts(task).values() if metric in s["test"]]
        if starts:
            handles["start"] = axes.axhline(
                sum(starts) / len(starts), color="#777777", linestyle=":", linewidth=1.2, zorder=1
            )
        _frame(axes, task, METRICS[metric], results.pairs(task, methods))
    ncols = 4 if columns > 1 else 2
    lines, names = list(handles.values()), list(handles)
    legend = figure.legend(lines, names, loc="outside upper left", ncols=ncols, frameon=False, fontsize=8.5)
    for text in legend.get_texts():
        text.set_parse_math(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw(axes: Axes, results: Results, task: str, method: str, metric: str, index: int, count: int) -> Any:
    """Draw the line of a method, moved a little to the side so that the intervals of two do not hide one another."""
    points = []
    for pairs in results.pairs(task, [method]):
        values = [r["test"][metric] for r in results.of(task, method, pairs).values() if metric in r.get("test", {})]
        if values:
            centre, half = t_interval(values) if len(values) > 1 else (values[0], 0.0)
            points.append((pairs * 1.045 ** (index - (count - 1) / 2), centre, half))
    if not points:
        return None
    style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    dashes = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
    x, y, half_widths = zip(*points, strict=True)
    return axes.errorbar(
        x, y, yerr=half_widths, linestyle=dashes, linewidth=1.5, markersize=4.5, elinewidth=0.9, capsize=2, **style
    )


def _frame(axes: Axes, title: str, metric: str, pairs: Sequence[int]) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", fontweight="bold").set_parse_math(False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(pairs), [str(p) for p in pairs])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("human pairs", fontsize=8.5)
    axes.set_ylabel(f"{metric} accuracy, test", fontsize=8.5)
    axes.tick_params(labelsize=8, color="#bbbbbb")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[:].set_color("#bbbbbb")
    axes.spines[["top", "right"]].set_visible(False)
