"""Errors of model files that do not load, in one line: which file, and what to do."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gem.files import seems_to_be

JSON_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt")


@contextmanager
def loading(what: str, source: str, expected: str) -> Iterator[None]:
    """Turn any error of the block, in which other libraries read model files, into a ValueError of one line.

    Args:
        what: the argument that named the source.
        source: the path or name that the user gave.
        expected: a description of a valid source.

    Raises:
        ValueError: names the damaged or missing file if known, else gives the first error's reason.
    """
    damage = damaged(Path(source))
    if damage is not None:
        raise ValueError(f"{what} must be a folder of whole files, got {source!r}: {damage}")
    try:
        yield
    except Exception as error:  # loaders fail on broken files with KeyError, AttributeError, a bare Exception, ...
        raise ValueError(f"{what} must be {expected}, got {source!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return an exception as one line, with advice for the common ones."""
    text, name = " ".join(str(error).split()), type(error).__name__
    if "trust_remote_code" in text:
        return (
            "it needs code of its own beside its weights, which is not run here: take a model that transformers knows"
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or "torch.load" in text:
        return "its weights are a pickle that torch does not load: convert them to safetensors"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other sizes than its config.json says: take both from one place"
    if "Repo id must" in text:  # transformers takes any source that is not a folder for a hub name
        return "no such folder, and no name on the hub"
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed: {_short(text)}"
    is_clear = isinstance(error, (ValueError, OSError, RuntimeError, Warning)) and text
    return _short(text) if is_clear else f"transformers does not read it ({name}: {_short(text)})"


def _short(text: str, most: int = 300) -> str:
    """Cut a text to one line's length: some messages list every class of a package."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def damaged(folder: Path) -> str | None:
    """Return the first damaged file of a model's folder, and what to do; None if none is known or the source is no folder.

    transformers ignores some of these files silently: a model without its generation config would lose its ends.
    """
    if not folder.is_dir():
        return None
    files = sorted(folder.iterdir())
    for file in files:
        why = None
        if file.name in JSON_FILES or file.name.endswith(".index.json"):
            why = _no_json(file, {f.name for f in files})
        elif file.name in TEXT_FILES:
            why = _no_text(file)
        elif file.suffix == ".safetensors":
            why = no_tensors(file)
        elif file.suffix == ".bin" and _start(file, 2) == b"PK" and not zipfile.is_zipfile(file):
            why = "is cut off"
        if why is not None:
            return f"{file.name} {why}: fetch or save it again"
    return None


def _no_text(file: Path) -> str | None:
    """Return why a file holds no UTF-8 text; None if it does."""
    try:
        kind = seems_to_be(_start(file, 64))
        if not kind:
            file.read_text(encoding="utf-8")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text ({error})"
    return f"is not text but {kind}" if kind else None


def _no_json(file: Path, names: set[str]) -> str | None:
    """Return why a file holds no JSON object, or which files an index names that are not among `names`; None if all is well."""
    if (why := _no_text(file)) is not None:
        return why
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(content, dict):
        return f"must hold a JSON object, got {type(content).__name__}"
    if file.name == "tokenizer.json" and not {"model", "added_tokens"} <= content.keys():
        return "is not of the tokenizers library"
    if not file.name.endswith(".index.json"):
        return None
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        return "must hold a weight_map"
    missing = sorted({str(name) for name in shards.values()} - names)
    return f"names {', '.join(missing[:3])}, not there" if missing else None


def no_tensors(file: Path) -> str | None:
    """Return why a file is not a safetensors file; None if it is one."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except SafetensorError as error:
        start = _start(file, 64)
        if start.startswith(b"version https://git-lfs"):
            return "is a pointer of git-lfs, not the weights (git lfs pull brings them)"
        kind = seems_to_be(start)
        seems = "" if kind in ("", "safetensors", "binary") else f": it seems to be {kind}"
        return f"is cut off or no safetensors file ({error}{seems})"


def _start(file: Path, length: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(length)
