"""Every flag of `gem-kernels train --help` has an effect or is refused by name."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import COMMANDS
from test_trainer import groups_of, tiny_model
from transformers import TrainerCallback, TrainingArguments

from gem.config import GuardArguments, LossArguments
from gem.settings import never_used, parse
from gem.stops import Diverged
from gem.tasks import build_tokenizer
from gem.trainer import GEMTrainer
from gem.training_flags import IGNORED, ONLY_WITH, PACKAGES, check_trackers, refuse_ignored

INSTALLED = {f.name for f in fields(TrainingArguments)}
# All of gem's own settings have an effect, given the conditions in test_settings.py; the comments name the tests.
OURS = {
    "config", "preset",  # test_cli.py
    "model", "tokenizer", "eos_token", "dtype", "attn_implementation", "lora_rank",  # test_models.py, test_sources.py
    "data", "data_format", "split", "eval_split", "limit", "on_bad_row",  # test_records.py, test_read.py, test_problems.py
    "prompt_format", "prompt_template", "system", "max_length", "cot_prompt", "cot_pairs",  # test_prompts.py, test_data.py
    "groups", "eval_data", "eval_limit", "eval_samples", "cache_mib",  # test_cli.py, test_evaluate.py, test_group_loss.py
    "loss", "length_norm", "beta", "kl_weight", "taper", "sft_weight",  # here
    "auroc_gate", "stop_patience", "stop_margin", "stop_growth", "stop_idle",  # test_guard.py
    "group_size", "max_new_tokens", "temperature", "top_p", "rollout_batch_size", "stop",  # test_settings.py, _generators.py
    "top_m", "branch_weight", "final_weight", "entropy_clip", "markers", "score_with", "score_tokens",  # test_settings.py
    "ema_decay",  # test_ema.py
    "tau", "prior_sd", "human_weight", "reward", "weight_norm", "min_spread", "filter_groups",  # test_settings.py
    "dry_run", "world_size", "shape", "longest", "device_memory", "accelerate_config",  # test_dry_run.py
    "filter_members", "comparators", "agreement_filter", "calibrate",  # test_settings.py, test_pipeline.py
    "unlabeled", "unlabeled_split", "unlabeled_share",  # test_unlabeled.py
}  # fmt: skip
CONDITIONAL = {name for names, _, _ in ONLY_WITH for name in names.split()}

# --- what acts: name -> what shows it -------------------------------------------------------------------------------------

STEPWISE: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
SAVING = {"save_strategy": "steps", "save_steps": 1}
BEST = {**STEPWISE, "metric_for_best_model": "preference_sum"}
WORKER = {"dataloader_num_workers": 1}

# Other settings -> the history of losses differs from that of the rest alone.
CHANGES_THE_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 3}, {}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {}),
    "num_train_epochs": ({"num_train_epochs": 0.5}, {}),
    "max_steps": ({"max_steps": 3}, {}),
    "learning_rate": ({"learning_rate": 0.1}, {}),
    "lr_scheduler_type": ({"lr_scheduler_type": "linear"}, {}),
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"num_cycles": 3}}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": ({"warmup_steps": 3}, {}),
    "optim": ({"optim": "adafactor"}, {}),
    "optim_args": ({"optim_args": "momentum=0.9"}, {"optim": "sgd"}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "adam_beta1": ({"adam_beta1": 0.5}, {}),
    "adam_beta2": ({"adam_beta2": 0.5}, {}),
    "adam_epsilon": ({"adam_epsilon": 0.1}, {}),
    "max_grad_norm": ({"max_grad_norm": 1e-8}, {}),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.3}, {"loss": "sft"}),
    "bf16": ({"bf16": True}, {}),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, {}),
    "logging_strategy": ({"logging_strategy": "epoch"}, {}),
    "logging_steps": ({"logging_steps": 2}, {}),
    "logging_first_step": ({"logging_first_step": True}, {"logging_steps": 2}),
    "seed": ({"seed": 7}, {}),
    "data_seed": ({"data_seed": 7}, {}),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, {}),
    "dataloader_drop_last": ({"dataloader_drop_last": True}, {"per_device_train_batch_size": 3}),
    "accelerator_config": ({"accelerator_config": {"use_seedable_sampler": False}}, {}),
}
# Other settings -> the expected property of the finished trainer.
SHOWS: dict[str, tuple[dict[str, Any], Callable[[GEMTrainer], Any]]] = {
    "eval_strategy": ({"eval_strategy": "epoch"}, lambda t: evaluations(t) == [4]),
    "eval_steps": ({**STEPWISE, "eval_steps": 2}, lambda t: evaluations(t) == [2, 4]),
    "eval_delay": ({**STEPWISE, "eval_delay": 3}, lambda t: evaluations(t) == [3, 4]),
    "eval_on_start": ({"eval_on_start": True}, lambda t: evaluations(t) == [0]),
    "save_strategy": ({**BEST, "save_strategy": "best"}, lambda t: checkpoints(t) == [1, 2]),
    "greater_is_better": (
        {**BEST, "save_strategy": "best", "greater_is_better": False},
        lambda t: checkpoints(t) == [1],
    ),
    "save_steps": ({**SAVING, "save_steps": 2}, lambda t: checkpoints(t) == [2, 4]),
    # The last step leaves nothing to resume for, so the checkpoint before it stays too.
    "save_total_limit": ({**SAVING, "save_total_limit": 1}, lambda t: checkpoints(t) == [3, 4]),
    "save_only_model": ({**SAVING, "save_only_model": True}, lambda t: not list(folder(t).rglob("optimizer.pt"))),
    "metric_for_best_model": ({**BEST, **SAVING}, lambda t: t.state.best_global_step == 2),
    "load_best_model_at_end": (
        {**BEST, **SAVING, "load_best_model_at_end": True},
        lambda t: same_weights(t, folder(t) / "checkpoint-2"),
    ),
    "disable_tqdm": ({"disable_tqdm": False}, lambda t: "Progress" in names_of_callbacks(t)),
    "output_dir": (SAVING, lambda t: checkpoints(t) == [1, 2, 3, 4]),
    "use_cpu": ({}, lambda t: t.args.device.type == "cpu"),
    "use_cache": ({"use_cache": True}, lambda t: t.model.config.use_cache),
    "full_determinism": ({"full_determinism": True}, lambda t: torch.are_deterministic_algorithms_enabled()),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "non_padding"},
        lambda t: t.state.num_input_tokens_seen > 0,
    ),
    "skip_memory_metrics": (
        {"skip_memory_metrics": False},
        lambda t: "train_mem_cpu_alloc_delta" in t.state.log_history[-1],
    ),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, lambda t: checkpointing(t)),
    "gradient_checkpointing_kwargs": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        lambda t: checkpointing(t).keywords["use_reentrant"] is True,
    ),
    "dataloader_num_workers": (WORKER, lambda t: loader(t).num_workers == 1),
    "dataloader_prefetch_factor": (
        {**WORKER, "dataloader_prefetch_factor": 3},
        lambda t: loader(t).prefetch_factor == 3,
    ),
    "dataloader_persistent_workers": (
        {**WORKER, "dataloader_persistent_workers": True},
        lambda t: loader(t).persistent_workers,
    ),
    "restore_callback_states_from_checkpoint": (
        {"restore_callback_states_from_checkpoint": True},
        lambda t: restores_callbacks(t),
    ),
}
# Settings that need a GPU, other machines, the network, a tracker or other steps than the test's.
ELSEWHERE = {
    "auto_find_batch_size", "logging_nan_inf_filter", "torch_empty_cache_steps", "log_level", "debug", "report_to",
    "resume_from_checkpoint",  # tests of their own: below, and test_runs.py
    "activation_checkpointing", "activation_checkpointing_kwargs",  # newer names of gradient_checkpointing
    "torch_compile", "torch_compile_backend", "torch_compile_mode",  # below
    "dataloader_multiprocessing_context", "dataloader_in_order",  # as their neighbours
    "ignore_data_skip",  # only for a resumed run
    "fp16", "tf32", "optim_target_modules",  # a GPU; a package
    "log_level_replica", "log_on_each_node", "save_on_each_node", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",  # several processes
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir",
    "warmup_ratio",  # older name of warmup_steps
    "remove_unused_columns",  # always false
}  # fmt: skip

# --- what is refused: name -> flags with which it is, and with which it is not ----------------------------------------------

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("prediction_loss_only", "eval_use_gather_object", "batch_eval_metrics", "use_liger_kernel"), "true"
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval", "do_train", "do_eval", "do_predict", "fsdp", "enable_jit_checkpoint"),
        "true",
    ),
    **dict.fromkeys(("eval_do_concat_batches", "average_tokens_across_devices", "dataloader_pin_memory"), "false"),
    "per_device_eval_batch_size": "4",
    "eval_accumulation_steps": "2",
    "include_for_metrics": "loss",
    "label_names": "labels",
    "length_column_name": "len",
    "liger_kernel_config": '{"rope":true}',
    "fsdp_config": "fsdp.json",
    "deepspeed": "ds.json",
    "parallelism_config": "x",
    "remove_unused_columns": "true",
    "local_rank": "3",
    "train_sampling_strategy": "group_by_length",
    "debug": "tpu_metrics_debug",
    "ddp_backend": "gloo",
    "activation_checkpointing_kwargs": '{"use_reentrant":true}',
    "gradient_checkpointing_kwargs": '{"use_reentrant":true}',
    "dataloader_in_order": "false",
    "dataloader_prefetch_factor": "2",
    "dataloader_persistent_workers": "true",
    "dataloader_multiprocessing_context": "spawn",
    "warmup_steps": "3 --lr_scheduler_type constant",
    "warmup_ratio": "0.3 --lr_scheduler_type constant",
    "lr_scheduler_kwargs": '{"num_cycles":2}',
    "adam_beta1": "0.5 --optim sgd",
    "adam_beta2": "0.5 --optim adafactor",
    "adam_epsilon": "0.5 --optim rmsprop",
    "optim_args": "momentum=0.9",
    "optim_target_modules": "all-linear",
    "eval_steps": "3",
    "eval_delay": "3",
    "metric_for_best_model": "auroc",
    "load_best_model_at_end": "true",
    "save_strategy": "best",
    "greater_is_better": "true",
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_revision", "run_name", "project", "logging_dir"), "name"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "name"),
    "hub_strategy": "end",
    "hub_always_push": "true",
    "hub_private_repo": "true",
    "fp16": "true",
}
ONLINE = ("--data", "pairs.jsonl")


def parsed(*flags: str) -> dict[str, Any]:
    instances, _ = parse("train", [*ONLINE, "--use_cpu", *flags], *COMMANDS["train"], TrainingArguments)
    return {name: value for instance in instances for name, value in vars(instance).items()}


def test_every_flag_is_in_a_list() -> None:
    settings = {f.name for cls in COMMANDS["train"] for f in fields(cls)}
    assert settings - never_used("train") == OURS - {"config", "preset"}
    acting = CHANGES_THE_LOSSES.keys() | SHOWS.keys() | ELSEWHERE
    assert INSTALLED - acting - IGNORED.keys() - CONDITIONAL == set()
    assert not acting & (IGNORED.keys() - {"resume_from_checkpoint"})
    assert REFUSED.keys() == (IGNORED.keys() - {"resume_from_checkpoint"}) | CONDITIONAL
    never = CONDITIONAL - acting
    assert never == {"do_eval", "local_rank", "dataloader_pin_memory"}  # they state the default, or are refused


def test_help_shows_what_acts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = {
        line.split()[0][2:].rstrip(",") for line in capsys.readouterr().out.splitlines() if line.startswith("  --")
    }
    shown = {name for name in shown if "-" not in name and not name.startswith("no_")}
    assert shown == (INSTALLED | OURS) - (IGNORED.keys() - {"resume_from_checkpoint"})


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & INSTALLED))
def test_a_flag_that_would_do_nothing_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    value, *more = REFUSED[name].split()
    # use_cpu=false leaves pinned memory on, which transformers would otherwise switch off.
    more += ["--use_cpu", "false"] if name == "dataloader_pin_memory" else []
    with pytest.raises(ValueError, match=rf"^{name} would do nothing and must be left at .*, got .*: "):
        parsed(f"--{name}", value, *more)


@pytest.mark.parametrize("name", sorted(IGNORED.keys() & INSTALLED - {"resume_from_checkpoint"}))
def test_at_its_default_it_is_not(name: str) -> None:
    parsed()
    default = next(f for f in fields(TrainingArguments) if f.name == name).default
    if isinstance(default, bool | int | str):
        parsed(f"--{name}", str(default).lower() if isinstance(default, bool) else str(default))


@pytest.mark.parametrize(
    "flags",
    [
        "--optim sgd --optim_args momentum=0.9",
        "--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs {\"num_cycles\":2} --warmup_steps 3",
        "--dataloader_num_workers 1 --dataloader_prefetch_factor 2 --dataloader_persistent_workers true",
        "--gradient_checkpointing --gradient_checkpointing_kwargs {\"use_reentrant\":true}",
        "--push_to_hub --hub_model_id me/it --hub_private_repo true",
        "--eval_data pairs.jsonl --eval_strategy steps --eval_steps 3 --metric_for_best_model auroc --eval_delay 1",
        "--remove_unused_columns false",
        "--dataloader_pin_memory false",
    ],
)  # fmt: skip
def test_with_what_it_needs_it_is_not(flags: str) -> None:
    assert parsed(*flags.split())


def test_users_of_the_class_are_told_too(tmp_path: Path) -> None:
    for changes, message in (
        ({"per_device_eval_batch_size": 3}, "per_device_eval_batch_size would do nothing and must be left at 8, got 3"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy would do nothing"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches would do nothing"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config.even_batches would do nothing"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor would do nothing .*: it is for loss=sft, loss is sega",
        ),
        ({"resume_from_checkpoint": "x"}, r"resume_from_checkpoint would .*: give it to GEMTrainer.train\("),
        ({"eval_on_start": True}, "eval_on_start would do nothing .*: there is nothing to evaluate on"),
        ({"max_steps": 0}, "max_steps must be > 0, or -1 for num_train_epochs, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be > 0, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be >= 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, evaluated=False, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {**SAVING, "load_best_model_at_end": True},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"metric_for_best_model": "eval_loss"},
    ],
    ids=str,
)
def test_the_best_model_is_not_that_of_a_loss_nobody_computes(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="metric_for_best_model must be a metric of the evaluation, such as preference_sum"
    ):
        trained(tmp_path, **STEPWISE, **changes)


@pytest.mark.parametrize("loss", ["sega", "dpo", "ipo", "pro", "listwise_dpo"])
def test_label_smoothing_is_for_sft(loss: str) -> None:
    arguments = TrainingArguments("x", use_cpu=True, label_smoothing_factor=0.1)
    refuse_ignored(arguments, "sft")
    with pytest.raises(ValueError, match=f"loss is {loss}$"):
        refuse_ignored(arguments, loss)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow", "comet_ml", "trackio"])
def test_a_tracker_that_is_not_installed(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.integrations.integration_utils
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: [])
    with pytest.raises(
        ValueError, match=f"^report_to={tracker} needs pip install {PACKAGES.get(tracker, tracker)}, got"
    ):
        parsed("--report_to", tracker)
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: [tracker])
    check_trackers([tracker])
    check_trackers("none")
    with pytest.raises(ValueError, match="report_to must be none, all or one of .*, got 'wandbb'"):
        check_trackers("wandbb")


# --- that they act ----------------------------------------------------------------------------------------------------------


def trained(
    where: Path,
    loss: str | LossArguments = "sega",
    *,
    evaluated: bool = True,
    train: bool = True,
    resume: str = "",
    **changes: Any,
) -> GEMTrainer:
    """Return a trainer after four steps on eight groups, and an evaluation whose second metric is the best."""
    shown = iter([0.5, 0.9, 0.7, 0.6, 0.5])
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings |= {"lr_scheduler_type": "constant_with_warmup", "output_dir": str(where)}
    arguments = TrainingArguments(**{**settings, **changes})
    model = tiny_model()
    trainer = GEMTrainer(
        model, arguments, guard=GuardArguments(stop_patience=0),
        loss=LossArguments(loss=loss) if isinstance(loss, str) else loss,
        train_dataset=groups_of(copy.deepcopy(model), 8), processing_class=build_tokenizer(),
        evaluation=(lambda _: {"preference_sum": next(shown)}) if evaluated else None,
    )  # fmt: skip
    if train:
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def losses(trainer: GEMTrainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def evaluations(trainer: GEMTrainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "eval_preference_sum" in entry]


def folder(trainer: GEMTrainer) -> Path:
    assert trainer.args.output_dir is not None
    return Path(trainer.args.output_dir)


def checkpoints(trainer: GEMTrainer) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder(trainer).glob("checkpoint-*"))


def same_weights(trainer: GEMTrainer, checkpoint: Path) -> bool:
    saved = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    ours: Any = trainer.model
    return all(torch.equal(value, saved[name]) for name, value in ours.state_dict().items())


def names_of_callbacks(trainer: GEMTrainer) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callback_handler.callbacks]


def checkpointing(trainer: GEMTrainer) -> Any:
    """Return the function with which a layer of the model checkpoints; None if it does not."""
    found = [m for m in trainer.model.modules() if getattr(m, "gradient_checkpointing", False)]  # type: ignore[union-attr]
    return found[0]._gradient_checkpointing_func if found else None


def loader(trainer: GEMTrainer) -> Any:
    return trainer.callback_handler.train_dataloader


def restores_callbacks(trainer: GEMTrainer) -> bool:
    trainer.state.stateful_callbacks = {"TrainerControl": {"args": {"should_training_stop": True}, "attributes": {}}}
    trainer.control.should_training_stop = False
    trainer._load_callback_state()
    return trainer.control.should_training_stop


Cache = Callable[..., GEMTrainer]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Call trained() once for each of its settings."""
    known: dict[str, GEMTrainer] = {}

    def get(**settings: Any) -> GEMTrainer:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = trained(tmp_path_factory.mktemp("run"), **settings)
        return known[key]

    return get


@pytest.mark.parametrize("name", CHANGES_THE_LOSSES)
def test_a_flag_changes_the_losses(name: str, cached: Cache) -> None:
    changes, rest = CHANGES_THE_LOSSES[name]
    assert losses(cached(**{**rest, **changes})) != losses(cached(**rest))


def test_nothing_changes_the_losses(cached: Cache, tmp_path: Path) -> None:
    assert losses(cached()) == losses(trained(tmp_path))
    assert [step for step, _ in losses(cached())] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", SHOWS)
def test_a_flag_shows(name: str, cached: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, look = SHOWS[name]
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    try:
        assert look(trained(tmp_path, **changes))
    finally:
        torch.use_deterministic_algorithms(False)
    if name in changes:  # the property is due to this flag
        without = cached(**{other: value for other, value in changes.items() if other != name})
        with contextlib.suppress(AttributeError, OSError):  # the property does not exist
            assert not look(without)


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"loss": "pro"}, "sega"),
        ({"length_norm": "tokens"}, "sega"),
        ({"taper": False}, "sega"),
        ({"kl_weight": 0.5}, "sega"),
        ({"sft_weight": 0.5}, "ipo"),
        ({"beta": 0.5}, "listwise_dpo"),
    ],
    ids=str,
)
def test_a_setting_of_the_loss_changes_the_losses(
    changes: dict[str, Any], loss: str, cached: Cache, tmp_path: Path
) -> None:
    assert losses(trained(tmp_path, LossArguments(**{"loss": loss, **changes}))) != losses(cached(loss=loss))


@pytest.mark.parametrize("changes", [{"torch_compile": True}, {"torch_compile_backend": "eager"}], ids=str)
def test_the_model_is_compiled(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=1, train=False, **changes)
    backend = changes.get("torch_compile_backend", "inductor")
    assert trainer.accelerator.state.dynamo_plugin.backend == backend.upper()
    assert type(trainer.accelerator.prepare_model(trainer.model)).__name__ == "OptimizedModule"


def test_a_batch_that_does_not_fit_gets_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, own = [], GEMTrainer.compute_loss
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # it takes a second and has no other effect here

    def compute_loss(self: GEMTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["groups"]))
        if sizes[-1] > 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GEMTrainer, "compute_loss", compute_loss)
    trained(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    assert sizes[0] == 8 and sizes[1:] == [7, 1]


def test_an_infinite_loss_stops_whatever_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = GEMTrainer.compute_loss
    monkeypatch.setattr(GEMTrainer, "compute_loss", lambda self, *a, **k: own(self, *a, **k) * float("inf"))
    for filtered in (True, False):
        with pytest.raises(Diverged, match="step 1: "):
            trained(tmp_path, logging_nan_inf_filter=filtered, max_steps=1)


def test_memory_is_emptied_and_messages_are_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda *_, **__: emptied.append(1))
    before = transformers.logging.get_verbosity()
    trained(tmp_path, torch_empty_cache_steps=2, log_level="error")
    assert len(emptied) == 2
    assert transformers.logging.get_verbosity() == logging.ERROR != before
    transformers.logging.set_verbosity(before)


def test_overflow_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(transformers.trainer, "DebugUnderflowOverflow", lambda model: found.append(model))
    trainer = trained(tmp_path, debug="underflow_overflow")
    assert found == [trainer.model]


def test_data_is_skipped_on_resume(tmp_path: Path) -> None:
    whole = losses(trained(tmp_path, **SAVING))
    checkpoint = str(tmp_path / "checkpoint-2")
    assert dict(losses(trained(tmp_path, resume=checkpoint))) == pytest.approx(dict(whole))
    assert losses(trained(tmp_path, resume=checkpoint, ignore_data_skip=True))[2:] != whole[2:]


def test_a_tracker_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            got.append((args.run_name, logs))

    module = transformers.integrations.integration_utils
    monkeypatch.setitem(module.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    trained(tmp_path, report_to="wandb", run_name="mine", max_steps=1)
    assert got[0][0] == "mine" and "kl" in got[0][1]
