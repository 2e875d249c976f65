"""The command line: help, where settings come from, one line for every mistake, output folders, and a run end to end."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from gem import config as c
from gem.cli import SUMMARIES, main, newest_checkpoint, parse, prepare_output
from gem.demo import build_tokenizer
from gem.groups import load_groups

COMMANDS: dict[str, tuple[type, ...]] = {
    "sft": (c.ModelArguments, c.DataArguments, c.LossArguments, c.GuardArguments),
    "score": (c.ModelArguments, c.DataArguments, c.RolloutArguments, c.ScoreArguments, c.RankArguments,
              c.GuardArguments, c.OutputArguments),
    "train": (c.ModelArguments, c.DataArguments, c.GroupsArguments, c.LossArguments, c.GuardArguments,
              c.RolloutArguments, c.ScoreArguments, c.RankArguments, c.EvalArguments),
    "eval": (c.ModelArguments, c.DataArguments, c.RolloutArguments, c.ScoreArguments, c.EvalArguments,
             c.OutputArguments),
}  # fmt: skip
SYMBOLS = {  # of MATHS.md, for the settings that have one
    "group_size": "k:", "top_m": "rho:", "branch_weight": "lambda:", "final_weight": "w_final:", "tau": "tau:",
    "prior_sd": "s:", "human_weight": "n_h:", "reward": "f:", "weight_norm": "w = A", "length_norm": "log pi",
    "beta": "beta:", "kl_weight": "KL(policy || reference)",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(status, stdout, stderr), whichever way the command ends."""
    try:
        status: Any = main(argv)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return int(status or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake gives."""
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
        assert re.search(rf"--{setting.name}\b", out), setting.name
        assert " ".join(setting.metadata["help"].split()) in text, setting.name
    assert "--config" in out and "--preset" in out


def test_help_gives_the_papers_symbols() -> None:
    settings = {f.name: f for classes in COMMANDS.values() for cls in classes for f in fields(cls)}
    for name, symbol in SYMBOLS.items():
        assert symbol in settings[name].metadata["help"], name
    for name, choices in c.CHOICES.items():  # every choice is told
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


# --- where settings come from -----------------------------------------------------------------------------------------


def settings_of(*argv: str, command: str = "train") -> dict[str, Any]:
    from transformers import TrainingArguments

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
    assert {k: found[k] for k in paper} == paper and (paper or command == "eval")  # which nothing of it concerns
    ours = {f.name for cls in COMMANDS[command] for f in fields(cls)}
    assert {k for k in ours if found[k] != default[k]} == set(paper)


def test_flags_beat_yaml_beats_preset(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "preset: paper\nkl_weight: 0.3\nsft_weight: 0.4\nlearning_rate: 2e-4\n")
    found = settings_of("--config", file, "--sft_weight", "0.5")
    assert (found["reward"], found["kl_weight"], found["sft_weight"]) == ("identity", 0.3, 0.5)
    assert found["learning_rate"] == 2e-4  # which yaml reads as text
    assert settings_of(f"--config={file}", "--preset", "default")["reward"] == "bt"
    assert settings_of("--config", file, "--preset=paper", "--taper", "true")["taper"] is True


def test_yaml_gives_what_flags_would(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "model: 123\neos_token: null\nfilter_groups: no\ntaper: 'no'\ngroup_size: '3'\ntau: 1\ntop_m: 5\n"
        "markers: ['#### ', \"\\u2028\"]\nbf16: false\nmax_steps: 7\nlr_scheduler_kwargs: {num_cycles: 2}\n",
    )
    flags = ["--model", "123", "--filter_groups", "false", "--no_taper", "--group_size", "3", "--tau", "1", "--top_m"]
    flags += ["5", "--markers", "#### ", "\u2028", "--bf16", "false", "--max_steps", "7"]
    ours, theirs = settings_of("--config", file), settings_of(*flags)
    for name in ("model", "eos_token", "filter_groups", "taper", "group_size", "tau", "top_m", "markers", "max_steps"):
        assert ours[name] == theirs[name] and type(ours[name]) is type(theirs[name]), name
    assert ours["lr_scheduler_kwargs"] == {"num_cycles": 2}


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "examples" / "configs").glob("*.yaml")), ids=str
)
def test_shipped_configs_parse(file: Path) -> None:
    command = next(name for name in ("sft", "train", "score", "eval") if name in file.stem or name == "train")
    assert settings_of("--config", str(file), command=command)["model"]


# --- mistakes: status 2 and one line that names the setting -----------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("fine-tune",), "command must be one of sft, score, train, eval, report, doctor, demo, got 'fine-tune'"),
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


# --- output folders ---------------------------------------------------------------------------------------------------


def test_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"tau": 0.5, "markers": ["####"], "output_dir": str(folder), "seed": 3}
    assert prepare_output(folder, "train", settings) is None
    assert json.loads((folder / "run.json").read_text())["seed"] == 3
    assert prepare_output(folder, "train", {**settings, "output_dir": "reached/by/another/name"}) is None
    with pytest.raises(ValueError, match=r"same settings, got .*run with tau: 0\.5 there, 0\.7 now"):
        prepare_output(folder, "train", {**settings, "tau": 0.7})
    with pytest.raises(ValueError, match="command: 'train' there, 'sft' now"):
        prepare_output(folder, "sft", settings)


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="output_dir must be empty or hold a run of this command.*not empty"):
        prepare_output(tmp_path, "sft", {})
    with pytest.raises(ValueError, match="output_dir must be a folder, got .*which is a file"):
        prepare_output(tmp_path / "thesis.tex", "sft", {})
    (tmp_path / "run.json").write_text('{"name": "DPO", "seed": 0}')  # an arm of the demo: no settings in it
    with pytest.raises(ValueError, match="output_dir must be empty or hold a run of this command"):
        prepare_output(tmp_path, "sft", {})
    (tmp_path / "empty").mkdir()
    assert prepare_output(tmp_path / "empty", "sft", {}) is None


def test_newest_checkpoint_skips_a_half_written_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name, state in (("9", "{}"), ("20", "{}"), ("100", '{"global_st'), ("200", None), ("tmp", "{}")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")  # 20 > 9 as numbers


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, a tokenizer, data and yaml files, in the current folder."""
    monkeypatch.chdir(tmp_path)
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
    return tmp_path


def test_every_phase_of_a_tiny_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sft -> score -> train -> eval -> report, each from its file; then each again."""
    for command in ("sft", "score", "train", "eval"):
        status, _, err = run(capsys, command, "--config", f"{command}.yaml")
        assert status == 0, err
    assert run(capsys, "report", "sft", "gem", "--output", "page.html")[0] == 0
    assert json.loads(Path("sft/metrics.json").read_text()) == {"train_steps": 3.0}
    groups = load_groups(Path("groups.jsonl"))
    assert len(groups) == 8 and all(len(g.members) == 5 for g in groups)
    trained, evaluated = (json.loads(Path(name).read_text()) for name in ("gem/metrics.json", "eval.json"))
    assert trained["train_steps"] == 2
    assert {"preference_sum", "preference_reference", "accuracy_greedy", "truncated"} <= trained.keys()
    same = ("preference_sum", "preference_token", "preference_length", "accuracy_greedy")  # what no sampling enters
    assert {k: trained[k] for k in same} == pytest.approx({k: evaluated[k] for k in same})
    assert "preference_reference" not in evaluated  # the model is its own
    history = json.loads(Path("gem/trainer_state.json").read_text())["log_history"]
    assert all(any(key in entry for entry in history) for key in ("loss", "kl", "score", "eval_preference_sum"))
    assert Path("gem/completions.jsonl").read_text().count("\n") == 8
    assert "<html" in Path("page.html").read_text() and "gem" in Path("page.html").read_text()

    # Once more: what is finished stays as it is, and a groups file is never overwritten.
    files_before = {p: p.read_bytes() for folder in ("sft", "gem") for p in Path(folder).rglob("*") if p.is_file()}
    for command in ("sft", "train"):
        status, out, err = run(capsys, command, "--config", f"{command}.yaml")
        assert status == 0 and "train_steps" in out, err
    files_after = {p: p.read_bytes() for folder in ("sft", "gem") for p in Path(folder).rglob("*") if p.is_file()}
    assert files_before == files_after
    before = Path("groups.jsonl").read_bytes()
    assert "output must be a new file, got groups.jsonl" in refused(capsys, "score", "--config", "score.yaml")
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
