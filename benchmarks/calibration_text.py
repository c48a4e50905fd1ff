"""Which text to calibrate on: text like that of use, what comes with Python, or what the model itself writes.

    python benchmarks/calibration_text.py MODEL --like FILE --val FILE --out NAME [--tokens N] [--seeds 0 1]
    python benchmarks/calibration_text.py --draw-only

Half of the neurons of MODEL's MLPs are removed by ``--allocation global``, without training, on as many tokens of each
text: --like, which is of the same kind as --val; ``python-docs``; and ``self``. Measured are the first --measured
tokens of --val by the ``token`` protocol, in bfloat16.

Writes ``benchmarks/results/calibration-text-NAME.json`` and its table in ``docs/options.md``. Runs that are in the file
are not repeated, so that an interrupted run resumes, and more seeds can be added.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from common import DOCS, RESULTS, Runs, arguments, fill, quiet_transformers, read_results
from torch import Tensor

import krony
from krony.pages import Table

PAGE, SCRIPT = "options.md", "benchmarks/calibration_text.py"
TEXTS = ("like", "self", "python-docs")


def measure_missing(options: argparse.Namespace) -> None:
    """Measures the runs that are not in the results."""
    runs = Runs(
        RESULTS / f"calibration-text-{options.out}.json",
        tokens=options.tokens,
        measured=options.measured,
        like=Path(options.like).parent.name,
    )
    runs.results["label"] = options.label or options.model
    tokenizer = krony.load_tokenizer(options.model)
    original = krony.load_model(options.model, dtype="float32")

    def read(text: str, seed: int) -> Tensor:
        if text == "self":
            return krony.own_text(original, tokenizer, tokens=options.tokens, seed=seed)
        return krony.calibration_set(
            options.like if text == "like" else text, tokenizer, tokens=options.tokens, seed=seed
        )

    def look(model: Any) -> float:
        low = copy.deepcopy(model).to(torch.bfloat16)
        return krony.evaluate(low, tokenizer, options.val, protocol="token", max_tokens=options.measured).perplexity

    if "base" not in runs.results:
        runs.results["base"] = look(original)
    for seed in options.seeds:
        for text in TEXTS:
            key = {"text": text, "seed": seed}
            if runs.has(key):
                continue
            start = time.perf_counter()
            ids = read(text, seed)
            read_in = time.perf_counter() - start
            model = copy.deepcopy(original)
            config = krony.KronyConfig("keep=0.5", allocation="global", seed=seed)
            report = krony.compress(model, config, calibration=ids)
            runs.add(key | {"params": report.params_after, "perplexity": look(model), "read_seconds": read_in})
            print(runs.results["runs"][-1], flush=True)


def write_page(results: dict[str, Any]) -> None:
    """Puts the table into the page."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    named = {
        "like": f"like the measured text ({results['like']})",
        "self": "`self`",
        "python-docs": "`python-docs`",
    }
    rows = []
    for text in TEXTS:
        found = {run["seed"]: run["perplexity"] for run in results["runs"] if run["text"] == text}
        rows.append([named[text], *(f"{found[seed]:.1f} ({found[seed] / results['base']:.2f})" for seed in seeds)])
    table = Table(["calibration text", *(f"seed {seed}" for seed in seeds)], rows).markdown()
    where = results["machine"]
    said = (
        f"Perplexity, and its ratio to the original's {results['base']:.1f}, on {results['measured']:,} tokens. Half "
        f"of the neurons in the MLPs of {results['label']} are removed by `--allocation global` on "
        f"{results['tokens']:,} tokens, without training ({where['processor']}, threads: {where['threads']})."
    )
    fill(DOCS / PAGE, SCRIPT, f"{table}\n\n{said}\n")


def main() -> None:
    """Measures what is missing, and writes the page."""
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--like", metavar="FILE", help="text of the same kind as --val")
    parser.add_argument("--val", metavar="FILE")
    parser.add_argument("--out", metavar="NAME", default="smollm2")
    parser.add_argument("--label")
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--measured", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    quiet_transformers()
    if not options.draw_only:
        measure_missing(options)
    write_page(read_results(f"calibration-text-{options.out}"))


if __name__ == "__main__":
    main()
