"""The structure of the packages, read from their sources: levels, public names, lengths; and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools import levels
from tools.levels import LEVELS, ROOT, arrows, imports, violations

FILES = sorted(
    path for folder in ("gem_kernels", "gem", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
KERNELS = levels.modules("gem_kernels")
GEM = levels.modules("gem")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", LEVELS)
def test_every_arrow_points_down(package: str) -> None:
    assert not violations(package, LEVELS[package], levels.read(package))


def test_the_command_lists_levels_and_fails_on_an_upward_arrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert levels.main(["--arrows"]) == 0
    assert "softmax -> operands, types" in capsys.readouterr().out
    swapped = [LEVELS["gem_kernels"][1], LEVELS["gem_kernels"][0], *LEVELS["gem_kernels"][2:]]
    monkeypatch.setitem(LEVELS, "gem_kernels", swapped)
    assert levels.main([]) == 1
    assert "WRONG: gem_kernels.operands (level 0) imports gem_kernels.types (level 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "import gem_kernels.high",
        "from gem_kernels import high",
        "from gem_kernels.high import name",
        "def f():\n    from gem_kernels.high import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gem_kernels.high import Name",
        "from importlib import import_module\nimport_module('gem_kernels.high')",
        "import importlib\nimportlib.import_module(name='gem_kernels.high')",
        "from importlib import import_module as load\nload('gem_kernels.high')",
        "from importlib import import_module\nimport_module('.high', 'gem_kernels')",
        "__import__('gem_kernels.high')",
        "import sys\nsys.modules['gem_kernels.high']",
        "import gem_kernels\ngem_kernels.high.name()",
        "import gem_kernels as g\ng.high.name()",
    ],
)
def test_an_upward_import_is_found(line: str) -> None:
    sources = {"low": line, "high": ""}
    expected = ["gem_kernels.low (level 0) imports gem_kernels.high (level 1)"]
    assert violations("gem_kernels", [{"low"}, {"high"}], sources) == expected
    sideways = violations("gem_kernels", [{"low", "high"}], sources)
    assert sideways == ["gem_kernels.low (level 0) imports gem_kernels.high (level 0)"]


def test_a_public_name_is_an_arrow_to_the_package() -> None:
    for line in ("import gem_kernels as g\ng.sega_loss()", "from gem_kernels import sega_loss", "import gem_kernels"):
        assert arrows("gem_kernels", line, list(KERNELS)) == {""}


def test_a_computed_import_is_refused() -> None:
    found = violations("gem", [{"low"}], {"low": "from importlib import import_module\nimport_module(name)"})
    assert found == ["gem.low imports a module whose name is computed: what it imports cannot be read"]


@pytest.mark.parametrize(
    "line",
    [
        "import torch\n_ops = torch.ops.gem_kernels\n",
        "import torch as t\nt.ops.gem_kernels.linear_logprob()\n",
        "from torch import ops\nops.gem_kernels.linear_logprob()\n",
        "import torch\ngetattr(torch.ops, 'gem_kernels')\n",
    ],
)
def test_a_call_of_an_operator_is_an_arrow(line: str) -> None:
    operator = arrows("gem_kernels", line, list(KERNELS))
    assert operator == {"linear_logprob.op", "logprob.op", "group_loss.op", "scoring.op"}


def test_a_call_of_the_dispatcher_is_an_arrow() -> None:
    known = list(KERNELS)
    dispatched = arrows("gem_kernels", "implementation('logprob', impl).forward()", known)
    assert dispatched == {"logprob.chunked", "logprob.triton"}


def test_a_module_without_a_level_and_a_level_without_a_module_are_found() -> None:
    found = violations("gem", [{"gone"}], {"new": ""})
    assert found == ["gem.new has no level: add it to tools/levels.py", "gem.gone has a level and no file"]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_know_neither_gem_nor_transformers(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(read(KERNELS[module]))}
    assert not tops & {"gem", "transformers", "accelerate", "datasets", "peft"}


@pytest.mark.parametrize("module", [m for m in KERNELS if m.endswith((".reference", ".chunked", ".triton"))])
def test_implementations_never_import_one_another(module: str) -> None:
    used = arrows("gem_kernels", read(KERNELS[module]), list(KERNELS))
    for name in used:
        assert name.split(".")[-1] not in ("op", "dispatch", "validation", "reference", "chunked", "triton"), name
    if module.endswith(".reference"):  # the definition shares no helper with what it checks
        assert used <= {"types", "definition"}
    else:
        assert "definition" not in used


@pytest.mark.parametrize("module", GEM)
def test_gem_imports_public_names_of_the_kernels_only(module: str) -> None:
    import gem_kernels

    for name in imports(read(GEM[module])):
        if name.startswith("gem_kernels."):
            assert name.split(".")[1] in gem_kernels.__all__, name


def test_every_function_reads_in_one_sitting() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
        for path in FILES
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.FunctionDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 100
    }
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
