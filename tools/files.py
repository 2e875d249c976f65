"""JSON files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gem.files import replacing

Json = dict[str, Any]


def write_json(path: Path, document: Any) -> None:
    with replacing(path) as out:
        out.write(json.dumps(document, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Return the document, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
