"""Speed and accuracy of krony's exact decomposition against the paper's ``svd_lowrank``.

    python benchmarks/decomposition.py [--threads 2] [--matrices 24] [--draw-only]

Decomposes 24 Gaussian matrices of 3072x768, the number and shape of GPT-2 124M's MLP matrices, at every named scheme;
then matrices of the shape of ``81M`` at widths from 768 to 4096. The two methods take turns on each matrix; times are
medians per matrix. ``svd_lowrank`` is the script of the paper's Appendix A: ``torch.svd_lowrank(R, q=k, niter=10)`` in
float32. Memory is the most that tensors take beside the matrix and its factors. Writes
``benchmarks/results/decomposition.json``, ``docs/decomposition.md`` and ``docs/decomposition.svg``; with --draw-only
the last two, from the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import DOCS, RESULTS, arguments, read_results
from torch import Tensor

from krony.evaluation.memory import peak_of
from krony.kronecker.algebra import KronShape, dense, nearest, rearrange
from krony.kronecker.schemes import PAPER_NAMES, resolve
from krony.pages import Table
from krony.pictures import lines
from krony.runtime.hardware import machine
from krony.storage.files import write_json, write_text

SEED, WIDTHS = 0, (768, 1024, 1600, 2048, 3072, 4096)


def paper(weight: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """The script of the paper's Appendix A, for one matrix."""
    u, s, v = torch.svd_lowrank(rearrange(weight, shape), q=shape.factors, niter=10)
    root = s.sqrt()
    return (u * root).T.reshape(-1, *shape.left), (v * root).T.reshape(-1, *shape.right)


METHODS: dict[str, Callable[[Tensor, KronShape], tuple[Tensor, Tensor]]] = {"krony": nearest, "svd_lowrank": paper}


def compare(shape: KronShape, matrices: int) -> dict:
    """Medians over the matrices: seconds and relative error of both methods, their spread, and the memory they need."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    memory = {}
    for index in range(matrices + 1):
        torch.manual_seed(SEED + index)
        weight = torch.randn(shape.rows, shape.columns)
        for method, decompose in METHODS.items():
            if index == 0:  # a warm-up
                memory[method] = peak_of(lambda decompose=decompose, weight=weight: decompose(weight, shape))
                continue
            start = time.perf_counter()
            left, right = decompose(weight, shape)
            seconds[method].append(time.perf_counter() - start)
            errors[method].append(((weight - dense(left, right)).norm() / weight.norm()).item())
    middle = {method: statistics.median(times) for method, times in seconds.items()}
    return {
        "shape": [*shape.left, *shape.right, shape.factors],
        "seconds": middle,
        "spread": {method: [min(times), max(times)] for method, times in seconds.items()},
        "faster": middle["svd_lowrank"] / middle["krony"],
        "error": {method: statistics.median(values) for method, values in errors.items()},
        "as_accurate": all(ours <= theirs + 1e-6 for ours, theirs in zip(*errors.values(), strict=True)),
        "peak_bytes": memory,
    }


def table(results: dict[str, dict]) -> Table:
    """The figures as a table."""
    columns = ["", "krony, ms", "svd_lowrank, ms", "faster", "error", "of svd_lowrank", "memory, MB", "of svd_lowrank"]
    rows = []
    for name, r in results.items():
        cells = [name, *(f"{1000 * r['seconds'][method]:,.1f}" for method in METHODS), f"{r['faster']:.1f}x"]
        cells += [f"{r['error'][method]:.5f}" for method in METHODS]
        rows.append([*cells, *(f"{r['peak_bytes'][method] / 1e6:,.1f}" for method in METHODS)])
    return Table(columns, rows)


def document(figures: dict) -> str:
    """``docs/decomposition.md``."""
    where = figures["machine"]
    return f"""# Decomposition

Written by `python benchmarks/decomposition.py`. {where["processor"]}, {where["threads"]} threads, torch
{where["torch"]}; medians per matrix over {figures["matrices"]} Gaussian ones, seed {figures["seed"]}. krony computes in
float64, `torch.svd_lowrank(R, q=k, niter=10)` (the paper's Appendix A) in float32. The error is ‖W − Ŵ‖/‖W‖.

GPT-2 124M's matrices, 3072x768:

{table(figures["schemes"]).markdown()}

The scheme of 81M at other widths d, for matrices of 4d x d:

{table(figures["widths"]).markdown()}

![seconds against width](decomposition.svg)
"""


def picture(figures: dict) -> str:
    """Seconds against width."""
    series = {
        method: [(float(width), r["seconds"][method]) for width, r in figures["widths"].items()] for method in METHODS
    }
    faster = [r["faster"] for r in figures["widths"].values()]
    ratios = f"{min(faster):.0f} to {max(faster):.0f} times"
    title = f"At the scheme of 81M krony decomposes a matrix {ratios} as fast as svd_lowrank, and exactly"
    return lines(series, title=title, x="width of the model", y="seconds per matrix", log=True)


def main() -> None:
    """Measures, and writes the results and the page."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matrices", type=int, default=24)
    options = parser.parse_args()
    figures = read_results("decomposition") if options.draw_only else measure(options)
    write_text(DOCS / "decomposition.svg", picture(figures))
    write_text(DOCS / "decomposition.md", document(figures))


def measure(options: argparse.Namespace) -> dict:
    """All figures, which are also written to the results."""
    torch.set_num_threads(options.threads)
    schemes, widths = {}, {}
    for name, scheme in PAPER_NAMES.items():
        schemes[f"{name} ({scheme})"] = compare(resolve(scheme, 3072, 768), options.matrices)
        print(table(schemes).markdown().splitlines()[-1], flush=True)
    for width in WIDTHS:
        matrices = min(options.matrices, 5)
        widths[f"{width}"] = compare(KronShape.split(4 * width, width, width, width), matrices)
        print(table(widths).markdown().splitlines()[-1], flush=True)
    figures = {
        "machine": machine(), "seed": SEED, "matrices": options.matrices, "schemes": schemes, "widths": widths,
    }  # fmt: skip
    write_json(RESULTS / "decomposition.json", figures)
    return figures


if __name__ == "__main__":
    main()
