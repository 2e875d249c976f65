"""The config file of `gem-kernels evidence`: studies, seeds, rates, budget, and the user's own tasks.

    config = read_config(Path("evidence.yaml"), METHODS, TASKS)

Neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from gem.config import DataArguments, ModelArguments, check
from gem.files import read_yaml

TASK_FILES = ("pairs", "prompts", "validation", "test")
ELSEWHERE = {"data", "split", "limit"}  # settings of DataArguments whose place the files of a task take


@dataclass(frozen=True)
class Study:
    """Methods to compare: every one on each task with each number of pairs."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    pairs: tuple[int, ...]
    ablations: bool = False  # on the page, compared with GEM in a section of its own


@dataclass(frozen=True)
class OwnTask:
    """A task of the user: a model, which is the start, and files of preference records.

    Args:
        model, data: how the model and the records are read.
        pairs: records with prompt, chosen and rejected; each seed draws its pairs from them.
        validation, test: the same; the final answer of `chosen` is the right one.
        prompts: records with a prompt, unlabelled; "": the pairs that were not drawn, without their answers.
        max_new_tokens: limit on the tokens of a sampled answer.
        micro_batch: prompts of one forward and backward, which divides those of a step; 0: all of a step.
        gradient_checkpointing: compute the forward of a layer again in the backward, for memory.
    """

    model: ModelArguments
    data: DataArguments
    pairs: str
    validation: str
    test: str
    prompts: str = ""
    max_new_tokens: int = 256
    micro_batch: int = 0
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Config:
    """The content of a config file, checked."""

    path: Path
    output_dir: Path
    studies: tuple[Study, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    sweep_pairs: int
    sweep_seeds: tuple[int, ...]
    budget: dict[str, Any] = field(default_factory=dict)  # fields of gem.methods.Budget; what is absent has its default
    eval_samples: int = 8
    workers: int = 0  # 0: one per GPU, or per core
    device: str | None = None
    tasks: dict[str, OwnTask] = field(default_factory=dict)
    plot: tuple[str, ...] = ()  # methods of the plot; (): the first ones

    def start_of(self, task: str, seed: int) -> tuple[str, int]:
        """Return the task and the seed of a start: one for each seed of a task that is built in, one in all of the user's."""
        return task, 0 if task in self.tasks else seed


def read_config(path: Path, methods: Collection[str], tasks: Collection[str]) -> Config:
    """Read the yaml file of a comparison.

    Args:
        path: the file; docs/evidence.md explains its keys.
        methods, tasks: names of those that are built in.

    Raises:
        ValueError: no such file, no yaml, a key that is unknown, missing or there twice, or a value that is not what its key
            expects; the message names the key.
    """
    content = _mapping(_read_yaml(path), "config", required=("output_dir", "studies", "rates"), optional=(
        "seeds", "sweep", "budget", "eval_samples", "workers", "device", "tasks", "plot",
    ))  # fmt: skip
    own = _mapping(content.get("tasks", {}), "tasks")
    known = dict.fromkeys((*tasks, *own))
    for name in own:
        if name in tasks or not re.fullmatch(r"[\w.-]+", name):
            built_in = ", ".join(tasks)
            raise ValueError(f"tasks must have names of letters, digits, _ . - other than {built_in}, got {name!r}")
    if not isinstance(content["studies"], list) or not content["studies"]:
        raise ValueError(f"studies must be a list of one or more studies, got {content['studies']!r}")
    studies = tuple(_study(study, f"studies[{i}]", methods, known) for i, study in enumerate(content["studies"]))
    compared = dict.fromkeys(method for study in studies for method in study.methods)
    seeds = _numbers(content.get("seeds", [0, 1, 2, 3, 4]), "seeds", least=0)
    sweep = _mapping(content.get("sweep", {}), "sweep", optional=("pairs", "seeds"))
    device = content.get("device")
    return Config(
        path=path,
        output_dir=Path(_text(content["output_dir"], "output_dir")),
        studies=studies,
        seeds=seeds,
        rates=_rates(content["rates"]),
        sweep_pairs=_number(sweep.get("pairs", max(max(study.pairs) for study in studies)), "sweep.pairs", least=1),
        sweep_seeds=_numbers(sweep.get("seeds", [seeds[0]]), "sweep.seeds", least=0),
        budget=_budget(content.get("budget", {})),
        eval_samples=_number(content.get("eval_samples", 8), "eval_samples", least=1),
        workers=_number(content["workers"], "workers", least=1) if "workers" in content else 0,
        device=None if device is None else _text(device, "device"),
        tasks={name: _own_task(settings, f"tasks.{name}") for name, settings in own.items()},
        plot=_names(content["plot"], "plot", compared) if "plot" in content else (),
    )


def _study(value: Any, where: str, methods: Collection[str], tasks: Collection[str]) -> Study:
    study = _mapping(value, where, required=("tasks", "methods", "pairs"), optional=("ablations",))
    return Study(
        tasks=_names(study["tasks"], f"{where}.tasks", tasks),
        methods=_names(study["methods"], f"{where}.methods", methods),
        pairs=_numbers(study["pairs"], f"{where}.pairs", least=1),
        ablations=_flag(study.get("ablations", False), f"{where}.ablations"),
    )


def _budget(value: Any) -> dict[str, Any]:
    least = {"steps": 1, "prompts": 1, "group_size": 2}
    budget = _mapping(value, "budget", optional=(*least, "unlabeled_share"))
    share = budget.get("unlabeled_share", 1.0)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"budget.unlabeled_share must be in (0, 1], got {share!r}")
    numbers = {name: _number(budget[name], f"budget.{name}", least[name]) for name in least if name in budget}
    return {**numbers, **{name: float(share) for name in ("unlabeled_share",) if name in budget}}


def _own_task(value: Any, where: str) -> OwnTask:
    """Return a task of the user; its keys are its files, `own`, and the settings of model and data."""
    own = ("max_new_tokens", "micro_batch", "gradient_checkpointing")
    kinds = {"ModelArguments": ModelArguments, "DataArguments": DataArguments}
    names = {kind: [f for f in fields(cls) if f.name not in ELSEWHERE] for kind, cls in kinds.items()}
    settings = [f.name for group in names.values() for f in group if f.name != "model"]
    optional = ("prompts", *own, *settings)
    task = _mapping(value, where, required=("model", "pairs", "validation", "test"), optional=optional)
    hints = {name: hint for cls in kinds.values() for name, hint in get_type_hints(cls).items() if name in task}
    for name, hint in hints.items():  # a bool is an int to isinstance
        if not isinstance(task[name], hint) or (isinstance(task[name], bool) and hint is not bool):
            raise ValueError(f"{where}.{name} must be of type {getattr(hint, '__name__', hint)}, got {task[name]!r}")
    given = {kind: {f.name: task[f.name] for f in group if f.name in task} for kind, group in names.items()}
    model, data = ModelArguments(**given["ModelArguments"]), DataArguments(**given["DataArguments"])
    for arguments in (model, data):
        try:
            check(arguments)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
    files = {name: _text(task[name], f"{where}.{name}") for name in TASK_FILES if name in task}
    tokens = _number(task.get("max_new_tokens", 256), f"{where}.max_new_tokens", least=1)
    micro = _number(task["micro_batch"], f"{where}.micro_batch", least=1) if "micro_batch" in task else 0
    checkpointing = _flag(task.get("gradient_checkpointing", False), f"{where}.gradient_checkpointing")
    return OwnTask(model, data, max_new_tokens=tokens, micro_batch=micro, gradient_checkpointing=checkpointing, **files)


def _read_yaml(path: Path) -> Any:
    content, node = read_yaml(str(path))
    try:
        twice = _twice(node)
    except RecursionError as error:  # an alias of what holds it
        raise ValueError(f"config must be yaml, got {path}: {error}") from None
    if twice:
        raise ValueError(f"config must hold each key once, got {twice} several times in {path}")
    return content


def _twice(node: Any) -> str:
    """Return a key that a mapping of a yaml node holds twice, "" if none does: yaml would keep the last one alone."""
    inner = [child for item in getattr(node, "value", []) for child in (item if isinstance(item, tuple) else [item])]
    if getattr(node, "id", "") == "mapping":
        keys = [str(key.value) for key, _ in node.value]
        if found := next((key for key in keys if keys.count(key) > 1), ""):
            return found
    return next(filter(None, (_twice(child) for child in inner if hasattr(child, "id"))), "")


def _mapping(
    value: Any, where: str, required: Sequence[str] = (), optional: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return a mapping whose keys are texts: all that are required and, unless any may be there, no unknown ones."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping of names to values, got {value!r}")
    known = [*required, *(optional or ())]
    if unknown := [key for key in value if known and key not in known]:
        raise ValueError(f"{where} must hold {', '.join(known)} alone, got {', '.join(unknown)}")
    if missing := [key for key in required if key not in value]:
        raise ValueError(f"{where} must hold {', '.join(required)}, got no {', '.join(missing)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{where} must be a text, got {value!r}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {value!r}")
    return value


def _number(value: Any, where: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{where} must be an integer >= {least}, got {value!r}")
    return value


def _numbers(value: Any, where: str, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or len(set(map(repr, value))) < len(value):
        raise ValueError(f"{where} must be a list of different integers, got {value!r}")
    return tuple(_number(item, where, least) for item in value)


def _rates(value: Any) -> tuple[float, ...]:
    """Return the learning rates, rising. A text is read too: to yaml, 1e-5 without a point is one."""
    expected = f"rates must be a list of different numbers > 0, got {value!r}"
    try:
        rates = [float(item) for item in value if not isinstance(item, bool)]
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if (
        not isinstance(value, list)
        or not rates
        or len(set(rates)) < len(value)
        or not all(0 < r < math.inf for r in rates)
    ):
        raise ValueError(expected)
    return tuple(sorted(rates))


def _names(value: Any, where: str, known: Collection[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where} must be a list of names, got {value!r}")
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where} must be of {', '.join(known)}, got {', '.join(unknown)}")
    if len(set(value)) < len(value):
        raise ValueError(f"{where} must hold each name once, got {value!r}")
    return tuple(value)
