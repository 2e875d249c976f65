"""gem.report on made-up runs: 4 methods x 2 seeds, the literal recipe rising and then falling."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gem.curves import FIGURES, LINE_STYLES, plot_curves
from gem.report import HEADLINE, Table, markdown, plain, results_table, t_interval, write_report
from gem.results import Run, load_run

METHODS = ("SFT", "SEGA, literally", "SEGA, guarded", "DPO")
PNG = b"\x89PNG\r\n\x1a\n"


def sample_run(name: str, seed: int) -> Run:
    rng = random.Random(f"{name} {seed}")
    literal = name == "SEGA, literally"
    history = []
    for step in range(0, 61, 10):
        x = step / 60
        accuracy = 0.3 + (1.2 * math.sin(math.pi * x) * 0.5 - 0.2 * x if literal else 0.5 * x) + rng.gauss(0, 0.02)
        entry = {"step": step, "loss": 1 - x, "eval_accuracy_greedy": accuracy, "eval_auroc": 0.8 - 0.3 * x * literal}
        if name != "SFT":
            entry |= {"score": -0.5 + x, "final_entropy": 0.7 * (1 - x) if literal else 0.7 - 0.2 * x, "epoch": x}
        history.append(entry)
    metrics = {"accuracy_greedy": accuracy, "preference_length": 0.58, "train_runtime": 812.4, "learning_rate": 2e-5}
    completions = [
        {"prompt": f"{n} + 1 =", "completion": f"#### {n + 1}", "expected": str(n + 1), "correct": "True"}
        for n in range(8)
    ]
    return Run(name, history, metrics, completions, seed)


@pytest.fixture
def runs() -> list[Run]:
    return [sample_run(name, seed) for name in METHODS for seed in (0, 1)]


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing, which takes a second and which most of the page does not need."""
    monkeypatch.setattr("gem.report.plot_curves", lambda runs: {})


def one(**metrics: float) -> Run:
    return Run("a", [], metrics, [])


def put(folder: Path, **files: Any) -> Path:
    """Write a training folder: `trainer_state=...` becomes trainer_state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


# Loading


def test_load_a_whole_folder_and_merge_the_entries_of_a_step(tmp_path: Path) -> None:
    log = [
        {"step": 20, "loss": 0.5},
        {"step": 10, "loss": 1.0, "epoch": 0.1, "comment": "text", "done": True},
        {"step": 10, "eval_auroc": 0.8},
        {"step": 20, "train_runtime": 3.5},
    ]
    folder = put(
        tmp_path / "out",
        trainer_state={"log_history": log, "best_metric": None},
        metrics={"auroc": 0.8, "seeds": 3, "model": "tiny", "ok": True, "nested": {"a": 1}},
        run={"name": "SEGA", "seed": 7},
    )
    lines = [
        {"prompt": "1 + 1 =", "completion": "#### 2\u2028", "expected": "2", "correct": True, "score": -0.5},
        {"prompt": "2 + 2 =", "completion": "#### 5", "expected": None},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (folder / "completions.jsonl").write_text(text, encoding="utf-8")
    run = load_run(folder)
    assert (run.name, run.seed) == ("SEGA", 7)
    assert run.history == [
        {"step": 10, "loss": 1.0, "epoch": 0.1, "eval_auroc": 0.8},
        {"step": 20, "loss": 0.5, "train_runtime": 3.5},
    ]
    assert run.metrics == {"auroc": 0.8, "seeds": 3.0}
    assert run.completions == [
        {"prompt": "1 + 1 =", "completion": "#### 2\u2028", "expected": "2", "correct": "True", "score": "-0.5"},
        {"prompt": "2 + 2 =", "completion": "#### 5"},
    ]


def test_load_takes_the_newest_checkpoint_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        put(tmp_path / f"checkpoint-{step}", trainer_state={"log_history": [{"step": step, "loss": 1.0}]})
    put(tmp_path / "checkpoint-best", trainer_state={"log_history": []})
    assert load_run(tmp_path) == Run(tmp_path.name, [{"step": 100, "loss": 1.0}], {}, [], 0)


def test_load_prefers_the_folders_own_state(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-5", trainer_state={"log_history": [{"step": 5, "loss": 1.0}]})
    put(tmp_path, trainer_state={"log_history": [{"step": 6, "loss": 0.9}]})
    assert load_run(tmp_path).history == [{"step": 6, "loss": 0.9}]


def test_load_metrics_alone_and_name_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path / "dpo", metrics={"auroc": 0.8}))
    assert load_run(Path(".")) == Run("dpo", [], {"auroc": 0.8}, [], 0)


def test_load_keeps_the_nan_that_the_trainer_writes(tmp_path: Path) -> None:
    put(tmp_path, trainer_state='{"log_history": [{"step": 1, "loss": NaN}]}')
    assert math.isnan(load_run(tmp_path).history[0]["loss"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"expected trainer_state\.json .* or metrics\.json in .*found neither"),
        ({"run": {"name": "a"}}, "found neither"),
        ({"metrics": "{"}, r"metrics\.json: expected a JSON object, got text that does not parse"),
        ({"metrics": [1]}, r"metrics\.json: expected a JSON object, got list"),
        ({"trainer_state": {"log_history": [{"loss": 1}]}}, r'expected "step" in every entry .* got \[\'loss\'\]'),
        ({"metrics": {}, "run": {"seed": "one"}}, r"run\.json: expected \"seed\" to be an integer, got 'one'"),
    ],
)
def test_load_says_what_is_wrong(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(put(tmp_path, **files))


@pytest.mark.parametrize("line", ['{"prompt": "a"}', "[]", "{"])
def test_load_names_the_line_of_a_bad_completion(tmp_path: Path, line: str) -> None:
    put(tmp_path, metrics={})
    (tmp_path / "completions.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"completions\.jsonl, line 2: expected"):
        load_run(tmp_path)


# Numbers


def test_interval_by_hand() -> None:
    # mean 2, sd 1, t(2) = 4.3027: 4.3027 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4841), abs=1e-4)
    # t(1) = 12.7062 times half of the distance
    assert t_interval([0.4, 0.6]) == pytest.approx((0.5, 1.27062), abs=1e-5)


@pytest.mark.parametrize("count", [*range(2, 14), 30, 200])
def test_interval_against_scipy(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(count)
    values = [rng.gauss(0.5, 0.1) for _ in range(count)]
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=2e-3)


def test_results_table_aggregates_seeds() -> None:
    table = results_table(
        [
            Run("b", [], {"accuracy_greedy": 0.4, "auroc": 0.7}, [], seed=1),
            Run("a", [], {"accuracy_greedy": 0.9, "other": 1.0}, []),
            Run("b", [], {"accuracy_greedy": 0.6}, [], seed=0),
        ]
    )
    assert table.header == ["method", "seeds", "greedy accuracy", "AUROC of S"]
    assert table.rows == [["b", "2", "0.500 ± 1.271", "0.700 (1 of 2 seeds)"], ["a", "1", "0.900", "—"]]


def test_headline_keeps_its_order_whatever_the_order_of_the_metrics() -> None:
    run = one(**dict.fromkeys(reversed(HEADLINE), 0.5))
    assert results_table([run]).header[2:] == list(HEADLINE.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.12345, "0.123"), (2e-5, "2e-05"), (15234.2, "1.523e+04"), (-3.5, "-3.500"), (math.nan, "nan")],
)
def test_numbers_in_cells(value: float, text: str) -> None:
    assert results_table([one(auroc=value)]).rows == [["a", "1", text]]


def test_a_seed_that_diverged_shows_in_the_mean() -> None:
    table = results_table([one(auroc=math.inf), Run("a", [], {"auroc": 0.5}, [], seed=1)])
    assert table.rows == [["a", "2", "inf ± nan"]]


def test_plain_is_aligned() -> None:
    table = Table(["method", "auroc"], [["SFT", "0.5"], ["a longer name", "0.500 ± 0.100"]])
    assert plain(table).split("\n") == [
        "method                 auroc",
        "-------------  -------------",
        "SFT                      0.5",
        "a longer name  0.500 ± 0.100",
    ]


def test_markdown_escapes_what_would_break_a_row() -> None:
    table = Table(["method", "auroc"], [["log p(a|q)\nnew", "0.5"]])
    assert markdown(table) == "| method | auroc |\n| --- | ---: |\n| log p(a\\|q) new | 0.5 |"


# Curves


def drawn(monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> dict[str, Any]:
    """The axes of every panel by its title."""
    figure_module = pytest.importorskip("matplotlib.figure")
    axes: dict[str, Any] = {}

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        axes.update({each.get_title(loc="left"): each for each in self.axes})

    monkeypatch.setattr(figure_module.Figure, "savefig", savefig)
    plot_curves(runs)
    return axes


def test_curves_draw_only_what_was_logged(runs: list[Run]) -> None:
    pytest.importorskip("matplotlib")
    figures = plot_curves(runs)
    assert list(figures) == ["outcome", "batch health"]
    assert all(png.startswith(PNG) for png in figures.values())
    assert plot_curves([one(auroc=0.5)]) == {}


def test_every_key_has_one_panel_with_a_unit_and_a_sentence() -> None:
    panels = [panel for figure in FIGURES.values() for panel in figure]
    assert len({panel.key for panel in panels}) == len({panel.title for panel in panels}) == len(panels) == 38
    assert all(panel.unit and panel.look_for.endswith(".") for panel in panels)


def test_a_method_looks_the_same_in_every_panel(monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
    axes = drawn(monkeypatch, runs)
    looks = [[(line.get_color(), line.get_linestyle()) for line in axes[title].lines] for title in axes]
    by_title = dict(zip(axes, looks, strict=True))
    assert len(set(by_title["Task accuracy, greedy"])) == len(METHODS) <= len(LINE_STYLES)
    assert by_title["Score S of the candidates"] == by_title["Task accuracy, greedy"][1:]  # SFT logs no score
    assert axes["Task accuracy, greedy"].get_ylim() == (-0.02, 1.02)
    assert axes["Entropy of the answer, training"].get_ylim()[0] == 0


def test_line_is_the_mean_while_all_seeds_run_and_the_band_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": math.nan}]
    whole = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 4, "kl": 0.1}]
    runs = [Run("a", stopped, {}, [], 0), Run("a", whole, {}, [], 1), Run("a", [], {}, [], 2)]
    axes = drawn(monkeypatch, runs)["Training loss"]
    (line,), (band,) = axes.lines, axes.collections
    assert list(line.get_xdata()) == [1, 2]
    assert line.get_ydata()[0] == 3.0
    assert math.isnan(line.get_ydata()[1])  # a seed that diverged is not averaged away
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 2), (1, 4), (2, 3), (3, 1)}


def test_a_single_point_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(monkeypatch, [Run("a", [{"step": 5, "loss": 1.0}], {}, [])])["Training loss"]
    assert axes.lines[0].get_marker() == "o"
    assert not axes.collections  # one seed has no band


def test_curves_survive_odd_names_and_values() -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": 1, "loss": math.inf}, {"step": 2, "loss": math.nan}]
    runs = [Run(r"a $\b{ $ %s", history, {}, [], seed) for seed in (0, 1)]
    assert plot_curves(runs)["batch health"].startswith(PNG)


# The page


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path, runs: list[Run]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    write_report(path, runs, title="Four methods", notes=["two seeds", "a warning"])
    page = path.read_text(encoding="utf-8")
    assert "<title>Four methods</title>" in page
    assert "<ul><li>two seeds</li><li>a warning</li></ul>" in page
    assert page.index("Results") < page.index("Outcome") < page.index("Completions") < page.index("All other numbers")
    assert "Falling to zero while accuracy falls too" not in page  # no run logs the held-out entropy
    assert "The same on the candidates of each batch" in page
    assert page.count("✓ right") == 6 * len(METHODS)
    assert "812.400 ± 0.000" in page
    assert re.search(r"Made \d{4}-\d\d-\d\d .* · Python 3\.\d+", page)
    links = re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]*)|url\(|@import""", page)
    assert len(links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page
    assert not re.search("https?:", page)
    assert os.listdir(tmp_path) == ["report.html"]


def test_everything_is_escaped(tmp_path: Path, no_curves: None) -> None:
    evil = "<script>alert('x')</script>&\""
    keys = ("prompt", "completion", "expected", "correct")
    run = Run(evil, [], {"auroc": 0.5, evil: 1.0}, [dict.fromkeys(keys, evil)])
    write_report(tmp_path / "report.html", [run], title=evil, notes=[evil, "{braces} %s"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;") == 10
    assert "{braces} %s" in page


def test_completions_are_the_first_six_with_or_without_a_verdict(tmp_path: Path, no_curves: None) -> None:
    verdicts = ["true", "1.0", "False", "0", "perhaps", None, "true"]
    items = [{"prompt": "p", "completion": f"answer {n}"} for n in range(len(verdicts))]
    for item, verdict in zip(items, verdicts, strict=True):
        item.update({"correct": verdict} if verdict is not None else {})
    write_report(tmp_path / "report.html", [Run("a", [], {}, items[:2]), Run("a", [], {}, items[2:], 1)], title="t")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [page.count(word) for word in ("✓ right", "✗ wrong", "answer 5", "answer 6")] == [2, 2, 1, 0]


def test_page_of_a_bare_run_has_no_empty_sections(tmp_path: Path, no_curves: None) -> None:
    write_report(tmp_path / "report.html", [one()], title="t")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*)</h2>", page) == ["Results"]
    assert "<ul>" not in page


def test_verdicts_of_each_run_are_open_where_a_rail_fired(tmp_path: Path, no_curves: None) -> None:
    well = [{"rail": "idle", "verdict": "passed", "said": "no step"}, {"rail": "leap", "verdict": "off", "said": "a=0"}]
    ill = [
        {"rail": "idle", "verdict": "fired", "said": "<20 steps"},
        {"rail": "leap", "verdict": "not watched", "said": ""},
    ]
    seen = {"rail_idle": 1.0, "train_steps": 4.0}
    runs = [
        Run("a", [], seen, [], 0, well),
        Run("a", [], seen, [], 1, ill),
        Run("b", [], {}, [], 0, well),
        Run("old", [], {}, []),
    ]
    table = results_table(runs)
    assert table.header[-1] == "guard rails hit" and [row[-1] for row in table.rows] == ["idle (1 of 2)", "none", "—"]
    write_report(tmp_path / "report.html", runs, title="t")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<h2>Results") < page.index("<h2>Guard rails") < page.index("<h2>All other numbers")
    assert re.findall("<details(.*?)><summary>(.*?)</summary>", page) == [
        ("", "a, seed 0: 1 passed, 1 off"), (" open", "a, seed 1: 1 fired, 1 not watched"), ("", "b: 1 passed, 1 off"),
    ]  # fmt: skip
    assert "✗ fired" in page and "✓ passed" in page and "&lt;20 steps" in page and "rail_idle" not in page
    assert "train_steps" in page


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path, no_curves: None) -> None:
    run = Run("a", [], {}, [{"prompt": "p", "completion": "cut \ud83d"}])
    write_report(tmp_path / "report.html", [run], title="t")
    assert "cut ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_curves: None) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def fail(source: object, target: object) -> None:
        assert Path(str(source)).parent == tmp_path  # a rename is atomic on one file system only
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, [one(auroc=0.5)], title="t")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_errors_name_the_argument(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with pytest.raises(TypeError, match="notes: expected a sequence of strings, got the string 'one note'"):
        write_report(path, [one()], title="t", notes="one note")
    with pytest.raises(ValueError, match="runs: expected at least one Run, got none"):
        results_table([])
    with pytest.raises(ValueError, match="runs: expected one of each name and seed, got two of 'a' with seed 0"):
        write_report(path, [one(), one()], title="t")
    assert not path.exists()


def test_import_needs_neither_torch_nor_transformers_nor_matplotlib() -> None:
    code = "import sys, gem.report; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"
