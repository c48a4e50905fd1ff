"""GPT-2 124M at the paper's sizes against the original and against rivals: prefill, decode, training, memory, loading.

    python benchmarks/speed.py [--threads 2] [--rounds 7] [--compile] [--draw-only]

All models have GPT-2's config and random weights (speed doesn't depend on their values; the factors are ``van-loan``'s,
without zeros). All models are in one process and take turns. Rivals:

- ``multiplied out``: the 81M model as the paper's code runs it, forming the Kronecker products in every forward pass;
- ``DistilGPT2's shape``: six layers instead of twelve, 81.9M parameters;
- ``whitened SVD``: every matrix of the MLPs as two thin ones, with the 81M model's number of parameters;
- ``n_inner=768``: a dense GPT-2 with the 81M model's arithmetic but nothing to combine, which is also what
  ``krony export --to slim`` makes of a model that neuron selection compressed to 81M.

Writes ``benchmarks/results/speed.json``, ``docs/speed.md``, ``docs/speed.svg`` (``speed-compiled`` with --compile);
with --draw-only the last two, from the first. The README shows some rows; ``tests/test_readme.py`` checks them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from common import DOCS, RESULTS, arguments, quiet_transformers, read_results
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from krony.compression.compress import compress
from krony.config import KronyConfig
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.speed import ModelSpeed, bench, make_subject, to_json
from krony.evaluation.speed_tables import caption, ratio_picture, table
from krony.evaluation.spread import compare
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import unfuse
from krony.models.surgery import find_groups, kronecker_layers, put_in, take_out
from krony.storage.files import write_json, write_text

# 153 * (3072 + 768) = 587,520 numbers per matrix; 81M has 589,828.
ORIGINAL, OURS, SVD_RANK = "GPT-2 124M", "krony 81M", 153


class MultipliedOut(nn.Module):
    """A Kronecker layer as the paper's public code runs it: the products are formed in every forward pass."""

    def __init__(self, layer: KroneckerLinear) -> None:
        super().__init__()
        self.weight, self.right, self.bias = layer.weight, layer.right, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, sum(map(torch.kron, self.weight, self.right)), self.bias)


class Thin(nn.Module):
    """A low-rank matrix as two thin ones."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def gpt2(seed: int, **changes: int) -> PreTrainedModel:
    """A GPT-2 124M with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(GPT2Config(**changes)).eval()


def compressed(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """A copy compressed to this scheme."""
    model = copy.deepcopy(model)
    compress(model, KronyConfig(scheme, init="van-loan"))
    return model


def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a compressed model that forms its products in every forward pass."""
    model = copy.deepcopy(model)
    unfuse(model)
    for name, layer in kronecker_layers(model).items():
        put_in(model, name, MultipliedOut(layer))
    return model


def low_rank(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A copy whose MLPs consist of thin matrices."""
    model = copy.deepcopy(model)
    for group in find_groups(model):
        for site in group.sites:
            rows, columns = take_out(model, site.name)[0].shape
            put_in(model, site.name, Thin(rows, columns, rank))
    return model.eval()


def subjects(seed: int) -> dict[str, PreTrainedModel]:
    """Every model by its name in the table, the original first."""
    original = gpt2(seed)
    krony = {f"krony {scheme}": compressed(original, scheme) for scheme in ("81M", "96M", "80M")}
    return {
        ORIGINAL: original, **krony,
        "81M multiplied out": multiplied_out(krony["krony 81M"]),
        "DistilGPT2's shape": gpt2(seed, n_layer=6),
        "whitened SVD, 81M": low_rank(original, SVD_RANK),
        "n_inner=768": gpt2(seed, n_inner=768),
    }  # fmt: skip


def verdicts(rows: list[ModelSpeed]) -> dict[str, float]:
    """Ratios between two models of which neither is the first: the medians of the turns' ratios."""
    seconds = {row.name: row.seconds for row in rows}

    def ours(rival: str, work: str) -> float:
        return compare(seconds[rival][work], seconds[OURS][work]).ratio

    return {
        "decode, 81M against multiplied out": ours("81M multiplied out", "decode"),
        "prefill, 81M against multiplied out": ours("81M multiplied out", "prefill"),
        "training step, 81M against multiplied out": ours("81M multiplied out", "train"),
        "prefill, 81M against DistilGPT2's shape": ours("DistilGPT2's shape", "prefill"),
        "decode, 81M against DistilGPT2's shape": ours("DistilGPT2's shape", "decode"),
    }


def document(figures: dict, rows: list[ModelSpeed], image: str) -> str:
    """``docs/speed.md``."""
    pairs = "\n".join(f"| {name} | {ratio:.2f}x |" for name, ratio in figures["against"].items())
    return f"""# Speed

Written by `python benchmarks/speed.py{" --compile" if figures["settings"]["compiled"] else ""}`.
{caption(figures)}; seed {figures["settings"]["seed"]}, torch {figures["machine"]["torch"]}, transformers
{figures["machine"]["transformers"]}. A training step is forward, backward and AdamW on as many tokens as the prefill.
Peak is the most memory that tensors take during a prefill, weights included. All models are in one process and take
turns.

{table(rows).markdown()}

| | |
| --- | ---: |
{pairs}

![speed relative to the original's]({image})
"""


def main() -> None:
    """Measures, and writes the results and the page."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    name = "speed-compiled" if options.compile else "speed"
    figures = read_results(name) if options.draw_only else measure(options, name)
    rows = [ModelSpeed.from_json(model) for model in figures["models"]]
    page = document(figures, rows, f"{name}.svg")
    write_text(DOCS / f"{name}.svg", ratio_picture(rows, subject=OURS))
    write_text(DOCS / f"{name}.md", page)
    print(page)


def measure(options: argparse.Namespace, name: str) -> dict:
    """All figures, which are also written to the results."""
    torch.set_num_threads(options.threads)
    start = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {done}/{total}  {what}", file=sys.stderr, flush=True)

    quiet_transformers()
    progress(0, 1, "building")
    rivals = (MultipliedOut, Thin)  # they can't be loaded: their size is that of their tensors
    models = {
        name: make_subject(name, model, loads=0 if any(isinstance(m, rivals) for m in model.modules()) else 3)
        for name, model in subjects(options.seed).items()
    }
    settings = SpeedSettings(rounds=options.rounds, seed=options.seed, compiled=options.compile)
    rows = bench(list(models.values()), settings, progress=progress)
    against = verdicts(rows)
    figures = to_json(rows, settings, dtype="float32", against=against, seconds=time.perf_counter() - start)
    write_json(RESULTS / f"{name}.json", figures)
    return figures


if __name__ == "__main__":
    main()
