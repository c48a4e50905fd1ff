"""How fast and how near: krony's exact decomposition against the paper's ``svd_lowrank``, on matrices of GPT-2's size.

    python benchmarks/decomposition.py [--json FILE]

Gaussian matrices, 3072x768, as many as GPT-2's MLPs have (24). The two take turns matrix by matrix; medians are of one
matrix. ``paper`` is Appendix A: ``torch.svd_lowrank(R, q=k, niter=10)`` in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from krony.kron import KronShape, dense, nearest, rearrange
from krony.schemes import NAMED, resolve

MATRICES, SEED = 24, 0


def paper(weight: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """The script of the paper's Appendix A, for one matrix."""
    u, s, v = torch.svd_lowrank(rearrange(weight, shape), q=shape.factors, niter=10)
    root = s.sqrt()
    return (u * root).T.reshape(-1, *shape.left), (v * root).T.reshape(-1, *shape.right)


def compare(shape: KronShape) -> dict:
    """Medians over the matrices: seconds and relative error of both, and their ratios."""
    ways = {"krony": nearest, "paper": paper}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    errors: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(MATRICES + 1):
        torch.manual_seed(SEED + index)
        weight = torch.randn(shape.rows, shape.columns)
        for way, decompose in ways.items():
            start = time.perf_counter()
            left, right = decompose(weight, shape)
            if index == 0:  # warm-up
                continue
            seconds[way].append(time.perf_counter() - start)
            errors[way].append(((weight - dense(left, right)).norm() / weight.norm()).item())
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "seconds": middle,
        "spread": {way: [min(times), max(times)] for way, times in seconds.items()},
        "faster": middle["paper"] / middle["krony"],
        "error": {way: statistics.median(values) for way, values in errors.items()},
    }


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    print("| scheme | krony, ms | svd_lowrank, ms | faster | error | error of svd_lowrank |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, scheme in NAMED.items():
        r = results[name] = compare(resolve(scheme, 3072, 768)) | {"scheme": scheme}
        ours, theirs = (1000 * r["seconds"][way] for way in ("krony", "paper"))
        print(f"| {name} ({scheme}) | {ours:.1f} | {theirs:.1f} | {r['faster']:.1f}x | ", end="")
        print(f"{r['error']['krony']:.5f} | {r['error']['paper']:.5f} |", flush=True)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        payload = {"machine": machine, "versions": versions, "seed": SEED, "results": results}
        options.json.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
