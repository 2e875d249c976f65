"""`--dry-run`: check a training as it would begin, and print what it needs; nothing is loaded, started or written.

Files that are there are read and checked. Those that are not, as on a machine that only plans, are named. The model comes from
its config alone, and no hub is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from gem.config import (
    DataArguments,
    EvalArguments,
    LossArguments,
    ModelArguments,
    PlanArguments,
    RankArguments,
    RolloutArguments,
    ScoreArguments,
    UnlabeledArguments,
)
from gem.data import Example, read_examples
from gem.ends import Ends
from gem.group import ROLES, Group
from gem.groups import check_header, load_groups
from gem.launch import planned_launch
from gem.loading import loading
from gem.losses import reads, reads_reference
from gem.mixing import read_unlabeled
from gem.models import load_tokenizer, source_ends
from gem.plan import GIB, Work, on_meta, plan
from gem.plan_table import DEVICE_GIB, check_fits, lines
from gem.positions import check_positions
from gem.runs import check_output
from gem.score import longest_row
from gem.sources import configs_of
from gem.training_flags import NO_AVERAGE


@dataclass
class Request:
    """The settings of a training. command: sft or train. settings: all of them, by name; groups: the groups file, or ""."""

    command: str
    settings: Mapping[str, Any]
    plan: PlanArguments
    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    training: Any
    groups: str = ""
    unlabeled: UnlabeledArguments = field(default_factory=UnlabeledArguments)
    rollout: RolloutArguments = field(default_factory=RolloutArguments)
    score: ScoreArguments = field(default_factory=ScoreArguments)
    rank: RankArguments = field(default_factory=RankArguments)
    evaluation: EvalArguments = field(default_factory=EvalArguments)

    @property
    def online(self) -> bool:
        return self.command == "train" and not self.groups


@dataclass(frozen=True)
class _Sizes:
    """What a micro-batch may hold at most: sequences of a group, tokens of a sequence, those with a label; and of a prompt."""

    members: int
    length: int
    labelled: int
    prompt: int


def dry_run(request: Request) -> None:
    """Print the plan of a training.

    Raises:
        ValueError: a real run would refuse its settings or files, the shape of the model is not known, or the plan does not fit
            the device; the plan is printed before that.
    """
    check_output(Path(request.training.output_dir), request.command, request.settings)
    missing: list[str] = []
    with _no_hub():
        sizes = _sizes(request, missing)
        of = plan(_work(request, sizes))
    device = request.plan.device_memory or _own_memory()
    for line in missing:
        print(f"not at hand   {line}")
    print("\n".join(lines(of, device)))
    check_fits(of, device)


@contextmanager
def _no_hub() -> Iterator[None]:
    """Let the libraries look for models and data on this machine alone, for the block."""
    import datasets.config
    import huggingface_hub.constants

    own = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = own


def _own_memory() -> float:
    """Return the GiB of this machine's GPU; without one, those of the GPU that is planned for by default."""
    return torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else DEVICE_GIB


# --- what is at hand --------------------------------------------------------------------------------------------------


def _sizes(request: Request, missing: list[str]) -> _Sizes:
    """Return the sizes of the largest micro-batch: of what is at hand, else of the settings. `missing` gets the rest."""
    tokenizer, ends = _tokenizer(request.model, missing), None
    if tokenizer is not None and _is_there(request.model.model):
        ends = source_ends(request.model, tokenizer, request.rollout.stop)
    read = partial(_examples, request, tokenizer, ends, missing)
    if request.groups:
        return _of_groups(request, tokenizer, missing)
    need = ("chosen",) if request.command == "sft" else ("chosen", "rejected") if request.rank.human_weight else ()
    examples = read(request.data.data, "data", need=need)
    if request.evaluation.eval_data:
        read(request.evaluation.eval_data, "eval_data", need=("chosen",), split=request.evaluation.eval_split)
    if request.unlabeled.unlabeled and tokenizer is not None and _is_there(request.unlabeled.unlabeled):
        examples += read_unlabeled(
            request.data, request.unlabeled, tokenizer, request.rollout, ends or Ends(frozenset())
        )
    if request.command == "sft":
        longest = request.plan.longest or longest_row(examples) or request.data.max_length
        return _Sizes(1, longest, longest, longest)
    prompt = max((len(example.sampled_from) for example in examples), default=0)
    fresh = request.rollout.max_new_tokens if request.rollout.group_size else 0
    longest = request.plan.longest or max(longest_row(examples), prompt + fresh if prompt else request.data.max_length)
    prompt = prompt or max(1, longest - request.rollout.max_new_tokens)
    return _Sizes(_members(request, request.rollout.group_size), longest, longest - min(prompt, longest - 1), prompt)


def _members(request: Request, candidates: int) -> int:
    """Return the sequences of a group that its loss reads."""
    pair = sum(reads(request.loss, role) for role in ("chosen", "rejected"))  # type: ignore[arg-type]
    return max(1, pair + (candidates if reads(request.loss, "candidate") else 0))


def _tokenizer(arguments: ModelArguments, missing: list[str]) -> Any:
    source = arguments.tokenizer or arguments.model
    try:
        return load_tokenizer(arguments)
    except ValueError:
        if not source or _is_there(source):  # it is there, and wrong
            raise
    missing.append(f"tokenizer {source}: no text is read")
    return None


def _is_there(source: str) -> bool:
    """Return True for a file or folder; what else a name stands for lies on a hub."""
    return Path(source).exists()


def _examples(
    request: Request,
    tokenizer: Any,
    ends: Ends | None,
    missing: list[str],
    source: str,
    name: str,
    *,
    need: Sequence[str],
    split: str | None = None,
) -> list[Example]:
    if not source:
        raise ValueError(f"{name} must be a file, a folder or a hub dataset, got nothing")
    if tokenizer is None or not _is_there(source):
        missing.append(f"{name} {source}" + (": sizes are those of the settings" if name == "data" else ""))
        return []
    rollout = request.rollout if request.command == "train" else None
    return read_examples(request.data, tokenizer, need=need, source=source, split=split, rollout=rollout, ends=ends)


def _of_groups(request: Request, tokenizer: Any, missing: list[str]) -> _Sizes:
    path = Path(request.groups)
    if not path.is_file():
        missing.append(f"groups {path}: sizes are those of the settings")
        longest = request.plan.longest or request.data.max_length
        return _Sizes(_members(request, request.rollout.group_size), longest, longest, longest)
    if tokenizer is not None:
        check_header(path, tokenizer)
    groups = load_groups(path)
    longest = request.plan.longest or longest_row(groups)
    read = [[m for m in group.members if reads(request.loss, m.role)] for group in groups]
    labelled = max((len(member.ids) for members in read for member in members), default=longest)
    return _Sizes(max(map(len, read)), longest, min(labelled, longest), _longest_prompt(groups))


def _longest_prompt(groups: Sequence[Group]) -> int:
    return max(len(group.prompt_ids) for group in groups)


# --- the work ---------------------------------------------------------------------------------------------------------


def _work(request: Request, sizes: _Sizes) -> Work:
    training, loss, asked = request.training, request.loss, request.plan
    launch = planned_launch(asked.accelerate_config, asked.dry_run or asked.world_size)
    evaluates = bool(request.evaluation.eval_data) and str(training.eval_strategy) != "no"
    if launch.fsdp and request.online and request.score.score_with == "ema":
        raise ValueError(NO_AVERAGE)
    samples = (request.online and request.rollout.group_size > 0) or evaluates
    second = request.online and not request.model.lora_rank and _reads_reference(loss, request.score)
    two_passes = request.online and (request.score.score_with != "policy" or request.score.entropy_clip < 1)
    attention = request.model.attn_implementation or ""
    recomputes = getattr(training, "activation_checkpointing", False) or training.gradient_checkpointing
    build = partial(on_meta, _config(request), request.model.dtype, request.model.lora_rank)
    check_positions(build(), sizes.length, "max_length: prompt and completion")
    return Work(
        build=build,
        launch=launch,
        bf16=training.bf16 or launch.mixed_precision == "bf16",
        checkpointing=bool(recomputes or launch.checkpointing),
        groups=training.per_device_train_batch_size,
        members=sizes.members,
        length=sizes.length,
        labelled=sizes.labelled,
        accumulation=training.gradient_accumulation_steps,
        cache_bytes=loss.cache_mib << 20,
        optim=str(getattr(training.optim, "value", training.optim)),
        masked="flash" not in attention,
        rollouts=request.rollout.rollout_batch_size if samples else 0,
        prompt=sizes.prompt,
        new_tokens=request.rollout.max_new_tokens,
        top_p=request.rollout.top_p,
        score_tokens=request.score.score_tokens if second or two_passes or evaluates else 0,
        frozen=second,
        average=request.online and request.score.score_with == "ema",
        gpu=not training.use_cpu,
    )


def _reads_reference(loss: LossArguments, score: ScoreArguments) -> bool:
    reads_one = any(reads_reference(loss, role, fresh) for role in ROLES for fresh in (True, False))
    return reads_one or score.score_with == "reference"


def _config(request: Request) -> Any:
    """Return the model's config: its own if it is at hand, else that of `shape`.

    Raises:
        ValueError: neither is at hand.
    """
    source, shape = request.model.model, request.plan.shape
    if source.endswith(".json") and (_is_there(source) or not shape):
        return _config_file("model", source)
    try:
        return configs_of(source).config
    except ValueError as error:
        if _is_there(source):  # it is there, and wrong
            raise
        if shape:
            return _config_file("shape", shape)
        raise ValueError(f"shape must be a config .json for {source!r}, which is not at hand, got none") from error


def _config_file(name: str, path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"{name} must be an existing config .json, got {path!r}")
    with loading(name, path, "the config .json of a causal language model"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
