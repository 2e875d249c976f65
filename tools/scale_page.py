"""Write the plans of docs/scale.md: what the dry runs of the recipes print.

    python -m tools.scale_page [--check]

Each plan stands between the markers `<!-- plan: COMMAND CONFIG -->` and `<!-- end of plan -->`. With --check nothing is
written, and the exit status is 1 if the page differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gem import cli
from gem.files import replacing

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scale.md"
BLOCK = re.compile(r"(<!-- plan: (\w+) (\S+) -->\n).*?(<!-- end of plan -->)", re.DOTALL)


def printed(command: str, config: str) -> str:
    """Return what a dry run prints, from the root of the repository, whose paths the configs hold.

    Raises:
        RuntimeError: it is refused.
    """
    out, before = io.StringIO(), Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out):
            status = cli.main([command, "--config", config, "--dry-run"])
    finally:
        os.chdir(before)
    if status:
        raise RuntimeError(f"the dry run of {config} ends with status {status}")
    return out.getvalue()


def updated(page: str) -> str:
    """Return the page with the plans of today."""
    return BLOCK.sub(lambda found: f"{found[1]}```\n{printed(found[2], found[3])}```\n{found[4]}", page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the plans of docs/scale.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page differs")
    check = parser.parse_args(argv).check
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if check:
        print("docs/scale.md is current" if new == page else "docs/scale.md differs: python -m tools.scale_page")
        return int(new != page)
    with replacing(PAGE) as out:
        out.write(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
