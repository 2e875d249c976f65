"""What the commands work on: a tiny model, data and configs; one mode of each command; and what a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from commands import Disk, Plant, Running, command, ranks, scratch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gem.finite import not_finite
from gem.tasks import build_tokenizer

KILLS = int(os.environ.get("FAULTS", "3"))  # of each mode
STEPS = 4 * KILLS  # a kill comes after up to three steps
RECORDS = max(16, 4 * KILLS)  # of pairs.jsonl: as many batches of score
WARM_STEPS = 60

TRAINER = f"""
use_cpu: true
disable_tqdm: true
max_steps: {STEPS}
save_steps: 2
per_device_train_batch_size: 2
learning_rate: 1e-3
lr_scheduler_type: cosine
"""
EVALUATION = """
eval_data: held_out.jsonl
eval_strategy: steps
eval_steps: 3
eval_on_start: true
stop_patience: 100
"""
SAMPLING = "group_size: 3\nmax_new_tokens: 10\n"
CONFIGS = {
    "sft.yaml": f"model: warm\ndata: pairs.jsonl\noutput_dir: runs/sft\n{TRAINER}",
    "groups.yaml": f"model: warm\ngroups: groups.jsonl\noutput_dir: runs/groups\nmax_new_tokens: 10\n{EVALUATION}{TRAINER}",
    "online.yaml": f"model: warm\ndata: pairs.jsonl\noutput_dir: runs/online\n{SAMPLING}{EVALUATION}{TRAINER}",
    "score.yaml": f"model: warm\ndata: pairs.jsonl\noutput: scored/groups.jsonl\nrollout_batch_size: 3\n{SAMPLING}",
    "eval.yaml": "model: warm\ndata: held_out.jsonl\noutput: scored/eval.json\nmax_new_tokens: 10\n",
}


@dataclass(frozen=True)
class Mode:
    """A command as the suite runs it, and where its results go."""

    argv: tuple[str, ...]
    output: str  # a run's folder, or a file
    ranks: int = 1
    state: str = ""  # FULL or SHARDED: how FSDP2 saves its state; "": the ranks run DistributedDataParallel

    @property
    def launch(self) -> dict[str, str]:
        """What accelerate sets for its processes."""
        if not self.state:
            return {}
        wrap = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": f"{self.state}_STATE_DICT"}
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", **wrap}

    @property
    def trains(self) -> bool:
        return self.argv[0] in ("sft", "train")

    @property
    def folder(self) -> str:
        """The folder that receives what the command writes."""
        return self.output if self.trains else str(Path(self.output).parent)

    def start(self, folder: Path, *more: str, plants: Sequence[Plant] = (), disk: Disk | None = None) -> Running:
        """Start the command on one process."""
        return command(*self.argv, *more, folder=folder, plants=plants, disk=disk)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Run the command to its end, on all ranks, and return its results."""
        if self.ranks == 1:
            self.start(folder).end().ended()
        else:
            for rank in ranks(*self.argv, folder=folder, environment=self.launch):
                rank.end().ended()
        return results(folder / self.output)


MODES = {
    "sft": Mode(("sft", "--config", "sft.yaml"), "runs/sft"),
    "score": Mode(("score", "--config", "score.yaml"), "scored/groups.jsonl"),
    "train --groups": Mode(("train", "--config", "groups.yaml"), "runs/groups"),
    "train online": Mode(("train", "--config", "online.yaml"), "runs/online"),
    "train online, score_with ema": Mode(
        ("train", "--config", "online.yaml", "--output_dir", "runs/ema", "--score_with", "ema"), "runs/ema"
    ),
    "train online, two ranks": Mode(("train", "--config", "online.yaml"), "runs/online", ranks=2),
    "train online, FSDP2 on two ranks": Mode(("train", "--config", "online.yaml"), "runs/online", 2, "SHARDED"),
    "score, two ranks": Mode(("score", "--config", "score.yaml"), "scored/groups.jsonl", ranks=2),
    "sft, FSDP2 on two ranks": Mode(("sft", "--config", "sft.yaml"), "runs/sft", 2, "FULL"),
}


@cache
def world() -> Path:
    """Return a folder with everything that the configs name. It is made once and copied for each test."""
    folder = scratch("world")
    folder.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, attention_dropout=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "cold")
    build_tokenizer().save_pretrained(folder / "cold")
    for name, numbers in (("pairs", range(1, RECORDS + 1)), ("held_out", range(90, 94))):
        rows = [{"prompt": f"{i}+{i}=", "chosen": f"{i} #### {2 * i}", "rejected": f"#### {i}"} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    warm = ("--model", "cold", "--max_steps", str(WARM_STEPS), "--learning_rate", "1e-2", "--save_steps", "1000")
    command("sft", "--config", "sft.yaml", *warm, "--output_dir", "warm", folder=folder).end().ended()
    for path in (folder / "warm").iterdir():  # the model alone, as from the hub
        if path.name in ("run.json", "metrics.json", "trainer_state.json", "manifest.json", "training_args.bin"):
            path.unlink()
        elif path.name.startswith("checkpoint-"):
            shutil.rmtree(path)
    command("score", "--config", "score.yaml", "--output", "groups.jsonl", folder=folder).end().ended()
    return folder


@cache
def uninterrupted(mode: str) -> dict[str, Any]:
    """Return the results of a mode that nothing disturbs."""
    folder = scratch(f"uninterrupted {mode}")
    shutil.copytree(world(), folder)
    return MODES[mode].finish(folder)


def results(output: Path) -> dict[str, Any]:
    """Return what must be the same bits in the end: the weights, the log without times, the metrics; or the file."""
    if not output.is_dir():
        return {output.name: output.read_bytes()}
    names = ("model.safetensors", "metrics.json", "completions.jsonl")
    found: dict[str, Any] = {name: (output / name).read_bytes() for name in names if (output / name).exists()}
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    found["log"] = [{k: v for k, v in entry.items() if not _of_the_session(k)} for entry in history]
    return found


def _of_the_session(name: str) -> bool:
    """Return True for what Trainer logs of its last session alone: times, and the mean of the losses since it began."""
    return name.endswith(("_runtime", "_per_second")) or name in ("train_loss", "total_flos")


def same(found: dict[str, Any], mode: str) -> None:
    """Assert that results are those of an uninterrupted run."""
    expected = uninterrupted(mode)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs from that of an uninterrupted run"


def whole_checkpoints(run: Path) -> list[str]:
    """Return the names of the checkpoints with a manifest, oldest first. Everything with one loads in plain transformers."""
    for path in run.rglob("manifest.json"):
        if (path.parent / "model.safetensors").exists():
            loads(path.parent)
    found = [
        path for path in run.glob("checkpoint-*") if path.name[11:].isdigit() and (path / "manifest.json").exists()
    ]
    return [path.name for path in sorted(found, key=lambda path: int(path.name[11:]))]


def loads(folder: Path) -> None:
    """Assert that a folder holds a model with finite weights, for transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not not_finite(model.named_parameters())


def nothing_half_written(folder: Path) -> None:
    """Assert that no part of a file, and no checkpoint without a manifest, is left below a folder."""
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.tmp"))
    for path in folder.rglob("checkpoint-*"):
        assert not path.is_dir() or (path / "manifest.json").exists() or path.suffix == ".damaged", path


def listing(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content, but the locks, which a kill leaves behind."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
