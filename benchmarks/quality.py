"""What each initialisation makes of a model at equal parameters, without any training, and after the same training.

    python benchmarks/quality.py MODEL --calibration FILE --data-dir DIR --out NAME [--rivals] [--distil TOKENS]
    python benchmarks/quality.py --draw-only --out NAME

Every method compresses the MLPs of all layers to the same number of parameters. Measured are the first tokens of
OpenWebText's validation sample (by the ``token`` protocol), of WikiText-2's test set and of LAMBADA's (by the ``paper``
protocol), with the accuracy of the last word, and the divergence from the original. 8-bit and 4-bit weights (torchao)
are there for comparison: of the original, and of what ``krony export --to slim`` makes. DIR holds
``openwebtext/val.jsonl``, ``wikitext-2`` and ``lambada``.

--rivals adds what other papers and packages do (``quality_methods.py``, ``rivals.py``). --distil TOKENS also trains
each compressed model towards the original's predictions on the same rows (``distilled.py``), and measures it again; a
run with another --seed adds its rows. ``pip install --group bench`` installs the packages.

Results are in ``benchmarks/results/quality-NAME.json``; tables and pictures are in ``docs``. Rows in the file are not
measured again, so that an interrupted run resumes, also in the middle of a training, and more methods can be added.
With --draw-only the page and the pictures are written from the file. Sizes are computed from the shapes of the model's
matrices, which are in the file too; ``tests/test_sizes.py`` computes them again. The README shows some rows;
``tests/test_readme.py`` checks them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DOCS, RESULTS, arguments, quiet_transformers, read_results
from distilled import Lesson
from quality_bytes import BITS, bits_of, check_sizes, model_facts, quantised, set_sizes
from quality_measures import Measures
from quality_methods import METHODS, RIVALS, WAYS, Starts, finished
from quality_page import cells, document, pictures

import krony
from krony.models.loading import context_length
from krony.runtime.hardware import machine
from krony.storage.files import write_json, write_text
from krony.storage.locks import locked

KEPT = ("model", "dtype", "tokens", "lambada_tokens", "calibration_tokens")  # rows of one file share them


def main() -> None:
    """Measures what is missing in the results, and writes the page and the pictures."""
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", metavar="FILE|python-docs")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", required=True, metavar="NAME")
    parser.add_argument("--label", help="the model's name in the table; MODEL by default")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of each set to measure on")
    parser.add_argument("--lambada-tokens", type=int, help="tokens of LAMBADA; 0 for all of it, by default as --tokens")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5, 0.25])
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="the methods; by default all but the rivals")
    parser.add_argument("--rivals", action="store_true", help="the rivals too")
    parser.add_argument("--distil", type=int, default=0, metavar="TOKENS", help="also train each on so many tokens")
    parser.add_argument("--rate", type=float, help="the learning rate of this training; the recipe's by default")
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="dtype to measure in"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.ways is None:
        options.ways = list(METHODS)
    if options.rivals:
        options.ways = list(dict.fromkeys((*options.ways, *RIVALS)))
    if options.lambada_tokens is None:
        options.lambada_tokens = options.tokens
    if not options.draw_only:
        if None in (options.model, options.calibration, options.data_dir):
            parser.error("a measurement takes MODEL, --calibration and --data-dir")
        quiet_transformers()
        measure_missing(options)
    results = read_results(f"quality-{options.out}")
    write_text(DOCS / f"quality-{options.out}.md", document(results, options.out))
    for name, svg in pictures(results).items():
        write_text(DOCS / f"quality-{options.out}{name}.svg", svg)
    print(document(results, options.out))


def measure_missing(options: argparse.Namespace) -> None:
    """Measures the rows that the results don't have; each is written as soon as it is measured."""
    file = RESULTS / f"quality-{options.out}.json"
    base, tokenizer = krony.load_model(options.model, dtype=torch.float32), krony.load_tokenizer(options.model)
    length = min(512, context_length(base))
    ids = krony.calibration_set(
        options.calibration, tokenizer, tokens=options.calibration_tokens, length=length, seed=options.seed
    )
    results = read_results(f"quality-{options.out}") if file.exists() else {"rows": []}
    start_results(results, options, {"calibration_tokens": ids.numel(), "facts": model_facts(base)})
    measures = Measures(base, tokenizer, options)

    def keep_results() -> None:
        with locked(file):  # another run may measure other rows of the same file
            if file.exists():
                take_over(results, read_results(f"quality-{options.out}"))
            set_sizes(results)
            check_sizes(results)
            write_json(file, results)

    measure_originals(results, base, measures, options, keep_results)
    starts = Starts(base, ids, results["facts"], options)
    lesson = Lesson(base, tokenizer, options) if options.distil else None
    for keep in options.keep:
        for way in options.ways:
            if not starts.knows(way):
                print(f"{way} does not know this model", flush=True)
                continue
            for row in measure(way, keep, starts, lesson, measures, results):
                results["rows"].append(row)
                keep_results()
                trained = f", trained on {row['distilled']:,} tokens" if "distilled" in row else ""
                print(f"{keep:g} {way}{trained}: {cells(row, results, [])}", flush=True)
                if lesson is not None and trained:
                    lesson.forget(way, keep)


def start_results(results: dict[str, Any], options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes down how these results are measured. Ends the run if its rows were measured in another way."""
    settings = {
        "model": options.label or options.model, "dtype": f"{options.dtype}".removeprefix("torch."),
        "tokens": options.tokens, "lambada_tokens": options.lambada_tokens, **found,
    }  # fmt: skip
    results.setdefault("lambada_tokens", results.get("tokens", options.lambada_tokens))
    for name in KEPT:
        if results.get(name, settings[name]) != settings[name]:
            raise SystemExit(
                f"quality-{options.out}.json was measured with {name} {results[name]}, and now it is {settings[name]}: "
                "take the same, or another --out"
            )
    results |= {"seed": results.get("seed", options.seed), "machine": results.get("machine", machine()), **settings}


def measure_originals(
    results: dict[str, Any], base: torch.nn.Module, measures: Measures, options: argparse.Namespace, keep: Callable
) -> None:
    """The original, and the original in fewer bits where slim is measured in as many."""
    if "base" not in results:
        results["base"] = measures.row(copy.deepcopy(base).to(options.dtype), is_original=True)
    elif "losses" not in results["base"]["sets"]["OpenWebText"]:  # an earlier version's
        results["base"]["sets"]["OpenWebText"] = measures.web(copy.deepcopy(base).to(options.dtype))
    keep()
    for name, bits in BITS.items():
        if name not in results and any(bits_of(way) == bits for way in options.ways):
            results[name] = measures.row(quantised(copy.deepcopy(base).to(options.dtype), bits))
            keep()


def take_over(results: dict[str, Any], stored: dict[str, Any]) -> None:
    """Adds the rows and originals that only the file has."""
    known = {key_of(row, results) for row in results["rows"]}
    results["rows"] += [row for row in stored["rows"] if key_of(row, results) not in known]
    for name in BITS:
        if name in stored:
            results.setdefault(name, stored[name])


def measure(
    way: str, keep: float, starts: Starts, lesson: Lesson | None, measures: Measures, results: dict[str, Any]
) -> Any:
    """Yields the rows of one method at one size that the results don't have: before the training, and after it."""
    options = starts.options
    tokens = 0 if lesson is None or bits_of(way) else options.distil
    wanted = [count for count in dict.fromkeys((0, tokens)) if not has(results, way, keep, count, options.seed)]
    if not wanted:
        return
    model, facts = starts.make(way, keep)
    row = {"way": way, "removed": 1 - keep, "seed": options.seed} | facts
    if 0 in wanted:
        yield row | measures.row(finished(copy.deepcopy(model), way, options.dtype))
    if lesson is not None and tokens in wanted and tokens:
        trained = lesson.train_on(model, way, keep)
        yield row | trained | measures.row(finished(model, way, options.dtype))


def has(results: dict[str, Any], way: str, keep: float, tokens: int, seed: int) -> bool:
    """Whether a row is in the results."""
    return (way, 1 - keep, tokens, seed) in {key_of(row, results) for row in results["rows"]}


def key_of(row: dict[str, Any], results: dict[str, Any]) -> tuple[str, float, int, int]:
    """What tells a row from others: method, share removed, tokens trained on, seed; without one it has the first."""
    return row["way"], row["removed"], row.get("distilled", 0), row.get("seed", results["seed"])


if __name__ == "__main__":
    main()
