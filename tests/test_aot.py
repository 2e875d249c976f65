"""The compile report: every kernel of the library, compiled for every architecture, stays within its budget."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tools import aot, aot_budget, aot_cases

pytest.importorskip("triton", reason="there is no Triton for this platform")

ROOT = Path(__file__).parent.parent
# Kernels for one dtype: entropies are fp32, cached exponentials bf16.
ONLY = {
    "_span_topm_mean_fwd_kernel": ["fp32"],
    "_span_topm_mean_bwd_kernel": ["fp32"],
    "_row_exponentials_kernel": ["bf16"],
    "_follow_maximum_kernel": ["bf16"],
    "_fold_target_kernel": ["bf16"],
}
ROW = aot_budget.Row(
    kernel="_some_kernel",
    case="case",
    variant="128x256 SOFTCAP",
    dtype="bf16",
    arch=90,
    threads=256,
    registers=128,
    spills=0,
    shared=100 << 10,
    tensor_memory=0,
    multiplies=True,
    instructions=["wgmma.mma_async"],
    instructions_per_logit=None,
    barriers=None,
    blocks=2,
)
# The same numbers at the edge of the budget of a kernel that walks rows.
WALKS = ROW._replace(
    kernel="_row_statistics_kernel",
    case="logits",
    multiplies=False,
    instructions=[],
    instructions_per_logit=14.0,
    barriers=3,
)


def report(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process: kernels that were imported as interpreted cannot be compiled."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot", *args]
    return subprocess.run(command, cwd=ROOT, env=inherited | env, capture_output=True, text=True, timeout=900)


def kernels() -> set[str]:
    """Return the names of launched functions under @triton.jit, which are called `_*_kernel`."""
    return {
        node.name
        for path in (ROOT / "gem_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("_")
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@pytest.mark.slow
def test_every_kernel_compiles_within_its_budget_on_every_architecture(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # fp16 compiles to the same code as bf16 but for its conversions: here each kernel once; `make aot` compiles every case.
    fp16 = ("--dtype", "fp16", "--case", "linear", "chunked", "logits", "hand-over")
    rows, table = [], ""
    for name, selected in (("wide", ("--dtype", "bf16", "fp32")), ("fp16", fp16)):
        done = report("--json", str(tmp_path / f"{name}.json"), "--markdown", str(tmp_path / f"{name}.md"), *selected)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        rows += [aot_budget.Row(**row) for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
        table += (tmp_path / f"{name}.md").read_text()
    assert not [what for row in rows for what in aot_budget.violations(row)]
    assert min(row.blocks for row in rows) >= 1
    assert {row.kernel for row in rows} == kernels(), "tools.aot_cases.CASES launches the kernels of the library"
    for kernel in kernels():
        compiled = {(row.dtype, row.arch) for row in rows if row.kernel == kernel}
        assert compiled == set(product(ONLY.get(kernel, aot_cases.DTYPES), aot_budget.MULTIPROCESSORS)), kernel
    assert all(f"| {kernel} " in table for kernel in kernels())
    assert not list(tmp_path.glob("*.part"))


def test_a_row_within_budget_violates_nothing() -> None:
    assert aot_budget.violations(ROW) == []
    assert aot_budget.violations(ROW._replace(multiplies=False, instructions=[])) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 8}, "spills 8 bytes of registers"),
        ({"shared": (227 << 10) + 1}, "needs 232449 bytes of shared memory, of 232448"),
        (
            {"arch": 80, "shared": 164 << 10, "instructions": ["mma.sync"]},
            "needs 167936 bytes of shared memory, of 166912",
        ),
        ({"arch": 100, "tensor_memory": 784}, "needs 784 columns of tensor memory, of 512"),
        ({"instructions": []}, "multiplies matrices without wgmma.mma_async"),
        ({"instructions": ["mma.sync"]}, "multiplies matrices without wgmma.mma_async"),
    ],
)
def test_what_breaks_the_budget_is_said(change: dict[str, object], said: str) -> None:
    row = ROW._replace(**change)
    assert aot_budget.violations(row) == [f"_some_kernel (case, 128x256 SOFTCAP, bf16, sm_{row.arch}) {said}"]


def test_a_kernel_that_walks_rows_has_a_budget_of_instructions_and_barriers() -> None:
    def said(**change: object) -> list[str]:
        what = "_row_statistics_kernel ({}, 128x256 SOFTCAP, bf16, sm_90) "
        row = WALKS._replace(**change)
        return [sentence.removeprefix(what.format(row.case)) for sentence in aot_budget.violations(row)]

    assert said() == []
    assert said(instructions_per_logit=14.125) == ["issues 14.1 instructions a logit, of 14"]
    assert said(barriers=4) == ["waits at 4 barriers a step, of 3"]
    assert said(case="logits, ragged", instructions_per_logit=60.0) == []  # a softcap has its price
    assert said(case="logits, ragged", barriers=4) == ["waits at 4 barriers a step, of 3"]
    assert said(instructions_per_logit=None, barriers=None) == ["has no loop in which a step of a row was found"]


def test_every_budget_is_of_a_kernel_and_of_cases_that_exist() -> None:
    assert set(aot_budget.BUDGETS) <= kernels()
    assert {case for budget in aot_budget.BUDGETS.values() for case in budget.instructions} <= set(aot_cases.CASES)


def test_the_worst_of_several_specialisations_is_shown() -> None:
    rows = [ROW, ROW._replace(registers=200), ROW._replace(registers=255, dtype="fp16")]
    assert aot.worst([r._replace(case="linear") for r in rows]) == [r._replace(case="linear") for r in rows[1:]]
    # Of kernels that walk rows it is the one that issues most, unless another one breaks its budget.
    slow, big = WALKS._replace(instructions_per_logit=13.0), WALKS._replace(instructions_per_logit=9.0, registers=200)
    assert aot.worst([big, slow]) == [slow]
    assert aot.worst([slow, over := big._replace(barriers=4)]) == [over]


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "tensor_memory", "blocks"),
    [
        (80, 128, 32, 0, 0, 16),  # threads: 2048 / 128
        (80, 32, 16, 0, 0, 32),  # 32 blocks, whatever they are
        (90, 256, 128, 0, 0, 2),  # registers: 65536 / (256 * 128)
        (90, 256, 129, 0, 0, 1),  # allocated in eights
        (80, 128, 32, 81 << 10, 0, 2),  # shared memory: 164 / (81 + 1)
        (90, 128, 32, 227 << 10, 0, 1),
        (90, 128, 32, 228 << 10, 0, 0),
        (100, 128, 32, 0, 256, 2),  # tensor memory: 512 / 256
    ],
)
def test_blocks_per_multiprocessor(
    arch: int, threads: int, registers: int, shared: int, tensor_memory: int, blocks: int
) -> None:
    assert aot_budget.blocks_per_multiprocessor(arch, threads, registers, shared, tensor_memory) == blocks


def test_the_page_has_every_kernel_on_every_architecture() -> None:
    page = ROOT / "docs/aot.md"
    assert page.read_text(encoding="utf-8").startswith("triton ")
    cells = aot.read_page(page)
    shown = {(row["kernel"], row["arch"]) for row in cells}
    assert shown == set(product(kernels(), (f"sm_{arch}" for arch in aot_budget.MULTIPROCESSORS)))
    assert {row["spills"] for row in cells} == {"0"}
    for row in cells:
        assert bool(row["instructions/logit"] and row["barriers"]) == (row["kernel"] in aot_budget.BUDGETS), row


def test_reads_the_page_that_it_writes(tmp_path: Path) -> None:
    (tmp_path / "aot.md").write_text(f"triton 3.4.0, torch 2.8.0\n\n{aot.table([ROW, WALKS])}\n")
    first, second = aot.read_page(tmp_path / "aot.md")
    assert (first["kernel"], first["arch"], first["instructions/logit"], first["barriers"]) == (
        "_some_kernel",
        "sm_90",
        "",
        "",
    )
    assert (second["instructions/logit"], second["barriers"], second["blocks/SM"]) == ("14.0", "3", "2")


def test_refuses_the_interpreter() -> None:
    done = report(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot.compat, "INTERPRETED", False)
    monkeypatch.setattr(aot.compat, "HAS_TRITON", False)
    with pytest.raises(SystemExit, match="2"):
        aot.main([])
    assert "triton is not installed" in capsys.readouterr().err


def test_says_that_cuobjdump_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(aot.compat, "INTERPRETED", False)
    monkeypatch.setattr(aot.compat, "HAS_TRITON", True)
    monkeypatch.setattr(aot, "_cuobjdump", missing)
    with pytest.raises(SystemExit, match="2"):
        aot.main([])
    assert "Cannot find cuobjdump" in capsys.readouterr().err
