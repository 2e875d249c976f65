"""The command line: help, sources of settings, one line per mistake, output folders, and a run end to end."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, TrainingArguments

from gem import cli
from gem import config as c
from gem.cli import SUMMARIES, main, parse
from gem.explain import explain
from gem.groups import load_groups
from gem.settings import never_used
from gem.tasks import build_tokenizer

COMMANDS: dict[str, tuple[type, ...]] = {
    "sft": (c.ModelArguments, c.DataArguments, c.LossArguments, c.GuardArguments, c.PlanArguments),
    "score": (c.ModelArguments, c.DataArguments, c.UnlabeledArguments, c.RolloutArguments, c.ScoreArguments, c.RankArguments,
              c.GuardArguments, c.OutputArguments),
    "train": (c.ModelArguments, c.DataArguments, c.UnlabeledArguments, c.GroupsArguments, c.LossArguments, c.GuardArguments,
              c.RolloutArguments, c.ScoreArguments, c.RankArguments, c.EvalArguments, c.PlanArguments),
    "eval": (c.ModelArguments, c.DataArguments, c.RolloutArguments, c.ScoreArguments, c.EvalArguments,
             c.OutputArguments),
}  # fmt: skip
SYMBOLS = {  # setting -> its symbol in MATHS.md
    "group_size": "k:", "top_m": "rho:", "branch_weight": "lambda:", "final_weight": "w_final:", "tau": "tau:",
    "prior_sd": "s:", "human_weight": "n_h:", "reward": "f:", "weight_norm": "w = A", "length_norm": "log pi",
    "beta": "beta:", "kl_weight": "KL(policy || reference)",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Return (status, stdout, stderr) of a command, however it ends."""
    try:
        status: Any = main(argv)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return int(status or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the single line of stderr that a refused command prints."""
    status, _, err = run(capsys, *argv)
    assert status == 2, err
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    return err


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and SUMMARIES[command] in out
    text = " ".join(out.split())
    for setting in (f for cls in COMMANDS[command] for f in fields(cls)):
        shown = re.search(rf"--{setting.name}\b", out) is not None
        assert shown != (setting.name in never_used(command)), setting.name
        assert not shown or " ".join(setting.metadata["help"].split()) in text, setting.name
    assert "--config" in out and "--preset" in out


def test_help_gives_the_papers_symbols() -> None:
    settings = {f.name: f for classes in COMMANDS.values() for cls in classes for f in fields(cls)}
    for name, symbol in SYMBOLS.items():
        assert symbol in settings[name].metadata["help"], name
    for name, choices in c.CHOICES.items():  # the help lists every choice
        assert all(choice in settings[name].metadata["help"] for choice in choices), name
    assert set(c.CHOICES) | set(c.RANGES) <= set(settings)


@pytest.mark.parametrize(
    ("command", "flag"), [("report", "--output"), ("doctor", "--seq_len"), ("demo", "--output_dir")]
)
def test_help_of_the_small_commands(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and flag in out


@pytest.mark.parametrize("argv", [(), ("-h",), ("--help",)])
def test_usage(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *argv)
    assert status == (0 if argv else 2)
    assert all(name in out and summary in out for name, summary in SUMMARIES.items())


# --- sources of settings -----------------------------------------------------------------------------------------


def settings_of(*argv: str, command: str = "train") -> dict[str, Any]:
    training = (TrainingArguments,) if command in ("sft", "train") else ()
    instances, _ = parse(command, argv, *COMMANDS[command], *training)
    return {name: value for instance in instances for name, value in vars(instance).items()}


def yaml_file(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return str(folder / "c.yaml")


def test_defaults_are_those_of_config() -> None:
    found = settings_of()
    for cls in COMMANDS["train"]:
        for name, value in vars(cls()).items():
            assert found[name] == value and type(found[name]) is type(value), name
    for name, value in c.TRAINING_DEFAULTS.items():
        expected = [] if name == "report_to" else value
        assert found[name] == expected, name


@pytest.mark.parametrize("command", COMMANDS)
def test_preset_paper_is_what_config_says(command: str) -> None:
    found, default = settings_of("--preset", "paper", command=command), settings_of(command=command)
    paper = {k: v for k, v in c.PRESETS["paper"].items() if k in found}
    assert {k: found[k] for k in paper} == paper and (paper or command == "eval")  # eval has none of these settings
    ours = {f.name for cls in COMMANDS[command] for f in fields(cls)}
    assert {k for k in ours if found[k] != default[k]} == set(paper)


def test_flags_beat_yaml_beats_preset(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "preset: paper\nkl_weight: 0.3\nsft_weight: 0.4\nlearning_rate: 2e-4\n")
    found = settings_of("--config", file, "--sft_weight", "0.5")
    assert (found["reward"], found["kl_weight"], found["sft_weight"]) == ("identity", 0.3, 0.5)
    assert found["learning_rate"] == 2e-4  # yaml reads it as text
    assert settings_of(f"--config={file}", "--preset", "default")["reward"] == "bt"
    assert settings_of("--config", file, "--preset=paper", "--taper", "true")["taper"] is True


def test_yaml_gives_what_flags_would(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "model: 123\neos_token: null\nfilter_groups: no\ntaper: 'no'\ngroup_size: '3'\ntau: 1\ntop_m: 5\n"
        "markers: ['#### ', \"\\u2028\"]\nbf16: false\nmax_steps: 7\n"
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\n",
    )
    flags = ["--model", "123", "--filter_groups", "false", "--no_taper", "--group_size", "3", "--tau", "1", "--top_m"]
    flags += ["5", "--markers", "#### ", "\u2028", "--bf16", "false", "--max_steps", "7"]
    ours, theirs = settings_of("--config", file), settings_of(*flags)
    for name in ("model", "eos_token", "filter_groups", "taper", "group_size", "tau", "top_m", "markers", "max_steps"):
        assert ours[name] == theirs[name] and type(ours[name]) is type(theirs[name]), name
    assert ours["lr_scheduler_kwargs"] == {"num_cycles": 2}


CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


@pytest.mark.parametrize(
    "file",
    sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("evidence*.yaml"))),
    ids=str,  # those: test_evidence.py
)
def test_shipped_configs_parse(file: Path) -> None:
    command = next(name for name in ("sft", "train", "score", "eval") if name in file.stem or name == "train")
    assert settings_of("--config", str(file), command=command)["model"]


# --- mistakes: status 2 and one line that names the setting -----------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("fine-tune",),
            "command must be one of sft, score, merge, train, eval, report, doctor, demo, evidence, got 'fine-tune'",
        ),
        (("train", "--reward", "best"), "reward must be one of identity, softmax, rank, bt, got 'best'"),
        (("train", "--loss", "SEGA"), "loss must be one of sega"),
        (("score", "--dtype", "fp32"), "dtype must be one of float32"),
        (("train", "--tau", "0"), "tau must be in"),
        (("train", "--tau", "nan"), "tau must be in"),
        (("train", "--top_p", "1.5"), "top_p must be in"),
        (("eval", "--eval_limit", "-1"), "eval_limit must be in"),
        (("train", "--markers", ""), "markers must be a list of texts"),
        (("train", "--group_size", "five"), "argument --group_size"),
        (("train", "--group_size", "2.5"), "argument --group_size"),
        (("train", "--tau"), "argument --tau"),
        (("train", "--filter_groups", "perhaps"), "argument --filter_groups"),
        (("train", "--max_steps", "many"), "argument --max_steps"),
        (("train", "--lr_scheduler_type", "zigzag"), "zigzag"),
        (("train", "--no_such_flag", "1"), "--no_such_flag"),
        (("train", "--pre", "paper"), "--pre"),  # an abbreviation would be taken by one parser and missed by the other
        (("train", "--conf", "x.yaml"), "--conf"),
        (("train", "--preset", "papers"), "preset must be one of default, paper, got 'papers'"),
        (("train", "--config"), "argument --config"),
        (("train", "--config", "no.yaml"), "config must be an existing yaml file, got 'no.yaml'"),
        (("train",), "expected either groups (a file) or data (online)"),
        (("train", "--data", "a", "--groups", "b"), "expected either groups (a file) or data (online)"),
        (("sft",), "model must be a folder, a hub name, a GGUF file or a config .json, got nothing"),
        (("sft", "--model", "/no/such/folder"), "model must be"),
        (("report",), "runs"),
        (("report", "/no/such/folder"), "/no/such/folder"),
        (("demo", "--seeds", "two"), "argument --seeds"),
        (("demo", "--seeds", "0"), "seeds must be >= 1, got 0"),
    ],
    ids=" ".join,
)
def test_one_line_names_the_mistake(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())  # and it leaves nothing behind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\ntau: 1\n", "config must hold settings of `gem-kernels train`, got learning_rat in"),
        ("config: other.yaml\n", "got config in"),
        ("help: true\n", "got help in"),
        ("1: 2\n", "got 1 in"),
        ("- tau\n", "config must be a mapping of settings, got list"),
        ("", "config must be a mapping of settings, got NoneType"),
        ("tau: [1\nloss: {", "config must be yaml, got"),
        ("reward: best\n", "reward must be one of"),
        ("preset: papers\n", "preset must be one of"),
        ("preset: [paper]\n", "argument preset: expected one value"),
        ("group_size: five\n", "argument --group_size"),
        ("group_size: 2.5\n", "argument --group_size"),
        ("group_size: true\n", "argument --group_size"),
        ("group_size: [5]\n", "argument group_size: expected one value, got [5]"),
        ("group_size:\n", "argument group_size: expected a value, got nothing"),
        ("markers: '####'\n", "argument markers: expected a list"),
        ("markers: []\n", "markers must be a list of texts"),
        ("markers: ['####', 7]\n", "markers must be a list of texts"),
        ("filter_groups: perhaps\n", "argument --filter_groups"),
    ],
    ids=repr,
)
def test_one_line_names_the_mistake_in_a_file(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in refused(capsys, "train", "--config", yaml_file(tmp_path, text))


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


def write_files(folder: Path) -> Path:
    """Write a config, a tokenizer, data and yaml files into the current folder."""
    LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    ).save_pretrained("cfg")  # fmt: skip
    build_tokenizer().save_pretrained("tok")
    rows = [{"prompt": f"{i}+{i}=", "chosen": f"{i}+{i} #### {2 * i}", "rejected": f"#### {i}"} for i in range(1, 9)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "data: pairs.jsonl\nmax_length: 40\n"
    trainer = "use_cpu: true\ndisable_tqdm: true\nper_device_train_batch_size: 2\n"
    Path("sft.yaml").write_text(
        f"model: cfg/config.json\ntokenizer: tok\noutput_dir: sft\nmax_steps: 3\nlearning_rate: 1e-2\n{common}{trainer}"
    )
    Path("score.yaml").write_text(
        f"model: sft\ngroup_size: 3\nmax_new_tokens: 6\noutput: groups.jsonl\nfilter_groups: false\n{common}"
    )
    Path("train.yaml").write_text(
        f"model: sft\ngroups: groups.jsonl\noutput_dir: gem\nmax_steps: 2\nlearning_rate: 1e-2\nmax_new_tokens: 6\n"
        f"eval_data: pairs.jsonl\neval_strategy: steps\neval_steps: 1\n{trainer}"
    )
    Path("eval.yaml").write_text(f"model: gem\nmax_new_tokens: 6\noutput: eval.json\n{common}")
    return folder


def test_every_phase_of_a_tiny_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sft -> score -> train -> eval -> report, each from its file; then each again."""
    for command in ("sft", "score", "train", "eval"):
        status, _, err = run(capsys, command, "--config", f"{command}.yaml")
        assert status == 0, err
    assert run(capsys, "report", "sft", "gem", "--output", "page.html")[0] == 0
    rails = {"rail_leap": 1.0, "rail_idle": 1.0, "rail_finite": 1.0}
    assert json.loads(Path("sft/metrics.json").read_text()) == {"train_steps": 3.0, **rails}
    groups = load_groups(Path("groups.jsonl"))
    assert len(groups) == 8 and all(len(g.members) == 5 for g in groups)
    trained, evaluated = (json.loads(Path(name).read_text()) for name in ("gem/metrics.json", "eval.json"))
    assert trained["train_steps"] == 2
    assert {"preference_sum", "preference_reference", "accuracy_greedy", "truncated"} <= trained.keys()
    same = ("preference_sum", "preference_token", "preference_length", "accuracy_greedy")  # metrics without sampling
    assert {k: trained[k] for k in same} == pytest.approx({k: evaluated[k] for k in same})
    assert "preference_reference" not in evaluated  # the model is its own reference
    history = json.loads(Path("gem/trainer_state.json").read_text())["log_history"]
    assert all(any(key in entry for entry in history) for key in ("loss", "kl", "score", "eval_preference_sum"))
    assert Path("gem/completions.jsonl").read_text().count("\n") == 8
    assert "<html" in Path("page.html").read_text() and "gem" in Path("page.html").read_text()

    # Run again: what is finished stays as it is.
    files_before = {p: p.read_bytes() for folder in ("sft", "gem") for p in Path(folder).rglob("*") if p.is_file()}
    for command in ("sft", "train"):
        status, out, err = run(capsys, command, "--config", f"{command}.yaml")
        assert status == 0 and "train_steps" in out, err
    files_after = {p: p.read_bytes() for folder in ("sft", "gem") for p in Path(folder).rglob("*") if p.is_file()}
    assert files_before == files_after
    before = Path("groups.jsonl").read_bytes()
    status, out, err = run(capsys, "score", "--config", "score.yaml")
    assert status == 0 and "groups.jsonl holds this run, finished:\n24 candidates" in out, err
    assert "max_new_tokens: 6 there, 5 now" in refused(
        capsys, "score", "--config", "score.yaml", "--max_new_tokens", "5"
    )
    assert Path("groups.jsonl").read_bytes() == before
    assert "max_steps: 3 there, 5 now" in refused(capsys, "sft", "--config", "sft.yaml", "--max_steps", "5")
    assert "not empty" in refused(capsys, "sft", "--config", "sft.yaml", "--output_dir", ".")


def test_online_training(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "sft", "--config", "sft.yaml")[0] == 0
    flags = ["--model", "sft", "--data", "pairs.jsonl", "--output_dir", "online", "--max_steps", "2", "--group_size"]
    flags += ["2", "--max_new_tokens", "5", "--per_device_train_batch_size", "2", "--use_cpu", "true"]
    status, _, err = run(capsys, "train", *flags, "--preset", "paper", "--disable_tqdm", "true")
    assert status == 0, err
    history = json.loads(Path("online/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    settings = json.loads(Path("online/run.json").read_text())["settings"]
    assert settings["reward"] == "identity" and settings["kl_weight"] == 0


def test_score_is_the_same_under_the_same_seed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "cfg/config.json", "--tokenizer", "tok", "--data", "pairs.jsonl", "--max_new_tokens", "5"]
    found = []
    for i, seed in enumerate((7, 7, 8)):
        assert run(capsys, "score", *flags, "--output", f"{i}.jsonl", "--seed", str(seed))[0] == 0
        found.append(Path(f"{i}.jsonl").read_bytes())
    assert found[0] == found[1] != found[2]


def test_eval_is_the_same_under_the_same_seed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "cfg/config.json", "--tokenizer", "tok", "--data", "pairs.jsonl", "--max_new_tokens", "5"]
    found = [run(capsys, "eval", *flags, "--seed", "7") for _ in range(2)]
    assert found[0][0] == 0 and json.loads(found[0][1]) == json.loads(found[1][1])


def test_bad_data_is_named_before_a_folder_is_claimed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("pairs.jsonl").open("a") as out:
        out.write('{"prompt": "1=", "cho')
    assert "pairs.jsonl, line 9: expected one JSON object" in refused(capsys, "sft", "--config", "sft.yaml")
    assert "data must be" in refused(capsys, "sft", "--config", "sft.yaml", "--data", "no.jsonl")
    assert "data must be" in refused(capsys, "sft", "--config", "sft.yaml", "--data", "")
    assert not Path("sft").exists()


def test_groups_of_another_tokenizer(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sft", "score"):
        assert run(capsys, command, "--config", f"{command}.yaml")[0] == 0
    groups = [json.loads(line) for line in Path("groups.jsonl").read_text().splitlines()]
    groups[4]["members"][0]["ids"][0] = 17  # behind the header
    Path("groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    error = "groups must be of this model's tokenizer, got token 17 in groups.jsonl; the model has 17"
    assert error in run(capsys, "train", "--config", "train.yaml")[2]
    assert not Path("gem").exists()


# --- any other error: one line, status 2 -----------------------------------------------------------------------

LONG = "Error(s) in loading state_dict for LlamaForCausalLM:\n\n\tsize mismatch for lm_head.weight\n\tand 200 more"
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1 GiB is free."
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
HINT = "(--debug shows the traceback)"


class StrangeError(Exception):
    """An exception class that no handler knows."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no\n\nmore"), f"RuntimeError: no {HINT}"),
        (
            RuntimeError(LONG),
            "RuntimeError: Error(s) in loading state_dict for LlamaForCausalLM: size mismatch for lm_head.",
        ),
        (RuntimeError("x" * 9000), "RuntimeError: xxx"),
        (KeyError("eval_loss"), f"KeyError: 'eval_loss' {HINT}"),
        (StrangeError(), f"StrangeError {HINT}"),
        (AssertionError(), f"AssertionError {HINT}"),
        (ZeroDivisionError("division by zero"), f"ZeroDivisionError: division by zero {HINT}"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
        (ImportError("requires `x`\nPlease install"), f"ImportError: requires `x` {HINT}"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "UnicodeDecodeError: 'utf-8' codec can't decode",
        ),
        (ValueError("tau must be\n > 0,\tgot -1"), "tau must be > 0, got -1\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b.json"), "FileNotFoundError: a/b.json: No such file"),
        (PermissionError(13, "Permission denied", "/root/x"), "PermissionError: /root/x: Permission denied"),
        (OSError(28, "No space left on device"), "the disk is full ([Errno 28] No space left on device)"),
        (OSError(28, "No space left on device", "a/b"), "the disk is full (a/b: No space left on device)"),
        (
            RuntimeError("basic_ios::clear: iostream error"),
            "a file could not be written whole, as on a full disk (basic",
        ),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "needs pip install 'gem-kernels[train]' (No module",
        ),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "needs pip install 'gem-kernels[train]' (No module",
        ),
        (
            ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"),
            "needs pip install bitsandbytes (No",
        ),
        (torch.OutOfMemoryError(GPU), "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError(CPU), "out of memory ([enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator:"),
        (MemoryError(), "out of memory (MemoryError): lower "),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("command", SUMMARIES)
def test_every_error_is_one_line(
    command: str, error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, f"_{command}", fail)
    found = refused(capsys, command)
    assert found.startswith(f"gem-kernels {command}: {line}") and len(found) < 600
    # --debug shows the traceback, wherever it stands, and the line still comes last.
    for argv in (("--debug", command), (command, "--debug"), (command, "x", "--debug", "y")):
        status, _, err = run(capsys, *argv)
        assert status == 2 and err.startswith("Traceback (most recent call last)") and "in fail" in err
        assert err.endswith(found)


@pytest.mark.parametrize("command", ["sft", "train", "score", "eval"])
def test_out_of_memory_says_what_to_lower(command: str) -> None:
    """The message names settings that the command has."""
    line = explain(torch.OutOfMemoryError(GPU), command)
    names = re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", line.split(": lower ")[1])
    training = {f.name for f in fields(TrainingArguments)} if command in ("sft", "train") else set()
    assert len(names) >= 4 and set(names) <= {f.name for cls in COMMANDS[command] for f in fields(cls)} | training


def test_an_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_sft", interrupt)
    status, out, err = run(capsys, "sft")
    assert (status, out, err) == (
        130,
        "",
        "gem-kernels sft: interrupted: the same command goes on from the last checkpoint\n",
    )

    def leave(argv: list[str]) -> None:
        raise SystemExit(7)

    monkeypatch.setattr(cli, "_sft", leave)
    assert run(capsys, "sft") == (7, "", "")


def test_debug_of_transformers_stays_its_own() -> None:
    """--debug followed by a value of TrainingArguments' setting is that setting."""
    found = settings_of("--groups", "g", "--debug", "underflow_overflow")
    assert [option.value for option in found["debug"]] == ["underflow_overflow"]
    assert cli._without_debug(["train", "--debug", "underflow_overflow"]) == (
        ["train", "--debug", "underflow_overflow"],
        False,
    )
    assert cli._without_debug(["train", "--debug", "--tau", "1"]) == (["train", "--tau", "1"], True)


def test_an_error_behind_a_progress_bar_is_the_last_line(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gem.trainer import GEMTrainer

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(GEMTrainer, "training_step", fail)
    _, _, err = run(capsys, "sft", "--config", "sft.yaml", "--disable_tqdm", "false")
    gc.collect()
    err += capsys.readouterr().err
    assert (
        "0/3" in err
        and err.splitlines()[-1]
        == f"gem-kernels sft: RuntimeError: in the middle of it {HINT}; no checkpoint was written"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ("score", "--config", "score.yaml", "--model", "cfg/config.json", "--tokenizer", "tok", "--output"),
        ("eval", "--config", "eval.yaml", "--model", "cfg/config.json", "--tokenizer", "tok", "--output"),
        ("report", "run", "--output"),
    ],
    ids=lambda argv: argv[0],
)
def test_a_result_that_cannot_be_written_is_told_first(
    argv: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run").mkdir()
    Path("run/metrics.json").write_text("{}")
    monkeypatch.setattr("gem.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("gem.report.results_table", lambda *_: pytest.fail("the report was made"))
    assert "output must be in a folder, got pairs.jsonl/x: " in refused(capsys, *argv, "pairs.jsonl/x")
    assert "output must be a " in refused(capsys, *argv, "cfg")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "got new/x: No space left on device" in refused(capsys, *argv, "new/x")
    assert not Path("new").exists()


def test_the_line_of_a_process_under_torchrun(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gem"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "report", "no/such/run"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    line = "gem-kernels report: folder: expected trainer_state.json (there or in a checkpoint-N) or metrics.json in no/such"
    assert done.returncode != 0 and any(found.startswith(line) for found in done.stderr.splitlines()), done.stderr


def test_groups_with_nothing_to_learn(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "prompt": "",
        "prompt_ids": [1],
        "kept": False,
        "members": [{"role": "candidate", "ids": [2], "logprobs": [0.0]}],
    }
    Path("empty.jsonl").write_text(json.dumps(row) + "\n")
    argv = [
        "train",
        "--model",
        "cfg/config.json",
        "--tokenizer",
        "tok",
        "--groups",
        "empty.jsonl",
        "--output_dir",
        "none",
    ]
    assert "groups must hold a weight or a chosen answer" in refused(capsys, *argv, "--use_cpu", "true")
    assert not Path("none").exists()
