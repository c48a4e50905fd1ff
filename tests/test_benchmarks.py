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
    ("interpretability", [], ["interpretability.md"], ["interpretability-right.svg", "interpretability-ablation.svg"]),
    ("healing", [], ["healing-curves.md"], ["healing-curves-512x256.svg", "healing-curves-256x256.svg"]),
    ("quality", ["--out", "smollm2"], ["quality-smollm2.md"], ["quality-smollm2.svg", "quality-smollm2-rivals.svg"]),
    ("quality", ["--out", "demo"], ["quality-demo.md"], ["quality-demo.svg"]),
    ("engines", [], ["deployment.md"], []),
    ("scalars", [], ["paper.md"], ["scalars.svg"]),
    ("right_factors", [], ["paper.md"], []),
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


def test_what_scalars_could_move_by_is_the_sum_of_the_schedule(monkeypatch):
    """As transformers' own schedule has it, which the trainer uses."""
    import torch
    from transformers import get_scheduler

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scalars = importlib.import_module("scalars")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=scalars.RATE)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": scalars.OWN_RATE})
    schedule = get_scheduler(
        "cosine_with_min_lr", optimizer, 50, 256, scheduler_specific_kwargs={"min_lr": scalars.RATE / 100}
    )
    sums = [0.0, 0.0]
    for _ in range(256):
        sums = [total + group["lr"] for total, group in zip(sums, optimizer.param_groups, strict=True)]
        optimizer.step()
        schedule.step()
    for total, rate in zip(sums, (scalars.RATE, scalars.OWN_RATE), strict=True):
        assert scalars.reach(256, rate, 50, 0.01) == pytest.approx(total, rel=0.01)


def test_the_answer_on_scalars_follows_from_the_runs(monkeypatch):
    """Invented runs that come to 4, and such that don't."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scalars = importlib.import_module("scalars")

    def runs(end):
        return {
            "runs": [
                one | {"loss": 2.0 + one["frozen"], "points": [[0, 1, 1, 1, 1, 1], [9, 0, 1, end, 5, 9]]}
                for one in scalars.wanted([0, 1])
            ]
        }

    assert len(scalars.wanted([0, 1])) == 12
    assert "? Yes, here.** With" in scalars.answer(runs(4.2)) and "1 → 4.20, α → 4.20" in scalars.answer(runs(4.2))
    assert "? Not here.** With" in scalars.answer(runs(1.5))
    assert "Frozen the model ends at 20.09, trained from 4 at 7.39" in scalars.answer(runs(1.5))
