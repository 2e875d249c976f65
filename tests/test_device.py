"""Devices of models: every command puts the model, and every tensor that meets it, on the chosen device.

No GPU is needed. The commands run on a second device made of CPU memory (second_device.py), which raises where one of its
tensors meets a tensor of the CPU. A batch, a mask or a statistic on the wrong device therefore ends the command, and a model or
a reference that was left on the CPU shows in the devices of the weights that were used. The numbers of CUDA's kernels are
checked by the cases marked `gpu` (devices.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from transformers import LlamaConfig

from gem import cli
from gem.doctor import load
from gem.models import pick_device
from gem.tasks import build_tokenizer

HERE = Path(__file__).parent
MODEL = ("--model", "cfg/config.json", "--tokenizer", "tok")
DATA = ("--data", "pairs.jsonl", "--max_new_tokens", "5")
TRAIN = (
    *("train", *MODEL, "--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"),
    *("--save_strategy", "no", "--max_new_tokens", "5", "--eval_data", "pairs.jsonl", "--eval_strategy", "steps"),
    *("--eval_steps", "1"),
)
ONLINE = ("--data", "pairs.jsonl", "--group_size", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor", "cfg/config.json", "--device", "second"),
    "score": ("score", *MODEL, *DATA, "--output", "there.jsonl", "--device", "second:0"),
    "eval": ("eval", *MODEL, *DATA, "--output", "there.json", "--device", "second"),
    "sft": ("sft", *MODEL, *DATA[:2], "--max_steps", "2", "--save_strategy", "no", "--output_dir", "sft"),
    "train": (*TRAIN, "--groups", "there.jsonl", "--output_dir", "offline"),
    "train online": (*TRAIN, *ONLINE, "--output_dir", "online"),
    "train online, scored by the reference": (
        *(*TRAIN, *ONLINE, "--output_dir", "reference", "--score_with", "reference"),
    ),
    "train online, LoRA": (*TRAIN, *ONLINE, "--output_dir", "lora", "--lora_rank", "2"),
}


def write_inputs(folder: Path) -> None:
    LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    ).save_pretrained(folder / "cfg")  # fmt: skip
    build_tokenizer().save_pretrained(folder / "tok")
    rows = [{"prompt": f"{i}+{i}=", "chosen": f"{i}+{i} #### {2 * i}", "rejected": f"#### {i}"} for i in range(1, 5)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all commands on the second device; return their folder and their results."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot have a device that is written in Python")
    folder = tmp_path_factory.mktemp("second")
    write_inputs(folder)
    script = [sys.executable, str(HERE / "second_device.py"), json.dumps(list(COMMANDS.values()))]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mixing raises"]
    return folder, dict(zip(COMMANDS, found["commands"], strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_on_the_chosen_device(command: str, elsewhere: tuple[Path, dict[str, Any]]) -> None:
    result = elsewhere[1][command]
    assert result["status"] == 0, result["printed"]
    assert result["devices"] == ["second:0"]
    if command == "doctor":
        assert "LlamaForCausalLM, float32, on second:0" in result["printed"]


@pytest.mark.parametrize(("command", "name"), [("score", "jsonl"), ("eval", "json")])
def test_the_numbers_are_those_of_the_cpu(
    command: str,
    name: str,
    elsewhere: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(elsewhere[0])
    output = tmp_path / "here"
    assert cli.main([command, *MODEL, *DATA, "--device", "cpu", "--output", str(output)]) == 0
    assert numbers(output.read_text()) == pytest.approx(numbers(Path(f"there.{name}").read_text()), abs=1e-5)


def numbers(text: str) -> list[float]:
    def walk(value: Any) -> list[float]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [x for v in value for x in walk(v)]
        return [float(value)] if isinstance(value, (int, float)) else []

    rows = [text] if text.startswith("{\n") else text.splitlines()
    return [x for row in rows for x in walk(json.loads(row))]


# --- which device ---------------------------------------------------------------------------------------------------------


def test_cuda_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device(None) == torch.device(device)
    assert pick_device("cpu") == torch.device("cpu")  # also where there is one


@pytest.mark.parametrize("name", ["nonsense", "0", "cuda:x", "meta", ""])
def test_a_device_that_torch_does_not_know(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device must be one of this machine \(cpu.*\), got '{name}': "):
        pick_device(name)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=rf"device must be one of this machine \(cpu.*\), got '{name}': "):
        load(str(tmp_path), name)


@pytest.mark.parametrize("command", ["score", "eval", "doctor"])
def test_a_bad_device_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    arguments = ["cfg/config.json"] if command == "doctor" else [*MODEL, *DATA]
    assert cli.main([command, *arguments, "--device", "nonsense"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert f"gem-kernels {command}: device must be one of this machine (cpu" in err and "got 'nonsense': " in err
