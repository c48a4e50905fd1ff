"""How fast and how near: krony's exact decomposition against the paper's ``svd_lowrank``.

    python benchmarks/decomposition.py [--threads 2] [--matrices 24]

As many Gaussian matrices of 3072x768 as GPT-2 124M's MLPs have, at every named scheme; then one shape, ``81M``'s, at
widths from 768 to 4096. The two take turns matrix by matrix; seconds are medians of one matrix. ``svd_lowrank`` is the
script of the paper's Appendix A: ``torch.svd_lowrank(R, q=k, niter=10)`` in float32. Memory is the most that tensors
take beside the matrix and its factors. Writes ``benchmarks/results/decomposition.json``, ``docs/decomposition.md`` and
``docs/decomposition.svg``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from krony.evaluation.speed import peak_of
from krony.kronecker.algebra import KronShape, dense, nearest, rearrange
from krony.kronecker.schemes import NAMED, resolve
from krony.pages import Table, lines
from krony.runtime.hardware import machine
from krony.storage.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
SEED, WIDTHS = 0, (768, 1024, 1600, 2048, 3072, 4096)


def paper(weight: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """The script of the paper's Appendix A, for one matrix."""
    u, s, v = torch.svd_lowrank(rearrange(weight, shape), q=shape.factors, niter=10)
    root = s.sqrt()
    return (u * root).T.reshape(-1, *shape.left), (v * root).T.reshape(-1, *shape.right)


WAYS: dict[str, Callable[[Tensor, KronShape], tuple[Tensor, Tensor]]] = {"krony": nearest, "svd_lowrank": paper}


def compare(shape: KronShape, matrices: int) -> dict:
    """Medians over the matrices: seconds and relative error of both ways, their spread, and the memory they need."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    memory = {}
    for index in range(matrices + 1):
        torch.manual_seed(SEED + index)
        weight = torch.randn(shape.rows, shape.columns)
        for way, decompose in WAYS.items():
            if index == 0:  # a warm-up
                memory[way] = peak_of(lambda decompose=decompose, weight=weight: decompose(weight, shape))
                continue
            start = time.perf_counter()
            left, right = decompose(weight, shape)
            seconds[way].append(time.perf_counter() - start)
            errors[way].append(((weight - dense(left, right)).norm() / weight.norm()).item())
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "shape": [*shape.left, *shape.right, shape.factors],
        "seconds": middle,
        "spread": {way: [min(times), max(times)] for way, times in seconds.items()},
        "faster": middle["svd_lowrank"] / middle["krony"],
        "error": {way: statistics.median(values) for way, values in errors.items()},
        "as_accurate": all(ours <= theirs + 1e-6 for ours, theirs in zip(*errors.values(), strict=True)),
        "peak_bytes": memory,
    }


def table(results: dict[str, dict]) -> Table:
    """The figures as they are shown."""
    columns = ["", "krony, ms", "svd_lowrank, ms", "faster", "error", "of svd_lowrank", "memory, MB", "of svd_lowrank"]
    rows = []
    for name, r in results.items():
        cells = [name]
        cells += [f"{1000 * r['seconds'][way]:,.1f}" for way in WAYS] + [f"{r['faster']:.1f}x"]
        cells += [f"{r['error'][way]:.5f}" for way in WAYS] + [f"{r['peak_bytes'][way] / 1e6:,.1f}" for way in WAYS]
        rows.append(cells)
    return Table(columns, rows)


def document(figures: dict) -> str:
    """``docs/decomposition.md``."""
    where = figures["machine"]
    return f"""# Decomposition

Written by `python benchmarks/decomposition.py`. {where["processor"]}, {where["threads"]} threads, torch
{where["torch"]}; medians of one matrix of {figures["matrices"]} Gaussian ones, seed {SEED}; krony computes in float64,
`torch.svd_lowrank(R, q=k, niter=10)` (the paper's Appendix A) in float32. The error is ‖W − Ŵ‖/‖W‖.

GPT-2 124M's matrices, 3072x768:

{table(figures["schemes"]).markdown()}

The scheme of 81M at other widths, 4d x d:

{table(figures["widths"]).markdown()}

![seconds against width](decomposition.svg)
"""


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matrices", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    schemes, widths = {}, {}
    for name, scheme in NAMED.items():
        schemes[f"{name} ({scheme})"] = compare(resolve(scheme, 3072, 768), options.matrices)
        print(table(schemes).markdown().splitlines()[-1], flush=True)
    for width in WIDTHS:
        matrices = min(options.matrices, 5)
        widths[f"{width}"] = compare(KronShape.split(4 * width, width, width, width), matrices)
        print(table(widths).markdown().splitlines()[-1], flush=True)
    figures = {
        "machine": machine(), "seed": SEED, "matrices": options.matrices, "schemes": schemes, "widths": widths,
    }  # fmt: skip
    series = {way: [(float(width), r["seconds"][way]) for width, r in widths.items()] for way in WAYS}
    write_json(ROOT / "benchmarks/results/decomposition.json", figures)
    write_text(ROOT / "docs/decomposition.svg", lines(series, "width of the model", "seconds a matrix"))
    write_text(ROOT / "docs/decomposition.md", document(figures))


if __name__ == "__main__":
    main()
