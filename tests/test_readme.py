"""The README's code and commands run as written; the pages link to files and name modules that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES

from gem import cli, demo
from gem.methods import Budget
from gem.tasks import CHAIN, build_model, build_tokenizer, worked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
STATS = ("logprob", "entropy", "lse", "max_logprob")
COMMANDS = [line.split("#")[0].split() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    kernels, model = [block for kind, block in BLOCKS if kind == "python"]
    names: dict[str, Any] = {}
    for code in (kernels, model):
        assert len([line for line in code.splitlines() if line]) <= 8
        exec(compile(code, "README.md", "exec"), names)
    assert names["weight"].grad is not None and names["hidden"].grad is not None
    assert all(getattr(names["result"].stats, name).shape == (12,) for name in STATS)
    assert all(p.grad is not None for p in names["model"].parameters())
    assert names["out"].log_probs.shape == (1, names["ids"].shape[1] - 1)


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 110
    first_screen = README.split("\n## ")[0]
    for part in ("pip install .", "make demo", "make test", ".png)", "Not measured yet: any GPU"):
        assert part in first_screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_picture_is_linked() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in (ROOT / "docs").glob("*.png") if f"{path.name})" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_of_a_page_exist(page: Path) -> None:
    """Every `python -m name` is a module of the repository; CHANGELOG.md also names one that moved."""
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"python -m ((?:benchmarks|tools|gem|gem_kernels)[\w.]*)", text)) - {"gem_kernels.aot"}
    stems = [ROOT.joinpath(*name.split(".")) for name in names]
    assert not [stem for stem in stems if not stem.with_suffix(".py").exists() and not (stem / "__main__.py").exists()]


def test_the_files_that_the_pages_name_exist() -> None:
    """Paths in backquotes that start at a top-level folder exist; those with a <placeholder> are left out."""
    named = set()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/models.md"):
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"`((?:gem|gem_kernels|tools|tests|benchmarks|examples|docs)/[\w./-]+)`", text))
    assert not sorted(name for name in named if not (ROOT / name).exists())


def test_the_number_of_architectures() -> None:
    assert f"{len(ARCHITECTURES)} architectures are tested" in README


def test_make_targets_exist() -> None:
    targets = {command[1] for command in COMMANDS if command[0] == "make"}
    assert targets == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    assert "gem-kernels demo --output_dir runs/demo" in makefile
    assert "-m pytest" in makefile


def test_every_other_command_is_one_of_ours() -> None:
    assert {command[0] for command in COMMANDS} == {"pip", "make", "gem-kernels"}
    assert [command for command in COMMANDS if command[0] == "pip"] == [["pip", "install", "."]]
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'name="gem-kernels"' in setup and '"train": TRAIN' in setup


def write_inputs(folder: Path) -> None:
    """Write MODEL, pairs.jsonl and test.jsonl, under the names that the commands use."""
    import random

    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    rng = random.Random(0)
    rows = []
    for _ in range(8):
        terms = [rng.randint(1, 9) for _ in range(3)]
        prompt = "+".join(map(str, terms)) + "="
        rows.append({"prompt": prompt, "chosen": worked(rng, terms, False), "rejected": f"#### {sum(terms) + 1}"})
    for name in ("pairs.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_the_training_commands_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = {
        "doctor": "--batch_size 2",
        "sft": "--max_steps 2 --use_cpu",
        "score": "--max_new_tokens 6 --group_size 2",
        "train": "--max_steps 2 --use_cpu",
        "eval": "--max_new_tokens 6",
        "report": "",
    }
    ran = []
    for command in COMMANDS:
        if command[0] == "gem-kernels":
            assert cli.main([*command[1:], *shlex.split(small[command[1]])]) == 0, capsys.readouterr().err
            ran.append(command[1])
    assert ran == ["doctor", "sft", "score", "train", "eval", "report"]
    assert (tmp_path / "report.html").stat().st_size > 2000


def test_the_reference_script_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "train_gem.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 120
    write_inputs(tmp_path)
    flags = "--model MODEL --data pairs.jsonl --warm_steps 2 --steps 2 --batch_size 4 --max_new_tokens 6"
    done = subprocess.run(
        [sys.executable, str(script), *flags.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy_greedy" in done.stdout


def test_the_demo_runs_small_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the whole demo with a few steps: a row per method, a report, data in the public format; a second run replaces it."""
    task = replace(CHAIN, n_sft=64, n_pairs=8, n_test=4, warm_steps=2, warm_batch=8)
    budget = Budget(steps=2, prompts=2, group_size=2)
    for name, value in {"TASK": task, "BUDGET": budget, "PAIRS": 4, "EVAL_EVERY": 1, "FINAL_SAMPLES": 1}.items():
        monkeypatch.setattr(demo, name, value)
    output = tmp_path / "demo"
    for _ in range(2):
        runs = demo.run_demo(output)
    assert [run.name for run in runs] == ["warm start", *demo.ARMS]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert all(run.name in page for run in runs)
    rows = [json.loads(line) for line in (output / "seed0/data/pairs.jsonl").read_text().splitlines()]
    assert {*rows[0]} == {"prompt", "chosen", "rejected"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="output_dir must be empty or hold an earlier demo"):
        demo.run_demo(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()
