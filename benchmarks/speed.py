"""GPT-2 124M at the paper's sizes against the original and against rivals: prefill, decode, training, memory, loading.

    python benchmarks/speed.py [--threads 2] [--rounds 7] [--compile]

All models have GPT-2's config and random weights (speed doesn't depend on their values; the factors are ``van-loan``'s,
without zeros). Everything runs in one process, turn by turn. Rivals:

- ``multiplied out``: the 81M model as the paper's code runs it, the Kronecker products formed in every forward;
- ``DistilGPT2's shape``: six layers instead of twelve, 81.9M parameters;
- ``whitened SVD``: every matrix of the MLPs as two thin ones, at the 81M model's parameters;
- ``n_inner=768``: a dense GPT-2 of the 81M model's arithmetic without its mixes, which is also what
  ``krony export --to slim`` makes of a model that neuron selection compressed to 81M.

Writes ``benchmarks/results/speed.json``, ``docs/speed.md``, ``docs/speed.svg`` (``speed-compiled`` with
--compile). The README shows some rows; ``tests/test_readme.py`` checks them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from krony.cli.bench import caption, table
from krony.cli.output import quiet_libraries
from krony.compression.compress import compress
from krony.config import KronyConfig
from krony.evaluation.speed import Row, Settings, bench, store, to_json
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import part
from krony.models.surgery import find_groups, kronecker_layers, put_in, take_out
from krony.pages import bars
from krony.storage.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL, SVD_RANK = "GPT-2 124M", 153  # 153 * (3072 + 768) = 587,520 numbers a matrix; 81M has 589,828


class MultipliedOut(nn.Module):
    """A Kronecker layer as the paper's public code runs it: the products formed in every forward."""

    def __init__(self, layer: KroneckerLinear) -> None:
        super().__init__()
        self.weight, self.right, self.bias = layer.weight, layer.right, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, sum(map(torch.kron, self.weight, self.right)), self.bias)


class Thin(nn.Module):
    """A matrix of low rank as two thin ones."""

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
    """A copy at this scheme."""
    model = copy.deepcopy(model)
    compress(model, KronyConfig(scheme, init="van-loan"))
    return model


def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a compressed model that forms its products in every forward."""
    model = copy.deepcopy(model)
    part(model)
    for name, layer in kronecker_layers(model).items():
        put_in(model, name, MultipliedOut(layer))
    return model


def low_rank(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A copy whose MLPs are of thin matrices."""
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


def verdicts(rows: list[Row]) -> dict[str, float]:
    """The ratios between models that are neither the first's."""
    by = {row.name: row.tokens_per_s | {"peak": float(row.peak_bytes)} for row in rows}
    ours, theirs, distil = by["krony 81M"], by["81M multiplied out"], by["DistilGPT2's shape"]
    return {
        "decode, 81M against multiplied out": ours["decode"] / theirs["decode"],
        "prefill, 81M against multiplied out": ours["prefill"] / theirs["prefill"],
        "training step, 81M against multiplied out": ours["train"] / theirs["train"],
        "prefill, 81M against DistilGPT2's shape": ours["prefill"] / distil["prefill"],
        "decode, 81M against DistilGPT2's shape": ours["decode"] / distil["decode"],
    }


def document(figures: dict, rows: list[Row], image: str) -> str:
    """``docs/speed.md``."""
    pairs = "\n".join(f"| {name} | {ratio:.2f}x |" for name, ratio in figures["against"].items())
    return f"""# Speed

Written by `python benchmarks/speed.py{" --compile" if figures["settings"]["compiled"] else ""}`.
{caption(figures)}; seed {figures["settings"]["seed"]}, torch {figures["machine"]["torch"]}, transformers
{figures["machine"]["transformers"]}. A training step is forward, backward and AdamW on the prefill's tokens; peak is of
the tensors during a prefill, weights included. All models take turns in one process.

{table(rows).markdown()}

| | |
| --- | ---: |
{pairs}

![speed against the original's]({image})
"""


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {done}/{total}  {what}", file=sys.stderr, flush=True)

    quiet_libraries()
    progress(0, 1, "building")
    rivals = (MultipliedOut, Thin)  # no format that loads: their size is that of their tensors
    models = {
        name: store(name, model, loads=0 if any(isinstance(m, rivals) for m in model.modules()) else 3)
        for name, model in subjects(options.seed).items()
    }
    settings = Settings(rounds=options.rounds, seed=options.seed, compiled=options.compile)
    rows = bench(list(models.values()), settings, progress=progress)
    against = verdicts(rows)
    figures = to_json(rows, settings, dtype="float32", against=against, seconds=time.perf_counter() - start)
    name = "speed-compiled" if options.compile else "speed"
    write_json(ROOT / "benchmarks/results" / f"{name}.json", figures)
    heights = {work: {row.name: row.ratio[work] for row in rows} for work in ("prefill", "decode", "train")}
    write_text(ROOT / "docs" / f"{name}.svg", bars(heights, "times the original's speed", level=1.0))
    write_text(ROOT / "docs" / f"{name}.md", document(figures, rows, f"{name}.svg"))
    print(document(figures, rows, f"{name}.svg"))


if __name__ == "__main__":
    main()
