"""The settings of a command: preset < --config file.yaml < flags. A setting without effect is refused.

They are the fields of dataclasses (gem.config, transformers.TrainingArguments). A setting that the command or the chosen loss
does not use is refused, whether it came from a flag or the file: see UNUSED here and gem.training_flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NoReturn

from gem.config import (
    PRESETS,
    RANGES,
    TRAINING_DEFAULTS,
    DataArguments,
    EvalArguments,
    GuardArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
    check,
    check_url,
)
from gem.files import read_yaml
from gem.launch import on_no_device
from gem.training_flags import IGNORED, check_trackers, refuse_ignored, training_defaults

logger = logging.getLogger(__name__)

SUMMARIES = {
    "sft": "supervised warm start on prompt + chosen (or completion)",
    "score": "candidates, Eq. 1, ranking, Eq. 2's weights -> a groups file",
    "merge": "the groups files of the shards of a score -> the file of one run",
    "train": "Eq. 2 on a groups file (--groups), or online from preference records (--data)",
    "eval": "preference accuracies, AUROC of the score, task accuracy",
    "report": "tables, curves and one html page from finished runs",
    "doctor": "how the fused lm_head handles a model: shape, transform, adapter, memory; checked against its logits",
    "demo": "the whole of GEM on a small model from scratch, beside DPO, SFT and the literal recipe",
    "evidence": "methods, tasks, numbers of human pairs and seeds: all runs, a record each, and a page from them",
}
RESUME_HELP = "checkpoint to resume from: a folder; true, and the default: the newest of output_dir; false: start over"
DEBUG_HELP = "show the traceback of an error, not only its one line"


def _names(*classes: Any, but: str = "") -> str:
    return " ".join(f.name for cls in classes for f in fields(cls) if f.name not in but.split())


ALWAYS = None
SERVER = "server server_model server_timeout"
SAMPLING = f"max_new_tokens temperature top_p stop {SERVER}"
SAMPLED_SCORE = "temperature top_p top_m branch_weight final_weight entropy_clip"
OWN_REFERENCE = "the model is its own reference here"
NO_LORA = "new adapters change nothing before they are trained"

# Settings that a command does not use: commands, names, condition (ALWAYS: hidden in --help), reason.
Rule = tuple[str, str, Callable[[Any], bool] | None, str]
UNUSED: tuple[Rule, ...] = (
    ("sft", "loss length_norm beta kl_weight taper sft_weight", ALWAYS, "sft has one loss, -log pi(chosen)"),
    ("sft", _names(GuardArguments, but="stop_growth stop_idle"), ALWAYS, "sft evaluates nothing"),
    ("sft", "eval_strategy eval_on_start", ALWAYS, "sft evaluates nothing; `gem-kernels eval` does"),
    ("score", _names(GuardArguments, but="auroc_gate"), ALWAYS, "score trains nothing"),
    ("score eval", "score_with ema_decay", ALWAYS, OWN_REFERENCE),
    ("score eval", "lora_rank", ALWAYS, NO_LORA),
    (
        "train",
        SERVER,
        ALWAYS,
        "the server's weights do not follow the training: `gem-kernels score --server`, then train on its groups",
    ),
    ("score eval", "server_model server_timeout", lambda s: not s.server, "there is no server"),
    ("eval", "shard", ALWAYS, "eval writes no groups"),
    ("eval", "group_size", ALWAYS, "eval_samples says how many completions are sampled"),
    ("eval", "data", lambda s: s.eval_data, "eval_data is what is evaluated"),
    ("eval", SAMPLED_SCORE, lambda s: not s.eval_samples, "eval_samples=0 samples and scores nothing"),
    ("score", "unlabeled_share", ALWAYS, "score makes each group once; `gem-kernels train` mixes them"),
    ("score train", "unlabeled_split", lambda s: not s.unlabeled, "there are no unlabeled prompts"),
    ("train", "unlabeled", lambda s: s.groups, "the groups of `gem-kernels score --unlabeled` are in the groups file"),
    ("train", "unlabeled_share", lambda s: not s.unlabeled and not s.groups, "there are no unlabeled prompts"),
    (
        "train",
        "unlabeled unlabeled_share",
        lambda s: s.loss != "sega",
        "only sega learns from groups without a human pair",
    ),
    ("score", SAMPLING, lambda s: not s.group_size, "group_size=0 samples nothing"),
    ("score train eval", "cot_pairs", lambda s: not s.cot_prompt, "there is no cot_prompt"),
    ("score", "cot_prompt", lambda s: not s.group_size and not s.cot_pairs, "group_size=0 samples nothing"),
    ("score train", "min_spread", lambda s: not s.filter_groups, "filter_groups is off"),
    ("train", "length_norm beta kl_weight taper sft_weight", lambda s: s.loss == "sft", "loss=sft is -log pi(chosen)"),
    ("train", "beta", lambda s: s.loss in ("sega", "pro"), "it is for dpo, ipo and listwise_dpo"),
    ("train", "kl_weight", lambda s: s.loss in ("dpo", "ipo", "pro"), "it is for sega and listwise_dpo"),
    ("train", "taper length_norm", lambda s: s.loss != "sega", "it is for sega"),
    (
        "train",
        _names(RankArguments),
        lambda s: s.groups,
        "the weights are in the groups file: rank with `gem-kernels score`",
    ),
    (
        "train",
        _names(RankArguments),
        lambda s: s.loss not in ("sega", "pro"),
        "weights are for sega, and for pro as an order",
    ),
    ("train", "group_size", lambda s: s.groups, "the candidates are in the groups file"),
    ("train", "score_with", lambda s: s.groups, "the scores are in the groups file"),
    ("train", "ema_decay", lambda s: s.score_with != "ema", "it is for score_with=ema"),
    (
        "train",
        _names(DataArguments, but="data"),
        lambda s: s.groups and not s.eval_data,
        "the groups file is read as it is, and there is no eval_data",
    ),
    (
        "train",
        _names(RolloutArguments, ScoreArguments),
        lambda s: s.groups and not s.eval_data,
        "candidates and scores are in the groups file, and there is no eval_data",
    ),
    (
        "train",
        SAMPLED_SCORE,
        lambda s: s.groups and not s.eval_samples,
        "candidates and scores are in the groups file, and eval_samples=0 samples nothing",
    ),
    ("train", SAMPLING, lambda s: not s.group_size and not s.eval_data, "group_size=0 samples nothing"),
    (
        "train",
        _names(EvalArguments, but="eval_data") + " eval_strategy eval_on_start",
        lambda s: not s.eval_data,
        "there is no eval_data",
    ),
    (
        "train",
        "stop_patience stop_margin",
        lambda s: str(s.eval_strategy) == "no" or not s.eval_samples,
        "the guard watches sampled answers while training: it needs eval_strategy and eval_samples",
    ),
    ("train", "stop_margin", lambda s: not s.stop_patience, "stop_patience=0 never stops"),
    (
        "sft train",
        "stop_growth stop_idle",
        lambda s: str(s.logging_strategy) == "no",
        "the guard reads the log, and logging_strategy is no",
    ),
    ("sft train", "world_size", lambda s: s.dry_run is None, "it is for a dry run; a launcher starts the processes"),
    (
        "train",
        "auroc_gate",
        lambda s: not s.groups and not s.eval_on_start,
        "online, the gate looks at the evaluation before the first step: it needs eval_on_start",
    ),
)


def raise_error(message: str) -> NoReturn:
    """Replace ArgumentParser.error, which prints all flags of the usage before the one line that matters."""
    raise ValueError(message)


def parse(command: str, argv: Sequence[str], *classes: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return (dataclass instances, the settings they were built from), from preset, yaml file and flags.

    resume_from_checkpoint is only in the settings: it is an argument of train(), not of the dataclasses.

    Raises:
        ValueError: an unknown preset or flag, a missing or malformed file, an unknown key, a value of the wrong type or out
            of range, or a setting that the command would ignore.
    """
    from transformers import TrainingArguments

    parser, first = _parser(command, classes), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = raise_error  # type: ignore[method-assign]
    first.add_argument("--config")
    first.add_argument("--preset")
    early, _ = first.parse_known_args(argv)
    actions = {a.dest: a for a in parser._actions if not isinstance(a, OUTSIDE) and a.dest != "config"}
    from_file = _read_file(early.config, command, actions) if early.config else {}
    preset = early.preset or from_file.pop("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    base = {**(TRAINING_DEFAULTS if TrainingArguments in classes else {}), **PRESETS[preset]}
    parser.set_defaults(**{name: value for name, value in base.items() if name in actions})
    unset = {name: parser.get_default(name) for name in actions if name != "preset"}
    parser.set_defaults(**from_file)
    parsed = vars(parser.parse_args(list(argv)))
    settings = {name: parsed[name] for name in unset}
    _check_values(settings)

    if preset != "default" and not PRESETS[preset].keys() & (unset.keys() - never_used(command)):
        logger.warning("preset=%s changes nothing of `gem-kernels %s`", preset, command)
    _refuse_unused(command, settings, unset)
    built = {name: value for name, value in settings.items() if name != "resume_from_checkpoint"}
    loss, evaluates = "sft" if command == "sft" else settings.get("loss", ""), bool(settings.get("eval_data"))
    if TrainingArguments in classes:
        _check_training(built, unset)
        refuse_ignored(SimpleNamespace(**built), loss, evaluates=evaluates, defaults=unset)
    plans = settings.get("dry_run") is not None
    with on_no_device() if plans else nullcontext():
        instances = list(parser.parse_dict(built, allow_extra_keys=True))
    for instance in instances:
        if isinstance(instance, TrainingArguments):
            if plans:
                continue
            # Some conditions are known only now, such as the device.
            refuse_ignored(instance, loss, evaluates=evaluates)
        else:
            check(instance)
    return instances, settings


OUTSIDE = (argparse._HelpAction, argparse._StoreTrueAction)  # --help, and our --debug, which main() handles


def _parser(command: str, classes: Sequence[Any]) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(
        classes,
        prog=f"gem-kernels {command}",
        description=SUMMARIES[command],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # the first pass for --config and --preset must parse the same flags
    )
    parser.error = raise_error  # type: ignore[method-assign]
    parser.add_argument("--config", help="yaml file with any of these settings")
    parser.add_argument("--preset", default="default", help="default | paper (Eq. 1 and 2 as printed, no guard rails)")
    hidden = never_used(command)
    if TrainingArguments in classes:
        hidden |= IGNORED.keys() - {"resume_from_checkpoint"}
    else:
        parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
            if isinstance(getattr(action.type, "__origin__", action.type), type) and action.type not in (
                str,
                int,
                float,
            ):
                action.type = (
                    str  # for example dict, which argparse cannot convert text to: we refuse the flag ourselves
                )
        elif action.dest == "debug" and TrainingArguments in classes:
            action.help = f"{DEBUG_HELP}; with a value: {action.help}"
        elif action.dest == "resume_from_checkpoint":
            action.help = RESUME_HELP
    return parser


def never_used(command: str) -> set[str]:
    """Return the settings that a command never uses."""
    rules = [names for commands, names, when, _ in UNUSED if when is ALWAYS and command in commands.split()]
    return {name for names in rules for name in names.split()}


def _refuse_unused(command: str, settings: Mapping[str, Any], unset: Mapping[str, Any]) -> None:
    changed = {name for name, value in settings.items() if value != unset[name]}
    if command == "sft" and settings.get("loss") == "sft":
        changed.discard("loss")  # sft trains this loss anyway
    for commands, names, when, why in UNUSED:
        if command not in commands.split() or not changed & set(names.split()):
            continue
        if when is ALWAYS or when(SimpleNamespace(**settings)):
            name = next(name for name in names.split() if name in changed)
            raise ValueError(
                f"{name} would do nothing in `gem-kernels {command}` and must be left at {unset[name]!r}, "
                f"got {settings[name]!r}: {why}"
            )


def _check_values(settings: Mapping[str, Any]) -> None:
    """Refuse values that no setting has, and that later errors would not name."""
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value) and not (math.isnan(value) and name in RANGES):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name} must not hold a NUL character, got {value!r}")
        if name == "server" and value is not None:
            check_url(name, value)  # before a message repeats it


def _check_training(settings: Mapping[str, Any], unset: Mapping[str, Any]) -> None:
    """Refuse training settings that transformers would reject late, without a name, or not at all."""
    check_trackers(settings["report_to"])
    for name in training_defaults().keys() & settings.keys():
        value = settings[name]
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from None
    steps, epochs = settings["max_steps"], settings["num_train_epochs"]
    if steps > 0 and epochs != unset["num_train_epochs"]:
        logger.warning("max_steps=%d counts, num_train_epochs=%g does not: leave one of them out", steps, epochs)


def _read_file(path: str, command: str, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """Return name -> value for a yaml file, with each value as its flag would give it."""
    content, node = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"config must be a mapping of settings, got {type(content).__name__} in {path}")
    keys = [key.value for key, _ in node.value]
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
        raise ValueError(f"config must hold each setting once, got {', '.join(twice)} several times in {path}")
    unknown = sorted(map(str, set(content) - actions.keys()))
    if unknown:
        raise ValueError(f"config must hold settings of `gem-kernels {command}`, got {', '.join(unknown)} in {path}")
    return {name: _as_flag(actions[name], value) for name, value in content.items()}


def _as_flag(action: argparse.Action, value: Any) -> Any:
    """Return a value from yaml as its flag would give it: argparse checks and converts only text.

    true gives a flag without a value, if the flag allows that (nargs="?"); false gives no flag.

    Raises:
        ValueError: a list for a single value, a single value for a list, or nothing for a setting with a default.
    """
    if value is None and action.default is not None:
        raise ValueError(f"argument {action.dest}: expected a value, got nothing")
    if action.nargs == "?" and isinstance(value, bool) and not isinstance(action.const, bool):
        return action.const if value else action.default
    many = action.nargs in ("+", "*")
    if isinstance(value, dict) and (action.type in (int, float) or action.dest not in training_defaults()):
        raise ValueError(f"argument {action.dest}: expected {'a list' if many else 'one value'}, got {value!r}")
    if value is None or isinstance(value, dict) or (many and isinstance(value, list)):
        return value
    if many or isinstance(value, list):
        raise ValueError(f"argument {action.dest}: expected {'a list' if many else 'one value'}, got {value!r}")
    return str(value)
