"""Every command of the README is run, or its parts are: the two make targets by what they call, the rest as written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES

from gem import cli, demo
from gem.demo import build_model, build_tokenizer, worked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].split() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    kernels, model = [block for kind, block in BLOCKS if kind == "python"]
    names: dict[str, Any] = {}
    for code in (kernels, model):
        assert len(code.strip().splitlines()) <= 11
        exec(compile(code, "README.md", "exec"), names)
    assert names["weight"].grad is not None
    assert all(p.grad is not None for p in names["model"].parameters())
    assert names["out"].log_probs.shape == (1, names["ids"].shape[1] - 1)


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
    assert {command[0] for command in COMMANDS} == {"make", "gem-kernels"}


def write_inputs(folder: Path) -> None:
    """MODEL, pairs.jsonl and test.jsonl, as the commands name them."""
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
    """The whole demo with a few steps: four rows, a report, its data in the public format; a second run replaces it."""
    for name, value in {"N_SFT": 64, "N_PAIRS": 16, "N_TEST": 4, "WARM_STEPS": 2, "WARM_BATCH": 8}.items():
        monkeypatch.setattr(demo, name, value)
    for name, value in {"STEPS": 2, "PROMPTS": 2, "EVAL_EVERY": 1, "FINAL_SAMPLES": 1}.items():
        monkeypatch.setattr(demo, name, value)
    output = tmp_path / "demo"
    for _ in range(2):
        runs = demo.run_demo(output)
    assert [run.name for run in runs] == ["warm start", *demo.METHODS]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert all(run.name in page for run in runs)
    rows = [json.loads(line) for line in (output / "seed0/data/pairs.jsonl").read_text().splitlines()]
    assert {*rows[0]} == {"prompt", "chosen", "rejected"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="output_dir must be empty or hold an earlier demo"):
        demo.run_demo(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()
