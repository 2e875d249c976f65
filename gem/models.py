"""Models and tokenizers from the places that ModelArguments names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gem.config import ModelArguments
from gem.sources import MODEL_SOURCES, pretrained, tokenizer_of


def load_tokenizer(arguments: ModelArguments) -> Any:
    """A tokenizer with an end of sequence and a padding token.

    Raises:
        ValueError: no tokenizer named where one is needed, or one without an end of sequence.
    """
    source = arguments.tokenizer or arguments.model
    if not source:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    if source.endswith(".json"):
        if not arguments.tokenizer:
            raise ValueError(
                f"tokenizer must be given with a model from a config file, got none beside {arguments.model}"
            )
        if not Path(source).is_file():
            raise ValueError(f"tokenizer must be an existing file, got {source!r}")
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=source)
    else:
        tokenizer = tokenizer_of(source, "tokenizer" if arguments.tokenizer else "model")
    if arguments.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(arguments.eos_token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"eos_token must be a token of the tokenizer, got {arguments.eos_token!r}")
        # Added as special, not only named: else the decoder shows it as text, and it lands in the answer.
        tokenizer.add_special_tokens({"eos_token": arguments.eos_token})
    if tokenizer.eos_token is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        raise ValueError(
            f"eos_token must be given for this tokenizer, it names none; its special tokens: {special[:8]}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one CUDA where there is any, else the CPU.

    Args:
        name: as torch writes it: cpu, cuda, cuda:1, mps, ...; None: not named.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that is not here fails at its first use, each in its own way
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device must be one of this machine ({here}), got {name!r}: {why}") from None
    return device


def load_model(arguments: ModelArguments, tokenizer: Any, device: torch.device | str = "cpu") -> nn.Module:
    """A causal language model: pretrained, or from scratch where `model` is a config file; with LoRA on request.

    Args:
        arguments: where it comes from, its dtype, attention and adapters.
        tokenizer: from load_tokenizer; its special tokens become the model's.
        device: where the model goes.

    Returns:
        A transformers model, or a peft model around one.

    Raises:
        ValueError: no model named, an unknown file, or a vocabulary smaller than the tokenizer's.
    """
    if not arguments.model:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    dtype = getattr(torch, arguments.dtype)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model.endswith(".json"):
        if not Path(arguments.model).is_file():
            raise ValueError(f"model must be an existing file, got {arguments.model!r}")
        config = AutoConfig.from_pretrained(arguments.model)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    else:
        model = pretrained(arguments.model, dtype=dtype, **options)
    vocab = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab:
        raise ValueError(f"model must have at least the {len(tokenizer)} tokens of the tokenizer, got {vocab}")
    # generate() and Trainer would each align these with a warning of their own.
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    if arguments.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return cast(nn.Module, placed(model, device))


def placed(model: Any, device: torch.device | str) -> Any:
    """The model on that device. One that bitsandbytes quantised stays where it was loaded: it cannot be moved."""
    return model if getattr(model, "is_quantized", False) else model.to(device)
