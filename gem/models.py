"""Models and tokenizers from the places that ModelArguments names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gem.config import ModelArguments


def load_tokenizer(arguments: ModelArguments) -> Any:
    """A tokenizer with an end of sequence and a padding token.

    Raises:
        ValueError: no tokenizer named where one is needed, or one without an end of sequence.
    """
    source = arguments.tokenizer or arguments.model
    if not source:
        raise ValueError("model must be a folder, a hub name or a config .json, got nothing")
    if source.endswith(".json"):
        if not arguments.tokenizer:
            raise ValueError(
                f"tokenizer must be given with a model from a config file, got none beside {arguments.model}"
            )
        if not Path(source).is_file():
            raise ValueError(f"tokenizer must be an existing file, got {source!r}")
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=source)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            what = "tokenizer" if arguments.tokenizer else "model"
            raise ValueError(f"{what} must be a folder or hub name with a tokenizer, got {source!r}: {error}") from None
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


def load_model(arguments: ModelArguments, tokenizer: Any) -> nn.Module:
    """A causal language model: pretrained, or from scratch where `model` is a config file; with LoRA on request.

    Raises:
        ValueError: no model named, an unknown file, or a vocabulary smaller than the tokenizer's.
    """
    if not arguments.model:
        raise ValueError("model must be a folder, a hub name or a config .json, got nothing")
    dtype = getattr(torch, arguments.dtype)
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model.endswith(".json"):
        if not Path(arguments.model).is_file():
            raise ValueError(f"model must be an existing file, got {arguments.model!r}")
        config = AutoConfig.from_pretrained(arguments.model)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    else:
        model = _pretrained(arguments.model, dtype=dtype, **options)
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
    return cast(nn.Module, model)


def _pretrained(source: str, **options: Any) -> Any:
    """The model of a folder or hub name. Adapters are merged into their base: training goes on from what they reached."""
    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"model must name the base of its adapters, got none in {adapter}")
        model: Any = PeftModel.from_pretrained(_pretrained(base, **options), source).merge_and_unload()
        model.name_or_path = source  # the base of adapters to come
        return model.requires_grad_(True)  # peft had frozen it
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(f"model must be a folder, a hub name or a config .json, got {source!r}: {error}") from None
