"""Hashes of what goes into a run, 16 hexadecimal digits each: data, tokenizer and model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

DIGITS = 16
BLOCK = 1 << 18  # elements of a tensor that are summed at once
# Odd, hence invertible modulo 2^64: a change of one element never cancels. The first is 2^64 over the golden ratio.
_STEP, _BASE = 0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D


def data_hash(source: str) -> str:
    """Hash a file, or the files of a folder with their names; "" if `source` is neither, such as the name of a hub dataset.

    Files and folders whose names begin with a dot are passed over: they are no data.
    """
    path = Path(source)
    if path.is_file():
        return file_hash(path)[:DIGITS]
    if not path.is_dir():
        return ""
    names = {p.relative_to(path): p for p in path.rglob("*") if p.is_file()}
    seen = sorted((name.as_posix(), p) for name, p in names.items() if not any(x.startswith(".") for x in name.parts))
    return _text_hash(f"{name} {file_hash(p)}" for name, p in seen)


def source_hash(source: str, examples: Iterable[Any]) -> str:
    """Hash a file or folder, of a hub dataset the records that were read from it."""
    return data_hash(source) or records_hash(examples)


def records_hash(examples: Iterable[Any]) -> str:
    """Hash records that were read, gem.data.Example: texts and token ids, in order."""
    return _text_hash(json.dumps(vars(example)) for example in examples)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer makes of texts and chats: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # left there by the last call
        rules.pop("padding", None)
    else:
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), added]
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _text_hash(json.dumps(part, sort_keys=True) for part in (rules, named, tokenizer.chat_template))


def model_hash(model: nn.Module) -> str:
    """Hash the name, shape, dtype and every bit of each tensor of a model's state, tied tensors once, and the model's configs.

    The sums run on the tensors' device and are exact: CPU and CUDA give the same. They take some MiB.
    """
    import torch

    from gem.distributed import local_part

    sums, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            sums[f"{name} {tuple(tensor.shape)} {tensor.dtype}"] = _checksum(local_part(tensor.detach()))
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    texts = [json.dumps(_content(config), sort_keys=True, default=str) for config in configs if config is not None]
    return _text_hash([*(f"{what} {int(total)}" for what, total in sums.items()), *texts])


def state_hash(model: nn.Module) -> str:
    """Hash what a forward in evaluation mode depends on: model_hash, all buffers, and which adapters are on.

    Of a sharded model it is the hash of this process's part.
    """
    buffers = [
        f"{name} {int(_checksum(buffer.detach().contiguous()))}"
        for name, buffer in model.named_buffers()
        if buffer.numel()
    ]
    switches = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    tuned = [
        f"{name} {[getattr(module, switch, None) for switch in switches]}"
        for name, module in model.named_modules()
        if hasattr(module, "_active_adapter")
    ]
    return _text_hash([model_hash(model), *buffers, *tuned])


def _content(config: Any) -> dict[str, Any]:
    """Return what a config says of the model, without where it lies and which release wrote it."""
    return {
        k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "name_or_path", "transformers_version")
    }


def _checksum(tensor: Tensor) -> Tensor:
    """Return sum_b base^(B - b) sum_i odd_i x_bi modulo 2^64 of the elements x, as integers, of the blocks b."""
    import torch

    words = tensor.reshape(-1).view({1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32))
    at = torch.arange(min(BLOCK, len(words)), device=tensor.device) * _STEP  # integers wrap around on every device
    odd = (at ^ (at >> 29)) | 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in words.split(BLOCK) if len(words) else ():
        total = total * _BASE + (odd[: len(block)] * block).sum()
    return total


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()[:DIGITS]
