"""How many processes run, and how they share the model: from `accelerate launch`, or from the file that it would read.

    accelerate launch --config_file fsdp2.yaml -m gem train --config train.yaml

The setting accelerate_config names that file to a dry run, which starts no process. In a run it is checked: a file that asks
for FSDP does nothing unless accelerate has read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gem.files import read_yaml

# Keys of an accelerate file whose variable is not their own name in capitals.
_RENAMED = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
# What starts or joins a process group, if it is in the environment.
_OF_A_LAUNCH = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_USE_FSDP",
)

# In which FSDP2 saves its state; the first is accelerate's default.
STATE_FORMS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
LAUNCH = "accelerate launch --config_file fsdp2.yaml (examples/configs/llama3-8b-8xa100 has one)"

# What FSDP2 is if no file says otherwise: whole layers, freed behind their forward.
FSDP2 = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


# --- the launch of this process ---------------------------------------------------------------------------------------


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def several() -> bool:
    """Return True for one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def fsdp_is_on() -> bool:
    """Return True if accelerate was launched to shard models over several processes."""
    return several() and _is_set("ACCELERATE_USE_FSDP")


def state_form() -> str:
    """Return the form in which FSDP2 saves its state in this launch, FULL_STATE_DICT or SHARDED_STATE_DICT; "" without it."""
    return asked_form() if fsdp_is_on() else ""


def asked_form() -> str:
    """Return the form in which FSDP2 saves its state, if it runs."""
    return os.environ.get("FSDP_STATE_DICT_TYPE", STATE_FORMS[0])


def takes_weights() -> bool:
    """Return True for a process whose part of the weights comes from the first one: it need not read them."""
    efficient = _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return fsdp_is_on() and efficient and int(os.environ.get("RANK", "0")) > 0


def check_engine() -> None:
    """Check that accelerate was launched to shard by FSDP2, or not at all.

    Raises:
        ValueError: it is to run FSDP1, DeepSpeed, another parallelism, or FSDP2 with its shards elsewhere or in another form.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"DeepSpeed is not supported, got a launch with it: FSDP2 shards the same state, {LAUNCH}")
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(f"parallelism_config is not supported, got a launch with it: FSDP2 alone is, {LAUNCH}")
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version must be 2, got {version} (FSDP1, and the default of accelerate): {LAUNCH}")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params must be false, got true: the shards stay on the devices")
    if (form := asked_form()) not in STATE_FORMS:
        raise ValueError(f"fsdp_state_dict_type must be {' or '.join(STATE_FORMS)}, got {form!r}")


def check_several() -> None:
    """Raise ValueError if accelerate was launched to shard a model over one process."""
    if _is_set("ACCELERATE_USE_FSDP") and not several():
        raise ValueError(
            "FSDP2 must have several processes, got one: launch it without FSDP, there is nothing to share"
        )


# --- the launch that is planned ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The processes of a training, one a device.

    fsdp: the variables FSDP_* that accelerate sets; empty: each process has the whole model (DistributedDataParallel).
    """

    processes: int = 1
    fsdp: Mapping[str, str] = field(default_factory=dict)
    mixed_precision: str = "no"

    @property
    def checkpointing(self) -> bool:
        return self.fsdp.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"


def planned_launch(file: str | None, processes: int = 0) -> Launch:
    """Return the launch that a dry run plans for: what accelerate has set already, else what the file says.

    Args:
        file: config file of accelerate; None: one process, or DistributedDataParallel.
        processes: their number; 0: WORLD_SIZE, else that of the file, else 1.

    Raises:
        ValueError: there is no such file, or it asks for what the trainer cannot do.
    """
    found = _from_file(file) if file else Launch()
    if _is_set("ACCELERATE_USE_FSDP"):
        fsdp = {name: value for name, value in os.environ.items() if name.startswith("FSDP_")}
        found = Launch(found.processes, fsdp, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    number = processes or int(os.environ.get("WORLD_SIZE", "0")) or found.processes
    return Launch(number, found.fsdp, found.mixed_precision)


def check_launched(file: str | None, command: Sequence[str]) -> None:
    """Check that what an accelerate file asks for is what this process was started with.

    Raises:
        ValueError: the file asks for FSDP, and accelerate has not launched this process with it; the message has the command.
    """
    if file and _from_file(file).fsdp and not _is_set("ACCELERATE_USE_FSDP"):
        line = " ".join(["accelerate launch --config_file", file, "-m gem", *command])
        raise ValueError(f"accelerate_config must be what accelerate has read, got {file}, which asks for FSDP: {line}")


def _from_file(path: str) -> Launch:
    if not Path(path).is_file():
        raise ValueError(f"accelerate_config must be an existing file, got {path!r}")
    content, _ = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"accelerate_config must be a mapping, got {type(content).__name__} in {path}")
    kind, processes = str(content.get("distributed_type", "NO")).upper(), content.get("num_processes", 1)
    if type(processes) is not int or processes < 1:
        raise ValueError(f"accelerate_config must have num_processes >= 1, got {processes!r} in {path}")
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise ValueError(f"accelerate_config must ask for FSDP, MULTI_GPU or NO, got distributed_type {kind} in {path}")
    if content.get("parallelism_config"):
        raise ValueError(
            f"accelerate_config must not have a parallelism_config, got one in {path}: FSDP2 alone is supported"
        )
    given = content.get("fsdp_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"accelerate_config must have a mapping as fsdp_config, got {given!r} in {path}")
    fsdp = _variables(given) if kind == "FSDP" else {}
    if kind == "FSDP" and fsdp.get("FSDP_VERSION") != "2":
        raise ValueError(f"accelerate_config must have fsdp_version 2, got {fsdp.get('FSDP_VERSION', '1')} in {path}")
    if fsdp.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise ValueError(
            f"accelerate_config must have fsdp_offload_params false, got true in {path}: shards stay on devices"
        )
    return Launch(processes, fsdp, str(content.get("mixed_precision", "no")))


def _variables(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment that `accelerate launch` makes of fsdp_config."""
    named = {_RENAMED.get(name, name.upper()): value for name, value in settings.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in named.items()}


@contextmanager
def on_no_device() -> Iterator[None]:
    """Let TrainingArguments be built for GPUs that are not there, and without a process group, for the block."""
    import transformers.training_args

    training_args: Any = transformers.training_args
    own = training_args.is_torch_bf16_gpu_available
    training_args.is_torch_bf16_gpu_available = lambda: True
    try:
        with alone():
            yield
    finally:
        training_args.is_torch_bf16_gpu_available = own


@contextmanager
def alone(**variables: str) -> Iterator[None]:
    """Hide a launch from the libraries for the block, so that none of them starts a process group; set these variables."""
    own = dict(os.environ)
    for name in _OF_A_LAUNCH:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(own)
