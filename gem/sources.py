"""Where a pretrained model comes from: a folder, a hub name, a folder of adapters, or a GGUF file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

MODEL_SOURCES = "a folder, a hub name, a GGUF file or a config .json"
# What makes a folder an ordinary checkpoint: its weights. A config alone may lie beside a GGUF file.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")


def gguf_file(source: str, what: str = "model") -> Path | None:
    """The GGUF file that a source is, or the one that a folder without other weights holds; None: it is something else.

    Args:
        source: what the user named.
        what: the argument that named it.

    Raises:
        ValueError: a file that is not GGUF, a .gguf that is not there, or a folder of several.
    """
    path = Path(source)
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(
                    f"{what} must be {MODEL_SOURCES}, got {source!r}, a file that does not begin with GGUF"
                )
        if path.suffix != ".gguf":
            raise ValueError(f"{what} must be named *.gguf, by which transformers knows it, got {source!r}")
        return path
    if path.suffix.lower() == ".gguf" and not path.exists():
        raise ValueError(f"{what} must be an existing file, got {source!r}")
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        return None
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file())
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{what} must be one GGUF file or a folder that holds one, got {source!r} with {names}")
    return found[0] if found else None


def tokenizer_of(source: str, what: str) -> Any:
    """The tokenizer of a folder, hub name or GGUF file.

    Raises:
        ValueError: there is none, or it does not load.
    """
    file = gguf_file(source, what)
    if file is not None and not (file.parent / "tokenizer.json").is_file():  # somebody has put a whole one beside it
        tokenizer = _own_tokens(_from_gguf(AutoTokenizer, file, what))
        if (
            tokenizer.eos_token == tokenizer.bos_token
        ):  # as transformers 5.10 has it of every Llama; the config is right
            end = _from_gguf(AutoConfig, file, what).eos_token_id
            tokenizer.eos_token = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(source if file is None else str(file.parent))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} must be a folder or hub name with a tokenizer, got {source!r}: {error}") from None


def pretrained(source: str, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a folder, hub name or GGUF file, whose weights are de-quantised; adapters are merged into their base.

    Args:
        source: what the user named as `model`.
        model_class: of transformers; its from_pretrained loads the model, or the base under adapters.
        options: of from_pretrained.

    Raises:
        ValueError: there is no such model, or it does not load.
    """
    if adapter_base(source) is not None:
        model = adapted(source, model_class, **options).merge_and_unload()
        model.name_or_path = source  # the base of adapters to come
        return model.requires_grad_(True)  # peft had frozen it
    file = gguf_file(source)
    if file is not None:
        return _dequantised(model_class, file, **options)
    try:
        return model_class.from_pretrained(source, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model must be {MODEL_SOURCES}, got {source!r}: {error}") from None


def adapted(source: str, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The peft model of a folder of adapters; arguments as in `pretrained`.

    Raises:
        ValueError: the folder names no base, or one that does not load.
    """
    from peft import PeftModel

    base = adapter_base(source)
    assert base is not None
    model = pretrained(base, model_class, **options)
    if (Path(source) / "tokenizer_config.json").is_file():
        tokens = len(AutoTokenizer.from_pretrained(source))
        if tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokens)  # as peft's own auto classes do: the adapters came with new tokens
    return PeftModel.from_pretrained(model, source)


def adapter_base(source: str) -> str | None:
    """The base that a folder of adapters names; None: it is another kind of source.

    Raises:
        ValueError: adapters that name none.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"model must have adapters whose config is JSON, got {file}: {error}") from None
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or not settings.get("peft_type"):
        raise ValueError(f"model must name the base of its adapters and their peft_type, got {file} without")
    return str(base)


def _dequantised(model_class: Any, file: Path, **options: Any) -> Any:
    """An ordinary model with the weights of a GGUF file: it trains, and it is saved as any other."""
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would leave the weights in their blocks where a kernel for them is installed; and without this, they
        # mark even a model without blocks as quantised, which Trainer then refuses and save_pretrained too.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _from_gguf(model_class, file, "model", **options)
    model.name_or_path = str(file.resolve())  # the base of adapters to come; by default the folder alone
    logger.info("%s is a GGUF file: its weights are de-quantised to %s", file, str(model.dtype).removeprefix("torch."))
    return model


def _from_gguf(loader: Any, file: Path, what: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    except ImportError as error:
        raise ValueError(
            f"{what} {str(file)!r} is a GGUF file, which needs pip install 'gem-kernels[gguf]' ({error})"
        ) from None
    except Exception as error:  # a parser of a broken file trips over anything: struct.error, KeyError, ...
        raise ValueError(
            f"{what} must be a whole GGUF file of an architecture that transformers reads, got {str(file)!r}: {error!r}"
        ) from None


def _own_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens of its GGUF file alone: the conversion of a byte-level one adds GPT-2's <|endoftext|> where
    the file has none, and the model has no embedding for it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in content["added_tokens"] if token["id"] < tokenizer.vocab_size]
    if len(own) == len(content["added_tokens"]):
        return tokenizer
    backend = Tokenizer.from_str(json.dumps({**content, "added_tokens": own}))
    settings = {
        name: value for name, value in tokenizer.init_kwargs.items() if name.endswith("_token") and value is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **settings)
