"""The arrows of the design: who may import whom, checked on the sources; and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "gem_kernels").rglob("*.py"))
GEM = sorted((ROOT / "gem").rglob("*.py"))

# Layers of gem, lowest first: a module imports from lower layers only.
LAYERS = [
    {"problems", "files", "adapters", "loading", "decoding"},
    {"ends", "sources", "config", "groups", "messages", "read", "runs", "training_flags"},
    {"chat_template", "converters", "shapes", "models", "spans", "rank", "sega", "losses", "rounding", "curves"},
    {"conversation", "formats", "head_transform", "head_product", "router_loss"},
    {"encoding", "records", "head_check", "extra_outputs"},
    {"data", "fused_call"},
    {"head"},
    {"rollout", "score", "doctor"},
    {"pipeline", "evaluate", "report"},
    {"trainer"},
    {"demo", "trl", "settings", "explain"},
    {"cli"},
    {"__main__"},
]


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere in it (type-checking blocks included)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_neither_gem_nor_transformers(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"gem", "transformers", "accelerate", "datasets", "peft"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_implementations_never_import_one_another(path: Path) -> None:
    if path.stem not in ("reference", "chunked", "triton"):
        return
    ours = {name for name in imports(path) if name.startswith("gem_kernels.")}
    for name in ours:
        assert name.split(".")[-1] not in ("op", "dispatch", "validation", "reference", "chunked", "triton"), name
    if path.stem == "reference":  # the definition shares no helper with what it checks
        assert {name.split(".")[1] for name in ours} <= {"types"}


@pytest.mark.parametrize("path", GEM, ids=lambda p: str(p.relative_to(ROOT)))
def test_gem_imports_public_names_of_the_kernels_only(path: Path) -> None:
    import gem_kernels

    for name in imports(path):
        if name.startswith("gem_kernels."):
            assert name.removeprefix("gem_kernels.") in gem_kernels.__all__, name


@pytest.mark.parametrize("path", GEM, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_of_gem_point_down(path: Path) -> None:
    if path.stem == "__init__":  # gem/__init__ offers fuse_lm_head when it is asked for, and imports nothing before
        assert imports(path) <= {"gem", "gem.head"}
        return
    (level,) = [i for i, layer in enumerate(LAYERS) if path.stem in layer]
    below = set().union(*LAYERS[:level])
    used = {name.split(".")[1] for name in imports(path) if name.startswith("gem.") and name.count(".") == 1}
    assert used <= below, f"{path.stem} imports {used - below}"


def test_every_file_reads_in_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in KERNELS + GEM if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_imports_without_triton_and_transformers() -> None:
    run(
        "import sys\n"
        "for name in ('triton', 'transformers', 'datasets', 'matplotlib'): sys.modules[name] = None\n"
        "import gem_kernels, torch\n"
        "s = gem_kernels.linear_logprob_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4]))\n"
        "assert s.logprob.shape == (2,)\n"
    )


def test_import_costs_little_beyond_torch() -> None:
    out = run("import time, torch\nt = time.perf_counter()\nimport gem_kernels\nprint(time.perf_counter() - t)")
    assert float(out) < 0.3


def test_the_configuration_needs_no_torch() -> None:
    run("import sys\nsys.modules['torch'] = None\nimport gem, gem.config, gem.report")
