"""gem-kernels doctor: the report on a model's head, in the library and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT, available, build
from head_cases import Changed
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from gem import cli
from gem.doctor import Diagnosis, diagnose, load
from gem.head import fuse_lm_head
from gem_kernels import LogitTransform

ROOT = Path(__file__).parent.parent


def row(report: Diagnosis, name: str) -> str:
    (line,) = [line for line in report.lines() if line.startswith(name)]
    return line.removeprefix(name).strip()


def test_a_report() -> None:
    report = diagnose(build("llama tied"), batch_size=2, seq_len=5)
    assert (report.vocab, report.hidden, report.logits) == (97, 32, 97)
    assert report.tied and report.trained and not report.bias
    assert 0 < report.largest_gap < 1e-5 and report.largest_gap < report.allowed_gap < 1e-3
    assert report.logit_bytes == 2 * 4 * 97 * 12  # fp32 logits, their log-probs, the gradient
    assert row(report, "model") == "LlamaForCausalLM, float32, on cpu"
    assert row(report, "lm_head").startswith("V=97, D=32, no bias, tied to the input embeddings, trained: 6 N D V FLOP")
    assert row(report, "logits") == "z' = z" and row(report, "adapter") == "none"
    assert row(report, "implementation") == "chunked"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", "z' = 5 tanh(z / 5)"),
        ("granite", "z' = 0.25 z"),
        ("hyperclovax", "z' = 0.25 z"),
        ("minicpm3", "z' = z"),
    ],
)
def test_the_transform_in_words(name: str, words: str) -> None:
    if not available(name):
        pytest.skip("not in this transformers")
    assert row(diagnose(build(name)), "logits") == words


def test_a_frozen_head_in_bf16_under_an_adapter() -> None:
    model = get_peft_model(build("phi").bfloat16(), LoraConfig(r=4, target_modules=["lm_head"]))
    report = diagnose(model)
    assert report.adapter == "LoRA default (r=4)" and not report.trained and report.bias and not report.tied
    assert "bias, not tied to the input embeddings, frozen: 4 N D V FLOP" in row(report, "lm_head")
    assert report.logit_bytes == 8 * 2047 * 97 * 14  # bf16 logits, and fp32 logits, log-probs and gradient


def test_settings_of_a_fused_model_stay() -> None:
    model = fuse_lm_head(build("llama"), temperature=2.0, impl="reference")
    report = diagnose(model)
    assert report.transform == LogitTransform(temperature=2.0) and report.impl == "reference"


def test_a_vocabulary_whose_padding_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changed, "change", staticmethod(lambda z: z[..., :90]))
    assert "V=97, of which the model uses 90, D=32" in row(diagnose(Changed(LlamaConfig(**TEXT))), "lm_head")


@pytest.mark.parametrize(("name", "value", "least"), [("batch_size", 0, 1), ("seq_len", 1, 2)])
def test_bad_sizes(name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= {least}, got {value}"):
        diagnose(build("llama"), **{name: value})


# --- the command ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["doctor", *argv])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", ["gemma2", "llava"])
def test_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(name).save_pretrained(tmp_path)
    status, out, _ = run(capsys, str(tmp_path), "--batch_size", "4", "--seq_len", "128")
    assert status == 0
    report, _, plan = out.partition("\n\n")
    assert report.splitlines() == diagnose(load(str(tmp_path)), batch_size=4, seq_len=128).lines()
    assert "on one device" in plan and "4 groups of 1 sequence of at most 128 tokens" in plan
    assert "self-check" in out and "4 x 128 tokens" in out


def test_a_folder_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    model: Any = load(str(tmp_path / "base"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    status, out, _ = run(capsys, str(tmp_path / "adapter"))
    assert status == 0 and "LoRA default (r=2)" in out


def test_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, str(ROOT / "examples/configs/llama-tiny-neox.json"))
    assert status == 0 and "V=50277, D=128" in out


def test_a_dtype_is_kept(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path)
    assert next(load(str(tmp_path)).parameters()).dtype == torch.bfloat16


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (("/nowhere",), "model must be a folder, a hub name, a GGUF file or a config .json, got '/nowhere'"),
        ((), "the following arguments are required: model"),
        ((str(ROOT / "examples/configs/llama-tiny-neox.json"), "--seq_len", "1"), "seq_len must be >= 2, got 1"),
    ):
        status, out, err = run(capsys, *argv)
        assert status == 2 and not out and err.count("\n") == 1 and message in err


def test_the_plan_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples/configs/llama-tiny-neox.json")
    more = "--batch_size 2 --seq_len 64 --world_size 4 --optim sgd --bf16 --gradient_checkpointing --lora_rank 4"
    assert cli.main(["doctor", config, *more.split()]) == 0
    plan = capsys.readouterr().out.partition("\n\n")[2]
    assert "4 devices by FSDP2" in plan and "gathered units" in plan
    assert next(line for line in plan.splitlines() if line.startswith("optimizer state")).split()[2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--world_size 0", "world_size must be >= 1, got 0"),
        ("--lora_rank -1", "lora_rank must be >= 0, got -1"),
        ("--optim lomo", "optim must be one whose memory is known"),
    ],
)
def test_a_plan_that_cannot_be_made(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(ROOT / "examples/configs/llama-tiny-neox.json"), *flags.split()]) == 2
    assert words in capsys.readouterr().err
