"""The README's table and picture: ``krony demo``, run as it is.

    python benchmarks/demo.py

Writes ``benchmarks/results/demo.json`` and ``docs/demo.svg``, and the table between the README's marks.
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
    return f"""Half of the MLPs' weights gone from a small GPT-2 that comes with krony, by krony's neuron selection and
by the paper's starts; then {tokens:,} tokens of healing, and as much training of the unharmed original for comparison.
Perplexity on documentation that no model has seen, and speed, against the original's, of `neurons` as `krony export
--to slim` writes it ({machine()["processor"]}, {machine()["threads"]} threads, float32):

{table(demo).markdown()}

![perplexity of each, against the original's](docs/demo.svg)
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
    fill(ROOT / "README.md", "benchmarks/demo.py", section(demo))


if __name__ == "__main__":
    main()
