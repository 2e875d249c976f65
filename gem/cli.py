"""gem-kernels sft | score | merge | train | eval | report | doctor | demo: one command per phase, with files between them.

Settings come from dataclasses (gem.config, transformers.TrainingArguments): preset < --config file.yaml < flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from gem.config import (
    DataArguments,
    EvalArguments,
    GroupsArguments,
    GuardArguments,
    LossArguments,
    ModelArguments,
    OutputArguments,
    PlanArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
    UnlabeledArguments,
)
from gem.explain import explain
from gem.files import check_file, check_writable, write_lines
from gem.launch import check_engine, check_launched, fsdp_is_on
from gem.runs import RunFolder, train_to_end
from gem.settings import DEBUG_HELP, SUMMARIES, never_used, parse, raise_error
from gem.signals import die_by, terminating
from gem.stops import Diverged, Terminated
from gem.together import join, joining

__all__ = ["SUMMARIES", "main", "parse"]

# With one of these, --debug is TrainingArguments' own setting.
DEBUG_VALUES = ("underflow_overflow", "tpu_metrics_debug")
# Settings that leave groups as they are, and inputs, whose hashes the header holds.
NOT_IN_HEADER = {"output", "device", "shard", "auroc_gate", "model", "tokenizer", "data", "unlabeled"}
NOT_IN_HEADER |= {"server", "server_timeout", "server_model"}  # the header holds a server_model that is named


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 after an error, 3 if the numbers of the run are no good.

    An error is one line on stderr, which --debug precedes with the traceback. After a signal, a process that was started for
    the command (argv is None) ends by it, as shells and schedulers expect; else the status is 128 + its number.
    """
    started, (argv, debug) = argv is None, _without_debug(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for chatty in ("httpx", "datasets", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings of a broken answer are tracebacks
    commands = {
        "sft": _sft, "score": _score, "merge": _merge, "train": _train, "eval": _eval, "report": _report, "doctor": _doctor,
        "demo": _demo, "evidence": _evidence,
    }  # fmt: skip
    if not argv or argv[0] not in commands:
        if argv and argv[0] not in ("-h", "--help"):
            print(f"gem-kernels: the command must be one of {', '.join(commands)}, got {argv[0]!r}", file=sys.stderr)
            return 2
        print("usage: gem-kernels COMMAND [--config file.yaml] [--preset default|paper] [flags]\n")
        print("\n".join(f"  {name:10}{summary}" for name, summary in SUMMARIES.items()))
        print("\n`gem-kernels COMMAND --help` explains every flag; --debug anywhere shows the traceback of an error.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        with terminating(), joining(argv[0]):
            commands[argv[0]](argv[1:])
            sys.stdout.flush()  # a full disk or a closed pipe shows here
        return 0
    except (Exception, KeyboardInterrupt, Terminated) as error:
        _close_bars()
        if debug:
            traceback.print_exc()
        print(f"gem-kernels {argv[0]}: {explain(error, argv[0])}", file=sys.stderr)
        return _ended(error, started)


def _ended(error: BaseException, started: bool) -> int:
    """Return the exit status for an error; end a started process by the signal that it stands for."""
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written would be tried again at the end of the process, with lines of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signum = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "signum", 0)
    if signum and started:
        die_by(signum)
    return 128 + signum if signum else 3 if isinstance(error, Diverged) else 2


def _close_bars() -> None:
    """Close open progress bars: a bar redraws itself when it is collected, behind the line that must come last."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return (argv without our --debug, True if it was there)."""
    ours = [i for i, word in enumerate(argv) if word == "--debug" and not set(argv[i + 1 : i + 2]) & set(DEBUG_VALUES)]
    return [word for i, word in enumerate(argv) if i not in ours], bool(ours)


def _ends(model: ModelArguments, tokenizer: Any, stop: Sequence[str] = ()) -> Any:
    """Return the ends of the model's completions before its weights load; warn of a chat template without an end."""
    from gem.ends import warn_if_turns_do_not_end
    from gem.models import source_ends

    ends = source_ends(model, tokenizer, stop)
    warn_if_turns_do_not_end(tokenizer, ends)
    return ends


def _sft(argv: Sequence[str]) -> None:
    from transformers import TrainingArguments, set_seed

    from gem.distributed import loading_device

    check_engine()  # before TrainingArguments begin with it
    (model_args, data, loss, guard, training, planned), settings = parse(
        "sft", argv, ModelArguments, DataArguments, LossArguments, GuardArguments, TrainingArguments, PlanArguments
    )
    if planned.dry_run is not None:
        _dry_run("sft", settings, planned, model_args, data, replace(loss, loss="sft"), training)
        return
    check_launched(planned.accelerate_config, ["sft", *argv])
    from gem.data import read_examples
    from gem.fingerprint import source_hash
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import pair_group
    from gem.trainer import GEMTrainer
    from gem.training_flags import check_sharded

    loss.loss = "sft"
    if fsdp_is_on():
        check_sharded(training, averages=False)
    join()
    run = RunFolder(training, "sft", settings)
    if run.finished:
        return
    tokenizer = load_tokenizer(model_args)
    _check_tokenizer(run, model_args, tokenizer)
    ends = _ends(model_args, tokenizer)
    examples = read_examples(data, tokenizer, need=("chosen",), ends=ends)
    run.check_input("data", data.data, lambda: source_hash(data.data, examples))
    groups = [pair_group(example) for example in examples]
    set_seed(training.seed)
    model = load_model(model_args, tokenizer, loading_device(training.device))
    _check_model(run, model_args, model)
    with run.claimed():
        trainer = GEMTrainer(model, training, loss=loss, guard=guard, train_dataset=groups, processing_class=tokenizer)
        train_to_end(trainer, None, run.resume)


def _dry_run(*settings: Any) -> None:
    from gem.dry_run import Request, dry_run

    dry_run(Request(*settings))


def _check_tokenizer(run: RunFolder, arguments: ModelArguments, tokenizer: Any) -> None:
    from gem.fingerprint import tokenizer_hash

    run.check_input("tokenizer", arguments.tokenizer or arguments.model, lambda: tokenizer_hash(tokenizer))


def _check_model(run: RunFolder, arguments: ModelArguments, model: Any) -> None:
    """Check that a run began with this model. Of one from scratch the config is hashed: processors draw other bits."""
    from gem.fingerprint import data_hash, model_hash

    config = arguments.model if arguments.model.endswith(".json") else ""
    run.check_input("model", arguments.model, lambda: data_hash(config) if config else model_hash(model))


def _score(argv: Sequence[str]) -> None:
    from transformers import set_seed

    (model_args, data, unlabeled, rollout, score, rank, guard, output), settings = parse(
        "score", argv, ModelArguments, DataArguments, UnlabeledArguments, RolloutArguments, ScoreArguments, RankArguments,
        GuardArguments, OutputArguments,
    )  # fmt: skip
    from gem.data import read_examples
    from gem.distributed import awaits_shards, decided, launched, shard_frozen
    from gem.fingerprint import model_hash, source_hash, tokenizer_hash
    from gem.generators import check_room
    from gem.groups import NO_INPUT, parse_shard
    from gem.groups_writer import GroupsWriter, batches, check_same
    from gem.lock import locked
    from gem.mixing import read_unlabeled, report_shared
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import GroupMaker, sampling_prompts

    path, accelerator = Path(output.output or "groups.jsonl"), cast(Any, launched(output.device))
    join()
    device = _device(accelerator, output.device)
    check_file(path, "output")
    shard = "{}/{}".format(*parse_shard(output.shard))
    compared = {name: value for name, value in settings.items() if name not in NOT_IN_HEADER | never_used("score")}
    if rollout.server_model is not None:  # another one may be another model
        compared["server_model"] = rollout.server_model
    if fsdp_is_on() and accelerator.mixed_precision != "no":  # FSDP2 computes in it, whatever the dtype of the weights
        compared["mixed_precision"] = accelerator.mixed_precision
    header: dict[str, Any] = {"shard": shard, "settings": compared}
    check_same(path, header)
    tokenizer = load_tokenizer(model_args)
    header["tokenizer"] = {"name": model_args.tokenizer or model_args.model, "hash": tokenizer_hash(tokenizer)}
    check_same(path, header)
    ends = _ends(model_args, tokenizer, rollout.stop)
    pair = ("chosen", "rejected") if rank.human_weight else ()
    unpaired = read_unlabeled(data, unlabeled, tokenizer, rollout, ends)
    examples = read_examples(data, tokenizer, need=pair, rollout=rollout, ends=ends)
    header["data"] = {"name": data.data, "hash": source_hash(data.data, examples)}
    header["unlabeled"] = NO_INPUT
    if source := unlabeled.unlabeled:
        header["unlabeled"] = {"name": source, "hash": source_hash(source, unpaired)}
        report_shared(unpaired, examples)
    check_same(path, header)
    examples += unpaired
    step = max(1, rollout.rollout_batch_size // max(1, rollout.group_size))
    starts = batches(len(examples), step, shard)
    prompts = [example.prompt_ids for example in examples[starts.start : starts.stop]]
    with ExitStack() as stack:
        lock = locked(path.with_name(f"{path.name}.lock"), "output")
        decided(lambda: stack.enter_context(lock))
        set_seed(output.seed)
        model = load_model(model_args, tokenizer, device)
        check_room(model, sampling_prompts(examples, rollout), rollout)
        header["model"] = {"name": model_args.model, "hash": decided(lambda: model_hash(model))}
        if awaits_shards(model):
            shard_frozen(accelerator, model)
        maker = GroupMaker(model, tokenizer, rollout, score, rank, pairs=examples)
        out: GroupsWriter | None = None

        def begin() -> tuple[int, bool]:
            nonlocal out
            out = stack.enter_context(GroupsWriter(path, header, prompts, step))
            return out.batches, out.finished

        begun, finished = decided(begin)
        if finished and out is not None:
            print(f"{path} holds this run, finished:")
        if not finished:
            maker.generator = _generator(rollout, model, tokenizer, ends, sampling_prompts(examples, rollout))
            _write_in_turn(out, maker, examples, starts, begun, output.seed)
    if out is not None:
        _print_groups(path, out.summary, guard)


def _write_in_turn(out: Any, maker: Any, examples: Sequence[Any], starts: range, begun: int, seed: int) -> None:
    """Make a batch of groups on each process, round by round, and have the first process write them in their order.

    Args:
        out: the GroupsWriter of the first process; None in the others.
        maker: examples -> groups.
        examples: of all batches.
        starts: the first example of each batch.
        begun: number of batches that are written.
        seed: of all that is sampled.
    """
    from tqdm.auto import tqdm

    from gem.distributed import gathered, processes
    from gem.generators import seeded

    rank, count = processes()
    maker.calibration  # noqa: B018 - all processes score the pairs together, not each with its first batch
    with tqdm(total=len(starts), initial=begun, desc="groups", disable=out is None) as bar:
        for first in range(begun, len(starts), count):
            start = starts[first + rank] if first + rank < len(starts) else len(examples)
            with seeded(seed, "score", start):
                groups = maker(examples[start : start + starts.step])
            for made in gathered(groups):
                if made and out is not None:
                    out.append(made)
                    bar.update()
    if out is not None:
        out.finish()


def _device(accelerator: Any, name: str | None) -> Any:
    """Return where the model of a command that trains nothing is loaded."""
    from gem.distributed import loading_device
    from gem.models import pick_device

    return pick_device(name) if accelerator is None else loading_device(accelerator.device)


def _generator(rollout: RolloutArguments, model: Any, tokenizer: Any, ends: Any, prompts: Sequence[list[int]]) -> Any:
    """Return the generator of --server, which answers and has room for the prompts; None: transformers, on the model."""
    if rollout.server is None:
        return None
    from gem.server import ServedModel, ServerGenerator

    served = ServedModel.of(rollout)
    served.check_room(prompts, rollout)
    return ServerGenerator(served, tokenizer, ends, rollout, vocabulary=model.get_input_embeddings().weight.shape[0])


def _merge(argv: Sequence[str]) -> None:
    from gem.groups_writer import merge_groups
    from gem.lock import locked

    parser = _small_parser("merge")
    parser.add_argument("shards", nargs="+", help="files of `gem-kernels score --shard i/n`: all of a run, any order")
    parser.add_argument("--output", default="groups.jsonl", help="the file that one run would have written")
    arguments = parser.parse_args(list(argv))
    path = Path(arguments.output)
    if path.exists():
        raise ValueError(f"output must be a new file, got {path}, which exists")
    check_file(path, "output")
    with locked(path.with_name(f"{path.name}.lock"), "output"):
        groups = merge_groups([Path(shard) for shard in arguments.shards], path)
    _print_groups(path, groups, GuardArguments())


def _print_groups(path: Path, groups: Sequence[Any], guard: GuardArguments) -> None:
    """Print what a groups file holds, and warn of groups that teach little."""
    from gem.evaluate import pair_auroc
    from gem.group import candidates_line
    from gem.guard import scored_pairs, warn_below_gate
    from gem.rails import ordered_pairs

    share, number = pair_auroc(groups), scored_pairs(groups)
    kept, pairs = sum(group.kept for group in groups), sum(group.has_pair for group in groups)
    print(candidates_line(groups))
    said = "" if math.isnan(share) else f"; {ordered_pairs(share, number)}"
    without = f" ({len(groups) - pairs} without a human pair)" if 0 < pairs < len(groups) else ""
    print(f"{len(groups)} groups{without}, {kept} kept, in {path}{said}")
    if not kept:
        logging.warning("no group is kept: training on this file learns from the chosen answers alone")
    warn_below_gate(share, guard, number)


def _train(argv: Sequence[str]) -> None:
    from transformers import TrainingArguments, set_seed

    from gem.distributed import loading_device

    check_engine()  # before TrainingArguments begin with it
    parsed, settings = parse(
        "train", argv, ModelArguments, DataArguments, UnlabeledArguments, GroupsArguments, LossArguments, GuardArguments,
        RolloutArguments, ScoreArguments, RankArguments, EvalArguments, TrainingArguments, PlanArguments,
    )  # fmt: skip
    model_args, data, unlabeled, groups_args, loss, guard, rollout, score, rank, eval_args, training, planned = parsed
    from gem.data import read_examples
    from gem.evaluate import Evaluation, pair_auroc
    from gem.fingerprint import data_hash, source_hash
    from gem.generators import check_room
    from gem.groups import check_header, check_learnable, load_groups
    from gem.guard import scored_pairs, warn_below_gate
    from gem.mixing import check_pairs_beside, mix_by_pair, read_unlabeled, warn_of_held_out
    from gem.models import load_model, load_tokenizer
    from gem.pipeline import GroupMaker, sampling_prompts
    from gem.reference import reference_for
    from gem.trainer import GEMTrainer
    from gem.training_flags import check_sharded

    check_pairs_beside(data, unlabeled)
    if bool(groups_args.groups) == bool(data.data):
        raise ValueError(
            f"expected either groups (a file) or data (online), got groups={groups_args.groups!r}, data={data.data!r}"
        )
    if planned.dry_run is not None:
        of_groups = (groups_args.groups or "", unlabeled, rollout, score, rank, eval_args)
        _dry_run("train", settings, planned, model_args, data, loss, training, *of_groups)
        return
    check_launched(planned.accelerate_config, ["train", *argv])
    if fsdp_is_on():
        check_sharded(training, averages=not groups_args.groups and score.score_with == "ema")
    join()
    run = RunFolder(training, "train", settings)
    if run.finished:
        return
    tokenizer = load_tokenizer(model_args)
    _check_tokenizer(run, model_args, tokenizer)
    ends = _ends(model_args, tokenizer, rollout.stop)
    read = partial(read_examples, data, tokenizer, rollout=rollout, ends=ends)
    evaluated: Any = {"source": eval_args.eval_data, "split": eval_args.eval_split}
    held_out = []
    if eval_args.eval_data:
        held_out = read(need=("chosen",), **evaluated)
        run.check_input("eval_data", eval_args.eval_data, lambda: source_hash(eval_args.eval_data, held_out))
    groups, examples = [], []
    pairs: list[Any] = []  # that calibrate S
    if groups_args.groups:
        check_header(Path(groups_args.groups), tokenizer)
        groups = load_groups(Path(groups_args.groups))
        run.check_input("groups", groups_args.groups, lambda: data_hash(groups_args.groups))
        warn_below_gate(pair_auroc(groups), guard, scored_pairs(groups))
        warn_of_held_out([group for group in groups if not group.has_pair], held_out)
    else:
        prompts = read_unlabeled(data, unlabeled, tokenizer, rollout, ends)
        examples = read(need=("chosen", "rejected") if rank.human_weight else ())
        run.check_input("data", data.data, lambda: source_hash(data.data, examples))
        if loss.loss in ("sega", "pro"):  # the others read no weights
            pairs = examples  # before the mix, which repeats them
        if prompts:
            examples = _with_prompts(run, unlabeled, examples, prompts, held_out)
    set_seed(training.seed)
    model: Any = load_model(model_args, tokenizer, loading_device(training.device))
    _check_model(run, model_args, model)
    make_groups = None
    if groups_args.groups:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        supervised = loss.loss != "sega" or loss.sft_weight > 0  # the others learn from the pair itself
        check_learnable(groups, vocabulary, groups_args.groups, supervised, loss.loss)
        groups = mix_by_pair(groups, unlabeled.unlabeled_share)
    else:
        check_room(model, sampling_prompts(examples, rollout), rollout)
        make_groups = GroupMaker(model, tokenizer, rollout, score, rank, reference_for(model, loss, score), pairs=pairs)
    evaluation = Evaluation(model, tokenizer, held_out, rollout, score, eval_args) if held_out else None
    with run.claimed():
        trainer = GEMTrainer(
            model,
            training,
            loss=loss,
            guard=guard,
            train_dataset=groups or examples,
            processing_class=tokenizer,
            make_groups=make_groups,
            evaluation=evaluation,
        )
        train_to_end(trainer, evaluation, run.resume)


def _with_prompts(
    run: RunFolder, unlabeled: UnlabeledArguments, examples: list[Any], prompts: list[Any], held_out: list[Any]
) -> list[Any]:
    """Return the examples with the prompts of --unlabeled mixed in; check that a run began with these."""
    from gem.fingerprint import source_hash
    from gem.mixing import mix_by_pair, report_shared, warn_of_held_out

    source = unlabeled.unlabeled or ""
    run.check_input("unlabeled", source, lambda: source_hash(source, prompts))
    report_shared(prompts, examples)
    warn_of_held_out(prompts, held_out)
    return mix_by_pair([*examples, *prompts], unlabeled.unlabeled_share)


def _eval(argv: Sequence[str]) -> None:
    (model_args, data, rollout, score, eval_args, output), _ = parse(
        "eval", argv, ModelArguments, DataArguments, RolloutArguments, ScoreArguments, EvalArguments, OutputArguments
    )
    import torch

    from gem.data import read_examples
    from gem.distributed import awaits_shards, launched, processes, shard_frozen
    from gem.evaluate import Evaluation, answered, held_out
    from gem.models import load_model, load_tokenizer

    accelerator = launched(output.device)
    join()
    if output.output:
        check_file(Path(output.output), "output")
    device, tokenizer = _device(accelerator, output.device), load_tokenizer(model_args)
    ends = _ends(model_args, tokenizer, rollout.stop)
    evaluated: Any = {"source": eval_args.eval_data or "", "split": eval_args.eval_split}
    examples = read_examples(data, tokenizer, need=("chosen",), rollout=rollout, ends=ends, **evaluated)
    torch.manual_seed(output.seed)
    model = load_model(model_args, tokenizer, device)
    prompts = [example.sampled_from for example in answered(held_out(examples, eval_args))]
    if awaits_shards(model):
        shard_frozen(accelerator, model)
    generator = _generator(rollout, model, tokenizer, ends, prompts)
    evaluation = Evaluation(model, tokenizer, examples, rollout, score, eval_args, generator=generator)
    torch.manual_seed(output.seed)  # new adapters have drawn some
    metrics = evaluation(model)
    metrics.pop("preference_reference", None)  # the model is its own reference here: all ties
    if processes()[0]:
        return
    print(json.dumps(metrics, indent=1))
    if output.output:
        write_lines(Path(output.output), [json.dumps(metrics, indent=1)])


def _small_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command that has a few flags of its own and reads no config file."""
    parser = argparse.ArgumentParser(prog=f"gem-kernels {command}", description=SUMMARIES[command])
    parser.error = raise_error  # type: ignore[method-assign]
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)  # for --help: main() removes it from argv
    return parser


def _report(argv: Sequence[str]) -> None:
    from gem.report import plain, results_table, write_report
    from gem.results import load_run

    parser = _small_parser("report")
    parser.add_argument(
        "runs", nargs="+", help="output folders of sft or train; folders of one name are seeds of a method"
    )
    parser.add_argument("--output", default="report.html", help="the html page")
    parser.add_argument("--title", default="GEM runs", help="its title")
    arguments = parser.parse_args(list(argv))
    check_file(Path(arguments.output), "output")
    runs = [load_run(Path(folder)) for folder in arguments.runs]
    print(plain(results_table(runs)))
    write_report(Path(arguments.output), runs, title=arguments.title)
    print(f"\n{arguments.output}")


def _doctor(argv: Sequence[str]) -> None:
    parser = _small_parser("doctor")
    parser.add_argument("model", help="folder, hub name, GGUF file; of adapters too; or a config .json")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a training step")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--device", help="where it runs: cpu, cuda, cuda:1, ...; default: CUDA if available")
    parser.add_argument(
        "--world_size", type=int, default=1, help="devices of the plan; several share the model by FSDP2"
    )
    parser.add_argument("--optim", default="adamw_torch_fused", help="optimizer of the plan, as in `train`")
    parser.add_argument("--bf16", action="store_true", help="plan mixed precision, as in `train`")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="plan it, as in `train`")
    parser.add_argument("--lora_rank", type=int, default=0, help="plan new adapters, as in `train`")
    arguments = vars(parser.parse_args(list(argv)))
    from gem.doctor import diagnose, load, planned

    model = load(arguments.pop("model"), arguments.pop("device"))
    del arguments["debug"]
    sizes = {name: arguments[name] for name in ("batch_size", "seq_len")}
    print("\n".join(diagnose(model, **sizes).lines()))
    checkpointing = arguments.pop("gradient_checkpointing")
    print("\n".join(["", *planned(model, checkpointing=checkpointing, **arguments)]))


def _demo(argv: Sequence[str]) -> None:
    from gem.demo import run_demo

    parser = _small_parser("demo")
    parser.add_argument("--output_dir", default="runs/demo", help="where report.html and the runs go")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions; the table then has intervals")
    arguments = parser.parse_args(list(argv))
    if arguments.seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {arguments.seeds}")
    folder = Path(arguments.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir must be a folder, got {folder}, which is a file")
    check_writable(folder, "output_dir")
    run_demo(folder, seeds=arguments.seeds)


def _evidence(argv: Sequence[str]) -> None:
    parser = _small_parser("evidence")
    parser.add_argument("--config", required=True, help="yaml file of the comparison; docs/evidence.md has its keys")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="runs whose task/method/pairs/seed match, as chain/gem*/16/*",
    )
    parser.add_argument("--list", action="store_true", help="print what is done and what is missing, and run nothing")
    parser.add_argument("--page", metavar="FILE", help="write the page and its plot from the records, and run nothing")
    arguments = parser.parse_args(list(argv))
    from gem.evidence.config import read_config
    from gem.evidence.harness import checked_records, make_runs, status_table
    from gem.evidence.page import write_page
    from gem.evidence.plan import Plan
    from gem.methods import METHODS
    from gem.report import plain
    from gem.tasks import TASKS

    if arguments.page:
        check_file(Path(arguments.page), "page")
    plan = Plan(read_config(Path(arguments.config), METHODS, TASKS), arguments.only)
    if not (arguments.list or arguments.page):
        make_runs(plan, shlex.join(["gem-kernels", "evidence", *argv]))
        return
    records = checked_records(plan)
    if arguments.list:
        table, line = status_table(plan, records)
        print(f"{plain(table)}\n\n{line}")
    if arguments.page:
        write_page(Path(arguments.page), plan, records)
        print(f"\n{arguments.page}")
