"""Finished runs -> one table, the curves that show a collapse, and one self-contained html page.

    runs = [load_run(Path(folder)) for folder in folders]
    print(plain(results_table(runs)))
    write_report(Path("report.html"), runs, title="SEGA against DPO")

Runs of the same name are seeds of one method. Neither torch nor transformers is imported: a report can be made anywhere.
"""

from __future__ import annotations

import base64
import html
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from gem.curves import Panel, columns_of, panels_of, plot_curves
from gem.files import replacing
from gem.results import Run, by_method

# metrics of the headline table -> its column; every other metric goes to the second table under its own key
HEADLINE = {
    "accuracy_greedy": "greedy accuracy",
    "accuracy_sampled": "sampled accuracy",
    "accuracy_majority": "majority accuracy",
    "preference_sum": "preference, sum",
    "preference_token": "preference, per token",
    "preference_reference": "preference, vs reference",
    "preference_length": "preference, length only",
    "auroc": "AUROC of S",
}
ACCURACIES = ("accuracy_greedy", "accuracy_sampled", "accuracy_majority")
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of two or more values and the half-width of its 95 % t-interval."""
    freedom = len(values) - 1
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / freedom
    if freedom <= len(T_QUANTILES):
        quantile = T_QUANTILES[freedom - 1]
    else:  # Cornish-Fisher around the normal quantile z, good to 0.2 %
        z = 1.959964
        quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return mean, quantile * math.sqrt(variance / len(values))


def results_table(runs: Sequence[Run]) -> Table:
    """Return one row per method: the number of seeds and the headline metrics that at least one run has.

    With two or more seeds, a cell is the mean ± the half-width of its 95 % t-interval.
    """
    methods = by_method(runs)
    keys = [key for key in HEADLINE if any(key in run.metrics for run in runs)]
    rows = [[name, str(len(seeds)), *(_cell(seeds, key) for key in keys)] for name, seeds in methods.items()]
    header = ["method", "seeds", *(HEADLINE[key] for key in keys)]
    if any(run.rails for run in runs):
        header.append("guard rails hit")
        rows = [[*row, _hit(seeds)] for row, seeds in zip(rows, methods.values(), strict=True)]
    return Table(header, rows)


def differences_table(runs: Sequence[Run], base: str) -> Table:
    """Return how far `base` is above each other method: the mean difference over the seeds of both ± its 95 % t-interval.

    A seed gives two methods the same data and the same start, so their difference varies less than either. A method with fewer
    than two seeds in common is left out.

    Raises:
        ValueError: no run is named `base`.
    """
    methods = by_method(runs)
    if base not in methods:
        raise ValueError(f"base must be one of {', '.join(methods)}, got {base!r}")
    ours = {run.seed: run.metrics for run in methods.pop(base)}
    keys = [key for key in ACCURACIES if any(key in metrics for metrics in ours.values())]
    rows = []
    for name, seeds in methods.items():
        paired = [(ours[run.seed], run.metrics) for run in seeds if run.seed in ours]
        gaps = {key: [a[key] - b[key] for a, b in paired if key in a and key in b] for key in keys}
        if all(len(values) > 1 for values in gaps.values()):
            rows.append([name, str(len(paired)), *(signed(gaps[key]) for key in keys)])
    return Table(["minus", "seeds", *(HEADLINE[key] for key in keys)], rows)


def _hit(seeds: Sequence[Run]) -> str:
    """Name the guard rails that fired in at least one of the runs, with their number if there are several runs."""
    fired = [verdict["rail"] for run in seeds for verdict in run.rails if verdict["verdict"] == "fired"]
    counts = {rail: f" ({fired.count(rail)} of {len(seeds)})" if len(seeds) > 1 else "" for rail in fired}
    return ", ".join(map("".join, counts.items())) or ("none" if any(run.rails for run in seeds) else "—")


def _other_numbers(runs: Sequence[Run]) -> Table:
    """Return the metrics outside the tables of results and rails; a row each, as there may be many, and a column per method."""
    methods = by_method(runs)
    shown = {*HEADLINE, *(f"rail_{verdict['rail']}" for run in runs for verdict in run.rails)}
    keys = sorted({key for run in runs for key in run.metrics} - shown)
    return Table(["metric", *methods], [[key, *(_cell(seeds, key) for seeds in methods.values())] for key in keys])


def _cell(seeds: Sequence[Run], key: str) -> str:
    values = [run.metrics[key] for run in seeds if key in run.metrics]
    if not values:
        return "—"
    text = _number(values[0]) if len(values) == 1 else " ± ".join(map(_number, t_interval(values)))
    return text if len(values) == len(seeds) else f"{text} ({len(values)} of {len(seeds)} seeds)"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"


def signed(values: Sequence[float]) -> str:
    """Return the mean of differences, with its sign, ± the half-width of its 95 % t-interval."""
    mean, half = t_interval(values)
    return f"{mean:+.3f} ± {half:.3f}"


def plain(table: Table) -> str:
    """Return the table as aligned text, for a terminal."""
    lines = [table.header, *table.rows]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in (first, *others)])
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines)


def markdown(table: Table) -> str:
    """Return the table in GitHub's markdown."""
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in (table.header, *table.rows)]
    lines.insert(1, ["---", *["---:"] * (len(table.header) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(path: Path, runs: Sequence[Run], *, title: str, notes: Sequence[str] = ()) -> None:
    """Write one self-contained html page: notes, tables, figures, completions, date and versions.

    Raises:
        TypeError: notes is a single string.
        ValueError: there are no runs, or two of the same name and seed.
    """
    if isinstance(notes, str):
        raise TypeError(f"notes: expected a sequence of strings, got the string {notes!r}")
    # a completion may hold half a surrogate pair, which UTF-8 cannot encode
    page = _page(runs, title, notes).encode("utf-8", errors="replace").decode("utf-8")
    with replacing(Path(path)) as out:
        out.write(page)


def _page(runs: Sequence[Run], title: str, notes: Sequence[str]) -> str:
    panels, other = panels_of(runs), _other_numbers(runs)
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    body = [f"<h1>{html.escape(title)}</h1>", f"<ul>{items}</ul>" if items else ""]
    body += ["<h2>Results</h2>", _html_table(results_table(runs), "numbers"), f"<p>{HOW_TO_READ}</p>"]
    body += ["<h2>Guard rails</h2>"] if any(run.rails for run in runs) else []
    for name, seeds in by_method(runs).items():
        titles = [f"{name}, seed {run.seed}" if len(seeds) > 1 else name for run in seeds]
        body += [_html_rails(run, title) for run, title in zip(seeds, titles, strict=True) if run.rails]
    body += [_html_figure(name, png, panels[name]) for name, png in plot_curves(runs).items()]
    body += ["<h2>Completions</h2>"] if any(run.completions for run in runs) else []
    body += [_html_completions(name, seeds) for name, seeds in by_method(runs).items()]
    body += ["<h2>All other numbers</h2>", _html_table(other, "numbers")] if other.rows else []
    return PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(body), footer=html.escape(_made_with()))


def _html_table(table: Table, kind: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = ("".join(f"<td><div>{html.escape(cell)}</div></td>" for cell in row) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<section><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></section>'


def _html_rails(run: Run, title: str) -> str:
    """Return the verdicts on a run behind one line that counts them; they are open where a rail has fired."""
    counts = Counter(verdict["verdict"] for verdict in run.rails)
    line = f"{title}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    rows = [[v["rail"], f"{MARKS.get(v['verdict'], '–')} {v['verdict']}", v["said"]] for v in run.rails]
    table = _html_table(Table(["rail", "verdict", "what it saw"], rows), "rails")
    return f"<details{' open' if counts['fired'] else ''}><summary>{html.escape(line)}</summary>{table}</details>"


def _html_figure(name: str, png: bytes, panels: Sequence[Panel]) -> str:
    image = f'<img alt="Curves: {name}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
    # each sentence stands below its panel
    hints = "".join(f"<p><b>{html.escape(panel.title)}.</b> {html.escape(panel.look_for)}</p>" for panel in panels)
    grid = f'<div class="hints" style="--columns: {columns_of(len(panels))}">{hints}</div>'
    return f"<h2>{name.capitalize()}</h2>\n<figure>{image}</figure>\n{grid}"


def _html_completions(name: str, seeds: Sequence[Run]) -> str:
    # the first completions, not selected by quality
    rows = [_completion_row(completion) for run in seeds for completion in run.completions][:6]
    table = Table(["prompt", "completion", "expected", ""], rows)
    return f"<h3>{html.escape(name)}</h3>\n{_html_table(table, 'texts')}" if rows else ""


def _completion_row(completion: dict[str, str]) -> list[str]:
    correct = str(completion.get("correct")).lower()  # a JSON true, or the float of a metric
    verdict = "✓ right" if correct in ("true", "1", "1.0") else "✗ wrong" if correct in ("false", "0", "0.0") else "—"
    return [*(completion.get(key, "—") for key in ("prompt", "completion", "expected")), verdict]


def _made_with() -> str:
    parts = [f"Made {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", f"Python {platform.python_version()}"]
    for package in ("gem-kernels", "torch", "triton", "transformers", "matplotlib"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue  # reports can be made on machines that cannot train
    return " · ".join(parts)


MARKS = {"passed": "✓", "fired": "✗"}
HOW_TO_READ = (
    "± is the half-width of the 95 % t-interval of the mean over the seeds. In the curves, a line is the mean over the "
    "seeds for as long as all of them run, a band reaches from the lowest to the highest, and dotted grey is guessing."
)

# the policy makes the browser refuse to load anything from outside the file
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
<footer>{footer}</footer>
</body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e7; --paper: #fdfdfc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa5af; --line: #353c43; --paper: #16191c } }
body { max-width: 1100px; margin: 0 auto; padding: 48px 24px; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 20px } h2 { font-size: 21px; margin: 56px 0 16px }
h3 { font-size: 16px; margin: 32px 0 8px } ul { padding-left: 20px } section { overflow-x: auto }
p, footer, th { color: var(--soft); font-size: 14px } b { color: var(--ink) }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { font-weight: 500; vertical-align: bottom } td { vertical-align: top }
th, td { padding: 8px 0 8px 14px; border-bottom: 1px solid var(--line); text-align: left }
:is(th, td):first-child { padding-left: 0 }
.numbers { font-variant-numeric: tabular-nums } .numbers td { white-space: nowrap }
.numbers :is(th, td):not(:first-child) { text-align: right }
details { border-bottom: 1px solid var(--line) } summary { padding: 8px 0; cursor: pointer }
details section { padding: 0 0 16px 18px }
.rails :is(th, td):nth-child(1) { width: 14% } .rails :is(th, td):nth-child(2) { width: 14%; white-space: nowrap }
.texts { table-layout: fixed; min-width: 720px } .texts div { max-height: 14em; overflow: auto }
.texts div { white-space: pre-wrap; overflow-wrap: anywhere }
.texts th:nth-child(1) { width: 30% } .texts th:nth-child(3) { width: 14% } .texts th:nth-child(4) { width: 80px }
figure { margin: 0; padding: 12px; background: #fff; border: 1px solid var(--line); border-radius: 10px }
img { display: block; width: 100%; height: auto }
.hints { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 10px 28px; margin: 16px 12px }
.hints p { margin: 0 } @media (max-width: 720px) { .hints { grid-template-columns: 1fr } }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line) }
"""
