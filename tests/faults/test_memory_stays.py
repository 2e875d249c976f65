"""200 online steps: the memory of the process stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from plants import WatchMemory
from world import MODES


@pytest.mark.fault("memory: 200 steps of online training")
def test_memory_is_flat(folder: Path, row: Callable[[str, str], None]) -> None:
    """Up to step 50 caches fill: of the allocator, of the tokenizer, of torch for each new shape. Means smooth the rest."""
    flags = ("--max_steps", "200", "--eval_steps", "20", "--save_steps", "20")
    MODES["train online"].start(folder, *flags, plants=[WatchMemory("rss")]).end().ended()
    rss = [int(line) for line in (folder / "rss").read_text().split()]
    assert len(rss) == 200
    early, late = mean(rss[50:75]), mean(rss[175:200])
    print(f"{early / 2**20:.1f} MiB -> {late / 2**20:.1f} MiB")
    assert late < 1.05 * early
    row("nothing", "resident memory of steps 175 to 200 is within 5 % of that of steps 50 to 75")
