"""README tables and plots from the results on file, none by hand.

    python -m benchmarks.plot [--check]

Takes the newest file of every device in benchmarks/results, writes the block between the markers of README.md, all tables to
docs/benchmarks.md, and docs/bench-<device>-{tokens,error}.png. --check writes nothing and fails where README.md or
docs/benchmarks.md is not what the files say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers import ENTROPY_FIRST
from benchmarks.results import EAGER, HEADER, OURS, ROOT, Json

BEGIN, END = "<!-- benchmarks: python -m benchmarks.plot -->", "<!-- end of benchmarks -->"
# What the README shows, each at its largest shape. The rest is in docs/benchmarks.md.
IN_README = ("SEGA, weights from the pass", "SEGA, frozen head", "score: logprob and entropy, forward")
COLUMNS_IN_README = ("", "time", "/ eager", "/ bare mm", "extra MiB", "Δ logprob", "Δ dhidden")
OVER_TOKENS = "SEGA, weights from the pass"
OTHERS = ("drop_mass", "gpu-", "planted_faults", "real_step", "trl_heads")  # results of scripts of their own
COLORS = {OURS: "#c1272d", EAGER: "#555555", "torch.compile": "#999999", "TRL": "#0072b2", "Liger scaled CE": "#009e73"}
COLORS |= {"F.linear_cross_entropy": "#8e44ad", ENTROPY_FIRST: "#e69f00"}


def newest() -> dict[str, Path]:
    """device (as in the file's name) -> its newest file."""
    found = {}
    for path in sorted(results.FOLDER.glob("*.json")):
        match = re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d", path.stem)
        if match and not path.stem.startswith(OTHERS):
            found[match[1]] = path  # sorted by date: the last one stays
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _markdown(header: Sequence[str], grid: Sequence[Sequence[str]]) -> list[str]:
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in grid)]
    lines = ["| " + " | ".join(header[i] for i in used) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "---:" for i in used) + "|")
    return lines + ["| " + " | ".join(row[i] for i in used) + " |" for row in grid]


def _section(of_task: Sequence[Json], columns: Sequence[str], level: str) -> list[str]:
    row = of_task[0]
    lines = [f"{level} {row['task']}", "", f"{row['shape']}: {results.title(row)}.", ""]
    picked = [HEADER.index(name) for name in columns]
    grid = [[cells[i] for i in picked] for cells in results.filled(of_task)]
    lines += _markdown(columns, grid)
    if said := results.reasons(of_task):
        lines += ["", f"Does not: {said}."]
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


def readme_block(documents: dict[str, Json]) -> str:
    lines = [BEGIN, ""]
    for device, document in documents.items():
        tasks = results.by_task(results.rows(document))
        lines += [f"**{document['machine_info']['device']}** ({_about(document)})", ""]
        for wanted in IN_README:
            shapes = [of_task for (task, _), of_task in tasks.items() if task == wanted]
            if shapes:
                largest = max(shapes, key=lambda of_task: of_task[0]["N"] * of_task[0]["D"] * of_task[0]["V"])
                lines += _section(largest, COLUMNS_IN_README, "####")
        for kind, says in (("tokens", "time and memory against tokens"), ("error", "error against time")):
            if (ROOT / "docs" / f"bench-{device}-{kind}.png").exists():
                lines += [f"![{device}: {says}](docs/bench-{device}-{kind}.png)", ""]
    if not any("capability" in document["machine_info"] for document in documents.values()):
        lines += ["On A100, H100 and H200: **not measured yet**.", ""]
    return "\n".join([*lines, END])


def page(documents: dict[str, Json]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.plot` from benchmarks/results. Median times, all libraries in one process on the",
        "same inputs, in turns; each was held against fp64 before. **/ eager**: time over that of plain torch. **/ bare mm**:",
        "over one matrix product of 2NDV FLOP. **of GEMM rate**: the products that the task cannot do without, at the speed of",
        "that one, over the time. **extra MiB**: peak memory beyond inputs and gradients. **Δ**: largest error of a",
        "log-probability or entropy in nats, relative error of a gradient.",
        "",
    ]
    for document in documents.values():
        lines += [f"## {document['machine_info']['device']}", "", f"{_about(document)}.", ""]
        for of_task in results.by_task(results.rows(document)).values():
            lines += _section(of_task, HEADER, "###")
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


def plot_tokens(document: Json, path: Path) -> None:
    """Time and memory of the SEGA step against the number of tokens, of one head."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    timed = [r for r in results.rows(document) if r["task"] == OVER_TOKENS and "median s" in r]
    heads = [(r["D"], r["V"]) for r in timed if r["library"] == OURS]
    head = max(heads, key=heads.count, default=None)  # the one that was measured with the most numbers of tokens
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
    figure.suptitle(f"{OVER_TOKENS}, D={head[0]}, V={head[1]}: {device}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_error(document: Json, path: Path) -> None:
    """Error of the log-probability against time, of bf16 operands: what fp32 logits buy, and what they cost."""
    from matplotlib import pyplot as plt

    task = "score: logprob and entropy, forward"
    timed = [r for r in results.rows(document) if r["task"] == task and "median s" in r and r["dtype"] == "bfloat16"]
    eager = next((r for r in timed if r["library"] == EAGER), None)
    if eager is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, what in zip(axes, ("logprob", "entropy"), strict=True):
        for i, row in enumerate(sorted(timed, key=lambda row: row["median s"])):
            x, y = row["median s"] / eager["median s"], row[f"error of {what}"]
            axis.scatter(x, y, s=70, color=_style(row["library"])["color"] or "#d55e00", zorder=3)
            beside = (0, 9 if i % 2 else -16)  # above and below in turns, to be legible
            axis.annotate(row["library"], (x, y), beside, textcoords="offset points", ha="center", fontsize=9)
        axis.set(yscale="log", xlabel="time / eager", ylabel="nats", title=f"Largest error of the {what}")
        axis.set_xlim(0, 1.25 * max(row["median s"] for row in timed) / eager["median s"])
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{task}, {results.title(timed[0])}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="README tables and plots from benchmarks/results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where README.md or docs/ is not up to date"
    )
    args = parser.parse_args(argv)
    documents = {device: results.read(path) for device, path in newest().items()}
    docs = ROOT / "docs"
    if not args.check:
        import matplotlib

        matplotlib.use("Agg")
        for device, document in documents.items():
            plot_tokens(document, docs / f"bench-{device}-tokens.png")
            plot_error(document, docs / f"bench-{device}-error.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    wanted = {readme: before + readme_block(documents) + after, docs / "benchmarks.md": page(documents)}
    stale = [
        path for path, content in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    for path in stale:
        if args.check:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results says: run `python -m benchmarks.plot`")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
