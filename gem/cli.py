"""gem-kernels sft | score | train | eval | report | doctor | demo: one command a phase, files between them.

Settings come from dataclasses (gem.config, transformers.TrainingArguments): preset < --config file.yaml < flags.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gem.config import (
    PRESETS,
    TRAINING_DEFAULTS,
    DataArguments,
    EvalArguments,
    GroupsArguments,
    GuardArguments,
    LossArguments,
    ModelArguments,
    OutputArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
    check,
)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"

SUMMARIES = {
    "sft": "supervised warm start on prompt + chosen (or completion)",
    "score": "candidates, Eq. 1, ranking, Eq. 2's weights -> a groups file",
    "train": "Eq. 2 on a groups file (--groups), or online from preference records (--data)",
    "eval": "preference accuracies, AUROC of the score, task accuracy",
    "report": "tables, curves and one html page from finished runs",
    "doctor": "what the fused lm_head does with a model: shape, transform, adapter, memory; checks it against the logits",
    "demo": "the whole of GEM on a small model from scratch, beside DPO, SFT and the literal recipe",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for chatty in ("httpx", "datasets", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    commands = {
        "sft": _sft, "score": _score, "train": _train, "eval": _eval, "report": _report, "doctor": _doctor, "demo": _demo
    }  # fmt: skip
    if not argv or argv[0] not in commands:
        if argv and argv[0] not in ("-h", "--help"):
            print(f"gem-kernels: the command must be one of {', '.join(commands)}, got {argv[0]!r}", file=sys.stderr)
            return 2
        print("usage: gem-kernels COMMAND [--config file.yaml] [--preset default|paper] [flags]\n")
        print("\n".join(f"  {name:8}{summary}" for name, summary in SUMMARIES.items()))
        print("\n`gem-kernels COMMAND --help` explains every flag.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        commands[argv[0]](argv[1:])
    except ValueError as error:
        print(f"gem-kernels {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # `pip install gem-kernels` alone brings torch and no more
        print(f"gem-kernels {argv[0]}: needs pip install 'gem-kernels[train]' ({error})", file=sys.stderr)
        return 2
    return 0


def _raise(message: str) -> NoReturn:
    """In place of ArgumentParser.error, which prints all flags of the usage before the one line that matters."""
    raise ValueError(message)


def parse(command: str, argv: Sequence[str], *classes: Any) -> tuple[list[Any], dict[str, Any]]:
    """(dataclass instances, the settings they were made of), from preset, yaml file and flags.

    Raises:
        ValueError: an unknown preset or flag, a missing or malformed file, a key that no class has, a value of another
            type or out of range.
    """
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(
        classes,
        prog=f"gem-kernels {command}",
        description=SUMMARIES[command],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # `first` below must see the same flags
    )
    parser.error = _raise  # type: ignore[method-assign]
    parser.add_argument("--config", help="yaml file with any of these settings")
    parser.add_argument("--preset", default="default", help="default | paper (Eq. 1 and 2 as printed, no guard rails)")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = _raise  # type: ignore[method-assign]
    first.add_argument("--config")
    first.add_argument("--preset")
    early, _ = first.parse_known_args(argv)

    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    known = set(actions)
    from_file = _read_yaml(early.config) if early.config else {}
    unknown = sorted(map(str, set(from_file) - known))
    if unknown:
        raise ValueError(
            f"config must hold settings of `gem-kernels {command}`, got {', '.join(unknown)} in {early.config}"
        )
    from_file = {name: _as_flag(actions[name], value) for name, value in from_file.items()}
    preset = early.preset or from_file.pop("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    base = TRAINING_DEFAULTS if TrainingArguments in classes else {}
    defaults = {**base, **PRESETS[preset], **from_file}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    settings = vars(parser.parse_args(list(argv)))
    settings = {name: value for name, value in settings.items() if name not in ("config", "preset")}
    instances = list(parser.parse_dict(settings, allow_extra_keys=True))
    for instance in instances:
        if not isinstance(instance, TrainingArguments):
            check(instance)
    return instances, settings


def _as_flag(action: argparse.Action, value: Any) -> Any:
    """A value from yaml as the flag would give it: argparse checks and converts text, and nothing else.

    Raises:
        ValueError: a list where one value is expected, one value where a list is, or nothing where there is a default.
    """
    if value is None and action.default is not None:
        raise ValueError(f"argument {action.dest}: expected a value, got nothing")
    many = action.nargs in ("+", "*")
    if value is None or isinstance(value, dict) or (many and isinstance(value, list)):
        return value
    if many or isinstance(value, list):
        raise ValueError(f"argument {action.dest}: expected {'a list' if many else 'one value'}, got {value!r}")
    return str(value)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"config must be an existing yaml file, got {path!r}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config must be yaml, got {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config must be a mapping of settings, got {type(content).__name__} in {path}")
    return content


def prepare_output(folder: Path, command: str, settings: dict[str, Any]) -> str | None:
    """Claim an output folder. Returns the checkpoint to resume from, None to start from the beginning.

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
    """
    from gem.files import write_lines

    mine = {"command": command, **{k: v for k, v in settings.items() if k != "output_dir"}}
    mine = json.loads(json.dumps(mine, default=str))
    run_file = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got {folder}, which is a file")
    theirs = json.loads(run_file.read_text(encoding="utf-8")).get("settings") if run_file.is_file() else None
    if theirs is not None:
        changed = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
        if changed:
            shown = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} now" for k in sorted(changed)[:5])
            raise ValueError(f"output_dir must be new or hold a run of the same settings, got {folder} with {shown}")
        return newest_checkpoint(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir must be empty or hold a run of this command, got {folder}, which is not empty")
    run = {"name": folder.name, "seed": settings.get("seed", 0), "settings": mine}
    write_lines(run_file, [json.dumps(run, indent=1)])
    return None


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to resume from: whole (Trainer writes trainer_state.json last, a kill may come before it),
    and not of the last step, from which Trainer would take one step more; the one before it ends the same."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if "max_steps" not in state or state["global_step"] < state["max_steps"]:
            return str(checkpoint)
    return None


def _examples(data: DataArguments, tokenizer: Any, need: Sequence[str], source: str = "") -> list[Any]:
    from gem.data import encode_records, load_records

    if not (source or data.data):
        raise ValueError("data must be a jsonl file, a saved datasets folder or a hub dataset, got nothing")
    records = load_records(source or data.data, need=need, limit=data.limit)
    return encode_records(records, tokenizer, prompt_template=data.prompt_template, max_length=data.max_length)


def _run_training(trainer: Any, evaluation: Any, resume: str | None) -> None:
    """Train, save the model, the trainer's state and the final metrics."""
    from gem.files import write_lines

    folder = Path(trainer.args.output_dir)
    if (folder / METRICS_FILE).is_file():  # the last file to be written
        print(f"{folder} holds this run, finished:\n{(folder / METRICS_FILE).read_text(encoding='utf-8').rstrip()}")
        return
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    metrics = {"train_steps": float(trainer.state.global_step)}
    if evaluation is not None:
        metrics |= {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    if not trainer.is_world_process_zero():
        return
    if evaluation is not None:
        write_lines(folder / "completions.jsonl", [json.dumps(c, ensure_ascii=False) for c in evaluation.completions])
        trainer.save_state()
    write_lines(folder / METRICS_FILE, [json.dumps(metrics, indent=1)])
    print(json.dumps(metrics, indent=1))


def _sft(argv: Sequence[str]) -> None:
    from transformers import TrainingArguments, set_seed

    (model_args, data, loss, guard, training), settings = parse(
        "sft", argv, ModelArguments, DataArguments, LossArguments, GuardArguments, TrainingArguments
    )
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import pair_group
    from gem.trainer import GEMTrainer

    loss.loss = "sft"
    tokenizer = load_tokenizer(model_args)
    examples = _examples(data, tokenizer, ("chosen",))
    with training.main_process_first(local=False):
        resume = prepare_output(Path(training.output_dir), "sft", settings)
    set_seed(training.seed)
    model = load_model(model_args, tokenizer, training.device)
    groups = [pair_group(example) for example in examples]
    for group in groups:
        group.members = group.members[:1]  # the chosen one
    trainer = GEMTrainer(model, training, loss=loss, guard=guard, train_dataset=groups, processing_class=tokenizer)
    _run_training(trainer, None, resume)


def _score(argv: Sequence[str]) -> None:
    from transformers import set_seed

    (model_args, data, rollout, score, rank, guard, output), _ = parse(
        "score", argv, ModelArguments, DataArguments, RolloutArguments, ScoreArguments, RankArguments, GuardArguments,
        OutputArguments,
    )  # fmt: skip
    from tqdm.auto import tqdm

    from gem.evaluate import pair_auroc
    from gem.groups import save_groups
    from gem.models import load_model, load_tokenizer, pick_device
    from gem.pipeline import GroupMaker
    from gem.trainer import gate_message

    path, device = Path(output.output or "groups.jsonl"), pick_device(output.device)
    if path.exists():
        raise ValueError(f"output must be a new file, got {path}, which exists")
    tokenizer = load_tokenizer(model_args)
    examples = _examples(data, tokenizer, ("chosen", "rejected") if rank.human_weight else ())
    set_seed(output.seed)
    maker = GroupMaker(load_model(model_args, tokenizer, device), tokenizer, rollout, score, rank)
    step = max(1, rollout.rollout_batch_size // max(1, rollout.group_size))
    groups = []
    for start in tqdm(range(0, len(examples), step), desc="groups"):
        groups += maker(examples[start : start + step])
    save_groups(path, groups)
    share = pair_auroc(groups)
    kept = sum(group.kept for group in groups)
    print(f"{len(groups)} groups, {kept} kept, in {path}; S orders {share:.2f} of the human pairs rightly")
    if share < guard.auroc_gate:
        logging.warning("AUROC gate: %s", gate_message(share, guard))


def _train(argv: Sequence[str]) -> None:
    from transformers import TrainingArguments, set_seed

    (model_args, data, groups_args, loss, guard, rollout, score, rank, eval_args, training), settings = parse(
        "train", argv, ModelArguments, DataArguments, GroupsArguments, LossArguments, GuardArguments, RolloutArguments,
        ScoreArguments, RankArguments, EvalArguments, TrainingArguments,
    )  # fmt: skip
    from gem.evaluate import Evaluation, pair_auroc
    from gem.groups import load_groups
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import GroupMaker
    from gem.trainer import GEMTrainer, gate_message

    if bool(groups_args.groups) == bool(data.data):
        raise ValueError(
            f"expected either groups (a file) or data (online), got groups={groups_args.groups!r}, data={data.data!r}"
        )
    tokenizer = load_tokenizer(model_args)
    held_out = _examples(data, tokenizer, ("chosen",), eval_args.eval_data) if eval_args.eval_data else []
    items: list[Any] = load_groups(Path(groups_args.groups)) if groups_args.groups else []
    if not items:
        items = _examples(data, tokenizer, ("chosen", "rejected") if rank.human_weight else ())
    elif (share := pair_auroc(items)) < guard.auroc_gate:
        logging.warning("AUROC gate: %s", gate_message(share, guard))
    with training.main_process_first(local=False):
        resume = prepare_output(Path(training.output_dir), "train", settings)
    set_seed(training.seed)
    model = load_model(model_args, tokenizer, training.device)
    make_groups = None
    if data.data:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        make_groups = GroupMaker(model, tokenizer, rollout, score, rank, reference)
    evaluation = Evaluation(model, tokenizer, held_out, rollout, score, eval_args) if held_out else None
    trainer = GEMTrainer(
        model,
        training,
        loss=loss,
        guard=guard,
        train_dataset=items,
        processing_class=tokenizer,
        make_groups=make_groups,
        evaluation=evaluation,
    )
    _run_training(trainer, evaluation, resume)


def _eval(argv: Sequence[str]) -> None:
    (model_args, data, rollout, score, eval_args, output), _ = parse(
        "eval", argv, ModelArguments, DataArguments, RolloutArguments, ScoreArguments, EvalArguments, OutputArguments
    )
    import torch

    from gem.evaluate import Evaluation
    from gem.files import write_lines
    from gem.models import load_model, load_tokenizer, pick_device

    device, tokenizer = pick_device(output.device), load_tokenizer(model_args)
    examples = _examples(data, tokenizer, ("chosen",), eval_args.eval_data or "")
    torch.manual_seed(output.seed)
    model = load_model(model_args, tokenizer, device)
    evaluation = Evaluation(model, tokenizer, examples, rollout, score, eval_args)
    metrics = evaluation(model)
    metrics.pop("preference_reference", None)  # the model is its own reference here: it would say nothing
    print(json.dumps(metrics, indent=1))
    if output.output:
        write_lines(Path(output.output), [json.dumps(metrics, indent=1)])


def _report(argv: Sequence[str]) -> None:
    from gem.report import plain, results_table, write_report
    from gem.runs import load_run

    parser = argparse.ArgumentParser(prog="gem-kernels report", description=SUMMARIES["report"])
    parser.error = _raise  # type: ignore[method-assign]
    parser.add_argument(
        "runs", nargs="+", help="output folders of sft or train; folders of one name are seeds of a method"
    )
    parser.add_argument("--output", default="report.html", help="the html page")
    parser.add_argument("--title", default="GEM runs", help="its title")
    arguments = parser.parse_args(list(argv))
    runs = [load_run(Path(folder)) for folder in arguments.runs]
    print(plain(results_table(runs)))
    write_report(Path(arguments.output), runs, title=arguments.title)
    print(f"\n{arguments.output}")


def _doctor(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="gem-kernels doctor", description=SUMMARIES["doctor"])
    parser.error = _raise  # type: ignore[method-assign]
    parser.add_argument("model", help="folder, hub name, GGUF file; of adapters too; or a config .json")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a training step")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--device", help="where it runs: cpu, cuda, cuda:1, ...; default: CUDA when there is one")
    arguments = parser.parse_args(list(argv))
    from gem.doctor import diagnose, load

    model = load(arguments.model, arguments.device)
    print("\n".join(diagnose(model, batch_size=arguments.batch_size, seq_len=arguments.seq_len).lines()))


def _demo(argv: Sequence[str]) -> None:
    from gem.demo import run_demo

    parser = argparse.ArgumentParser(prog="gem-kernels demo", description=SUMMARIES["demo"])
    parser.error = _raise  # type: ignore[method-assign]
    parser.add_argument("--output_dir", default="runs/demo", help="where report.html and the runs go")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions; the table then has intervals")
    arguments = parser.parse_args(list(argv))
    if arguments.seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {arguments.seeds}")
    run_demo(Path(arguments.output_dir), seeds=arguments.seeds)
