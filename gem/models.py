"""Load models and tokenizers from the sources that ModelArguments names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gem.config import ModelArguments
from gem.ends import Ends, ends_of, model_ends
from gem.finite import not_finite_weights
from gem.launch import takes_weights
from gem.loading import loading
from gem.sources import (
    MODEL_SOURCES,
    adapter_base,
    configs_of,
    gguf_file,
    pretrained,
    tokenizer_of,
    with_new_adapters,
    without_weights,
)
from gem.special_tokens import check_savable, settle_ends

logger = logging.getLogger(__name__)


def load_tokenizer(arguments: ModelArguments) -> Any:
    """Return a tokenizer with an end of sequence and a padding token.

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
        with loading("tokenizer", source, "a tokenizer.json of tokenizers"):
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=source)
    else:
        tokenizer = tokenizer_of(source, "tokenizer" if arguments.tokenizer else "model")
    if arguments.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(arguments.eos_token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"eos_token must be a token of the tokenizer, got {arguments.eos_token!r}")
        # Add it as a special token: if only named, the decoder would show it as text, and in the answer.
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
    """Return the device of that name; by default CUDA if available, else the CPU.

    Args:
        name: in torch's form: cpu, cuda, cuda:1, mps, ...; None: the default.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a missing device fails only at its first use, each with another error
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device must be one of this machine ({here}), got {name!r}: {why}") from None
    return device


def load_model(arguments: ModelArguments, tokenizer: Any, device: torch.device | str = "cpu") -> nn.Module:
    """Return a causal language model: pretrained, or from scratch if `model` is a config file; with LoRA on request.

    Args:
        arguments: the source, dtype, attention and adapters.
        tokenizer: from load_tokenizer; its special tokens become those of a model from scratch. Its padding token is
            replaced if the model has no embedding for it.
        device: where the model goes.

    Returns:
        A transformers model, or a peft model around one.

    Raises:
        ValueError: no model named, a file that is unknown or damaged, weights that are not finite, a vocabulary smaller than
            the tokenizer's, or a generation config that could not be saved again.
    """
    if not arguments.model:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    dtype = getattr(torch, arguments.dtype)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    scratch = arguments.model.endswith(".json")
    if scratch:
        if not Path(arguments.model).is_file():
            raise ValueError(f"model must be an existing file, got {arguments.model!r}")
        with loading("model", arguments.model, "the config .json of a causal language model"):
            config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    else:
        # What reads adapters or a GGUF file makes weights of its own.
        is_plain = adapter_base(arguments.model) is None and gguf_file(arguments.model) is None
        load = without_weights if takes_weights() and is_plain else pretrained
        model = load(arguments.model, dtype=dtype, **options)
    _check_vocabulary(model, tokenizer)
    settle_ends(model, tokenizer, scratch=scratch, add_end=arguments.eos_token is not None)
    check_savable(model)
    model = placed(with_new_adapters(model, arguments.lora_rank), device)
    if not takes_weights() and (problem := not_finite_weights(model)):
        raise ValueError(f"model must have finite weights, got {problem} in {arguments.model!r}")
    return cast(nn.Module, model)


def source_ends(arguments: ModelArguments, tokenizer: Any, stop: Sequence[str] = ()) -> Ends:
    """Return gem.ends.model_ends for a model that is not loaded yet, to report bad data before its weights are read.

    Raises:
        ValueError: no model named, or a config that does not load.
    """
    if not arguments.model:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    if arguments.model.endswith(".json"):
        return ends_of(tokenizer, None, stop)
    return model_ends(configs_of(arguments.model), tokenizer, stop)


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that the model has an embedding for every token; the end of sequence replaces a padding token without one.

    Raises:
        ValueError: another token has no embedding.
    """
    rows, vocabulary = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    beyond = {token for token, i in vocabulary.items() if i >= rows}
    if beyond and beyond == {tokenizer.pad_token} and tokenizer.eos_token_id < rows:
        logger.warning("the model has no embedding for %s, which pads: the end of sequence pads", tokenizer.pad_token)
        tokenizer.pad_token = tokenizer.eos_token
    elif beyond:
        needed = max(vocabulary.values()) + 1
        raise ValueError(f"model must have at least the {needed} tokens of the tokenizer, got {rows}")


def placed(model: Any, device: torch.device | str) -> Any:
    """Return the model on that device; a model quantised by bitsandbytes cannot be moved and stays where it was loaded.

    Raises:
        ValueError: the device has no room for it, or does not support its dtype.
    """
    if getattr(model, "is_quantized", False):
        return model
    try:
        return model.to(device)
    except (RuntimeError, TypeError) as error:  # includes out of memory
        why = " ".join(str(error).split())
        raise ValueError(
            f"device must take the model in its dtype {model.dtype}, got {str(device)!r}: {why}"
        ) from error
