"""The TrainingArguments that have no effect with GEMTrainer. Each is refused by name, as a silently ignored setting is a trap.

Trainer reads some settings in parts that GEMTrainer replaces (evaluation, collation, the loss), and others only together with a
third one. Settings that no table here names have their usual effect.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from gem.launch import asked_form

EVALUATION = "evaluation is gem's own; eval_limit, eval_samples, rollout_batch_size and score_tokens steer it"
DISTRIBUTED = (
    "several processes train by DistributedDataParallel (torchrun --nproc_per_node N -m gem ...), or by FSDP2 "
    "(accelerate launch --config_file fsdp2.yaml -m gem ...)"
)
NO_AVERAGE = "score_with must be policy or reference under FSDP2, got ema: the average is not sharded"
COMMAND = "what is done is the command's business"

# Settings that never have an effect: name -> reason, and what to use instead.
IGNORED: dict[str, str] = {
    "per_device_eval_batch_size": EVALUATION,
    "prediction_loss_only": EVALUATION,
    "eval_do_concat_batches": EVALUATION,
    "eval_use_gather_object": EVALUATION,
    "eval_accumulation_steps": EVALUATION,
    "include_for_metrics": EVALUATION,
    "batch_eval_metrics": EVALUATION,
    "bf16_full_eval": "evaluation keeps the dtype of the weights; dtype=bfloat16 loads them so, to evaluate or for lora_rank",
    "fp16_full_eval": "evaluation keeps the dtype of the weights; dtype=float16 loads them so, to evaluate or for lora_rank",
    "label_names": "labels are made of groups and have no names",
    "length_column_name": "groups have no columns",
    "average_tokens_across_devices": "the loss is a mean over the groups (tokens, for sft) of all processes",
    "use_liger_kernel": "it replaces the forward that computes the loss without logits; nothing is lost without it",
    "liger_kernel_config": "liger kernels are not used",
    "fsdp": DISTRIBUTED,
    "fsdp_config": DISTRIBUTED,
    "deepspeed": DISTRIBUTED,
    "parallelism_config": DISTRIBUTED,
    "enable_jit_checkpoint": "SIGTERM and SIGINT always finish the step and save a checkpoint",
    "do_train": COMMAND,
    "do_predict": COMMAND,
    "resume_from_checkpoint": "give it to GEMTrainer.train(resume_from_checkpoint=...)",
}

NO_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "lomo", "adalomo")
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # the last two need an evaluation

# Settings with a condition: names, the condition for an effect, and the reason otherwise. Names that the installed transformers
# lacks are skipped.
ONLY_WITH: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("train_sampling_strategy", lambda a: a.train_sampling_strategy == "sequential", "groups have no one length"),
    ("remove_unused_columns", lambda a: not a.remove_unused_columns, "groups have no columns"),
    ("dataloader_pin_memory", lambda a: a.use_cpu, "batches are made of groups in the step itself: nothing to pin"),
    ("do_eval", lambda a: a.eval_strategy != "no", COMMAND),
    ("local_rank", lambda a: str(a.local_rank) == os.environ.get("LOCAL_RANK"), "torchrun sets LOCAL_RANK"),
    ("fp16", lambda a: getattr(getattr(a, "device", None), "type", "") != "cpu", "a CPU computes in bf16, not in fp16"),
    ("debug", lambda a: "tpu_metrics_debug" not in a.debug, "tpu_metrics_debug is for TPUs"),
    ("ddp_backend", lambda a: int(os.environ.get("WORLD_SIZE", "1")) > 1, "there is one process, without torchrun"),
    (
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        lambda a: getattr(a, "activation_checkpointing", False) or a.gradient_checkpointing,
        "gradient_checkpointing is off",
    ),
    (
        "dataloader_in_order dataloader_prefetch_factor dataloader_persistent_workers"
        " dataloader_multiprocessing_context",
        lambda a: a.dataloader_num_workers > 0,
        "dataloader_num_workers is 0",
    ),
    (
        "warmup_steps warmup_ratio",
        lambda a: a.lr_scheduler_type not in NO_WARMUP,
        "this lr_scheduler_type has no warmup",
    ),
    (
        "lr_scheduler_kwargs",
        lambda a: a.lr_scheduler_type not in ("constant", "constant_with_warmup"),
        "this lr_scheduler_type takes none",
    ),
    ("adam_beta1 adam_beta2 adam_epsilon", lambda a: a.optim not in NO_ADAM, "this optim is not of Adam's kind"),
    (
        "optim_args",
        lambda a: a.optim not in ("adamw_torch", "adamw_torch_fused", "adafactor"),
        "this optim takes none",
    ),
    ("optim_target_modules", lambda a: "galore" in a.optim or "apollo" in a.optim, "it is for galore_* and apollo_*"),
    ("eval_steps", lambda a: a.eval_strategy == "steps", "eval_strategy is not steps"),
    (
        "eval_delay metric_for_best_model load_best_model_at_end",
        lambda a: a.eval_strategy != "no",
        "eval_strategy is no",
    ),
    ("save_strategy", lambda a: a.save_strategy != "best" or a.eval_strategy != "no", "eval_strategy is no"),
    ("greater_is_better", lambda a: a.metric_for_best_model is not None, "there is no metric_for_best_model"),
    (
        "hub_model_id hub_token hub_strategy hub_always_push hub_revision",
        lambda a: a.push_to_hub,
        "push_to_hub is off",
    ),
    ("hub_private_repo", lambda a: a.push_to_hub or "trackio" in trackers(a.report_to), "push_to_hub is off"),
    ("logging_dir", lambda a: "tensorboard" in trackers(a.report_to), "report_to names no tensorboard"),
    ("run_name", lambda a: bool(trackers(a.report_to)), "report_to names no tracker"),
    (
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
        lambda a: "trackio" in trackers(a.report_to),
        "report_to names no trackio",
    ),
)

# Fields of accelerator_config: name -> (required value, reason).
ACCELERATOR: dict[str, tuple[Any, str]] = {
    "dispatch_batches": (None, "groups are no tensors, which alone can be sent to other processes"),
    "even_batches": (True, "the others would wait for ever for a process with fewer batches"),
    "non_blocking": (False, "batches are made of groups in the step itself"),
}

LEAST: dict[str, float] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


def refuse_ignored(args: Any, loss: str, *, evaluates: bool = True, defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse the settings of transformers that would have no effect with GEMTrainer.

    Args:
        args: TrainingArguments, or any object with the same names before they are built; missing names are skipped.
        loss: the loss that is trained (gem.config.LossArguments.loss).
        evaluates: True if there is evaluation data.
        defaults: values that count as not set, if they differ from transformers' defaults.

    Raises:
        ValueError: the first setting without effect, with its value and the reason; or one out of its range.
    """
    unset = {**training_defaults(), **(defaults or {})}
    present = {name: getattr(args, name) for name in unset if hasattr(args, name)}
    changed = {name: value for name, value in present.items() if value != unset[name] and (value or unset[name])}
    for name, why in IGNORED.items():
        if name in changed:
            raise _refusal(name, unset[name], changed[name], why)
    for names, acts, why in ONLY_WITH:
        for name in changed.keys() & set(names.split()):
            if not acts(args):
                raise _refusal(name, unset[name], changed[name], why)
    if "label_smoothing_factor" in changed and loss != "sft":
        raise _refusal(
            "label_smoothing_factor", 0.0, changed["label_smoothing_factor"], f"it is for loss=sft, loss is {loss}"
        )
    if "eval_on_start" in changed and not evaluates:
        raise _refusal("eval_on_start", False, True, "there is nothing to evaluate on")
    _check_best_metric(args, present)
    for name, (must, why) in ACCELERATOR.items():
        value = getattr(present.get("accelerator_config"), name, must)
        if value != must and (value or must):
            raise _refusal(f"accelerator_config.{name}", must, value, why)
    _check_ranges(present)


def check_sharded(args: Any, *, averages: bool) -> None:
    """Refuse what a training cannot do under FSDP2.

    Args:
        args: TrainingArguments.
        averages: True with score_with=ema.

    Raises:
        ValueError: names the setting, and what to use.
    """
    if averages:
        raise ValueError(NO_AVERAGE)
    if args.save_strategy == "no":
        return
    form = asked_form()
    if args.save_only_model and form == "SHARDED_STATE_DICT":
        raise ValueError(
            "save_only_model must be false with fsdp_state_dict_type SHARDED_STATE_DICT, got true: FULL_STATE_DICT allows it"
        )
    if args.save_only_model and args.load_best_model_at_end:
        raise ValueError("save_only_model must be false with load_best_model_at_end under FSDP2, got true")
    stateless = str(getattr(args.optim, "value", args.optim)) == "sgd" and "momentum" not in (args.optim_args or "")
    if stateless and form == "FULL_STATE_DICT":
        raise ValueError(
            "fsdp_state_dict_type must be SHARDED_STATE_DICT with optim=sgd, got FULL_STATE_DICT, from which torch loads no "
            "optimizer without a state"
        )


def _refusal(name: str, default: Any, value: Any, why: str) -> ValueError:
    plain = getattr(value, "value", value)  # an enum's value
    return ValueError(f"{name} would do nothing and must be left at {default!r}, got {plain!r}: {why}")


def _check_best_metric(args: Any, present: Mapping[str, Any]) -> None:
    """Refuse eval_loss as the best metric, transformers' default: GEMTrainer's evaluation computes no loss."""
    metric = present.get("metric_for_best_model")
    by_metric = (
        present.get("load_best_model_at_end")
        or present.get("save_strategy") == "best"
        or present.get("lr_scheduler_type") in NO_WARMUP[1:]
    )
    if metric in ("loss", "eval_loss") or (by_metric and metric is None):
        raise ValueError(
            "metric_for_best_model must be a metric of the evaluation, such as preference_sum or accuracy_greedy, got "
            f"{metric!r}: no loss is computed there"
        )


def _check_ranges(present: Mapping[str, Any]) -> None:
    for name, least in LEAST.items():
        if present.get(name, least) < least:
            raise ValueError(f"{name} must be >= {least:g}, got {present[name]!r}")
    if not present.get("num_train_epochs", 1) > 0:
        raise ValueError(f"num_train_epochs must be > 0, got {present['num_train_epochs']!r}")
    if (steps := present.get("max_steps", -1)) == 0 or steps < -1:
        raise ValueError(f"max_steps must be > 0, or -1 for num_train_epochs, got {steps}")


def training_defaults() -> dict[str, Any]:
    """Return name -> default for every field of the installed TrainingArguments."""
    from transformers import TrainingArguments

    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in fields(TrainingArguments)
        if f.init
    }


def trackers(report_to: Any) -> list[str]:
    """Return the names in report_to, which may be a flag's text or the list of TrainingArguments."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for name in names if name not in ("none", "all")]


# Packages whose name differs from the tracker's name in report_to.
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_trackers(report_to: Any) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
        ValueError: transformers does not know it, or its package is missing; the message names the package.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in trackers(report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to must be none, all or one of {known}, got {name!r}")
        here = (
            importlib.util.find_spec("flytekit") if name == "flyte" else name in get_available_reporting_integrations()
        )
        if not here:
            raise ValueError(f"report_to={name} needs pip install {PACKAGES.get(name, name)}, got no such package here")
