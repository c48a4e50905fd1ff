"""How long krony itself takes: each part of a compression at the widths of today's models, and steps of a training.

    python benchmarks/compressor_speed.py [--widths 576 960 2048 4096] [--draw-only]

A compression of ``keep=0.5 --init neurons --allocation global`` is measured on one layer of a Llama with random
weights, in float32, for each width: the forward pass over 16,384 tokens, the second moments that are summed meanwhile,
the sensitivity, the ranking of the neurons, whose costs the allocation compares, and the factors of those that stay,
with their errors. Steps of ``--tune`` and ``krony heal`` are measured on a Llama of SmolLM2-135M's shape with a teacher
of that shape, in rows of 512 tokens.

Beside the seconds is the arithmetic that they do, as a share of the rate at which this machine multiplies large square
matrices of the same dtype: what is far below 100 % is not bounded by products. The results are in
``benchmarks/results/compressor-speed.json``, each part as soon as it is measured, so that an interrupted run continues;
the tables are in ``docs/compressor-speed.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DOCS, RESULTS, Runs, arguments, draw_or_measure
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from krony.compression.allocation import least_width, ranking_of
from krony.compression.compress import compress_as_planned
from krony.compression.moments import BATCH_TOKENS, SENSITIVITY_TOKENS, Calibration, batches
from krony.compression.plan import plan
from krony.compression.replacement import replacements
from krony.compression.tuning import tune
from krony.config import KronyConfig
from krony.data.rows import Rows
from krony.healing.flops import flop_counter, training_flops
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.training import train_on_rows
from krony.models.modes import evaluating
from krony.models.precision import product_dtype
from krony.pages import Table
from krony.runtime.progress import silent
from krony.runtime.timing import timed
from krony.storage.files import write_text

SHAPES = {576: 1536, 960: 2560, 2048: 8192, 4096: 11_008}  # SmolLM2-135M and 360M, Llama 3.2 1B, Llama 2 7B
LENGTH, DEFAULT_TOKENS = 512, 131_072
PARTS = ("forward pass", "second moments", "finishing them", "sensitivity", "ranking", "factors")
GROW = PARTS[:2]  # with the text
PRODUCTS = tuple(name for name in PARTS if name != "finishing them")  # what mostly multiplies matrices
CONFIG = KronyConfig("keep=0.5", init="neurons", allocation="global")
PRODUCT = 3072  # rows and columns of the matrices by which the machine's rate is measured
TURNS, STEPS = 3, 8
HEALING = "krony heal"
TRAININGS = ("--tune", "--tune --tune-all", HEALING)
CPU = torch.device("cpu")


def llama(width: int, hidden: int, layers: int, words: int) -> PreTrainedModel:
    """A Llama-shaped model of random weights in float32, in eval mode."""
    torch.manual_seed(0)
    heads = width // 64
    shared = heads // (4 if heads % 3 else 3)  # of keys and values
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=words, tie_word_embeddings=True, dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on this machine, at its best of some turns."""
    first, second = (torch.randn(PRODUCT, PRODUCT, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2 * PRODUCT**3 / min(timed(CPU, lambda: first @ second) for _ in range(2 * TURNS))


def median(call: Callable[[], Any]) -> float:
    """Seconds, after one turn that does not count; a call of more than ten seconds has one turn, which does."""
    first = timed(CPU, call)
    return first if first > 10 else statistics.median(timed(CPU, call) for _ in range(TURNS))


def dropping(neurons: int, count: int, out: int) -> float:
    """FLOPs of dropping ``count`` of the neurons: the inverse, and one update per block of it and of the weights."""
    left = neurons - count
    return neurons**3 + 2 / 3 * (neurons**3 - left**3) + out * (neurons**2 - left**2)


@torch.no_grad()
def compression(width: int, hidden: int) -> dict[str, Any]:
    """Seconds and FLOPs of each part, for one layer."""
    model = llama(width, hidden, layers=1, words=1024)
    ids = torch.randint(1024, (SENSITIVITY_TOKENS // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    settled = plan(model, CONFIG)
    (group,), tokens, least = settled.groups, ids.numel(), least_width(settled)

    def read(rows: torch.Tensor, *, sensitivity: bool = False) -> Any:
        return next(iter(Calibration(model, settled.groups, rows, sensitivity=sensitivity)))

    def forward() -> None:
        with evaluating(model):
            for rows in batches(ids, BATCH_TOKENS):
                model.base_model(input_ids=rows, use_cache=False)

    moments = read(ids, sensitivity=True)
    half, rankings = hidden // 2, []  # neurons that stay, and their ranking in each turn
    passes = median(forward)
    reading, half_of_it = (median(partial(read, rows)) for rows in (ids, ids[: len(ids) // 2]))
    growing = 2 * (reading - half_of_it)
    seconds = {
        "forward pass": passes,
        "second moments": growing - passes,
        "finishing them": reading - growing,
        "sensitivity": median(lambda: read(ids, sensitivity=True)) - reading,
        "ranking": median(lambda: rankings.append(ranking_of(model, group, moments, CONFIG, least=least))),
    }
    kept = rankings[-1].kept(hidden, half)
    seconds["factors"] = median(lambda: replacements(model, group, settled.shapes, CONFIG, moments, kept=kept))
    once = counted(lambda: model.base_model(input_ids=ids[:1], use_cache=False)) * len(ids)
    factorised = (hidden**3 + half**3) / 3  # of all neurons, to see whether a ridge is needed, and of those that stay
    flops = {
        "forward pass": once,
        "second moments": tokens * (hidden**2 + width**2),  # one triangle
        "sensitivity": once + tokens * width**2,  # gradients of activations only
        "ranking": dropping(hidden, hidden - least, width),
        "factors": factorised + 2 * half * hidden * width + 2 * half**2 * width,
    }
    return {"width": width, "hidden": hidden, "tokens": tokens, "seconds": seconds, "flops": flops}


def training(name: str) -> dict[str, Any]:
    """Tokens per second of steps of this training, and FLOPs per token."""
    teacher = llama(576, 1536, layers=30, words=49_152)
    student = copy.deepcopy(teacher)
    compress_as_planned(student, plan(student, KronyConfig("keep=0.5", init="random")), None)
    ids = torch.randint(49_152, (STEPS + 8, LENGTH), generator=torch.Generator().manual_seed(0))

    def run(steps: int, progress: Callable[..., None] = silent) -> None:
        everything = "--tune-all" in name
        tune(copy.deepcopy(student), teacher, ids, steps=steps, everything=everything, progress=progress)

    if name == HEALING:
        pace, flops = pace_of_heal(student, teacher), training_flops(student, teacher, LENGTH)
    else:
        pace = LENGTH / statistics.median(between_steps(partial(run, STEPS)))
        flops = (counted(partial(run, 2)) - counted(partial(run, 1))) / LENGTH
    kind = str(product_dtype(teacher)).removeprefix("torch.")
    counted_with = {"flops_per_token": flops, "attention_counted": True}
    return {"training": name, "tokens_per_s": pace, "dtype": kind} | counted_with


def between_steps(run: Callable[[Callable[..., None]], object]) -> list[float]:
    """Seconds from each step of a training to the next, without the first."""
    moments: list[float] = []
    run(lambda *_: moments.append(time.perf_counter()))
    return [later - earlier for earlier, later in itertools.pairwise(moments[1:])]


def counted(run: Callable[[], object]) -> int:
    """FLOPs of the products that ``run`` computes."""
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops())


def pace_of_heal(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Tokens per second between two steps, of which most are not followed by a validation."""
    recipe = replace(RECIPES["quick"], length=LENGTH, evaluations=2)
    text = Rows(np.random.default_rng(0).integers(49_152, size=20 * LENGTH).astype(np.uint16), LENGTH)
    options = HealOptions(device="cpu", keep_anyway=True)

    def run(progress: Callable[..., None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            train_on_rows(
                copy.deepcopy(student), *text.split(4), work=Path(folder), teacher=teacher, recipe=recipe,
                options=options, progress=progress,
            )  # fmt: skip

    return recipe.sequences * LENGTH / statistics.median(between_steps(run))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, which are also written to the results."""
    runs = Runs(options.out, seed=0)
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    if "rates" not in runs.results:
        runs.results["rates"] = {str(dtype).removeprefix("torch."): rate(dtype) for dtype in kinds}
    for width in options.widths:
        if not runs.has({"width": width}):
            runs.add(compression(width, SHAPES[width]))
    for name in TRAININGS:
        if not runs.has({"training": name}):
            runs.add(training(name))
    return runs.results


def write_page(results: dict[str, Any]) -> None:
    """The tables of the page."""
    rates, runs = results["rates"], results["runs"]
    seconds, shares, steps = [], [], []
    for row in (run for run in runs if "width" in run):
        took = {name: max(0.0, each) for name, each in row["seconds"].items()}
        head = [f"{row['width']:,}", f"{row['hidden']:,}"]
        more = DEFAULT_TOKENS / row["tokens"]
        whole = {name: took[name] * (more if name in GROW else 1) for name in PARTS}
        largest = max(whole, key=lambda name: whole[name])
        cells = [f"{took[name]:,.2f}" for name in PARTS]
        total = sum(whole.values())
        seconds.append([*head, *cells, f"{total:,.1f}", f"{largest}, {whole[largest] / total:.0%}"])
        kinds = dict.fromkeys(PARTS, "float32") | {"ranking": "float64", "factors": "float64"}
        used = [row["flops"][name] / took[name] / rates[kinds[name]] for name in PRODUCTS]
        shares.append([*head, *(f"{each:.0%}" for each in used)])
    for row in (run for run in runs if "training" in run):
        achieved = row["tokens_per_s"] * row["flops_per_token"]
        share = f"{achieved / rates[row['dtype']]:.0%}"
        steps.append([row["training"], f"{row['tokens_per_s']:,.0f}", f"{achieved / 1e9:,.0f}", row["dtype"], share])
    all_counted = all(row.get("attention_counted") for row in runs if "training" in row)
    where = results["machine"]
    known = ", ".join(f"{name} {each / 1e9:,.0f}" for name, each in rates.items())
    write_text(DOCS / "compressor-speed.md", PAGE.format(
        processor=where["processor"], threads=where["threads"], torch=where["torch"], rates=known,
        seconds=Table(["width", "hidden", *PARTS, "a layer of a model", "the largest part"], seconds).markdown(),
        shares=Table(["width", "hidden", *PRODUCTS], shares).markdown(),
        steps=Table(["training", "tokens/s", "GFLOP/s", "products in", "of the rate above"], steps).markdown(),
        size=PRODUCT,
        without="" if all_counted else ", but without torch's own attention: the true shares are higher",
    ))  # fmt: skip


PAGE = """# Speed of krony itself

Written by `python benchmarks/compressor_speed.py`.
{processor}, {threads} threads, torch {torch}. The machine multiplies square matrices of {size:,} rows at these rates,
in GFLOP/s: {rates}.

## Compressing

`--scheme keep=0.5 --init neurons --allocation global` on one layer of a Llama, in float32. Seconds for 16,384 tokens;
the column *a layer of a model* is for 131,072 tokens, of which 16,384 measure the sensitivity:

{seconds}

The arithmetic of each part as a share of the rate above, in float32 for the first three and float64 for the others:

{shares}

The forward pass and the second moments grow with the text, ranking and factors with the cube of the hidden width. The
text is read with products in float32, also where the machine is faster in bfloat16. What takes more than 10 seconds was
timed once, everything else three times after a first. The columns from *second moments* to *sensitivity* are
differences of such times.

## Training

A Llama of SmolLM2-135M's shape with half of the MLPs' neurons, taught by the original, in rows of 512 tokens: one per
step in `--tune`, two in `krony heal`. The arithmetic is all products of a step, the teacher's forward pass
included{without}.

{steps}
"""


def main() -> None:
    """Measures, and writes the results and the page."""
    parser = arguments(__doc__)
    parser.add_argument("--widths", type=int, nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS / "compressor-speed.json")
    draw_or_measure(parser.parse_args(), "compressor-speed", measure, write_page)


if __name__ == "__main__":
    main()
