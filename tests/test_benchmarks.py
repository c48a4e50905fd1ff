"""The benchmarks stand on the library, and the pages are what they draw from their results."""

import ast
import importlib
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
DRAWN = [
    ("demo", [], ["quickstart.md"], ["demo.svg"]),
    ("decomposition", [], ["decomposition.md"], ["decomposition.svg"]),
    ("healing", [], ["healing-curves.md"], ["healing-curves-512x256.svg", "healing-curves-256x256.svg"]),
    ("quality", ["--out", "smollm2"], ["quality-smollm2.md"], ["quality-smollm2.svg", "quality-smollm2-rivals.svg"]),
    ("quality", ["--out", "demo"], ["quality-demo.md"], ["quality-demo.svg"]),
    ("engines", [], ["deployment.md"], []),
    ("sizes", [], ["sizes.md"], ["sizes.svg"]),
    ("speed", [], ["speed.md"], ["speed.svg"]),
    ("speed", ["--compile"], ["speed-compiled.md"], ["speed-compiled.svg"]),
    ("streaming", [], ["streaming.md"], []),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_benchmark_imports_the_command_line(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[:2] == ["krony", "cli"] for name in names), f"line {node.lineno}"


def title(svg: str) -> str:
    return next(e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("title") and e.text)


@pytest.mark.parametrize(("script", "options", "pages", "pictures"), DRAWN, ids=lambda value: str(value)[:24])
def test_pages_are_drawn_from_the_results(script, options, pages, pictures, tmp_path, monkeypatch, capsys):
    """Without a measurement: the same text, and pictures with the same title."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for page in pages:
        shutil.copy(ROOT / "docs" / page, tmp_path)  # some have a part that is written by hand
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--draw-only", *options])
    module.main()
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / "docs" / page).read_text(encoding="utf-8")
    for picture in pictures:
        drawn, kept = ((folder / picture).read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
        assert title(drawn) == title(kept)
        assert re.search(r"\d", title(kept))  # by how much
