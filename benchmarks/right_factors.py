"""When a Kronecker product beats pruning: free right factors against unit vectors, at equal parameters and tokens.

    python benchmarks/right_factors.py MODEL --calibration FILE --val FILE --out NAME [--factors 1 2 4] [--seeds 0 1]
    python benchmarks/right_factors.py --draw-only

Half of the parameters of MODEL's MLPs are removed by sums of k products whose right factors are vectors of 2k numbers.
Right factors that are unit vectors keep half of the neurons and drop the others: that is pruning. Free ones, trained
with the rest, let every neuron be a mixture. ``neurons`` begins with unit vectors, and is trained with right factors
frozen and free; ``van-loan`` begins with the nearest products, and is trained with the same two. All are trained
towards the original's predictions on the same --tokens (``distilled.py``), each with every one of --rates, of which the
better one counts; and measured on the first --measured tokens of --val by the ``token`` protocol.

Writes ``benchmarks/results/right-factors-NAME.json`` and its table in ``docs/paper.md``. Runs that are in the file are
not repeated, so that an interrupted run resumes, and more seeds can be added.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from statistics import mean
from typing import Any

from common import DOCS, RESULTS, Runs, arguments, fill, quiet_transformers, read_results
from distilled import Lesson

import krony
from krony.models.surgery import find_groups
from krony.pages import Table
from krony.storage.files import cache_folder

STARTS, RIGHT = ("neurons", "van-loan"), ("right", "none")  # what is frozen
PAGE, SCRIPT = "paper.md", "benchmarks/right_factors.py"


def scheme(width: int, inputs: int, factors: int) -> str:
    """Half of an MLP of this width, by so many products: their left factors have 2 x ``factors`` times fewer rows.

    Examples:
        >>> scheme(1024, 256, 2)
        '256x256:2'
    """
    rows, rest = divmod(width, 2 * factors)
    if rest:
        raise SystemExit(f"--factors {factors}: {width} neurons don't split into groups of {2 * factors}")
    return f"{rows}x{inputs}:{factors}"


def measure_missing(options: argparse.Namespace) -> None:
    """Measures the runs that are not in the results."""
    runs = Runs(RESULTS / f"right-factors-{options.out}.json", tokens=options.distil, measured=options.measured)
    results = runs.results
    results["label"] = options.label or options.model
    tokenizer, original = krony.load_tokenizer(options.model), krony.load_model(options.model, dtype="float32")
    site = find_groups(original)[0].sites[0]

    def look(model: Any) -> float:
        return krony.evaluate(model, tokenizer, options.val, protocol="token", max_tokens=options.measured).perplexity

    if "base" not in results:
        results["base"] = look(original)
    for seed in options.seeds:
        ids = krony.calibration_set(options.calibration, tokenizer, tokens=options.distil, seed=seed)
        for init, factors in itertools.product(STARTS, options.factors):
            key = {"init": init, "factors": factors, "seed": seed}
            arms = [{"frozen": frozen, "rate": rate} for frozen in RIGHT for rate in options.rates]
            missing = [arm for arm in arms if not runs.has(key | arm)]
            if not missing:
                continue
            model = copy.deepcopy(original)
            config = krony.KronyConfig(scheme(site.out_features, site.in_features, factors), init=init, seed=seed)
            report = krony.compress(model, config, calibration=ids, cache=cache_folder())
            start = look(model)
            for arm in missing:
                lesson = Lesson(original, tokenizer, argparse.Namespace(**vars(options) | {"seed": seed} | arm))
                trained, way = copy.deepcopy(model), f"{init}, {factors} factors, {arm['frozen']} frozen"
                lesson.train_on(trained, way, 0.5, freeze=arm["frozen"])
                run = key | arm | {"params": report.params_after, "start": start, "end": look(trained)}
                runs.add(run)
                lesson.forget(way, 0.5)
                ratios = [run[when] / results["base"] for when in ("start", "end")]
                print(f"{way}, rate {arm['rate']:g}, seed {seed}: {ratios[0]:.3f} -> {ratios[1]:.3f}", flush=True)


def chosen(results: dict[str, Any], **key: Any) -> list[dict[str, Any]]:
    """The runs that agree with ``key``, by seed; of several rates those of the one whose mean is lowest."""
    found: dict[float, list[dict[str, Any]]] = {}
    for run in sorted((run for run in results["runs"] if key.items() <= run.items()), key=lambda run: run["seed"]):
        found.setdefault(run["rate"], []).append(run)
    return min(found.values(), key=lambda runs: (-len(runs), mean(run["end"] for run in runs)), default=[])


def pairs(results: dict[str, Any], **key: Any) -> list[float]:
    """The perplexity with free right factors by that with frozen ones, for each seed that has both."""
    free, frozen = ({run["seed"]: run["end"] for run in chosen(results, frozen=f, **key)} for f in ("none", "right"))
    return [free[seed] / frozen[seed] for seed in sorted(free.keys() & frozen.keys())]


def table(results: dict[str, Any]) -> Table:
    """A row per start and number of factors; perplexities as multiples of the original's, means over the seeds."""
    rows = []
    for init, factors in sorted({(run["init"], run["factors"]) for run in results["runs"]}):
        key = {"init": init, "factors": factors}
        found = chosen(results, **key)
        cells = [init, str(factors), f"{found[0]['params']:,}", times([run["start"] for run in found], results["base"])]
        cells += [times([run["end"] for run in chosen(results, frozen=f, **key)], results["base"]) for f in RIGHT]
        rows.append([*cells, times(pairs(results, **key), 1.0)])
    columns = ["start", "factors", "parameters", "before training", "right factors frozen", "free", "free / frozen"]
    return Table(columns, rows)


def factors_of(results: dict[str, Any]) -> list[int]:
    """The numbers of factors that were measured."""
    return sorted({run["factors"] for run in results["runs"]})


def times(values: list[float], base: float) -> str:
    """The mean ratio to ``base``, and its range where there are several values."""
    ratios = sorted(value / base for value in values)
    if not ratios:
        return ""
    middle = mean(ratios)
    shown = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3f}"
    different = len(ratios) > 1 and middle < 100 and f"{ratios[0]:.3f}" != f"{ratios[-1]:.3f}"
    return f"{shown} ({ratios[0]:.3f} to {ratios[-1]:.3f})" if different else shown


def section(results: dict[str, Any]) -> str:
    """The text between the marks for one model."""
    seeds, where = sorted({run["seed"] for run in results["runs"]}), results["machine"]
    better = [ratio < 1 for factors in factors_of(results) for ratio in pairs(results, init="neurons", factors=factors)]
    return f"""{results["label"]}: {results["tokens"]:,} tokens of training, seed{"s" * (len(seeds) > 1)} {", ".join(map(str, seeds))},
measured on {results["measured"]:,} tokens ({where["processor"]}, threads: {where["threads"]}). Perplexity as a multiple of the original's;
from `neurons`, free right factors end below frozen ones in {sum(better)} of {len(better)} pairs.

{table(results).markdown()}
"""  # noqa: E501


def main() -> None:
    """Measures what is missing, and writes the tables."""
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--label", help="the model's name in the page; MODEL by default")
    parser.add_argument("--calibration", help="text to calibrate and to train on")
    parser.add_argument("--val", help="text to measure on")
    parser.add_argument("--tokens", dest="distil", type=int, default=65_536, help="of training, per run")
    parser.add_argument("--measured", type=int, default=16_384, help="tokens to measure on")
    parser.add_argument("--factors", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="*", default=[5e-4, 2e-3], help="the highest learning rates")
    parser.add_argument("--out", help="name of the results", default="demo")
    options = parser.parse_args()
    if not options.draw_only:
        if not (options.calibration and options.val):
            parser.error("--calibration and --val name the texts")
        quiet_transformers()
        measure_missing(options)
    kept = sorted(path.stem for path in RESULTS.glob("right-factors-*.json"))
    fill(DOCS / PAGE, SCRIPT, "\n".join(section(read_results(name)) for name in kept))


if __name__ == "__main__":
    main()
