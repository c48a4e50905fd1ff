"""Do scalars converge to 4, whatever they start at? And what does freezing them at 4 cost? (paper, section 6)

    python benchmarks/scalars.py
    python benchmarks/scalars.py --draw-only

The model that comes with krony is compressed by ``van-loan`` to four factors with a scalar each, the shape that
corresponds to the paper's 1024x256:4. The scalars start at 1, at α (the adaptive normalisation, the paper's start), at
4 and at 8; the left factors are divided by the start, so all models begin as the same function. Each is trained on the
calibration part of Python's documentation with the text alone, as the paper trains. AdamW moves a number by about its
learning rate per step, so the sum of the learning rates bounds how far a scalar can get; it is in the results. So that
4 is in reach of every start, the scalars have a learning rate of their own. From 4 they also train at the rate of all
other parameters, and stay frozen.

Results are in ``benchmarks/results/scalars.json``; a table and a picture are in ``docs/paper.md``. Runs that are in the
file are not repeated, so an interrupted run resumes, and more seeds can be added.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import DOCS, RESULTS, Runs, arguments, draw_or_measure, fill

import krony
from krony.data.python_docs import topics
from krony.data.rows import Rows
from krony.data.sets import join_documents
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.report import perplexity
from krony.healing.training import train_on_rows
from krony.pages import Table
from krony.pictures import lines
from krony.storage.files import write_text

SCHEME, GOAL = "256x128:4", 4.0
STARTS: tuple[float | None, ...] = (1.0, None, 4.0, 8.0)  # None: α
RATE, OWN_RATE = 1e-3, 0.05  # of all parameters; of scalars that get their own
SEQUENCES, LENGTH, HELD = 1, 128, 4_096  # rows per step, tokens per row, tokens to measure on
PLACES = 16  # points of a curve in the picture


def measure(start: float | None, scalar_rate: float, frozen: bool, seed: int, tokens: int) -> dict[str, Any]:
    """One run: the scalars over the training, and the losses on the held-out text."""
    tokenizer, model = krony.load_tokenizer("demo"), krony.load_model("demo")
    krony.compress(model, krony.KronyConfig(SCHEME, init="van-loan", scalar_init=start, seed=seed))
    texts = topics("calibration")
    random.Random(seed).shuffle(texts)
    rows = Rows(join_documents(texts, tokenizer)[:tokens].numpy(), LENGTH)
    held = Rows(join_documents(topics("held-out"), tokenizer)[:HELD].numpy(), LENGTH)
    recipe = replace(
        RECIPES["quick"].changed(learning_rate=RATE, sequences=SEQUENCES, length=LENGTH),
        text=1.0, scalar_rate=scalar_rate, evaluations=1,
    )  # fmt: skip
    options = HealOptions(seed=seed, keep_anyway=True, freeze="scalars" if frozen else "none")
    with tempfile.TemporaryDirectory() as work:
        report = train_on_rows(model, rows, held, work=Path(work), recipe=recipe, options=options)
    return {
        "start": start, "scalar_rate": scalar_rate, "frozen": frozen, "seed": seed,
        "reach": reach(len(rows) // SEQUENCES, scalar_rate, recipe.warm_up, recipe.final_rate / RATE),
        "loss_before": report.loss_before, "loss": report.validation[-1][1],
        "points": [list(point) for point in quantiles(report.scalars)],
    }  # fmt: skip


def reach(steps: int, rate: float, warm_up: int, final: float) -> float:
    """The sum of a learning rate over the steps: about the most that AdamW moves a number.

    A linear rise to ``rate`` over ``warm_up`` steps, then half a cosine to ``final`` times it.
    """
    rise = min(warm_up, steps // 5)
    return rate * (rise / 2 + (steps - rise) * (1 + final) / 2)


def quantiles(scalars: dict[str, list[tuple[int, list[float]]]]) -> list[tuple[float, ...]]:
    """At each logged place: tokens, and of all scalars together the least, the quartiles and the largest."""
    found: list[tuple[float, ...]] = []
    for together in zip(*scalars.values(), strict=True):
        values = sorted(value for _, own in together for value in own)
        found.append((together[0][0], values[0], *statistics.quantiles(values, n=4), values[-1]))
    return found


def wanted(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The runs, seed by seed: every start with a rate of its own, and 4 also at the common rate and frozen."""
    kinds = [(start, OWN_RATE, False) for start in STARTS] + [(GOAL, RATE, False), (GOAL, RATE, True)]
    return [
        {"start": start, "scalar_rate": rate, "frozen": frozen, "seed": seed}
        for seed, (start, rate, frozen) in itertools.product(seeds, kinds)
    ]


def measure_missing(options: argparse.Namespace) -> dict[str, Any]:
    """The results, with the runs that were not in the file; each is written as soon as it is measured."""
    runs = Runs(options.out, scheme=SCHEME, tokens=options.tokens, held=HELD, length=LENGTH, rate=RATE)
    for one in wanted(options.seeds):
        if runs.has(one):
            continue
        begin = time.perf_counter()
        run = measure(tokens=options.tokens, **one)
        runs.add(run)
        print(one, f"median {run['points'][-1][3]:.3f} in {time.perf_counter() - begin:.0f} s", flush=True)
    return runs.results


def groups(results: dict[str, Any]) -> dict[tuple[float | None, float, bool], list[dict[str, Any]]]:
    """The runs that differ in their seed alone."""
    found: dict[tuple[float | None, float, bool], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault((run["start"], run["scalar_rate"], run["frozen"]), []).append(run)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][2], pair[0][1])))


def said(start: float | None) -> str:
    """A start in words."""
    return "α" if start is None else f"{start:g}"


def table(results: dict[str, Any]) -> Table:
    """A row per start and rate: scalars at first and at last, and the perplexity, over the seeds."""
    rows = []
    for (start, rate, frozen), runs in groups(results).items():
        first, last = ([run["points"][place] for run in runs] for place in (0, -1))
        ends = [run["loss"] for run in runs]
        after = [perplexity(loss) for loss in (statistics.mean(ends), min(ends), max(ends))]
        rows.append(
            [
                f"{said(start)}, frozen" if frozen else said(start),
                "" if frozen else f"{rate:g}",
                "0" if frozen else f"{runs[0]['reach']:.2f}",
                f"{statistics.mean(point[3] for point in first):.2f}",
                f"{statistics.mean(point[3] for point in last):.2f}",
                f"{min(point[1] for point in last):.2f} to {max(point[5] for point in last):.2f}",
                f"{after[0]:.2f} ({after[1]:.2f} to {after[2]:.2f})",
            ]
        )
    columns = ["start", "scalars' rate", "could move by", "median before", "after", "all scalars after", "perplexity"]
    return Table(columns, rows)


def medians(results: dict[str, Any]) -> dict[str, float]:
    """The median scalar at the end by start, the mean over the seeds, with a rate of their own."""
    return {
        said(start): statistics.mean(run["points"][-1][3] for run in runs)
        for (start, rate, _), runs in groups(results).items()
        if rate == OWN_RATE
    }


def answer(results: dict[str, Any]) -> str:
    """What was found, in sentences."""
    ends, known = medians(results), groups(results)
    listed = ", ".join(f"{start} → {value:.2f}" for start, value in ends.items())
    yes = all(abs(value - GOAL) < 0.5 for value in ends.values())
    frozen, common, own = (
        perplexity(statistics.mean(run["loss"] for run in known[GOAL, rate, is_frozen]))
        for rate, is_frozen in ((RATE, True), (RATE, False), (OWN_RATE, False))
    )
    best = min(known, key=lambda kind: statistics.mean(run["loss"] for run in known[kind]))
    seeds = {run["seed"] for run in results["runs"]}
    hint = " This is one seed, so small differences say nothing." if len(seeds) == 1 else ""
    return (
        f"**Do they converge to 4, whatever they start at? {'Yes, here' if yes else 'Not here'}.** With a rate of "
        f"their own the medians go {listed}. **Frozen at 4 or trained?** Frozen the model ends at {frozen:.2f}, "
        f"trained from 4 at {common:.2f} with the common rate and {own:.2f} with their own. The best start here is "
        f"{said(best[0])}: a start also sets the size of the left factors, and AdamW's steps are the same for any "
        f"size.{hint}"
    )


def picture(results: dict[str, Any]) -> str:
    """The median scalar against tokens, by start, with a rate of its own; the mean over the seeds."""
    series = {}
    for (start, rate, frozen), runs in groups(results).items():
        if rate == OWN_RATE and not frozen:
            points = list(zip(*(run["points"] for run in runs), strict=True))
            kept = points[:: max(1, len(points) // PLACES)] + points[-1:]
            curve = [(group[0][0], statistics.mean(point[3] for point in group)) for group in kept]
            series[f"from {said(start)}"] = list(dict(curve).items())
    ends = ", ".join(f"{name} to {points[-1][1]:.2f}" for name, points in series.items())
    last = max(int(points[-1][0]) for points in series.values())  # the last place that is logged
    return lines(
        series,
        title=f"After {last:,} tokens the median scalar has come {ends}",
        x="tokens",
        y="median scalar",
        level=("4", GOAL),
    )


def write_page(results: dict[str, Any]) -> None:
    """The part of the page, and its picture."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    write_text(DOCS / "scalars.svg", picture(results))
    text = (
        f"`python benchmarks/scalars.py` compresses the model that comes with krony by `van-loan` to "
        f"`{results['scheme']}` and trains it on {results['tokens']:,} tokens of Python's documentation, in steps of "
        f"{results['length']} tokens, at a highest learning rate of {results['rate']:g}. Perplexity is measured on "
        f"{results['held']:,} held-out tokens, in windows of {results['length']}; seeds {', '.join(map(str, seeds))}, "
        f"with the range in brackets. *Could move by* is the sum of the scalars' learning rates, about the most that "
        "AdamW moves a number; it says which ends a run could have reached at all.\n\n"
        f"{table(results).markdown()}\n\n![the median scalar against tokens](scalars.svg)\n\n{answer(results)}"
    )
    fill(DOCS / "paper.md", "benchmarks/scalars.py", text)


def main() -> None:
    """Measures what is missing in the results, and writes the page and its picture."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="of training, per run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "scalars.json")
    options = parser.parse_args()
    if results := draw_or_measure(options, "scalars", measure_missing, write_page):
        print(table(results).markdown(), answer(results), sep="\n\n")


if __name__ == "__main__":
    main()
