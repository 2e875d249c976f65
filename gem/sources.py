"""Load pretrained models and tokenizers from a folder, a hub name, a folder of adapters, or a GGUF file."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gem.loading import loading

logger = logging.getLogger(__name__)

MODEL_SOURCES = "a folder, a hub name, a GGUF file or a config .json"
# The weights that make a folder an ordinary checkpoint; a config alone may lie beside a GGUF file.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
KEPT_WIDE = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # of models that load some weights in fp32 always


def gguf_file(source: str, what: str = "model") -> Path | None:
    """Return the GGUF file that a source is, or that a folder without other weights holds; None for other sources.

    Args:
        source: the path or name that the user gave.
        what: the argument that the user gave it for.

    Raises:
        ValueError: a file that is not GGUF, a missing .gguf, or a folder with several.
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
    """Return the tokenizer of a folder, hub name or GGUF file; adapters saved without a tokenizer have their base's.

    Raises:
        ValueError: there is none, or it does not load.
    """
    file = gguf_file(source, what)
    if file is not None and not (file.parent / "tokenizer.json").is_file():  # a tokenizer.json beside it is whole
        tokenizer = _own_tokens(_from_gguf(AutoTokenizer, file, what))
        if (
            tokenizer.eos_token == tokenizer.bos_token
        ):  # transformers 5.10 does this for every Llama; the config has the right end
            end = _from_gguf(AutoConfig, file, what).eos_token_id
            tokenizer.eos_token = tokenizer.eos_token if end is None else tokenizer.convert_ids_to_tokens(end)
        return tokenizer
    base = adapter_base(source)
    if base is not None and not any(Path(source).glob("tokenizer*")):
        _check_chain(source)
        return tokenizer_of(base, what)
    if what == "model" and base is None:
        check_config(source)
    with loading(what, source, "a folder or hub name with a tokenizer"):
        return AutoTokenizer.from_pretrained(source if file is None else str(file.parent), trust_remote_code=False)


def pretrained(source: str, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return the model of a folder, hub name or GGUF file (de-quantised); adapters are merged into their base.

    Args:
        source: the `model` that the user gave.
        model_class: of transformers; its from_pretrained loads the model, or the base under adapters.
        options: for from_pretrained.

    Raises:
        ValueError: there is no such model, or it does not load.
    """
    if adapter_base(source) is not None:
        model = merged(adapted(source, model_class, **options), source)
        model.name_or_path = source  # for adapters trained on it, which save it as their base
        return model.requires_grad_(True)  # peft freezes the base
    file = gguf_file(source)
    if file is not None:
        return _dequantised(model_class, file, **options)
    check_config(source)
    with loading("model", source, MODEL_SOURCES):
        model, found = model_class.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):  # transformers would make them anew and go on
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"its weights lack {missing[0]}{more}, which its config.json asks for")
        return model


def without_weights(source: str, **options: Any) -> Any:
    """Return the model of a folder or hub name with weights of any content, which take memory only once they are touched.

    Args:
        source: the `model` that the user gave.
        options: for from_config.

    Raises:
        ValueError: there is no such model, or its config does not load.
    """
    configs = configs_of(source)
    with loading("model", source, MODEL_SOURCES), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(configs.config, trust_remote_code=False, **options)
    if options.get("dtype") != torch.float32 and any(getattr(model, name, None) for name in KEPT_WIDE):
        return pretrained(source, **options)  # it alone knows which
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    model.tie_weights()
    model.generation_config = configs.generation_config or model.generation_config
    return model


class Configs(NamedTuple):
    """The configs of a pretrained model."""

    config: Any
    generation_config: Any


def configs_of(source: str) -> Configs:
    """Return the config and generation config of a folder, hub name or GGUF file; adapters have those of their base.

    Raises:
        ValueError: there is no such model, or its config does not load.
    """
    while (base := adapter_base(source)) is not None:
        _check_chain(source)
        source = base
    file = gguf_file(source)
    if file is not None:
        return Configs(_from_gguf(AutoConfig, file, "model"), None)
    with loading("model", source, MODEL_SOURCES):
        return Configs(AutoConfig.from_pretrained(source), _generation_config(source))


def _generation_config(source: str) -> Any:
    """Return the generation config of a folder or hub name, None for the many models that have none.

    Raises:
        ValueError: its ends are no token ids.
    """
    try:
        config = transformers.GenerationConfig.from_pretrained(source)
    except OSError:
        return None
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and abs(i) < 1 << 31 for i in ids) or (
            name == "eos_token_id" and min(ids, default=0) < 0
        ):
            raise ValueError(
                f"{name} of its generation_config.json must be a token's id or a list of them, got {value!r}"
            )
    return config


def adapted(source: str, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return the peft model of a folder of adapters; arguments as in `pretrained`.

    Raises:
        ValueError: the folder names no base, the base does not load, or the adapters do not fit it.
    """
    from peft import PeftModel

    base = adapter_base(source)
    assert base is not None
    _check_chain(source)
    if not any(Path(source).glob("adapter_model.*")):
        raise ValueError(
            f"model must be a folder of adapters with their weights, got {source!r} without adapter_model.*"
        )
    try:
        model = pretrained(base, model_class, **options)
    except ValueError as error:
        raise ValueError(f"{error} (the base that {Path(source) / 'adapter_config.json'} names)") from error
    expected, own = f"a folder of adapters of {base!r}", model.get_input_embeddings().weight.shape[0]
    with loading("model", source, expected):
        rows = _adapter_rows(Path(source), model)
    if rows is None and any(Path(source).glob("tokenizer*")):
        rows = max(own, len(tokenizer_of(source, "model")))
        if rows > own:
            logger.warning("%s: %d new tokens without their embeddings, which are made anew", source, rows - own)
    with loading("model", source, expected):
        if rows is not None and rows != own:
            model.resize_token_embeddings(rows)  # as in peft's auto classes: the adapters came with new tokens
        with warnings.catch_warnings():
            # Adapters missing from the file would keep their initial values, which have no effect.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, source)


def with_new_adapters(model: Any, rank: int) -> Any:
    """Return a model with LoRA of that rank on all its linear layers but the lm_head; the model itself for 0."""
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _check_chain(source: str) -> None:
    """Check that adapters of adapters of ... lead to a base.

    Raises:
        ValueError: the chain is circular.
    """
    passed: set[Path] = set()
    step: str | None = source
    while step is not None and (base := adapter_base(step)) is not None:
        if Path(step).resolve() in passed:
            raise ValueError(
                f"model must be adapters that come to a base, got {source!r}, whose base is of its own kind"
            )
        passed.add(Path(step).resolve())
        step = base


def check_config(source: str) -> None:
    """Check that transformers reads a folder's config.json, so that a bad one is reported before other errors follow from it.

    Raises:
        ValueError: transformers does not read it.
    """
    if (Path(source) / "config.json").is_file():
        with loading("model", source, "a folder whose config.json transformers reads"):
            AutoConfig.from_pretrained(source, trust_remote_code=False)


def _adapter_rows(folder: Path, model: Any) -> int | None:
    """Return the vocabulary size that adapters were trained with; None if they hold no rows of the vocabulary.

    The size of the tokenizer may differ: a vocabulary may be padded or cut.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    of_vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is m for m in of_vocabulary)]
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  a safetensors file is not a dict
            for name in names:
                _, found, part = key.partition(f".{name}.")
                shape: list[int] = tensors.get_slice(key).get_shape() if found else []
                if part.startswith("lora_embedding_A"):  # (r, V)
                    return shape[1]
                # lora_embedding_B has no vocabulary dimension; trainable single rows do not have all of it.
                if part.startswith("lora_B") or (part.endswith("weight") and "lora_" not in part):
                    return shape[0]
    return None


def merged(model: Any, source: str) -> Any:
    """Return the model under a peft model, with its adapters merged into its weights.

    Raises:
        ValueError: adapters that cannot be merged into a weight, such as learnt prompts.
    """
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    if not isinstance(model.base_model, BaseTuner):
        kind = model.peft_config[model.active_adapter].peft_type
        raise ValueError(f"model must have adapters that merge into its weights, got {source!r} with {kind}")
    base = model.get_base_model()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    weights = [getattr(layer, "weight", None) for layer in plain]
    if plain != layers and weights[0] is not None and weights[0] is weights[1]:
        # Two layers share their weight and only one has an adapter: without a copy, merging would change the other layer too.
        plain[1].weight = nn.Parameter(weights[1].detach().clone())
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    with loading("model", source, "a folder of adapters that merge into their base"):
        return model.merge_and_unload()


def adapter_base(source: str) -> str | None:
    """Return the base that a folder of adapters names; None for another kind of source.

    Raises:
        ValueError: adapters that name no base.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"model must have adapters whose config is JSON, got {file}: {error}") from None
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or not isinstance(base, str) or not settings.get("peft_type"):
        raise ValueError(f"model must name the base of its adapters and their peft_type, got {file} without")
    return base


def _dequantised(model_class: Any, file: Path, **options: Any) -> Any:
    """Return an ordinary model with the weights of a GGUF file, which can be trained and saved like any other."""
    if hasattr(transformers, "GgufConfig"):
        # Without this, newer releases keep the weights in quantised blocks if a kernel for them is installed. They also mark
        # a model without such blocks as quantised, which Trainer and save_pretrained then refuse.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _from_gguf(model_class, file, "model", **options)
    model.name_or_path = str(file.resolve())  # the base of later adapters; the default is only the folder
    logger.info("%s is a GGUF file: its weights are de-quantised to %s", file, str(model.dtype).removeprefix("torch."))
    return model


def _from_gguf(loader: Any, file: Path, what: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    except ImportError as error:
        raise ValueError(
            f"{what} {str(file)!r} is a GGUF file, which needs pip install 'gem-kernels[gguf]' ({error})"
        ) from None
    except Exception as error:  # the parser raises anything on a broken file: struct.error, KeyError, ...
        raise ValueError(
            f"{what} must be a whole GGUF file of an architecture that transformers reads, got {str(file)!r}: {error!r}"
        ) from None


def _own_tokens(tokenizer: Any) -> Any:
    """Return the tokenizer with only the tokens of its GGUF file.

    The conversion of a byte-level tokenizer adds GPT-2's <|endoftext|> if the file has none; the model has no embedding for it.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in content["added_tokens"] if token["id"] < tokenizer.vocab_size]
    if len(own) == len(content["added_tokens"]):
        return tokenizer
    backend = Tokenizer.from_str(json.dumps({**content, "added_tokens": own}))
    settings = {
        name: value for name, value in tokenizer.init_kwargs.items() if name.endswith("_token") and value is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **settings)
