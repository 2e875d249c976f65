"""GEMTrainer under FSDP2 (gloo, CPU) takes the steps that it takes on one process, and the commands give the same numbers.

One spawn runs all cases and leaves the results in files. The first process alone has the weights of each model until FSDP2
spreads them, as with cpu_ram_efficient_loading: in the others they are zeros.
"""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from test_readme import ROOT, write_inputs
from test_router_loss import moe, unequal_groups
from test_trainer import EOS, examples, groups_of, make_trainer
from test_trainer_distributed import records
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from gem.config import EvalArguments, GuardArguments, LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.distributed import is_sharded, launched, processes
from gem.evaluate import Evaluation
from gem.generators import TransformersGenerator
from gem.launch import check_engine, fsdp_is_on
from gem.pipeline import GroupMaker
from gem.reference import reference_for
from gem.tasks import build_tokenizer
from gem.trainer import GEMTrainer
from gem.training_flags import check_sharded

TIMEOUT = 150  # seconds; a process that waits for another would wait for ever
STEPS, GROUPS = 2, 4  # groups of a step
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": 17, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**shape, **special, **changes))  # type: ignore[arg-type]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def lora() -> Any:
    model = llama()
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    return adapted


def grown_lora() -> Any:
    """Adapters that change the model already, the lm_head too."""
    model = llama()
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return adapted


# name: (loss, model, more settings of the trainer)
CASES: dict[str, tuple[LossArguments, Callable[[], Any], dict[str, Any]]] = {
    "sega": (LossArguments(), llama, {}),
    "sega tied": (LossArguments(), partial(llama, tie_word_embeddings=True), {}),
    "sft": (LossArguments(loss="sft"), llama, {}),
    "sft smoothed": (LossArguments(loss="sft"), llama, {"label_smoothing_factor": 0.2}),
    "dpo": (LossArguments(loss="dpo"), llama, {}),
    "lora": (LossArguments(), lora, {}),
    "lora on the head": (LossArguments(), grown_lora, {}),
    "moe": (LossArguments(loss="sft"), partial(moe, "olmoe"), {}),
    "checkpointed": (LossArguments(), llama, {}),
    "online": (LossArguments(), llama, {}),
    "online lora": (LossArguments(), lora, {}),
    "calibrated": (LossArguments(), llama, {}),
}
ONLINE = ("online", "online lora", "calibrated")


def whole(t: Any) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def with_weights_of_the_first(model: Any) -> Any:
    """Return the model, in the other processes with zeros for its weights."""
    if fsdp_is_on() and processes()[0]:
        for p in model.parameters():
            p.data.zero_()
    return model


def data_of(name: str, model: Any) -> Any:
    if name == "moe":
        return unequal_groups()[:8]
    if name in ONLINE:  # records bring their candidates, as what is sampled differs by process
        return records()
    base = copy.deepcopy(model)
    data = groups_of(base.get_base_model() if hasattr(base, "get_base_model") else base, STEPS * GROUPS)
    data[2].members[1].ids.extend([7, 7])  # the processes have unequally many tokens, and members
    data[2].members[1].logprobs.extend([-1.0, -1.0])
    if name == "sega":
        data[3].members = [replace(data[3].members[0], ids=[5], logprobs=[-1.0])]
    return data


def run_steps(folder: Path, name: str, ranks: int, **settings: Any) -> dict[str, Any]:
    """Return the weights after two steps, and what was logged."""
    loss, make, args = CASES[name]
    model = make()
    more: dict[str, Any] = {"data": data_of(name, model)}
    model = with_weights_of_the_first(model)
    if name in ONLINE:
        reference = reference_for(model, loss, ScoreArguments())
        pairs = [record for record in records() if record.has_pair and name == "calibrated"]
        tools = (build_tokenizer(), RolloutArguments(), ScoreArguments(), RankArguments(), reference)
        more["make_groups"] = GroupMaker(model, *tools, pairs=pairs)
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": GROUPS // 2 // ranks,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",  # Adam would make steps of roundings where a gradient is 0
        "learning_rate": 0.1,
        **args,
        **settings,
    }
    trainer = make_trainer(folder / name, loss, model=model, args=args, **more)
    trainer.train()
    assert is_sharded(trainer.model) == (ranks > 1)  # type: ignore[arg-type]
    return {
        "log": trainer.state.log_history,
        "trust": trainer.calibration.trust if trainer.calibration else None,
        "weights": {n.replace("_checkpoint_wrapped_module.", ""): whole(p) for n, p in model.named_parameters()},
    }


def same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(found["log"], expected["log"], strict=True):
        timed = {k for k in mine if "runtime" in k or "per_second" in k or k in ("total_flos", "grad_norm")}
        assert {k: v for k, v in mine.items() if k not in timed} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in timed}, abs=2e-5, nan_ok=True
        )
    assert found["trust"] == expected["trust"]
    for n, p in expected["weights"].items():
        torch.testing.assert_close(found["weights"][n], p, atol=2e-6, rtol=1e-5)


# --- processes --------------------------------------------------------------------------------------------------------


def in_process(rank: int, work: Callable[[Path, int], dict[str, Any]], ranks: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in found.items()})
    os.environ.update(FSDP)
    torch.save(work(Path(folder), ranks), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(work: Callable[[Path, int], dict[str, Any]], ranks: int, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.spawn(in_process, (work, ranks, port, str(folder)), ranks, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{work.__name__} was not done after {TIMEOUT} s: a process waits for another")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


# --- evaluation, sampling, bf16 ---------------------------------------------------------------------------------------


def evaluated(folder: Path, ranks: int) -> dict[str, Any]:
    """Return what a training logs that samples nothing itself and is evaluated before, between and after its steps."""
    model = llama()
    data = data_of("sega", model)
    model = with_weights_of_the_first(model)
    rollout = RolloutArguments(max_new_tokens=6, rollout_batch_size=8)
    held_out = [Example("", [1, 7 + i % 9, *[5] * (i % 3)], *[[3, 4, 7 + i % 9, EOS], [3, 8, EOS]]) for i in range(7)]
    held_out.append(Example("", [1, 8], [3, 8, EOS]))
    evaluation = Evaluation(
        model, build_tokenizer(), held_out, rollout, ScoreArguments(score_tokens=20), EvalArguments(eval_samples=4)
    )
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": GROUPS // ranks,
        "optim": "sgd",
        "learning_rate": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
    }
    trainer = make_trainer(folder, LossArguments(), model=model, data=data, args=args, evaluation=evaluation)
    trainer.train()
    entropies = [entry["eval_branch_entropy"] for entry in trainer.state.log_history if "eval_length" in entry]
    assert len(set(entropies)) == STEPS + 1  # the weights that sampled were not those of an earlier step
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return {"log": trainer.state.log_history, "trust": evaluation.completions, "weights": weights}


def sampled(folder: Path, ranks: int) -> dict[str, Any]:
    """Train on candidates that are sampled in the step; of four records, the third brings its own and the fourth no pair."""
    model = with_weights_of_the_first(llama())
    rows = examples(4)
    rows[2] = replace(rows[2], candidate_ids=[[3, 6, EOS], [5, 5, 3, 7, EOS]])
    rows[3] = Example("", [1, 9, 9], [])
    loss = LossArguments()
    rollout = RolloutArguments(group_size=3, max_new_tokens=8)
    reference = reference_for(model, loss, ScoreArguments(score_with="reference"))
    score = ScoreArguments(score_with="reference", score_tokens=30)
    maker = GroupMaker(model, build_tokenizer(), rollout, score, RankArguments(), reference)
    seen: list[int] = []
    own = TransformersGenerator.__call__

    def counted(self: Any, prompts: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(len(prompts))
        return own(self, prompts, *arguments, **more)

    TransformersGenerator.__call__ = counted  # type: ignore[method-assign]
    args = {"max_steps": STEPS, "per_device_train_batch_size": 4 // ranks, "learning_rate": 0.1}
    trainer = make_trainer(folder, loss, model=model, data=rows, make_groups=maker, args=args)
    trainer.train()
    TransformersGenerator.__call__ = own  # type: ignore[method-assign]
    return {"seen": seen, "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e]}


def in_bf16(folder: Path, ranks: int) -> dict[str, Any]:
    """Return the first step's loss, and the log-probs that it was made of, with a computation in bf16."""
    found: dict[str, Any] = {}

    def noted(self: Any, group: Any, stats: Any, sequence: Any) -> Any:
        found.setdefault(group.name + str(group.prompt_ids), stats.logprob.detach().clone())
        return own(self, group, stats, sequence)

    own, GEMTrainer._group_loss = GEMTrainer._group_loss, noted  # type: ignore[method-assign]
    settings = {"bf16": True} if ranks > 1 else {"dtype": torch.bfloat16}
    model = llama()
    data = data_of("sega", model)
    model = with_weights_of_the_first(model).to(settings.get("dtype"))
    args = {"max_steps": 1, "per_device_train_batch_size": 4 // ranks, "optim": "sgd", "bf16": ranks > 1}
    trainer = make_trainer(folder, LossArguments(), model=model, data=data[:4], args=args)
    trainer.train()
    GEMTrainer._group_loss = own  # type: ignore[method-assign]
    masters = {p.dtype for p in model.parameters()}
    return {"loss": trainer.state.log_history[0]["loss"], "logprobs": found, "masters": masters}


def stopped(folder: Path, ranks: int) -> dict[str, Any]:
    """Return the weights of a training that a guard has stopped after its third step, and those at its best, the first."""
    model = llama()
    data = data_of("sega", model)
    model = with_weights_of_the_first(model)
    shares, seen = iter([0.5, 0.9, 0.1, 0.1]), []

    def evaluation(model: Any) -> dict[str, float]:
        seen.append({n: whole(p) for n, p in model.named_parameters()})
        return {"accuracy_sampled": next(shares)}

    args = {
        "max_steps": 8,
        "per_device_train_batch_size": GROUPS // ranks,
        "learning_rate": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 100,
    }
    guard = GuardArguments(stop_patience=2)
    trainer = make_trainer(
        folder, LossArguments(), model=model, data=data, args=args, evaluation=evaluation, guard=guard
    )
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.restored.endswith("checkpoint-best")
    return {"best": seen[1], "last": seen[-1], "end": {n: whole(p) for n, p in model.named_parameters()}}


def of_two(folder: Path, ranks: int) -> dict[str, Any]:
    return {
        "stopped": stopped(folder / "stopped", ranks),
        **all_cases(folder, ranks),
        "evaluated": evaluated(folder / "evaluated", ranks),
        "bf16": in_bf16(folder / "bf16", ranks),
    }


def of_four(folder: Path, ranks: int) -> dict[str, Any]:
    """The fourth process has one short group where the others have three answers each, and in turn no prompt to sample from."""
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": GROUPS // ranks}
    found = {name: run_steps(folder, name, ranks, **settings) for name in ("sega", "online")}
    return {**found, "sampled": sampled(folder / "sampled", ranks)}


def all_cases(folder: Path, ranks: int) -> dict[str, Any]:
    found = {}
    for name in CASES:
        os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(name == "checkpointed").lower()
        found[name] = run_steps(folder, name, ranks)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(of_two, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(of_four, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, two: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = run_steps(tmp_path, name, 1)
    start = dict(CASES[name][1]().named_parameters())
    for found in two:
        same_numbers(found[name], expected)
        assert any(not torch.equal(p, start[n]) for n, p in found[name]["weights"].items())


@pytest.mark.parametrize("name", ["sega", "online"])
def test_four_processes_take_the_steps_of_one(name: str, four: list[dict[str, Any]], tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": GROUPS}
    expected = run_steps(tmp_path, name, 1, **settings)
    for found in four:
        same_numbers(found[name], expected)


def test_a_process_without_a_prompt_waits_for_none(four: list[dict[str, Any]]) -> None:
    """Whole weights are gathered for those that sample, and scored together by all."""
    drawn = [found["sampled"]["seen"] for found in four]
    assert [sum(step) for step in zip(*drawn, strict=True)] == [3, 3] and any(0 in own for own in drawn)
    assert all(found["sampled"]["losses"] == four[0]["sampled"]["losses"] for found in four)
    assert all(map(math.isfinite, four[0]["sampled"]["losses"]))


def test_an_evaluation_on_two_processes_is_that_of_one(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """Also those samples are the same, and so are the steps between: sampling leaves the shards as they were."""
    expected = evaluated(tmp_path, 1)
    for found in two:
        same_numbers(found["evaluated"], expected)


def test_a_computation_in_bf16_has_log_probs_in_fp32(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """They are those of a model in bf16, whose head reads bf16 and gives fp32; the weights themselves stay in fp32."""
    expected, found = in_bf16(tmp_path, 1), {name: x for part in two for name, x in part["bf16"]["logprobs"].items()}
    assert found.keys() == expected["logprobs"].keys()
    for name, logprob in expected["logprobs"].items():
        torch.testing.assert_close(found[name], logprob, rtol=2**-8, atol=0)
        assert not torch.equal(found[name], found[name].bfloat16().float())
    for part in two:
        assert part["bf16"]["masters"] == {torch.float32}
        assert part["bf16"]["loss"] == pytest.approx(expected["loss"], rel=2**-8)


def test_a_guard_restores_the_best_weights_into_the_shards(two: list[dict[str, Any]]) -> None:
    for found in two:
        best, last, end = (found["stopped"][name] for name in ("best", "last", "end"))
        assert all(torch.equal(end[name], p) for name, p in best.items())
        assert not all(torch.equal(end[name], p) for name, p in last.items())


# --- what is refused --------------------------------------------------------------------------------------------------

LAUNCHES = {
    "fsdp_version must be 2, got 1": {"ACCELERATE_USE_FSDP": "true"},
    "DeepSpeed is not supported": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "parallelism_config is not supported": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
}
ON = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OTHERWISE = {
    "fsdp_offload_params must be false, got true": {"FSDP_OFFLOAD_PARAMS": "true"},
    "fsdp_state_dict_type must be SHARDED_STATE_DICT or FULL_STATE_DICT, got 'LOCAL'": {
        "FSDP_STATE_DICT_TYPE": "LOCAL"
    },
    "fsdp_version must be 2, got two": {"FSDP_VERSION": "two"},
}


@pytest.mark.parametrize("said", LAUNCHES)
def test_another_engine_is_refused_by_name(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in LAUNCHES[said].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{said}.*accelerate launch --config_file fsdp2\.yaml"):
        check_engine()


@pytest.mark.parametrize("said", OTHERWISE)
def test_fsdp2_as_it_does_not_run_here_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ON, **OTHERWISE[said]}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{said}"):
        check_engine()


def test_one_process_has_nothing_to_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ON.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for begin in (lambda: launched(None), lambda: make_trainer(tmp_path, LossArguments(), data=groups_of(llama(), 4))):
        with pytest.raises(ValueError, match="^FSDP2 must have several processes, got one"):
            begin()


UNSAVED = {
    "save_only_model must be false with fsdp_state_dict_type SHARDED": ("SHARDED", {"save_only_model": True}),
    "save_only_model must be false with load_best": ("FULL", {"save_only_model": True, "load_best_model_at_end": True}),
    "fsdp_state_dict_type must be SHARDED_STATE_DICT with optim=sgd": ("FULL", {"optim": "sgd"}),
}


@pytest.mark.parametrize("said", UNSAVED)
def test_what_could_not_be_saved_is_refused_at_the_start(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, settings = UNSAVED[said]
    known = {
        "save_strategy": "steps",
        "save_only_model": False,
        "load_best_model_at_end": False,
        "optim": "adamw_torch",
    }
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", f"{form}_STATE_DICT")
    args = SimpleNamespace(optim_args=None, **{**known, **settings})
    with pytest.raises(ValueError, match=f"^{said}"):
        check_sharded(args, averages=False)
    check_sharded(SimpleNamespace(optim_args=None, **known), averages=False)
    with pytest.raises(ValueError, match="^score_with must be policy or reference under FSDP2, got ema"):
        check_sharded(args, averages=True)


def test_several_devices_for_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    said = "args must ask for one process a device, got 4 devices for one, DataParallel: torchrun --nproc_per_node 4"
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, LossArguments(), model=llama(), data=groups_of(llama(), 4))


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_one_device_for_several_processes_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=rf"^device must be cpu, or left to the 2 processes of the launch, got '{name}'"
    ):
        launched(name)


# --- the reference script ---------------------------------------------------------------------------------------------


def test_the_reference_script_runs_in_shards(tmp_path: Path) -> None:
    """As a user types it, with the file of the recipe."""
    write_inputs(tmp_path)
    config = ROOT / "examples" / "configs" / "llama3-8b-8xa100" / "fsdp2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    flags = "--model MODEL --data pairs.jsonl --warm_steps 2 --steps 2 --batch_size 4 --max_new_tokens 6"
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / "train_gem.py"), *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy_greedy") == 1  # of the first process
    assert (tmp_path / "runs/gem/gem/checkpoint-2/pytorch_model_fsdp_0/.metadata").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/gem/gem")
