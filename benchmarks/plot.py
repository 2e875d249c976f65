"""Write every measured number and picture of README.md and docs/benchmarks.md from benchmarks/results.

    python -m benchmarks.plot [--check]

For the newest file of each device: the block between the markers of README.md, the tables of docs/benchmarks.md, and
docs/bench-<device>-{step,tokens,error}.png. With --check nothing is written, and the exit status is 1 if README.md or
docs/benchmarks.md differs from what the files give.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gpu_stages.suites import STAGES
from benchmarks.peers import ENTROPY_FIRST
from benchmarks.results import EAGER, HEADER, OURS, ROOT, Json

BEGIN, END = "<!-- benchmarks: python -m benchmarks.plot -->", "<!-- end of benchmarks -->"
STEP = "SEGA, weights from the pass"
SCORE = "score: logprob and entropy, forward"
TRL, SMALL_CACHE = "TRL", f"{OURS}, cache 128 MiB"
DOCS = ROOT / "docs"
PICTURES = {  # the last part of the file's name -> its alternative text in docs/benchmarks.md
    "step": "time and memory of one SEGA step, by library",
    "tokens": "time and memory of the SEGA step against tokens",
    "error": "error of bf16 log-probabilities and entropies against time",
}
OTHERS = ("gpu-", "online_step", "planted_faults", "real_step", "trl_heads")  # their scripts write the tables
COLORS = {OURS: "#c1272d", EAGER: "#555555", "torch.compile": "#999999", TRL: "#0072b2", "Liger scaled CE": "#009e73"}
COLORS |= {"F.linear_cross_entropy": "#8e44ad", ENTROPY_FIRST: "#e69f00"}


def newest() -> dict[str, Path]:
    """Map each device, as files are named after it, to its newest file."""
    found = {}
    for path in sorted(results.FOLDER.glob("*.json")):
        match = re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d", path.stem)
        if match and not path.stem.startswith(OTHERS):
            found[match[1]] = path  # in order of dates: the last one stays
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _markdown(header: Sequence[str], grid: Sequence[Sequence[str]]) -> list[str]:
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in grid)]
    lines = ["| " + " | ".join(header[i] for i in used) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "---:" for i in used) + "|")
    return lines + ["| " + " | ".join(row[i] for i in used) + " |" for row in grid]


def _section(of_task: Sequence[Json]) -> list[str]:
    row = of_task[0]
    rounds = [r["rounds"] for r in of_task if "rounds" in r]
    fewest, most = min(rounds, default=0), max(rounds, default=0)
    medians = f"medians of {most} rounds" if fewest == most else f"medians of {fewest} to {most} rounds"
    lines = [f"### {row['task']}", "", f"{row['shape']}: {results.title(row)}; {medians}.", ""]
    lines += _markdown(HEADER, results.filled(of_task))
    if said := results.reasons(of_task):
        lines += ["", f"Not timed: {said}."]
    return [*lines, ""]


def _about(document: Json) -> str:
    machine, commit = document["machine_info"], document["commit_info"]
    names = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    threads = f"{machine['threads']} threads" if "capability" not in machine else ""
    driver = machine.get("driver, power limit, max clock, clock, temperature") or ""
    changed = ", with changes" if commit.get("dirty") else ""
    where = ", ".join(filter(None, (machine.get("instructions"), threads, driver)))
    return f"{where}; {versions}; {document['datetime'][:10]}, commit {str(commit['id'])[:8]}{changed}"


def _largest(document: Json, task: str) -> dict[str, Json]:
    """Return the timed rows of a task at its largest shape by library; nothing if the task was not timed."""
    timed = [row for row in results.rows(document) if row["task"] == task and "median s" in row]
    largest = max((row["N"] * row["D"] * row["V"] for row in timed), default=0)
    return {row["library"]: row for row in timed if row["N"] * row["D"] * row["V"] == largest}


def _bf16(document: Json) -> dict[str, Json]:
    """Return the timed rows of the scoring task on bf16 operands by library."""
    timed = [row for row in results.rows(document) if row["task"] == SCORE and "median s" in row]
    return {row["library"]: row for row in timed if row["dtype"] == "bfloat16"}


def _picture(device: str, kind: str, folder: str = ".") -> str:
    return (Path(folder) / f"bench-{device}-{kind}.png").as_posix()


def _size(row: Json) -> str:
    return f"N={row['N']:,} tokens, D={row['D']:,}, V={row['V']:,}, {row['dtype']}"


def _where(document: Json) -> str:
    machine = document["machine_info"]
    return str(machine["device"]) + ("" if "capability" in machine else f", {machine['threads']} threads")


def _headline(document: Json) -> str:
    """State time, memory and error beside eager and TRL: the one measurement on the README's first screen."""
    step, score = _largest(document, STEP), _bf16(document)
    cost = {
        name: f"{results.seconds(row['median s'])} and {row['peak extra MiB']:,.0f} MiB" for name, row in step.items()
    }
    ours = step[OURS]
    says = (
        f"**One SEGA step takes {cost[OURS]}; eager PyTorch takes {cost[EAGER]}, TRL {cost[TRL]}**"
        f" ({_where(document)}; {_size(ours)}; medians of rounds in turns). The step is the forward and backward of SEGA, GEM's"
        " weighted loss, whose weights come from the entropies of the same pass. Memory is counted beyond inputs and gradients."
    )
    if SMALL_CACHE in step:
        says += f" With a cache of 128 MiB in place of 1 GiB the step takes {cost[SMALL_CACHE]}."
    if {OURS, EAGER, TRL} <= score.keys():
        error = {name: f"{row['error of logprob']:.0e}" for name, row in score.items()}
        says += (
            f" Scoring {next(iter(score.values()))['N']:,} tokens in bf16, the largest error of a log-probability against fp64"
            f" is {error[OURS]} nats (eager {error[EAGER]}, TRL {error[TRL]})."
        )
    return textwrap.fill(says, 120, break_on_hyphens=False)


def readme_block(documents: dict[str, Json]) -> str:
    lines = [BEGIN, ""]
    for device, document in documents.items():
        if {OURS, EAGER, TRL} <= _largest(document, STEP).keys():
            lines += [_headline(document), "", f"![{PICTURES['step']}]({_picture(device, 'step', 'docs')})", ""]
    return "\n".join([*lines, END])


def _on_a_gpu() -> list[str]:
    return [
        "## How to measure a GPU",
        "",
        "    python -m benchmarks.gpu                               # all stages, in ten minutes what fits: `make gpu`",
        "    python -m benchmarks.gpu --stages smoke claims         # these alone",
        "    python -m benchmarks.gpu --stages sweep --seconds 500  # one stage, with more time",
        "    python -m benchmarks.gpu --go-on gpu-X.json            # the same run again: what its file has is not repeated",
        "    python -m benchmarks.gpu --collect gpu-*.json          # benchmarks of several runs in one file, for this page",
        "    python -m benchmarks.gpu --dry-run                     # every stage on a CPU, tiny: what is broken shows before",
        "",
        "Nothing is installed: torch, triton and pytest are enough, with pytest-benchmark for `bench`. A library that is not",
        "there is a row that says so. The stages run in the order of what they decide. Each ends with its decision, a sentence",
        "computed from its numbers, in the log and in the JSON. A row is in the JSON before the next one is measured: a run",
        "that is killed loses the row in progress, and `--collect` writes its benchmarks. Stages that the time was too short",
        "for are named at the end, with the command that goes on.",
        "",
        "| stage | seconds | decides |",
        "|---|---:|---|",
        *(f"| {name} | {stage.seconds:.0f} | {stage.decides} |" for name, stage in STAGES.items()),
        "",
    ]


def page(documents: dict[str, Json]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "`python -m benchmarks.plot` writes this page from [benchmarks/results](../benchmarks/results); `make bench` runs the",
        "benchmarks and then this page. All libraries run in one process on the same inputs, in turns. Each is compared with",
        "fp64 before it is timed.",
        "",
        "| column | meaning |",
        "|---|---|",
        "| / eager | time over the time of plain torch |",
        "| / bare mm | time over the time of one matrix product of 2NDV FLOP |",
        "| of GEMM rate | time of the products that the task cannot avoid, at the rate of that one, over the time |",
        "| extra MiB | peak memory beyond inputs and gradients |",
        "| Δ logprob, Δ entropy | largest error against fp64, nats |",
        "| Δ dhidden, Δ dweight | relative error of the gradient against fp64 |",
        "",
    ]
    if not any("capability" in document["machine_info"] for document in documents.values()):
        lines += ["A100, H100, H200: **not measured yet**.", ""]
    lines += _on_a_gpu()
    for device, document in documents.items():
        lines += [f"## {document['machine_info']['device']}", "", f"{_about(document)}.", ""]
        for kind, shows in PICTURES.items():
            if (DOCS / _picture(device, kind)).exists():
                lines += [f"![{shows}]({_picture(device, kind)})", ""]
        for of_task in results.by_task(results.rows(document)).values():
            lines += _section(of_task)
    return "\n".join(lines).rstrip() + "\n"


# --- plots ------------------------------------------------------------------------------------------------------------


def _style(library: str) -> dict[str, Any]:
    ours = library.startswith(OURS)
    return {
        "color": COLORS.get(library, COLORS[OURS] if ours else None),
        "linewidth": 2.4 if ours else 1.3,
        "linestyle": "-" if library in COLORS else ":",
        "marker": "o" if ours else "s",
        "markersize": 6 if ours else 4,
        "zorder": 3 if ours else 2,
    }


def plot_step(document: Json, path: Path) -> None:
    """Draw time and memory of the SEGA step at its largest shape, one bar per library, the fastest on top."""
    from matplotlib import pyplot as plt

    rows = sorted(_largest(document, STEP).values(), key=lambda row: row["median s"], reverse=True)
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.33 * len(rows)), layout="constrained", sharey=True)
    panels = (
        ("median s", "Time, s", "{:.2f}"),
        ("peak extra MiB", "Memory beyond inputs and gradients, MiB", "{:,.0f}"),
    )
    for axis, (what, label, form) in zip(axes, panels, strict=True):
        bars = axis.barh(
            [row["library"] for row in rows],
            [row[what] for row in rows],
            color=[COLORS[OURS] if row["library"].startswith(OURS) else "#9aa5b1" for row in rows],
            height=0.7,
        )
        axis.bar_label(bars, [form.format(row[what]) for row in rows], padding=4, fontsize=9)
        axis.set_title(label, fontsize=10, loc="left")
        axis.margins(x=0.12)
        axis.xaxis.set_ticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    for name in axes[0].get_yticklabels():
        name.set_fontweight("bold" if name.get_text().startswith(OURS) else "normal")
    figure.suptitle(f"One SEGA step, {_size(rows[0])}: {_where(document)}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_tokens(document: Json, path: Path) -> None:
    """Draw time and memory of the SEGA step against the number of tokens, for one head."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    timed = [r for r in results.rows(document) if r["task"] == STEP and "median s" in r]
    heads = [(r["D"], r["V"]) for r in timed if r["library"] == OURS]
    head = max(heads, key=heads.count, default=None)  # the head measured at the most numbers of tokens
    lines: dict[str, list[Json]] = {}
    for row in timed:
        if (row["D"], row["V"]) == head:
            lines.setdefault(row["library"], []).append(row)
    if head is None or max(map(len, lines.values())) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for axis, what, label in zip(axes, ("median s", "peak extra MiB"), ("seconds", "MiB"), strict=True):
        for library, of_library in lines.items():
            points = sorted((r["N"], r[what]) for r in of_library if r.get(what))
            if points:
                axis.plot(*zip(*points, strict=True), label=library, **_style(library))
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        axis.set_xticks(sorted({r["N"] for of_library in lines.values() for r in of_library}))
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.grid(alpha=0.3)
    axes[0].set_title("Time of forward + backward")
    axes[1].set_title("Memory beyond inputs and gradients")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    device = document["machine_info"]["device"]
    figure.suptitle(f"{STEP}, D={head[0]}, V={head[1]}: {device}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_error(document: Json, path: Path) -> None:
    """Draw the errors of the statistics of bf16 operands against time: what fp32 logits gain and cost."""
    from matplotlib import pyplot as plt

    timed = _bf16(document)
    eager = timed.get(EAGER)
    if eager is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, what in zip(axes, ("logprob", "entropy"), strict=True):
        for i, row in enumerate(sorted(timed.values(), key=lambda row: row["median s"])):
            x, y = row["median s"] / eager["median s"], row[f"error of {what}"]
            axis.scatter(x, y, s=70, color=_style(row["library"])["color"] or "#d55e00", zorder=3)
            beside = (0, 9 if i % 2 else -16)  # alternate above and below: neighbours would overlap
            axis.annotate(row["library"], (x, y), beside, textcoords="offset points", ha="center", fontsize=9)
        axis.set(yscale="log", xlabel="time / eager", ylabel="nats", title=f"Largest error of the {what}")
        axis.set_xlim(0, 1.25 * max(row["median s"] for row in timed.values()) / eager["median s"])
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{SCORE}, {results.title(eager)}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the README block, docs/benchmarks.md and pictures from benchmarks/results."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if README.md or docs/benchmarks.md is out of date"
    )
    args = parser.parse_args(argv)
    documents = {device: results.read(path) for device, path in newest().items()}
    if not args.check:
        import matplotlib

        matplotlib.use("Agg")
        plots = {"step": plot_step, "tokens": plot_tokens, "error": plot_error}
        for device, document in documents.items():
            for kind, plot in plots.items():
                plot(document, DOCS / _picture(device, kind))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    wanted = {readme: before + readme_block(documents) + after, DOCS / "benchmarks.md": page(documents)}
    stale = [
        path for path, content in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    for path in stale:
        if args.check:
            print(f"{path.relative_to(ROOT)} differs from benchmarks/results: run `python -m benchmarks.plot`")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
