"""The sizes of the small GPT-2 that comes with krony: what each loses, and the smallest that keeps a promise.

    python benchmarks/sizes.py [--draw-only]

Writes ``benchmarks/results/sizes.json``, ``docs/sizes.svg`` and the tables in ``docs/sizes.md``. Everything is measured
on Python documentation that was held back from calibration.
"""

from __future__ import annotations

from typing import Any

from common import DOCS, fill, quiet_transformers, results_of

import krony
from krony.evaluation.interval import Interval
from krony.runtime.hardware import machine
from krony.sizing.report import Point
from krony.sizing.sizes import Size
from krony.storage.files import write_text

WITHIN = 0.05
TEXT = "python-docs"


def measure() -> dict[str, Any]:
    """All figures."""
    quiet_transformers()
    model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
    frontier = krony.frontier(model, TEXT, tokenizer=tokenizer).to_json() | {"model": "demo"}
    kept = krony.compress_within(model, WITHIN, TEXT, tokenizer=tokenizer)
    return {"frontier": frontier, "within": kept.to_json(), "machine": machine(), "seed": 0}


def frontier_of(results: dict[str, Any]) -> krony.Frontier:
    """What ``krony.frontier`` returned."""
    stored = results["frontier"]
    return krony.Frontier(**stored | {"points": [Point(**point) for point in stored["points"]]})


def kept_of(results: dict[str, Any]) -> krony.Kept:
    """What ``krony.compress_within`` returned, without its report."""
    stored = results["within"]
    trials = [
        (Size(**{key: trial[key] for key in ("scheme", "keep", "params")}), Interval(*map(trial.get, Interval._fields)))
        for trial in stored["trials"]
    ]
    size, measured = next(trial for trial in trials if trial[0].scheme == stored["scheme"])
    return krony.Kept(size=size, limit=stored["limit"], measured=measured, trials=trials, tokens=stored["tokens"])


def main() -> None:
    """Measures, and writes the results, the picture and the tables."""
    results = results_of("sizes", measure, __doc__)
    frontier, kept = frontier_of(results), kept_of(results)
    write_text(DOCS / "sizes.svg", frontier.picture())
    commands = (
        f"krony frontier demo --calibration {TEXT}",
        f"krony compress demo out --within {WITHIN:.0%} --calibration {TEXT}",
    )
    text = f"""With the small GPT-2 that comes with krony (`python benchmarks/sizes.py`), `{commands[0]}` prints:

{frontier}

![perplexity against parameters](sizes.svg)

`{commands[1]}` prints:

{kept}
"""
    fill(DOCS / "sizes.md", "benchmarks/sizes.py", text)


if __name__ == "__main__":
    main()
