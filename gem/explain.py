"""Describe an error in one line for the user of a command."""

from __future__ import annotations

EXTRAS = ("transformers", "accelerate", "datasets", "peft", "matplotlib", "tqdm", "yaml")
OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator")  # as in the messages of CUDA, and of torch on a CPU
LOWER = {
    "sft": "per_device_train_batch_size (and raise gradient_accumulation_steps), max_length or cache_mib; or use "
    "gradient_checkpointing, lora_rank or dtype=bfloat16",
    "train": "per_device_train_batch_size (and raise gradient_accumulation_steps), max_length, cache_mib, "
    "rollout_batch_size or score_tokens; or use gradient_checkpointing, lora_rank or dtype=bfloat16",
    "score": "rollout_batch_size, score_tokens, max_new_tokens or max_length; or use dtype=bfloat16",
    "eval": "rollout_batch_size, score_tokens, max_new_tokens or max_length; or use dtype=bfloat16",
}


def explain(error: BaseException, command: str) -> str:
    """Return one line for the user of a command: the error, and what to do if that is known."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        trains = command in ("sft", "train")
        return "interrupted" + (": the same command goes on from the last checkpoint" if trains else "")
    if isinstance(error, ModuleNotFoundError):
        # `pip install gem-kernels` alone installs only torch
        package = "'gem-kernels[train]'" if str(error.name).split(".")[0] in EXTRAS else error.name or "it"
        return f"needs pip install {package} ({text})"
    if isinstance(error, UnicodeError) or not isinstance(error, ValueError):
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            lower = LOWER.get(command, "the size of the model, of the batch or of the sequences")
            return f"out of memory ({text[:160] or 'MemoryError'}): lower {lower}"
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        what = type(error).__name__
        text = f"{what}: {text}" if text else what
        return f"{text[:400]} (--debug shows the traceback)"
    return text
