"""List the modules of both packages by level with what each imports, and fail where an arrow does not point down.

    python -m tools.levels [--arrows]

A module may import from lower levels only, so there is no circle of files. The sources are read: imports anywhere in a file,
inside functions and under TYPE_CHECKING too, names behind an alias, modules named by a string, calls of
`implementation("<op>", ...)` and of `torch.ops.gem_kernels`. Exit status: 0, or 1 with every arrow that points up or sideways.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

KERNELS: list[set[str]] = [
    {"types", "compat", "autograd", "plan"},
    {"operands", "tiles", "validation", "definition", "scale_triton"},
    {"softmax", "primitives"},
    {"rows_torch", "rows_triton", "ranks", "shards", "tokens"},
    {"logit_tiles", "fused", "gradients", "inputs"},
    {"group_loss.exponentials"},
    {
        f"{op}.{impl}"
        for op in ("linear_logprob", "logprob", "group_loss", "scoring")
        for impl in ("reference", "chunked", "triton")
    },
    {"dispatch"},
    {"linear_logprob.op", "logprob.op", "group_loss.op", "scoring.op"},
    {""},
]
"""Levels of gem_kernels, lowest first; "" is the package itself, and `dispatch` knows the implementations that ops ask for."""

GEM: list[set[str]] = [
    {"files"},
    {"launch"},
    {"distributed"},
    {
        "config",
        "decoding",
        "problems",
        "tokens",
        "training_flags",
        "positions",
        "stops",
        "finite",
        "lock",
        "fingerprint",
        "noise",
        "hub",
        "simulate",
    },
    {"loading", "explain", "signals", "evidence.config"},
    {
        "settings",
        "sources",
        "ends",
        "group",
        "messages",
        "read",
        "run_files",
        "head.output",
        "head.adapters",
        "together",
        "sharding",
    },
    {
        "special_tokens",
        "plan",
        "evidence.plan",
        "chat_template",
        "converters",
        "shapes",
        "checkpoints",
        "results",
        "group_lines",
        "ema",
        "rails",
    },
    {
        "models",
        "plan_table",
        "conversation",
        "formats",
        "curves",
        "runs",
        "saving",
        "groups",
        "head.rounding",
        "head.switch",
        "head.trial",
        "head.batch",
    },
    {
        "encoding",
        "evidence.workers",
        "records",
        "groups_writer",
        "health",
        "head.transform",
        "head.product",
        "head.router",
    },
    {"head.extra"},
    {"head.call"},
    {"head.check"},
    {"head.attach"},
    {"head", "data"},
    {"spans", "rank", "sega", "losses", "mixing"},
    {"answers", "calibration"},
    {"generators", "score", "guard", "doctor"},
    {"reference", "server"},
    {"pipeline"},
    {"evaluate", "report"},
    {"trainer"},
    {"tasks", "integrations.trl", "integrations.rloo"},
    {"methods"},
    {"demo", "evidence.run", "evidence.page"},
    {"evidence.harness", "dry_run"},
    {"cli"},
    {"__main__"},
    {"", "integrations"},
]
"""Levels of gem, lowest first; gem_kernels is below all of them."""

LEVELS = {"gem_kernels": KERNELS, "gem": GEM}
COMPUTES_IMPORTS = ("dispatch",)  # its calls of `implementation` are read
_DOTTED = re.compile(r"gem(_kernels)?(\.\w+)+")


def modules(package: str) -> dict[str, Path]:
    """Map the dotted names inside a package to their files; empty __init__ files hold nothing and are left out."""
    folder = ROOT / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if path.stem != "__init__" or path.read_text(encoding="utf-8").strip():
            found[name] = path
    return found


@cache
def operators() -> dict[str, str]:
    """Map the name of every torch operator of gem_kernels to the module that defines it."""
    found = {}
    for module, path in modules("gem_kernels").items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) == "define_operator" and node.args:
                found[ast.literal_eval(node.args[0])] = module
    return found


def imports(source: str) -> set[str]:
    """Return the dotted names of packages, modules and what is in them that a source mentions, aliases resolved."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            aliases |= {alias.asname or alias.name.split(".")[0]: _bound(alias) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("relative imports are not read: write the package's name")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = _name(node).partition(".")
            found |= {f"{aliases[root]}.{rest}"} if root in aliases else set()
        elif isinstance(node, ast.Call):
            found |= _called(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            found.add(node.value)  # of import_module, __import__, sys.modules
    if any(name.startswith("torch.ops.gem_kernels") for name in found):
        found |= {f"gem_kernels.{module}" for module in operators().values()}
    return found


def _bound(alias: ast.alias) -> str:
    return alias.name if alias.asname else alias.name.split(".")[0]


def _called(node: ast.Call) -> set[str]:
    """Return the modules that a call of the dispatcher, a relative import_module or getattr(torch.ops, ...) reaches."""
    constants = [str(a.value) for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    function = _name(node.func).rpartition(".")[2]
    if function == "implementation":
        return {f"gem_kernels.{op}.{impl}" for op in constants[:1] for impl in ("chunked", "triton")}
    if function == "import_module" and len(constants) == 2:
        return {constants[1] + constants[0]}
    return {"torch.ops.gem_kernels"} if function == "getattr" and "gem_kernels" in constants else set()


def _name(node: ast.AST) -> str:
    """Return the dotted name of an expression, "" if it has none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


def computed_imports(source: str) -> int:
    """Count the imports whose module is computed: what they reach cannot be read."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    importers = ("import_module", "__import__", "resolve_name")
    return sum(
        _name(call.func).rpartition(".")[2] in importers
        and not any(isinstance(a, ast.Constant) for a in (*call.args, *(k.value for k in call.keywords)))
        for call in calls
    )


def arrows(package: str, source: str, known: Collection[str]) -> set[str]:
    """Return the modules of the package, among the known ones, that a source imports; "" is the package's own __init__."""
    found = set()
    for name in imports(source):
        if name == package or name.startswith(f"{package}."):
            parts = name.split(".")[1:]
            prefixes = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
            found.add(next((prefix for prefix in prefixes if prefix in known), ""))
    return found


def level_of(levels: Sequence[set[str]], module: str) -> int | None:
    return next((i for i, level in enumerate(levels) if module in level), None)


def violations(package: str, levels: Sequence[set[str]], sources: dict[str, str]) -> list[str]:
    """Describe every module without a level and every arrow that does not point down."""
    found = []
    for module, source in sources.items():
        level = level_of(levels, module)
        if level is None:
            found.append(f"{package}.{module} has no level: add it to tools/levels.py")
            continue
        if module not in COMPUTES_IMPORTS and computed_imports(source):
            found.append(f"{package}.{module} imports a module whose name is computed: what it imports cannot be read")
        for other in sorted(arrows(package, source, sources) - {module}):
            at = level_of(levels, other)
            if at is not None and at >= level:
                found.append(f"{package}.{module} (level {level}) imports {package}.{other} (level {at})")
    gone = set().union(*levels) - set(sources)
    return found + [f"{package}.{module} has a level and no file" for module in sorted(gone)]


def read(package: str) -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in modules(package).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.levels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arrows", action="store_true", help="print what each module imports, too")
    args = parser.parse_args(argv)
    broken = []
    for package, levels in LEVELS.items():
        sources = read(package)
        for i, level in reversed(list(enumerate(levels))):
            print(f"{package} {i}: {', '.join(module or '__init__' for module in sorted(level))}")
            for module in sorted(level & set(sources)) if args.arrows else ():
                print(
                    f"    {module or '__init__'} -> {', '.join(sorted(arrows(package, sources[module], sources))) or '.'}"
                )
        broken += violations(package, levels, sources)
    for what in broken:
        print(f"WRONG: {what}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
