"""A run's folder: which run may use it, when it is claimed, where a run resumes, and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from test_checkpoints import checkpoint, cut
from test_cli import refused, run, write_files
from transformers import TrainerCallback

from gem.checkpoints import manifest_flaw, write_manifest
from gem.lock import locked
from gem.rails import Verdict
from gem.results import load_run
from gem.runs import RunFolder, check_output, prepare_output, train_to_end
from gem.signals import Stop
from gem.stops import Diverged


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


def test_folder_of_something_else(tmp_path: Path) -> None:
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
    (tmp_path / "empty" / "run.json").rename(tmp_path / "empty" / "run.lock")  # killed before it could claim the folder
    assert prepare_output(tmp_path / "empty", "sft", {})


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
    write_manifest(state.parent, world_size=1)
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


class Kill(TrainerCallback):
    """Send this process a signal in a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Add a callback to the trainers of the commands that follow."""
    usual = transformers.trainer.DEFAULT_CALLBACKS
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*usual, callback])


def logged(folder: str) -> list[dict[str, float]]:
    """Return what a run has logged, without its summary of the training, which has times."""
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "train_runtime" not in entry]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_goes_on(
    signum: int, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sft", "--config", "sft.yaml")
    assert run(capsys, *command, "--output_dir", "whole")[0] == 0
    with monkeypatch.context() as patched:
        add_callback(patched, Kill(1, signum))
        status, _, err = run(capsys, *command)
    said = "terminated after step 1 of 3: sft/checkpoint-1 is saved, the same command goes on from there"
    assert status == 128 + signum and err.splitlines()[-1] == f"gem-kernels sft: {said}"
    assert sorted(p.name for p in Path("sft").iterdir()) == ["checkpoint-1", "run.json"]
    status, out, err = run(capsys, *command)
    assert status == 0 and '"train_steps": 3.0' in out, err
    assert Path("sft/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert logged("sft") == logged("whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_last_step(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_callback(monkeypatch, Kill(3, signal.SIGTERM))
    status, out, err = run(capsys, *SFT)
    assert status == 0 and '"train_steps": 3.0' in out, err


@pytest.mark.parametrize(
    "flags", [("--logging_steps", "2"), ("--logging_steps", "50"), ("--logging_strategy", "epoch")]
)
def test_the_log_of_a_resumed_run(
    flags: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint between two logs: the losses before it are logged with it."""
    command = (*SFT, *flags, "--max_steps", "5", "--save_steps", "3")
    assert run(capsys, *command, "--output_dir", "whole")[0] == 0
    with monkeypatch.context() as patched:
        add_callback(patched, Raise(4))
        assert run(capsys, *command)[0] == 2
    assert run(capsys, *command)[0] == 0
    assert logged("sft") == logged("whole") and len(logged("sft")) > 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true", "--save_steps", "1"),
        ("--eval_strategy", "epoch", "--save_steps", "2"),  # a step that is saved ends an epoch
        ("--eval_strategy", "epoch", "--save_strategy", "epoch"),
    ],
    ids=" ".join,
)
def test_the_evaluations_of_a_resumed_run(
    flags: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "sft", "--config", "sft.yaml")[0] == 0
    assert run(capsys, "score", "--config", "score.yaml")[0] == 0
    Path("train.yaml").write_text(Path("train.yaml").read_text().replace("eval_strategy: steps\neval_steps: 1\n", ""))
    train = ("train", "--config", "train.yaml", "--max_steps", "-1", "--num_train_epochs", "2")
    command = (*train, "--per_device_train_batch_size", "4", "--eval_limit", "2", "--eval_samples", "0", *flags)
    assert run(capsys, *command, "--output_dir", "whole")[0] == 0
    for callback in (Raise(2), Kill(1, signal.SIGTERM), Kill(2, signal.SIGTERM)):
        shutil.rmtree("gem", ignore_errors=True)
        with monkeypatch.context() as patched:
            add_callback(patched, callback)
            assert run(capsys, *command)[0] != 0
        assert run(capsys, *command)[0] == 0
        assert logged("gem") == logged("whole"), callback
        assert Path("gem/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


# --- runs that fail ---------------------------------------------------------------------------------------------------


class Raise(TrainerCallback):
    """Raise an error when a step begins."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error or RuntimeError("no luck")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no luck"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_is_kept(
    error: BaseException, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = ", the same command goes on from there" * isinstance(error, KeyboardInterrupt)
    last = f"sft/checkpoint-2 is the last whole checkpoint{goes_on}"
    for step, kept in ((0, "no checkpoint was written"), (2, last)):
        with monkeypatch.context() as patched:
            add_callback(patched, Raise(step, type(error)(*error.args)))
            assert run(capsys, *SFT)[2].splitlines()[-1].endswith(kept)
        assert Path("sft").exists() == bool(step)
    assert {p.name for p in Path("sft").iterdir()} == {"run.json", "checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_half_written_checkpoint_is_removed(
    name: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.save

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        own(content, path, *args, **kwargs)
        if str(path).endswith(f"checkpoint-2/{name}"):
            cut(Path(path))
            raise OSError(28, "No space left on device", str(path))

    Path("sft").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        error = run(capsys, *SFT)[2].splitlines()[-1]
    assert error.startswith("gem-kernels sft: ") and error.endswith("sft/checkpoint-1 is the last whole checkpoint")
    assert {p.name for p in Path("sft").iterdir()} == {"run.json", "checkpoint-1"}
    Path("sft/checkpoint-3").mkdir()  # cut off by a kill: it may be anything, and is left in place
    assert run(capsys, *SFT, "--no_such_flag")[0] == 2 and Path("sft/checkpoint-3").is_dir()
    assert run(capsys, *SFT)[0] == 0


def test_results_that_cannot_be_saved(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gem.trainer import GEMTrainer

    own = GEMTrainer.save_model

    def save_model(self: GEMTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        own(self, output_dir, _internal_call)
        if output_dir is None:
            cut(Path("sft/model.safetensors"))
            raise OSError(28, "No space left on device", "sft/model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(GEMTrainer, "save_model", save_model)
        assert "sft/checkpoint-3 is the last whole" in run(capsys, *SFT)[2].splitlines()[-1]
    assert {p.name for p in Path("sft").iterdir()} == {"run.json", *(f"checkpoint-{step}" for step in (1, 2, 3))}
    assert run(capsys, *SFT)[0] == 0 and manifest_flaw(Path("sft")) == ""


def test_the_best_weights_are_kept(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Best(Raise):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            Path("sft/checkpoint-best").mkdir()
            write_manifest(Path("sft/checkpoint-best"), world_size=1)
            super().on_step_begin(args, state, control)

    add_callback(monkeypatch, Best(0))
    assert run(capsys, *SFT)[2].endswith("sft/checkpoint-best holds the weights of the best evaluation\n")
    assert sorted(p.name for p in Path("sft").iterdir()) == ["checkpoint-best", "run.json"]


class Stopped:
    """A trainer whose guard has ended the training after step 7."""

    stopped = "stopped after step 7 of 9: accuracy fell"

    def __init__(self, folder: Path, restored: str, *, diverged: bool) -> None:
        self.args = SimpleNamespace(output_dir=str(folder), world_size=1)
        self.state = SimpleNamespace(global_step=7, max_steps=9)
        self.restored, self.diverged, self.folder = restored, diverged, folder

    def train(self, resume_from_checkpoint: str | None) -> None: ...

    def is_world_process_zero(self) -> bool:
        return True

    @property
    def accelerator(self) -> Any:
        return SimpleNamespace(wait_for_everyone=lambda: None)

    def save_model(self) -> None:
        (self.folder / "model.safetensors").write_text("weights")

    def save_state(self) -> None:
        (self.folder / "trainer_state.json").write_text("{}")

    def verdicts(self, error: Diverged | None = None) -> list[Verdict]:
        return [Verdict("collapse", "fired", "accuracy fell"), Verdict("idle", "off", "stop_idle=0")]

    final_metrics = None


@pytest.mark.parametrize("best", ["checkpoint-5", "checkpoint-best", ""])
@pytest.mark.parametrize("diverged", [False, True])
def test_a_run_that_a_guard_ends(
    best: str, diverged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gem.runs.graceful", lambda _: nullcontext(Stop()))
    if best:
        (tmp_path / best).mkdir()
        (tmp_path / best / "trainer_state.json").write_text('{"global_step": 5, "max_steps": 9}')
    trainer = Stopped(tmp_path, str(tmp_path / best) if best else "", diverged=diverged)
    if diverged:
        with pytest.raises(Diverged, match="^stopped after step 7 of 9: accuracy fell$") as raised:
            train_to_end(trainer, None, None)
        kept = getattr(raised.value, "kept", "")
        nothing = "no checkpoint from before that is there to restore"
        assert kept == (f"{tmp_path} holds the weights of {best}, of step 5" if best else nothing)
        assert (tmp_path / "model.safetensors").exists() == bool(best)
        assert not (tmp_path / "metrics.json").exists()
    else:
        train_to_end(trainer, None, None)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        steps = {"train_steps": 7.0, "stopped_step": 7.0, **({"restored_step": 5.0} if best else {})}
        assert metrics == {**steps, "rail_collapse": 0.0}
        assert capsys.readouterr().out.startswith(Stopped.stopped) and manifest_flaw(tmp_path) == ""
    assert [v["verdict"] for v in json.loads((tmp_path / "rails.json").read_text())["rails"]] == ["fired", "off"]


# --- the final evaluation ---------------------------------------------------------------------------------------------------


def test_an_evaluation_is_not_repeated_at_its_step(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of generations and of passes over the pairs; the numbers and the completions are those of a run that repeats."""
    from gem import evaluate
    from gem.trainer import GEMTrainer

    counts: Counter[str] = Counter()

    def counted(name: str, own: Callable[..., Any], *args: Any, **more: Any) -> Any:
        counts[name] += 1
        return own(*args, **more)

    for name in ("draw_completions", "token_stats"):
        monkeypatch.setattr(evaluate, name, partial(counted, name, getattr(evaluate, name)))

    def trained(folder: str, *flags: str) -> tuple[dict[str, int], dict[str, float], str]:
        counts.clear()
        status, _, err = run(capsys, "train", "--config", "train.yaml", "--output_dir", folder, *flags)
        assert status == 0, err
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        assert load_run(Path(folder)).history[-1]["eval_preference_sum"] == metrics["preference_sum"]
        return dict(counts), metrics, Path(folder, "completions.jsonl").read_text()

    assert run(capsys, *SFT)[0] == 0 and run(capsys, "score", "--config", "score.yaml")[0] == 0
    start = ("--eval_on_start", "true")
    # Two draws an evaluation, greedy and sampled: at the steps 0, 1 and 2. The pairs of step 0 are those of the reference.
    found, metrics, completions = trained("once", *start)
    assert found == {"draw_completions": 6, "token_stats": 3}
    with monkeypatch.context() as patched:
        patched.setattr(GEMTrainer, "final_metrics", None)
        repeated = trained("again", *start)
    assert repeated == ({"draw_completions": 8, "token_stats": 4}, metrics, completions)
    counts.clear()
    assert run(capsys, "eval", "--config", "eval.yaml", "--model", "once")[0] == 0
    assert counts == {"draw_completions": 2, "token_stats": 1}


# --- what goes into a run -----------------------------------------------------------------------------------------------


def test_inputs_that_changed(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        add_callback(patched, Raise(2))
        assert run(capsys, *SFT)[0] == 2
    inputs = json.loads(Path("sft/run.json").read_text())["inputs"]
    assert {name: value["name"] for name, value in inputs.items()} == {
        "data": "pairs.jsonl", "tokenizer": "tok", "model": "cfg/config.json"
    }  # fmt: skip
    changed = {
        "data": (Path("pairs.jsonl"), lambda text: text.replace("#### 4", "#### 5")),
        "tokenizer": (
            Path("tok/tokenizer.json"),
            lambda text: text.replace('"</s>"', '"<end>"') if '"</s>"' in text else _other_vocabulary(text),
        ),
        "model": (
            Path("cfg/config.json"),
            lambda text: text.replace('"initializer_range": 0.3', '"initializer_range": 0.2'),
        ),
    }
    before = sorted(Path("sft").rglob("*"))
    for name, (path, change) in changed.items():
        text = path.read_text()
        path.write_text(change(text))
        then = inputs[name]["hash"]
        error = refused(capsys, *SFT)
        assert f"{name} must be what the run began with, got {inputs[name]['name']} with hash " in error
        assert f", {then} then" in error and error.count(then) == 1
        path.write_text(text)
    assert sorted(Path("sft").rglob("*")) == before
    about = json.loads(Path("sft/run.json").read_text())
    Path("pairs.jsonl").write_text(Path("pairs.jsonl").read_text().replace("#### 4", "#### 5"))
    for older in ({k: v for k, v in about.items() if k != "inputs"}, {**about, "inputs": None}):  # of older versions
        Path("sft/run.json").write_text(json.dumps(older))
        with monkeypatch.context() as patched:
            add_callback(patched, Raise(2))
            assert "no luck" in run(capsys, *SFT)[2]
    assert run(capsys, *SFT)[0] == 0


def _other_vocabulary(text: str) -> str:
    """Return a tokenizer.json with two tokens exchanged."""
    rules = json.loads(text)
    vocabulary = rules["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    return json.dumps(rules)


def test_groups_and_held_out_data_that_changed(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "sft", "--config", "sft.yaml")[0] == 0
    assert run(capsys, "score", "--config", "score.yaml")[0] == 0
    train = ("train", "--config", "train.yaml", "--save_steps", "1", "--eval_data", "held.jsonl")
    shutil.copy("pairs.jsonl", "held.jsonl")
    with monkeypatch.context() as patched:
        add_callback(patched, Raise(1))
        assert run(capsys, *train)[0] == 2
    inputs = json.loads(Path("gem/run.json").read_text())["inputs"]
    assert inputs.keys() == {"tokenizer", "eval_data", "groups", "model"}
    monkeypatch.setattr("gem.models.load_model", None)  # seen before the model loads
    for name, path in (("eval_data", Path("held.jsonl")), ("groups", Path("groups.jsonl"))):
        content = path.read_bytes()
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
        assert f"{name} must be what the run began with, got {path} with hash" in run(capsys, *train)[2]
        path.write_bytes(content)


# --- finished runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cut off", "empty", "a list", "NaN", "no steps", "a text", "weights", "state"])
def test_an_end_that_is_none(
    end: str, files: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(capsys, *SFT)[0] == 0
    whole = Path("sft/model.safetensors").read_bytes()
    contents = {
        "cut off": '{"train_st', "empty": "", "a list": "[3.0]", "NaN": '{"train_steps": NaN}', "no steps": '{"accuracy": 1.0}',
        "a text": '{"train_steps": "3"}',
    }  # fmt: skip
    path = {"weights": Path("sft/model.safetensors"), "state": Path("sft/trainer_state.json")}.get(
        end, Path("sft/metrics.json")
    )
    path.write_text(contents[end]) if end in contents else cut(path)
    status, out, _ = run(capsys, *SFT)
    assert status == 0 and "finished" not in out and '"train_steps": 3.0' in out
    said = next(line for line in caplog.messages if "not whole" in line)
    assert str(path) in said and said.endswith("it goes on from sft/checkpoint-2")
    assert Path("sft/model.safetensors").read_bytes() == whole
    assert "finished" in run(capsys, *SFT)[1]


def test_a_finished_run_of_an_older_version(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *SFT)[0] == 0
    Path("sft/manifest.json").unlink()
    about = json.loads(Path("sft/run.json").read_text())
    del about["inputs"]
    Path("sft/run.json").write_text(json.dumps(about))
    assert "finished" in run(capsys, *SFT)[1]


def test_a_finished_run_without_its_manifest_ends_again(
    files: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It is written last: a power cut before it may have left less than was written."""
    assert run(capsys, *SFT)[0] == 0
    Path("sft/manifest.json").unlink()
    status, out, _ = run(capsys, *SFT)
    assert status == 0 and "holds this run, finished" not in out
    assert "it has no manifest.json, which is written last" in caplog.text and Path("sft/manifest.json").exists()


def test_a_later_note_is_no_flaw(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *SFT)[0] == 0
    for name in ("README.md", "train.log"):
        Path("sft", name).write_text("mine")
    assert "finished" in run(capsys, *SFT)[1]


# --- two runs at once -------------------------------------------------------------------------------------------------


def test_a_folder_in_use(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Look(Raise):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert json.loads(Path("sft/run.lock").read_text())["pid"] == os.getpid()
            super().on_step_begin(args, state, control)

    with monkeypatch.context() as patched:
        add_callback(patched, Look(2))
        assert "no luck" in run(capsys, *SFT)[2]
    assert not Path("sft/run.lock").exists()
    with locked(Path("sft/run.lock"), "output_dir"), monkeypatch.context() as patched:
        patched.setattr("gem.models.load_tokenizer", None)  # refused before anything loads
        cut(Path("sft/checkpoint-2/optimizer.pt"))
        before = {p: p.stat().st_mtime_ns for p in Path("sft").rglob("*")}
        by = f"gem-kernels sft: output_dir is in use by process {os.getpid()} on "
        error = refused(capsys, *SFT)
        assert error.startswith(by) and error.endswith("got sft\n")
        assert {p: p.stat().st_mtime_ns for p in Path("sft").rglob("*")} == before
    Path("sft/run.lock").write_text('{"pid": 1, "host": "x", "since": "then"}')  # of a run that was killed
    assert run(capsys, *SFT)[0] == 0 and not Path("sft/run.lock").exists()


def test_a_folder_taken_meanwhile(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gem.models import load_model

    with ExitStack() as stack:

        def load(*args: Any) -> Any:
            stack.enter_context(locked(Path("sft/run.lock"), "output_dir"))
            return load_model(*args)

        monkeypatch.setattr("gem.models.load_model", load)
        assert "output_dir is in use by process" in refused(capsys, *SFT)
        assert [p.name for p in Path("sft").iterdir()] == ["run.lock"]


@pytest.mark.parametrize("name", ["checkpoint-3", "metrics.json", "run.json"])
def test_a_folder_used_meanwhile(
    name: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that has begun after this one looked, and is over: where this one would go on is no longer right."""
    from gem.models import load_model

    def load(*args: Any) -> Any:
        path = Path("sft", name)
        path.parent.mkdir()
        path.write_text("{}") if path.suffix else path.mkdir()
        return load_model(*args)

    monkeypatch.setattr("gem.models.load_model", load)
    said = "output_dir must be left to one run, got sft, where another one ran meanwhile"
    assert said in refused(capsys, *SFT) and [p.name for p in Path("sft").iterdir()] == [name]


# --- several processes ------------------------------------------------------------------------------------------------


def process(rank: int, port: int) -> None:
    """Use a folder as one of two processes, of which the second one must touch and hash nothing."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})

    def hashed() -> str:
        assert rank == 0
        return "1234"

    def folder(name: str) -> RunFolder:
        training = transformers.TrainingArguments(name, use_cpu=True, report_to="none")
        return RunFolder(training, "train", {})

    run = folder("new")
    run.check_input("data", "pairs.jsonl", hashed)
    with run.claimed():
        assert run.resume is None and run.inputs == {"data": {"name": "pairs.jsonl", "hash": "1234"}}
        if rank == 0:
            assert json.loads(Path("new/run.lock").read_text())["pid"] == os.getpid()
            checkpoint(Path("new"), 5, processes=2)
    run = folder("new")
    assert run.resume == "new/checkpoint-5" and not run.finished
    with pytest.raises(ValueError, match="data must be what the run began with, got pairs.csv with hash 5, 1234 then"):
        run.check_input("data", "pairs.csv", lambda: "5")
    with pytest.raises(ValueError, match="which is not empty"):
        folder("other")
    with pytest.raises(KeyError) as raised, run.claimed():
        raise KeyError
    assert getattr(raised.value, "kept", "") == "new/checkpoint-5 is the last whole checkpoint"
    if rank == 0:
        cut(Path("new/checkpoint-5/rng_state_1.pth"))
    with pytest.raises(ValueError, match="rng_state_1.pth is damaged or cut off"):
        folder("new")


def test_what_the_first_process_finds_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    Path("other/thesis.tex").touch()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(process, (port,), 2, start_method="fork")  # spares the imports


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
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(capsys, *SFT)[0] == 0
    for path in (Path("sft/metrics.json"), Path("sft/trainer_state.json")):
        path.unlink()
    cut(Path("sft/checkpoint-2") / name)
    assert run(capsys, *SFT)[0] == 0  # the one before it is whole
    assert f"sft/checkpoint-2/{name} is damaged or cut off" in caplog.text
    assert "renamed to checkpoint-2.damaged" in caplog.text and "going on from sft/checkpoint-1" in caplog.text
    assert Path("sft/checkpoint-2.damaged", name).is_file() and Path("sft/checkpoint-2").is_dir()
    Path("sft/metrics.json").unlink()
    for step in (1, 2):
        cut(Path(f"sft/checkpoint-{step}") / name)
    assert f"sft/checkpoint-2/{name} is damaged or cut off" in refused(capsys, *SFT)
