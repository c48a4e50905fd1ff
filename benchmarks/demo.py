"""The quickstart's table and picture, from ``krony demo``.

    python benchmarks/demo.py [--draw-only]

Writes ``benchmarks/results/demo.json`` and ``docs/demo.svg``, and the table in ``docs/quickstart.md``. With --draw-only
it writes the picture and the table from the results of the last run.
"""

from __future__ import annotations

from typing import Any

from common import DOCS, fill, results_of

from krony.demo.report import quality_picture, table
from krony.demo.run import DemoRow, run_demo
from krony.runtime.hardware import machine
from krony.storage.files import write_text


def section(results: dict[str, Any], rows: list[DemoRow]) -> str:
    """The text between the marks."""
    where = results["machine"]
    return f"""Half of the weights of the MLPs are removed, by krony's neuron selection and by the paper's two
starts. Then `neurons` is healed on {results["heal_tokens"]:,} tokens, and the original is trained on the same tokens
for comparison. Perplexity is measured on documentation that no model was trained on. Speed is relative to the original;
`neurons` is timed in the form that `krony export --to slim` writes ({where["processor"]}, {where["threads"]} threads,
float32):

{table(rows).markdown()}

![perplexity relative to the original](demo.svg)
"""


def measure() -> dict[str, Any]:
    """All figures."""
    demo = run_demo()
    return demo.to_json() | {"heal_tokens": demo.tokens, "machine": machine(), "seed": 0}


def main() -> None:
    """Runs the demo, and writes what it measured."""
    results = results_of("demo", measure, __doc__)
    rows = [DemoRow(**row) for row in results["rows"]]
    write_text(DOCS / "demo.svg", quality_picture(rows))
    fill(DOCS / "quickstart.md", "benchmarks/demo.py", section(results, rows))


if __name__ == "__main__":
    main()
