"""Imports run one way, and ``import krony`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import krony

ROOT = Path(krony.__file__).parent

# From the bottom up: a module imports from earlier lines only (and, in a package, from its own files).
ORDER = [
    ["errors", "_version", "progress", "python_docs", "hardware", "report"],
    ["kron", "config", "files", "allocation", "ranks", "tensor_files", "recipes"],
    ["schemes", "init", "shards", "journal", "planner", "trust"],
    ["linear", "embedding"],
    ["mlp"],
    ["join"],
    ["surgery"],
    ["hf", "budget"],
    ["models", "data"],
    [
        "calibration",
        "evaluation",
        "export",
        "harness",
        "inspection",
        "reference",
        "rows",
        "distillation",
        "training",
        "checkpoints",
    ],
    ["reconstruction", "tuning", "healing", "preparation", "blockwise"],
    ["compression"],
    ["card", "bench", "reproduce", "streaming"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imported(path: Path) -> set[str]:
    """The krony modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "krony":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("krony."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("krony.")}
    return found


def test_imports_run_one_way():
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong = {other for other in imported(path) - {own} if RANK[other] >= RANK[own]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_every_module_is_in_the_order():
    modules = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")} - {"__init__"}
    assert modules == set(RANK)


def test_the_architecture_page_shows_this_order():
    page = (ROOT.parents[1] / "docs/architecture.md").read_text()
    for line in ORDER:
        assert " ".join(f"`{name}`" for name in line) in page


def test_import_is_light():
    code = "import krony, sys; print([m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    for name in krony.__all__:
        assert getattr(krony, name) is not None
    assert set(krony.__all__) <= set(dir(krony))
