"""Perplexity during healing for every initialisation: the paper's Figure 1 and Tables 7 to 9 on a small model.

    python benchmarks/healing.py --data-dir DIR
    python benchmarks/healing.py --draw-only

The model that comes with krony is compressed by every init to two schemes, which correspond to the paper's 1536x768
(half of the MLPs' parameters) and 768x768 (a quarter), and healed with the quick recipe and the original as the
teacher. The text is the calibration part of Python's documentation, with its topics shuffled; it also calibrates.
Perplexity is measured on the held-out part of the documentation, and on DIR/openwebtext/val.jsonl as text of another
kind. The control is the original, trained on the same tokens.

Results are in ``benchmarks/results/healing.json``; a table and a picture per scheme are in ``docs``. Runs that are in
the file are not repeated, so that an interrupted run resumes, and more seeds, inits or schemes can be added. With
--draw-only the page and the pictures are written from the file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from common import DOCS, RESULTS, Runs, arguments, draw_or_measure

import krony
from krony.data.calibration_set import pack
from krony.data.python_docs import topics
from krony.data.rows import Rows
from krony.data.sets import join_documents, read_file
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.report import perplexity
from krony.healing.training import train_on_rows
from krony.healing.validation import validation_loss
from krony.pages import Table
from krony.pictures import lines
from krony.storage.files import cache_folder, write_text

SCHEMES = {"512x256": "half of the MLPs' parameters", "256x256": "a quarter of the MLPs' parameters"}
INITS = ("neurons", "als", "van-loan", "prune", "random")
CALIBRATED = ("neurons", "als")
# The highest learning rate of each init; starts that are far from the original get twice as much.
CONTROL_RATE = 5e-4  # a small model takes larger steps than the recipe's
RATES = {"neurons": 5e-4, "als": 5e-4, "van-loan": 1e-3, "prune": 1e-3, "random": 1e-3}
CONTROL, LENGTH, GOAL = "the original", 512, 1.03
SETS = ("python-docs", "openwebtext")
# Where a run is measured, as shares of its tokens.
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


def training_text(seed: int) -> list[str]:
    """The calibration part of Python's documentation, in an order that depends on the seed."""
    texts = topics("calibration")
    random.Random(seed).shuffle(texts)
    return texts


def measured_text(data_dir: Path, tokens: int) -> dict[str, Rows]:
    """The held-out documentation, and the first ``tokens`` tokens of OpenWebText's validation text."""
    tokenizer = krony.load_tokenizer("demo")
    docs = join_documents(topics("held-out"), tokenizer)
    web = join_documents(read_file(data_dir / "openwebtext/val.jsonl"), tokenizer)[:tokens]
    return {name: Rows(ids.numpy(), LENGTH) for name, ids in zip(SETS, (docs, web), strict=True)}


def measure(scheme: str | None, init: str, seed: int, rate: float, options: argparse.Namespace) -> dict:
    """One run: the losses on both sets at each measurement. The control has no scheme."""
    tokenizer, original = krony.load_tokenizer("demo"), krony.load_model("demo")
    texts, sets = training_text(seed), measured_text(options.data_dir, options.measured)
    model = copy.deepcopy(original)
    if scheme is not None:
        ids = pack(texts, tokenizer, length=LENGTH, seed=seed) if init in CALIBRATED else None
        krony.compress(model, krony.KronyConfig(scheme, init=init, seed=seed), calibration=ids, cache=cache_folder())
    rows = Rows(join_documents(texts, tokenizer)[: options.tokens].numpy(), LENGTH)
    recipe = replace(RECIPES["quick"], learning_rate=rate, final_rate=rate / 100, evaluations=1)
    step = recipe.sequences * recipe.length
    points = [(0, *losses(model, sets))]

    def watch(done: int, total: int, _: str) -> None:
        wanted = {round(total * share) for share in SHARES} | {total}
        if done in wanted and points[-1][0] != done * step:
            points.append((done * step, *losses(model, sets)))
            model.train()

    with tempfile.TemporaryDirectory() as work:
        small = Rows(sets["python-docs"].tokens[:LENGTH], LENGTH)  # required by the trainer; nothing depends on it
        teacher = None if scheme is None else original
        chosen = HealOptions(seed=seed, keep_anyway=True)
        where = {"work": Path(work), "progress": watch}
        train_on_rows(model, rows, small, recipe=recipe, teacher=teacher, options=chosen, **where)
    params = sum(p.numel() for p in model.parameters())
    return {"scheme": scheme, "init": init, "seed": seed, "rate": rate, "params": params, "points": points}


def losses(model: Any, sets: dict[str, Rows]) -> list[float]:
    """The loss on each set, in nats per token."""
    model.eval()
    return [validation_loss(model, sets[name]) for name in SETS]


def mean_curve(runs: list[dict], base: float) -> list[tuple[float, float]]:
    """Tokens, and the mean over the runs of the first set's perplexity relative to the original's."""
    together = zip(*(run["points"] for run in runs), strict=True)
    return [(group[0][0], mean(math.exp(point[1] - base) for point in group)) for group in together]


def tokens_to(points: list, which: int, goal: float) -> float | None:
    """Tokens until the loss has fallen to ``goal``, by linear interpolation; None if it doesn't."""
    if points[0][which] <= goal:
        return 0
    for (t0, *l0), (t1, *l1) in itertools.pairwise(points):
        before, after = l0[which - 1], l1[which - 1]
        if after <= goal:
            return t0 + (t1 - t0) * (before - goal) / (before - after)
    return None


def table(results: dict, scheme: str) -> Table:
    """One row per init, and one for the control: means over the seeds, the last ratio's spread, tokens to the goal."""
    bases = results["base"]
    columns = ["init", "parameters", "start", "of the original", "healed", "of the original", f"tokens to {GOAL}x"]
    rows = []
    for init in (*INITS, CONTROL):
        runs = chosen(results, None if init == CONTROL else scheme, init)
        if not runs:
            continue
        start, end = ([perplexity(run["points"][place][1]) for run in runs] for place in (0, -1))
        base = perplexity(bases[0])
        ratios = sorted(value / base for value in end)
        needed = [tokens_to(run["points"], 1, bases[0] + math.log(GOAL)) for run in runs]
        cells = [init, f"{runs[0]['params']:,}", short(mean(start)), short(mean(start) / base), short(mean(end))]
        rows.append([*cells, f"{mean(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", reached(needed, runs)])
    return Table(columns, rows)


def reached(needed: list[float | None], runs: list[dict]) -> str:
    """The mean number of tokens that the seeds need, or how many seeds reach the goal."""
    there = [value for value in needed if value is not None]
    if len(there) == len(needed):
        return f"{mean(there):,.0f}"
    return f"not in {runs[0]['points'][-1][0]:,}" if not there else f"{len(there)} of {len(needed)} seeds"


def web_table(results: dict, scheme: str) -> Table:
    """The perplexities on the other kind of text."""
    base = results["base"][1]
    rows = []
    for init in (*INITS, CONTROL):
        if runs := chosen(results, None if init == CONTROL else scheme, init):
            ratios = [mean([math.exp(run["points"][place][2] - base) for run in runs]) for place in (0, -1)]
            rows.append([init, *map(short, ratios)])
    return Table(["init", "start, of the original", "healed, of the original"], rows)


def picture(results: dict, scheme: str) -> str:
    """Perplexity relative to the original's against tokens, means over the seeds."""
    series, base = {}, results["base"][0]
    for init in (*INITS, CONTROL):
        if runs := chosen(results, None if init == CONTROL else scheme, init):
            name = f"{init}, trained on the same tokens" if init == CONTROL else init
            series[name] = mean_curve(runs, base)
    ends = {init: series[init][-1][1] for init in INITS if init in series}
    first, *others = sorted(ends, key=lambda init: ends[init])
    figures = "".join(f", {init} {ends[init]:.3g}" for init in others)
    return lines(
        series,
        title=f"After {results['tokens']:,} tokens of healing {first} has {ends[first]:.3f} times the original's "
        f"perplexity{figures} (less is better)",
        x="tokens",
        y="times the original's perplexity",
        level=(f"{GOAL} times the original's", GOAL),
        log=True,
        top=10.0,
    )


def chosen(results: dict, scheme: str | None, init: str) -> list[dict]:
    """The runs of an init at a scheme."""
    return [run for run in results["runs"] if run["scheme"] == scheme and run["init"] == init]


def short(figure: float) -> str:
    """A figure in the table."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.2f}"


def write_page(results: dict) -> None:
    """The page and its pictures."""
    where = f"{results['machine']['processor']}, threads: {results['machine']['threads']}"
    seeds = sorted({run["seed"] for run in results["runs"]})
    parts = [
        "# Healing curves\n",
        "`python benchmarks/healing.py --data-dir DIR` compresses the model that comes with krony by every init and "
        f"heals it on {results['tokens']:,} tokens with the quick recipe and the original as the teacher. The control "
        "is the original, trained on the same tokens. The text is the calibration part of Python's documentation; "
        f"perplexity is measured on its held-out part, {results['measured']['python-docs']:,} tokens, by the `token` "
        f"protocol. Means over seeds {', '.join(map(str, seeds))}, with the ratio's spread in brackets; {where}. "
        "Highest learning rates: "
        + ", ".join(f"{init} {rate:g}" for init, rate in RATES.items())
        + f", the control {CONTROL_RATE:g}.\n",
    ]
    for scheme, words in SCHEMES.items():
        if not any(run["scheme"] == scheme for run in results["runs"]):
            continue
        name = f"healing-curves-{scheme}.svg"
        write_text(DOCS / name, picture(results, scheme))
        parts += [
            f"## {scheme}: {words}\n",
            table(results, scheme).markdown() + "\n",
            f"![perplexity against tokens at {scheme}]({name})\n",
            f"The same models on OpenWebText's validation text, {results['measured']['openwebtext']:,} tokens:\n",
            web_table(results, scheme).markdown() + "\n",
        ]
    write_text(DOCS / "healing-curves.md", "\n".join(parts))


def main() -> None:
    """Measures what is missing in the results, and writes the page and its pictures."""
    parser = arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with openwebtext/val.jsonl")
    parser.add_argument("--tokens", type=int, default=65_536, help="of healing, per run")
    parser.add_argument("--measured", type=int, default=8_192, help="tokens of OpenWebText to measure on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="*", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--inits", nargs="*", choices=INITS, default=list(INITS))
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--rate", type=float, help="the highest learning rate, instead of each init's own")
    parser.add_argument("--out", type=Path, default=RESULTS / "healing.json")
    options = parser.parse_args()
    if options.data_dir is None and not options.draw_only:
        parser.error("--data-dir names the folder with openwebtext/val.jsonl")
    results = draw_or_measure(options, "healing", measure_missing, write_page)
    for scheme in options.schemes if results else ():
        print(table(results, scheme).markdown())


def measure_missing(options: argparse.Namespace) -> dict:
    """The results, with the runs that were not in the file; each is written as soon as it is measured."""

    sets = measured_text(options.data_dir, options.measured)
    runs = Runs(options.out, tokens=options.tokens, goal=GOAL)
    results = runs.results
    results["measured"] = {name: len(rows) * LENGTH for name, rows in sets.items()}
    if "base" not in results:
        results["base"] = losses(krony.load_model("demo"), sets)
    wanted: list[tuple[str | None, str]] = [] if options.no_control else [(None, CONTROL)]
    wanted += list(itertools.product(options.schemes, options.inits))
    for seed, (scheme, init) in itertools.product(options.seeds, wanted):
        rate = options.rate or RATES.get(init, CONTROL_RATE)
        if runs.has({"scheme": scheme, "init": init, "seed": seed}):
            continue
        start = time.perf_counter()
        run = measure(scheme, init, seed, rate, options)
        runs.add(run)
        (_, before, _), (_, after, _) = run["points"][0], run["points"][-1]
        ratios = [math.exp(loss - results["base"][0]) for loss in (before, after)]
        spent = time.perf_counter() - start
        print(f"{scheme or ''} {init}, seed {seed}: {ratios[0]:.3f} -> {ratios[1]:.3f} in {spent:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    main()
