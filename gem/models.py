"""Models and tokenizers from the places that ModelArguments names."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, TrainerCallback

from gem.config import ModelArguments
from gem.ends import Ends, ends_of, model_ends, own_ends
from gem.loading import loading
from gem.sources import MODEL_SOURCES, configs_of, pretrained, tokenizer_of

logger = logging.getLogger(__name__)


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
        with loading("tokenizer", source, "a tokenizer.json of tokenizers"):
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
        tokenizer: from load_tokenizer; its special tokens become those of a model from scratch. Its padding token is
            replaced where the model has no embedding for it.
        device: where the model goes.

    Returns:
        A transformers model, or a peft model around one.

    Raises:
        ValueError: no model named, a file that is unknown or damaged, a vocabulary smaller than the tokenizer's, or a
            generation config that could not be saved again.
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
        model = pretrained(arguments.model, dtype=dtype, **options)
    _check_vocabulary(model, tokenizer)
    settle_ends(model, tokenizer, scratch=scratch, asked=arguments.eos_token is not None)
    check_savable(model)
    if arguments.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return cast(nn.Module, placed(model, device))


def source_ends(arguments: ModelArguments, tokenizer: Any, stop: Sequence[str] = ()) -> Ends:
    """gem.ends.model_ends of a model that is not loaded yet, so that bad data are told before its weights are read.

    Raises:
        ValueError: no model named, or a config that does not load.
    """
    if not arguments.model:
        raise ValueError(f"model must be {MODEL_SOURCES}, got nothing")
    if arguments.model.endswith(".json"):
        return ends_of(tokenizer, None, stop)
    return model_ends(configs_of(arguments.model), tokenizer, stop)


_ALIGNERS = ("transformers.trainer_utils", "transformers.trainer")  # whose logger, by release
SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def settle_ends(model: Any, tokenizer: Any, *, scratch: bool = False, asked: bool = False) -> None:
    """Decide what a model's config and generation config say of its special tokens; they are saved with it.

    A pretrained model keeps what it says, its several ends and its beginning: whoever serves it relies on them. Where the
    tokenizer's end is not among them, both end a completion here, and a warning says so.

    Args:
        model: of transformers.
        tokenizer: with an end of sequence.
        scratch: the model says nothing yet: it gets the special tokens of the tokenizer.
        asked: the user named the tokenizer's end: the model gets it beside its own.
    """
    end = tokenizer.eos_token_id
    if scratch:
        for holder in _holders(model):
            for name in SPECIAL_IDS:
                setattr(holder, name, getattr(tokenizer, name))
    elif asked:
        for holder in _holders(model):
            own = getattr(holder, "eos_token_id", None)
            several = list(own) if isinstance(own, list) else [own] if own is not None else []
            if end not in several:
                # A config names one where it named one before: some readers take no list there.
                keeps_one = not isinstance(holder, GenerationConfig) and not isinstance(own, list)
                holder.eos_token_id = end if keeps_one or not several else [end, *several]
    elif end not in (named := own_ends(model)):
        logger.warning(
            "the tokenizer's end of sequence %s is none of the model's %s: each of them ends a completion here, and what is "
            "saved keeps the model's; --eos_token %r adds it",
            tokenizer.eos_token, tokenizer.convert_ids_to_tokens(sorted(named)), tokenizer.eos_token,
        )  # fmt: skip


def _holders(model: Any) -> list[Any]:
    """Who says something of special tokens: a model's config, that of its text part, and its generation config."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [config, text, getattr(inner, "generation_config", None)]
    return list({id(holder): holder for holder in found if holder is not None}.values())


def check_savable(model: Any) -> None:
    """Whether transformers will save the model's generation config: known now, not when the training is over.

    One with settings of sampling but without do_sample is published often, and refused by some releases once changed: it gets
    do_sample, which it means, with a warning.

    Raises:
        ValueError: it is refused for something else.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _refusal(config) is None:
        return
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    reason = _refusal(sampling)
    if reason is not None:
        raise ValueError(f"model must have a generation_config.json that transformers saves again, got {reason}")
    config.do_sample = True
    logger.warning(
        "generation_config.json has settings of sampling without do_sample: what is saved has do_sample=true"
    )


def _refusal(config: Any) -> str | None:
    """Why transformers will not save a generation config, in a line; None: it will."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            return " ".join(str(error).split())
    return None


class KeepSpecialTokens(TrainerCallback):
    """Puts back what a model said of its special tokens: Trainer.train sets them to the tokenizer's before it begins.

    Construct it before train(). transformers warns of its change, which does not last: that warning is left out.
    """

    def __init__(self, model: Any) -> None:
        self.said = [
            (holder, {name: copy.copy(getattr(holder, name)) for name in SPECIAL_IDS if hasattr(holder, name)})
            for holder in _holders(model)
        ]
        for name in _ALIGNERS:
            logging.getLogger(name).addFilter(_not_of_alignment)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name in _ALIGNERS:
            logging.getLogger(name).removeFilter(_not_of_alignment)
        for holder, values in self.said:
            for name in SPECIAL_IDS:
                if name in values:
                    setattr(holder, name, values[name])
                elif hasattr(holder, name):
                    delattr(holder, name)


def _not_of_alignment(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("The tokenizer has new PAD/BOS/EOS tokens")


def position_limit(model: Any) -> tuple[int, bool]:
    """How many tokens a row may have, and whether the model can take no more: it looks positions up in a table.

    (0, False): no limit is known. Rotary positions are computed for any length; beyond the limit the model is untrained.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(config, "rope_parameters", None) is not None:
        return limit or 0, False
    if limit is None:
        bias = getattr(config, "max_seq_len", None)  # of MPT, whose bias by distance is such a table
        return bias or 0, bias is not None

    def is_table(name: str, rows: int) -> bool:
        own = name.rsplit(".", 1)[-1]
        return ("pos" in own or own == "wpe") and limit <= rows <= limit + 8  # some leave the first rows to padding

    tables = [(name, m.num_embeddings) for name, m in inner.named_modules() if isinstance(m, nn.Embedding)]
    tables += [(name, max(buffer.shape, default=0)) for name, buffer in inner.named_buffers()]
    return limit, any(is_table(name, rows) for name, rows in tables)


def check_positions(model: Any, length: int, what: str) -> None:
    """Whether a model takes rows of `length` tokens; one that does but was not trained for them is warned of, once.

    Args:
        model: of transformers, or a peft model around one.
        length: tokens of the longest row.
        what: the setting that makes it so long, for the message.

    Raises:
        ValueError: the model has fewer positions.
    """
    limit, hard = position_limit(model)
    if not limit or length <= limit:
        return
    if hard:
        raise ValueError(f"{what} must fit into the model's {limit} positions, got a row of {length} tokens")
    _warn_of_long_rows(limit)


@cache
def _warn_of_long_rows(limit: int) -> None:
    logger.warning("rows are longer than max_position_embeddings=%d of the model, for which it was trained", limit)


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Whether the model has an embedding for every token. A padding token needs none: the end of sequence pads as well.

    Raises:
        ValueError: it has not.
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
    """The model on that device. One that bitsandbytes quantised stays where it was loaded: it cannot be moved.

    Raises:
        ValueError: the device has no room for it, or not its dtype.
    """
    if getattr(model, "is_quantized", False):
        return model
    try:
        return model.to(device)
    except (RuntimeError, TypeError) as error:  # out of memory is a RuntimeError
        why = " ".join(str(error).split())
        raise ValueError(
            f"device must take the model in its dtype {model.dtype}, got {str(device)!r}: {why}"
        ) from error
