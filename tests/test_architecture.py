"""Imports between packages run one way, and ``import krony`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import krony

ROOT = Path(krony.__file__).parent

# From the bottom up: a package imports from earlier floors and from its own files, never from its neighbours or above.
FLOORS = [
    ["errors", "options", "pages", "pictures", "_version"],
    ["kronecker", "storage", "runtime"],
    ["init", "models", "data"],
    ["config"],
    ["compression", "engines", "evaluation", "healing"],
    ["demo", "interpretation", "reproduce", "sizing", "streaming"],
    ["cli"],
]
# Not on a floor: they only start what the floors hold, by name.
ENTRANCES = {"__init__", "__main__", "_register"}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def place(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The packages of krony that a file imports, wherever in it; ``krony`` for the whole."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "krony":
                found.add(rest.split(".")[0] or "krony")
    return found


def test_imports_run_one_way():
    for path in modules():
        own = place(path)
        if own in ENTRANCES:
            continue
        for other in imported(path) - {own}:
            assert FLOOR.get(other, len(FLOORS)) < FLOOR[own], f"{path.relative_to(ROOT)} imports {other}"


def test_every_package_has_a_floor():
    assert {place(path) for path in modules()} - ENTRANCES == set(FLOOR)


def test_the_architecture_page_names_every_package():
    page, drawn = ((ROOT.parents[1] / f"docs/architecture.{end}").read_text(encoding="utf-8") for end in ("md", "svg"))
    for floor in FLOORS:
        for name in floor:
            assert f"`{name}" in page and f">{name}</text>" in drawn, name


def test_tests_mirror_the_packages():
    tests = ROOT.parents[1] / "tests"
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))} == packages


def test_only_init_knows_the_names_of_initialisations():
    """No other package compares an initialisation's name to a string: the record says what there is to know."""
    from krony.init.registry import INITIALISATIONS

    for path in modules():
        if place(path) == "init":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {leaf.value for part in (node.left, *node.comparators) for leaf in ast.walk(part)
                         if isinstance(leaf, ast.Constant)}  # fmt: skip
                assert not words & set(INITIALISATIONS), f"{path.relative_to(ROOT)}, line {node.lineno}"


# Read in their order everywhere, like a tensor's dimensions; and KronyConfig("81M").
POSITIONAL = {"KronShape", "KronyConfig", "Target", "Factors", "Moments", "Site"}


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def test_functions_are_short():
    """At most 60 lines, the docstring and a verb's declared options apart."""
    for path in modules():
        for function in functions(path):
            first = function.body[0]
            docstring = ast.get_docstring(function) is not None
            start = first.end_lineno if docstring else first.lineno - 1
            assert function.end_lineno - start <= 60, f"{path.relative_to(ROOT)}: {function.name}"


def test_library_functions_take_few_arguments():
    """At most nine; a verb of the command line declares its options as arguments."""
    for path in modules():
        for function in functions(path) if place(path) != "cli" else ():
            arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            count = len([name for name in arguments if name not in ("self", "cls")])
            assert count <= 9, f"{path.relative_to(ROOT)}: {function.name} takes {count}"


def test_large_records_take_keywords():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name in POSITIONAL:
                continue
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            if any(mark.startswith("dataclass") for mark in marks) and len(fields) > 3:
                assert any("kw_only=True" in mark for mark in marks), f"{path.relative_to(ROOT)}: {node.name}"


def test_import_is_light():
    code = "import krony, sys; print([m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    for name in krony.__all__:
        assert getattr(krony, name) is not None
    assert set(krony.__all__) <= set(dir(krony))
