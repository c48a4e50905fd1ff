"""What the factors of two compressed models mean, on the model that comes with krony.

    python benchmarks/interpretability.py [--draw-only]

Compresses and heals ``demo`` by the commands in ``docs/interpretability.md`` and inspects both models. Writes
``benchmarks/results/interpretability.json`` (without the singular values), the table in that page and its pictures;
with --draw-only the last two, from the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import DOCS, fill, results_of
from pydantic import TypeAdapter

from krony.interpretation.figures import ablations, by_kind, right_factors, similarity
from krony.interpretation.subspaces import effective_rank
from krony.interpretation.views import Interpretation
from krony.pages import Table
from krony.runtime.hardware import machine
from krony.storage.files import write_text

START = {
    "van-loan": ["--scheme", "256x128:4", "--init", "van-loan"],
    "neurons": ["--scheme", "256x256:2", "--init", "neurons", "--calibration", "python-docs"],
}


def measure() -> dict:
    """The figures of ``krony inspect`` for each model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def krony(*arguments: str) -> None:
            subprocess.run([sys.executable, "-m", "krony", *arguments], cwd=folder, check=True)

        for name, start in START.items():
            krony("compress", "demo", name, *start)
            text = ["--data", "python-docs", "--max-tokens", "131072"]
            krony("heal", name, f"{name}-healed", "--teacher", "demo", *text)
            krony("inspect", f"{name}-healed", "--report", f"{name}.html", "--json", f"{name}.json")
            found[name] = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))["factors"]
    for factors in found.values():
        for layer in factors["layers"]:
            for factor in layer["factors"]:
                factor["singular_values"] = []  # hundreds for each
    return {"models": found, "machine": machine(), "seed": 0}


def table(seen: dict[str, Interpretation]) -> Table:
    """One row for each kind of matrix. Noise is a Gaussian matrix of A's size, seed 0."""
    columns = ["matrices", "effective rank of A", "of noise", "share of energy", "without one factor", "in layer 0"]
    columns += ["largest share costs most", "A across layers (chance)", "spans of B (chance)"]
    rows = []
    for name, one in seen.items():
        for kind, layers in by_kind(one).items():
            factors = [factor for layer in layers for factor in layer.factors]
            later = [f.ratio for layer in layers[1:] for f in layer.factors if f.ratio is not None]
            first = [f.ratio for f in layers[0].factors if f.ratio is not None]
            ranks, shares = [f.effective_rank for f in factors], [f.share for f in factors]
            alike = {s.of: f"{s.across:.2f} ({s.chance:.2f})" for s in one.similarities if s.kind == kind}
            agree = sum(
                max(a.factors, key=lambda f: f.share) is max(a.factors, key=lambda f: f.ratio or 0) for a in layers
            )
            torch.manual_seed(0)
            noise = effective_rank(torch.linalg.svdvals(torch.randn(layers[0].left, dtype=torch.float64)))
            rows.append(
                [f"{name}, {kind}", f"{min(ranks):.0f} to {max(ranks):.0f} of {min(layers[0].left)}"]
                + [f"{noise:.0f}"]
                + [f"{min(shares):.0%} to {max(shares):.0%}", f"{min(later):.2f} to {max(later):.2f}"]
                + [f"{min(first):.2f} to {max(first):.2f}", f"{agree} of {len(layers)}", alike["left"], alike["right"]]
            )
    return Table(columns, rows)


def main() -> None:
    """Measures, and writes the table and the pictures."""
    results = results_of("interpretability", measure, __doc__)
    seen = {name: TypeAdapter(Interpretation).validate_python(one) for name, one in results["models"].items()}
    fill(DOCS / "interpretability.md", "benchmarks/interpretability.py", table(seen).markdown())
    van_loan = by_kind(seen["van-loan"])["mlp.c_fc"]
    write_text(DOCS / "interpretability-right.svg", right_factors("mlp.c_fc", van_loan))
    write_text(DOCS / "interpretability-ablation.svg", ablations("mlp.c_fc", van_loan))
    spans = next(s for s in seen["van-loan"].similarities if s.of == "right" and s.kind == "mlp.c_fc")
    write_text(DOCS / "interpretability-spans.svg", similarity(spans))


if __name__ == "__main__":
    main()
