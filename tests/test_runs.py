"""A run's folder: which run may use it, when it is claimed, where a run resumes, and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import refused, run, write_files
from transformers import TrainerCallback

from gem.checkpoints import find_checkpoint, newest_checkpoint, steps_of
from gem.results import load_run
from gem.runs import check_output, prepare_output


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


SFT = ("sft", "--config", "sft.yaml", "--save_steps", "1", "--save_total_limit", "9")


# --- which run may use it ---------------------------------------------------------------------------------------------------


def test_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"tau": 0.5, "markers": ["####"], "output_dir": str(folder), "seed": 3, "hub_token": "secret"}
    assert not check_output(folder, "train", settings) and not folder.exists()
    assert prepare_output(folder, "train", settings)
    assert json.loads((folder / "run.json").read_text())["seed"] == 3
    assert "secret" not in (folder / "run.json").read_text()
    elsewhere = {
        **settings,
        "output_dir": "reached/by/another/name",
        "resume_from_checkpoint": "true",
        "hub_token": "new",
    }
    for same in (settings, elsewhere):
        assert check_output(folder, "train", same) and not prepare_output(folder, "train", same)
    for check in (check_output, prepare_output):
        with pytest.raises(ValueError, match=r"same settings, got .*run with tau: 0\.5 there, 0\.7 now"):
            check(folder, "train", {**settings, "tau": 0.7})
        with pytest.raises(ValueError, match="command: 'train' there, 'sft' now"):
            check(folder, "sft", settings)


def test_folder_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="output_dir must be empty or hold a run of this command.*not empty"):
        prepare_output(tmp_path, "sft", {})
    with pytest.raises(ValueError, match="output_dir must be a folder, got .*which is a file"):
        prepare_output(tmp_path / "thesis.tex", "sft", {})
    with pytest.raises(ValueError, match=r"output_dir must be in a folder, .*thesis\.tex is a file"):
        prepare_output(tmp_path / "thesis.tex" / "runs" / "sft", "sft", {})
    (tmp_path / "run.json").write_text('{"name": "DPO", "seed": 0}')  # an arm of the demo, which records no settings
    with pytest.raises(ValueError, match="output_dir must be empty or hold a run of this command"):
        prepare_output(tmp_path, "sft", {})
    (tmp_path / "empty").mkdir()
    assert prepare_output(tmp_path / "empty", "sft", {})
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(
        ValueError, match=f"output_dir must be where one may write, got .*new: {tmp_path} cannot be written"
    ):
        prepare_output(tmp_path / "new", "sft", {})


@pytest.mark.parametrize("command", ["sft", "train"])
def test_it_is_refused_before_the_model_loads(
    command: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"gem.models.{name}", load)
    assert "not empty" in refused(capsys, command, "--config", f"{command}.yaml", "--output_dir", ".")
    assert "is a file" in refused(capsys, command, "--config", f"{command}.yaml", "--output_dir", "pairs.jsonl/new")
    Path("other").mkdir()
    Path("other/run.json").write_text('{"settings": {"command": "sft", "tau": 1}}')
    assert "same settings" in refused(capsys, command, "--config", f"{command}.yaml", "--output_dir", "other")


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "no/such/model"),
        ("--tokenizer", "no/such/tokenizer"),
        ("--dtype", "float16", "--attn_implementation", "no_such_attention"),
        ("--learning_rate", "-1"),
        ("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"no_such_argument": 1}'),
        ("--accelerator_config", '{"no_such_argument": 1}'),
    ],
    ids=" ".join,
)
def test_a_run_that_fails_at_once_leaves_no_folder(
    flags: tuple[str, ...],
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(files.iterdir())
    status, _, err = run(capsys, *SFT, *flags)
    assert status == 2 and err.splitlines()[-1].startswith("gem-kernels sft: "), err
    assert sorted(files.iterdir()) == before


def test_one_that_fails_later_leaves_its_checkpoints(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its first checkpoint a run may be retried with other settings; afterwards it resumes with its own."""
    from gem.trainer import GEMTrainer

    own, failing = GEMTrainer.training_step, [0]

    def training_step(self: GEMTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == failing[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(GEMTrainer, "training_step", training_step)
    for error in ("out of memory (CUDA out of memory. Tried", "lower per_device_train_batch_size"):
        status, _, err = run(capsys, *SFT)
        assert status == 2 and error in err.splitlines()[-1] and not Path("sft").exists()
    failing[0] = 2
    assert run(capsys, *SFT)[0] == 2
    assert {p.name for p in Path("sft").iterdir()} == {"run.json", "checkpoint-1", "checkpoint-2"}
    monkeypatch.undo()
    monkeypatch.chdir(files)
    assert "max_length: 40 there, 30 now" in refused(capsys, *SFT, "--max_length", "30")
    assert run(capsys, *SFT)[0] == 0
    history = json.loads(Path("sft/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]


# --- where a run resumes -----------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, of: int = 1000, without: str = "") -> Path:
    """Write the files of a checkpoint of Trainer, as small as possible."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    linear = torch.nn.Linear(2, 2)
    transformers.modeling_utils.safe_save_file(linear.state_dict(), path / "model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(9)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": of}))
    if without:
        (path / without).unlink()
    return path


def test_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 20):
        checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")  # 20 > 9 as numbers
    checkpoint(tmp_path, 100, without="trainer_state.json")  # written last, so a kill came before
    (checkpoint(tmp_path, 200) / "trainer_state.json").write_text('{"global_st')
    checkpoint(tmp_path, 300, of=300)  # finished
    (tmp_path / "checkpoint-tmp").mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20") and not caplog.text
    cut(checkpoint(tmp_path, 400) / "optimizer.pt")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert "checkpoint-400 is not whole" in caplog.text and "optimizer.pt is damaged or cut off" in caplog.text
    for step in (9, 20):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        ValueError, match=r"output_dir must hold a whole checkpoint .*optimizer\.pt.*=false starts over"
    ):
        newest_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path, "false") is None


def cut(path: Path, keep: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5, without=name)
    with pytest.raises(ValueError) as raised:
        find_checkpoint(tmp_path, str(path))
    assert str(raised.value).startswith(f"resume_from_checkpoint must be a whole checkpoint, got '{path}': it has no ")
    assert ("file of weights" if "model" in name else name) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_checkpoint_with_a_damaged_file(name: str, damage: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    if damage == "cut":
        cut(path / name)
    else:
        (path / name).write_text("garbage" if damage == "text" else "")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint must be a whole checkpoint, got .*{name}"):
        find_checkpoint(tmp_path, str(path))


def test_a_checkpoint_in_parts(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"it has no model-00002-of-00002\.safetensors"):
        find_checkpoint(tmp_path, str(path))
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors")
    assert find_checkpoint(tmp_path, str(path)) == str(path)
    assert steps_of(path) == (5, 1000)


@pytest.mark.parametrize("asked", ["true", "True", "no/such/checkpoint-5", "pairs.jsonl", "cfg"])
def test_no_checkpoint_to_resume_from(
    asked: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(files.iterdir())
    assert "resume_from_checkpoint must be a" in refused(capsys, *SFT, "--resume_from_checkpoint", asked)
    assert sorted(files.iterdir()) == before


def test_resuming_as_asked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def losses(folder: str) -> list[float]:
        history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    assert run(capsys, *SFT)[0] == 0
    whole = losses("sft")
    elsewhere = (*SFT, "--output_dir", "again", "--resume_from_checkpoint")
    state = Path("sft/checkpoint-1/trainer_state.json")
    told = json.loads(state.read_text())
    told["log_history"][0]["loss"] = 99.0  # marks this checkpoint
    state.write_text(json.dumps(told))
    assert run(capsys, *elsewhere, "sft/checkpoint-1")[0] == 0
    assert losses("again") == pytest.approx([99.0, *whole[1:]], abs=1e-6)
    # A checkpoint of the last step or a later one leaves no step to take.
    shutil.rmtree("again")
    for flags in ((), ("--max_steps", "2"), ("--max_steps", "-1", "--num_train_epochs", "0.5")):
        assert "must be of a step before the last" in run(capsys, *elsewhere, "sft/checkpoint-3", *flags)[2]
        assert not Path("again").exists()
    # A finished run is shown, and is not resumed.
    assert "this run is finished" in refused(capsys, *SFT, "--resume_from_checkpoint", "sft/checkpoint-1")
    assert "finished" in run(capsys, *SFT, "--resume_from_checkpoint", "true")[1]
    # true: resume from the newest; false: start over.
    for asked, first in (("true", 99.0), ("false", whole[0])):
        shutil.copytree("sft", asked)
        for name in ("metrics.json", "checkpoint-2", "checkpoint-3"):
            path = Path(asked, name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(capsys, *SFT, "--output_dir", asked, "--resume_from_checkpoint", asked)[0] == 0
        assert losses(asked)[0] == pytest.approx(first)


def test_a_terminated_run_goes_on(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """enable_jit_checkpoint: SIGTERM saves a checkpoint and stops, and the run does not count as finished."""
    from transformers import trainer_jit_checkpoint

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    at_once = lambda seconds, call: type("Timer", (), {"start": lambda self: call()})()  # noqa: E731
    monkeypatch.setattr(trainer_jit_checkpoint.threading, "Timer", at_once)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Kill])
    command = ("sft", "--config", "sft.yaml", "--enable_jit_checkpoint", "true")
    status, out, err = run(capsys, *command)
    assert status == 0 and "terminated after step 1; the same command goes on from there" in out, err
    assert Path("sft/checkpoint-1").is_dir() and not Path("sft/metrics.json").exists()
    monkeypatch.setattr(Kill, "on_step_end", TrainerCallback.on_step_end)
    status, out, err = run(capsys, *command)
    assert status == 0 and '"train_steps": 3.0' in out, err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- damaged files ----------------------------------------------------------------------------------------------------------

DAMAGED: dict[str, bytes] = {
    "cut off": b'{"log_history": [{"step": 1, "lo',
    "empty": b"",
    "a list": b"[1, 2]",
    "not text": b"\xff\xfe\x00garbage",
    "a number": b"7",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "metrics.json", "completions.jsonl"])
def test_the_report_names_a_damaged_file(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/metrics.json").write_text('{"accuracy_greedy": 0.5}')
    assert load_run(Path("run")).metrics == {"accuracy_greedy": 0.5}
    Path("run", name).write_bytes(content)
    if name == "completions.jsonl" and not content:
        return  # it has no lines
    assert f"gem-kernels report: run/{name}" in refused(capsys, "report", "run")


@pytest.mark.parametrize("history", ["7", '"x"', "[7]", '[{"loss": 1}]', '[{"step": "one"}]'])
def test_a_history_that_is_none(history: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(f'{{"log_history": {history}}}')
    with pytest.raises(ValueError, match=r"trainer_state\.json: expected "):
        load_run(tmp_path)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_folder_with_a_damaged_claim(
    content: bytes,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("sft").mkdir()
    Path("sft/run.json").write_bytes(content)
    assert "gem-kernels sft: sft/run.json: expected" in refused(capsys, *SFT)
    assert Path("sft/run.json").read_bytes() == content


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "scheduler.pt"])
def test_a_damaged_checkpoint_of_ones_own(
    name: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(capsys, *SFT)[0] == 0
    for path in (Path("sft/metrics.json"), Path("sft/trainer_state.json")):
        path.unlink()
    cut(Path("sft/checkpoint-2") / name)
    status, _, err = run(capsys, *SFT)  # the one before it is whole
    assert status == 0 and f"sft/checkpoint-2/{name} is damaged or cut off" not in err.splitlines()[-1]
    Path("sft/metrics.json").unlink()
    for step in (1, 2):
        cut(Path(f"sft/checkpoint-{step}") / name)
    assert f"sft/checkpoint-2/{name} is damaged or cut off" in refused(capsys, *SFT)
