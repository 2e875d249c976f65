"""Special tokens of a model: what its configs hold while it is trained, and what is saved with it."""

from __future__ import annotations

import copy
import logging
import tempfile
from typing import Any

from transformers import GenerationConfig, TrainerCallback

from gem.ends import own_ends

logger = logging.getLogger(__name__)

_ALIGNERS = ("transformers.trainer_utils", "transformers.trainer")  # the logger to filter, by release of transformers
SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def settle_ends(model: Any, tokenizer: Any, *, scratch: bool = False, add_end: bool = False) -> None:
    """Set the special tokens in a model's config and generation config, which are saved with it.

    A pretrained model keeps its own ends and beginning, as those who serve it rely on them. If the tokenizer's end is not among
    its ends, both end a completion here, and a warning says so.

    Args:
        model: of transformers.
        tokenizer: with an end of sequence.
        scratch: the model is new and gets the special tokens of the tokenizer.
        add_end: the user set the tokenizer's end, which the model gets beside its own.
    """
    end = tokenizer.eos_token_id
    if scratch:
        for holder in _holders(model):
            for name in SPECIAL_IDS:
                setattr(holder, name, getattr(tokenizer, name))
    elif add_end:
        for holder in _holders(model):
            own = getattr(holder, "eos_token_id", None)
            several = list(own) if isinstance(own, list) else [own] if own is not None else []
            if end not in several:
                # A config with a single end keeps a single one: some readers take no list there.
                keeps_one = not isinstance(holder, GenerationConfig) and not isinstance(own, list)
                holder.eos_token_id = end if keeps_one or not several else [end, *several]
    elif end not in (named := own_ends(model)):
        logger.warning(
            "the tokenizer's end of sequence %s is none of the model's %s: each of them ends a completion here, and what is "
            "saved keeps the model's; --eos_token %r adds it",
            tokenizer.eos_token, tokenizer.convert_ids_to_tokens(sorted(named)), tokenizer.eos_token,
        )  # fmt: skip


def _holders(model: Any) -> list[Any]:
    """Return the configs of a model that hold special tokens: its config, its text config, and its generation config."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [config, text, getattr(inner, "generation_config", None)]
    return list({id(holder): holder for holder in found if holder is not None}.values())


def check_savable(model: Any) -> None:
    """Check that transformers will save the model's generation config, before training rather than after it.

    Many published configs have sampling settings without do_sample, which some releases refuse to save once changed. Such a
    config gets do_sample=True, as intended, with a warning.

    Raises:
        ValueError: transformers refuses it for another reason.
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
    """Return the reason why transformers will not save a generation config, in one line; None if it will."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            return " ".join(str(error).split())
    return None


class KeepSpecialTokens(TrainerCallback):
    """Restore a model's special tokens, which Trainer.train sets to the tokenizer's before it begins.

    Construct it before train(). It also filters transformers' warning about the change, which does not last.
    """

    def __init__(self, model: Any) -> None:
        self.original = [
            (holder, {name: copy.copy(getattr(holder, name)) for name in SPECIAL_IDS if hasattr(holder, name)})
            for holder in _holders(model)
        ]
        for name in _ALIGNERS:
            logging.getLogger(name).addFilter(_not_of_alignment)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name in _ALIGNERS:
            logging.getLogger(name).removeFilter(_not_of_alignment)
        for holder, values in self.original:
            for name in SPECIAL_IDS:
                if name in values:
                    setattr(holder, name, values[name])
                elif hasattr(holder, name):
                    delattr(holder, name)


def _not_of_alignment(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("The tokenizer has new PAD/BOS/EOS tokens")
