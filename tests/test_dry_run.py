"""`--dry-run`: the plans of the recipes, what is not at hand, what is read and refused; and that nothing is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from test_cli import COMMANDS, write_files
from transformers import TrainingArguments

from gem import cli
from gem.config import PlanArguments
from gem.groups import Group, Member, save_groups
from gem.launch import check_launched, planned_launch
from gem.runs import NOT_COMPARED
from gem.settings import parse
from tools import scale_page

ROOT = Path(__file__).parent.parent
TRAIN_8B = "examples/configs/llama3-8b-8xa100/train.yaml"
FSDP_8B = "examples/configs/llama3-8b-8xa100/fsdp2.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the recipes are relative to the root of the repository."""
    monkeypatch.chdir(ROOT)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    status = cli.main(line.split())
    out, err = capsys.readouterr()
    return status, out, err


def row(out: str, name: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(name)).removeprefix(name).split()


# --- the recipes ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_plans_of_today() -> None:
    """Both recipes end to end, and 70 billion parameters take no memory."""
    page = scale_page.PAGE.read_text(encoding="utf-8")
    assert scale_page.updated(page) == page, "python -m tools.scale_page"
    assert "70,553,706,496 of them trained; on 32 devices by FSDP2" in page
    assert "8,030,261,248 of them trained; on 8 devices by FSDP2" in page
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 8 << 20  # KiB: one layer of 70B in fp32 would be 3 GiB more
    assert not dist.is_initialized()


def test_a_whole_model_on_each_device_is_refused_as_the_page_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ddp.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    status, out, err = run(capsys, f"train --config {TRAIN_8B} --accelerate_config {tmp_path}/ddp.yaml --dry-run 8")
    assert status == 2 and "on 8 devices, a whole model on each" in out
    said = re.search(r"\$ gem-kernels train .*? --dry-run 8\n(.*?)```", scale_page.PAGE.read_text(), flags=re.DOTALL)
    assert said is not None and err.split() == said[1].split()


@pytest.mark.parametrize(
    "config", sorted(ROOT.glob("examples/configs/llama3-*/fsdp2.yaml")), ids=lambda p: p.parent.name
)
def test_accelerate_reads_the_files_as_we_do(config: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    theirs, ours = load_config_from_file(str(config)), planned_launch(str(config))
    assert theirs.distributed_type == "FSDP" and theirs.num_processes == ours.processes
    assert theirs.mixed_precision == ours.mixed_precision == "bf16" and ours.checkpointing
    assert set(theirs.fsdp_config) == {name.lower() for name in ours.fsdp}


def test_the_batch_file_names_what_exists() -> None:
    text = (ROOT / "examples/configs/llama3-70b-32xa100/train.sbatch").read_text()
    (folder,) = re.findall(r"^folder=(\S+)$", text, flags=re.MULTILINE)
    assert all((ROOT / folder / name).is_file() for name in re.findall(r"\$folder/([\w.]+)", text))


# --- what is at hand ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of a tiny model, its tokenizer and pairs, where the commands run."""
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


TINY = "--model cfg/config.json --tokenizer tok --data pairs.jsonl --use_cpu"


def test_what_is_there_is_read(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny.rglob("*"))
    status, out, err = run(capsys, f"sft {TINY} --per_device_train_batch_size 2 --dry-run")
    assert status == 0, err
    assert "not at hand" not in out and "on one device" in out
    lengths = re.search(r"1 x 2 groups of 1 sequence of at most (\d+) tokens", out)
    assert lengths is not None and 2 < int(lengths[1]) < 64
    assert sorted(tiny.rglob("*")) == before  # no output_dir either


def test_online_training_has_a_phase_of_its_own(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, f"train {TINY} --group_size 3 --max_new_tokens 8 --rollout_batch_size 6 --dry-run 2")
    assert status == 0, err
    assert out.splitlines()[0].split()[3:] == ["update", "training", "generation", "scoring"]
    assert "8 groups of 5 sequences" in out and "2 devices, a whole model on each" in out
    parameters, reference = row(out, "parameters"), row(out, "reference")
    assert reference[:4] == parameters[:4]  # taper and the KL term want a frozen copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--data no.jsonl", ["data no.jsonl: sizes are those of the settings"]),
        ("--tokenizer org/none", ["tokenizer org/none: no text is read", "data pairs.jsonl"]),
    ],
)
def test_what_is_not_there_is_named(
    tiny: Path, change: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, f"sft {TINY} --max_length 48 {change} --dry-run")
    assert status == 0, err
    assert all(f"not at hand   {line}" in out for line in words) and "at most 48 tokens" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sft --model org/none --data pairs.jsonl --dry-run", "shape must be a config .json for 'org/none'"),
        ("sft --model no.json --data pairs.jsonl --dry-run", "model must be an existing config .json, got 'no.json'"),
        ("sft --model org/none --shape no.json --data pairs.jsonl --dry-run", "shape must be an existing config .json"),
        (
            f"sft {TINY} --accelerate_config no.yaml --dry-run",
            "accelerate_config must be an existing file, got 'no.yaml'",
        ),
        (f"sft {TINY} --dry-run -1", "dry_run must be a number of processes"),
        (f"sft {TINY} --optim lomo --dry-run", "optim must be one whose memory is known"),
        (f"train {TINY} --groups g.jsonl --dry-run", "expected either groups"),
        (f"sft {TINY} --beta 0.3 --dry-run", "beta would do nothing"),
        (f"sft {TINY} --device_memory 1.05 --dry-run", "device_memory must hold the plan, got 1.05 GiB"),
    ],
)
def test_it_refuses_what_a_run_would(tiny: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, line)
    assert status == 2 and words in err, err
    assert len(err.strip().splitlines()) == 1 or "WARNING" in err


def test_a_damaged_groups_file_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "groups.jsonl").write_text('{"prompt": 3}\n')
    line = f"train {TINY.replace('--data pairs.jsonl', '--groups groups.jsonl')} --dry-run"
    status, _, err = run(capsys, line)
    assert status == 2 and "groups.jsonl" in err, err


def test_a_groups_file_gives_the_sizes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [Member("candidate", list(range(4, 8)), logprobs=[-1.0] * 4) for _ in range(3)]
    save_groups(tiny / "groups.jsonl", [Group("1+", [1, 5, 9], members), Group("2+", [1], members[:1])])
    line = f"train {TINY.replace('--data pairs.jsonl', '--groups groups.jsonl')} --dry-run"
    status, out, err = run(capsys, line)
    assert status == 0, err
    assert "8 groups of 3 sequences of at most 7 tokens" in out


# --- the launch -----------------------------------------------------------------------------------------------------------


def test_where_the_number_of_processes_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_launch(None).processes == 1 and not planned_launch(None).fsdp
    assert planned_launch(FSDP_8B).processes == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert planned_launch(FSDP_8B).processes == 4
    assert planned_launch(FSDP_8B, 16).processes == 16


def test_what_accelerate_has_set_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch = planned_launch(None, 2)
    assert launch.fsdp["FSDP_VERSION"] == "2" and launch.mixed_precision == "bf16" and not launch.checkpointing
    check_launched(FSDP_8B, ["train"])


def test_a_run_that_accelerate_did_not_launch_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / FSDP_8B
    status, _, err = run(capsys, f"sft {TINY} --accelerate_config {file}")
    assert status == 2 and f"accelerate launch --config_file {file} -m gem sft --model cfg/config.json" in err
    assert not (tiny / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "must be a mapping, got list"),
        ("distributed_type: DEEPSPEED\n", "must ask for FSDP, MULTI_GPU or NO, got distributed_type DEEPSPEED"),
        ("num_processes: none\n", "must have num_processes >= 1, got 'none'"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "must have fsdp_version 2, got 1"),
    ],
)
def test_an_accelerate_file_that_we_cannot_follow(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        planned_launch(str(tmp_path / "a.yaml"))


def test_a_dry_run_joins_no_launch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the variables of torchrun, which would wait for the other processes, and those of accelerate."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    status, out, err = run(capsys, f"sft {TINY} --dry-run")
    assert status == 0, err
    assert "4 devices by FSDP2" in out and not dist.is_initialized()
    assert {name: os.environ.get(name) for name in before} == before


def test_what_only_plans_is_no_part_of_a_run() -> None:
    assert {"dry_run", "world_size", "shape", "longest", "device_memory", "accelerate_config"} <= set(NOT_COMPARED)


def test_bf16_is_planned_where_it_cannot_run() -> None:
    (training, planned), _ = parse(
        "sft", ["--bf16", "--dry-run", "--world_size", "3"], TrainingArguments, PlanArguments
    )
    assert training.bf16 and (planned.dry_run, planned.world_size) == (0, 3)


def test_the_flag_takes_a_number() -> None:
    (planned,), _ = parse("sft", ["--dry-run", "8"], PlanArguments)
    assert planned.dry_run == 8


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/configs/llama3-*/*.yaml")), ids=str)
def test_the_recipes_parse(file: Path) -> None:
    if file.stem == "fsdp2":
        return
    dry = ["--dry-run"] if file.stem in ("sft", "train") else []
    instances, settings = parse(
        file.stem, ["--config", str(file), *dry], *COMMANDS[file.stem], *TRAINED.get(file.stem, ())
    )
    assert settings["model"] and instances


TRAINED = {"sft": (TrainingArguments,), "train": (TrainingArguments,)}
