"""Describe an error in one line for the user of a command."""

from __future__ import annotations

import pickle

from gem.stops import Diverged, RankEnded, Terminated

EXTRAS = ("transformers", "accelerate", "datasets", "peft", "matplotlib", "tqdm", "yaml", "requests")
OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator")  # as in the messages of CUDA, and of torch on a CPU
NO_SPACE = ("no space left on device", "disk quota exceeded")
NOT_WRITTEN = ("pytorchstreamwriter", "inline_container", "iostream error")  # torch.save, which swallows the reason
LOWER = {
    "sft": "per_device_train_batch_size (and raise gradient_accumulation_steps), max_length or cache_mib; or use "
    "gradient_checkpointing, or lora_rank with dtype=bfloat16",
    "train": "per_device_train_batch_size (and raise gradient_accumulation_steps), max_length, cache_mib, "
    "rollout_batch_size or score_tokens; or use gradient_checkpointing, or lora_rank with dtype=bfloat16",
    "score": "rollout_batch_size, score_tokens, max_new_tokens or max_length; or use dtype=bfloat16",
    "eval": "rollout_batch_size, score_tokens, max_new_tokens or max_length; or use dtype=bfloat16",
    "evidence": "micro_batch, max_new_tokens or workers; or use gradient_checkpointing, or lora_rank with dtype=bfloat16",
}
GOES_ON = {
    "sft": "the same command goes on from the last checkpoint",
    "train": "the same command goes on from the last checkpoint",
    "score": "the same command goes on after the last group that is written",
    "evidence": "the same command makes the runs that have no record",
}


def explain(error: BaseException, command: str, more: str = "--debug shows the traceback") -> str:
    """Return one line for the user of a command: the error, and what is kept or what to do if that is known.

    Args:
        error: its attribute `kept`, if it has one, says what is kept.
        command: of gem-kernels.
        more: where there is more about an error that is not foreseen.
    """
    kept = getattr(error, "kept", "")
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        text = " ".join(str(error).split()) or "interrupted"
        kept = kept or ("" if text not in ("interrupted", "terminated") else GOES_ON.get(command, ""))
        return f"{text}: {kept}" if kept else text
    return "; ".join(filter(None, (reason(error, command, more), kept)))


def reason(error: BaseException, command: str, more: str) -> str:
    """Return an error as one line, with advice for the common ones. The arguments are those of explain()."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        # `pip install gem-kernels` alone installs only torch
        package = "'gem-kernels[train]'" if str(error.name).split(".")[0] in EXTRAS else error.name or "it"
        return f"needs pip install {package} ({text})"
    if isinstance(error, (ValueError, Diverged, RankEnded)) and not isinstance(error, UnicodeError):
        return text
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
        lower = LOWER.get(command, "the size of the model, of the batch or of the sequences")
        return f"out of memory ({text[:160] or 'MemoryError'}): lower {lower}"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):  # whose advice is to run it
        return "a file holds a pickle that is damaged or asks for more than tensors, which is not run here"
    if any(sign in str(error).lower() for sign in NOT_WRITTEN):
        return f"a file could not be written whole, as on a full disk ({text[:160]})"
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if any(sign in str(error).lower() for sign in NO_SPACE):
        return f"the disk is full ({text[:160]})"
    what = type(error).__name__
    text = f"{what}: {text}" if text else what
    return f"{text[:400]} ({more})"
