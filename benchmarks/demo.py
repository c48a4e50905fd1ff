"""The quickstart's table and picture: ``krony demo``, run as it is.

    python benchmarks/demo.py

Writes ``benchmarks/results/demo.json`` and ``docs/demo.svg``, and the table in ``docs/quickstart.md``.
"""

from __future__ import annotations

from pathlib import Path

from pages import fill

from krony.cli.demo import table
from krony.demo import Demo, run_demo
from krony.pages import bars
from krony.runtime.hardware import machine
from krony.storage.files import write_json

ROOT = Path(__file__).resolve().parents[1]


def section(demo: Demo) -> str:
    """What stands between the marks."""
    tokens = demo.healing["neurons"].tokens
    return f"""Half of the weights of the MLPs are removed, by krony's neuron selection and by the paper's two
starts. Then `neurons` is healed on {tokens:,} tokens, and the original is trained on the same tokens for comparison.
Perplexity is measured on documentation that no model was trained on. Speed is relative to the original; `neurons` is
timed in the form that `krony export --to slim` writes ({machine()["processor"]}, {machine()["threads"]} threads,
float32):

{table(demo).markdown()}

![perplexity relative to the original](demo.svg)
"""


def main() -> None:
    """Runs the demo and writes what it found."""
    demo = run_demo()
    results = demo.to_json() | {"machine": machine(), "seed": 0}
    write_json(ROOT / "benchmarks/results/demo.json", results)
    ratios = {row.init: row.ratio for row in demo.rows}
    healed = {row.init: row.ratio_healed for row in demo.rows if row.ratio_healed is not None}
    picture = bars({"before healing": ratios, "healed": healed}, "times the original's perplexity", level=1.0, log=True)
    (ROOT / "docs/demo.svg").write_text(picture, encoding="utf-8")
    fill(ROOT / "docs/quickstart.md", "benchmarks/demo.py", section(demo))


if __name__ == "__main__":
    main()
