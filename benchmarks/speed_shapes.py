"""What half of the MLPs' parameters gains in speed at the widths of today's models, and where the gain ends.

    python benchmarks/speed_shapes.py [--shape llama-1b qwen-0.5b gpt2-xl] [--threads 1 2] [--draw-only]

Models have the widths of Llama-3.2-1B, Qwen2.5-0.5B and GPT-2 XL, two layers, a small vocabulary and random weights.
They are in one process and take turns:

- ``original``;
- ``general``: the paper's structure, ``(width/2, d) ⊗ (2, 1)``, with right factors as training leaves them: no zeros;
- ``neurons``: the same split with unit vectors as right factors, as ``--init neurons`` gives them;
- ``slim``: the plain model of half the hidden width that ``krony export --to slim`` makes of ``neurons``.

A cell is a shape, a dtype, a number of threads, a batch and a length. Prefills have ``--lengths`` tokens; length 1 is a
decode: one token of every sequence after 128. Before each decode other memory is read, so that weights come from memory
rather than from the processor's caches, as they do in a model of many layers.

Cells are written to ``benchmarks/results/speed-shapes.json`` one by one; those in the file are not repeated, so an
interrupted run resumes. Tables are in ``docs/speed-shapes.md``, pictures beside it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import DOCS, RESULTS, Runs, arguments, draw_or_measure, fill
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from krony.compression.compress import compress
from krony.config import KronyConfig
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.spread import compare
from krony.evaluation.workloads import Workload, alternate, empty_cache, prefill, random_ids
from krony.models.export import slim
from krony.pages import Table
from krony.pictures import lines
from krony.runtime.timing import timed
from krony.storage.files import write_text

KEEP = 0.5
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "llama-1b": (
        LlamaConfig,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "qwen-0.5b": (
        Qwen2Config,
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    "gpt2-xl": (
        GPT2Config,
        {"n_embd": 1600, "n_head": 25, "n_inner": 6400, "n_positions": 4096, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VARIANTS = ("general", "neurons", "slim")
VOCABULARY, CONTEXT = 1024, 128  # tokens that the head knows; tokens before a decoded one
MOST_TOKENS = 4096  # of a cell, per thread
TURNED = 4096  # a cell has about as many turns as make this number of tokens, and at least FEWEST
FEWEST, LARGE = 2, 2048  # cells from LARGE tokens on take seconds and need no warm-up
OTHER_MEMORY = 2**29  # bytes that are read before a decode: more than processors cache

Cell = dict[str, Any]  # shape, dtype, threads, batch, length


def config_of(shape: str, layers: int) -> PreTrainedConfig:
    """The config of a shape with this number of layers."""
    kind, widths = SHAPES[shape]
    return kind(**widths, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True)


def models_of(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> dict[str, PreTrainedModel]:
    """The models by name, the original first."""
    torch.manual_seed(seed)
    models = {"original": AutoModelForCausalLM.from_config(config, dtype=dtype).eval()}
    for name, init in (("general", "random"), ("neurons", "random-neurons")):
        models[name] = copy.deepcopy(models["original"])
        compress(models[name], KronyConfig(keep=KEEP, init=init, seed=seed))
    return models | {"slim": slim(copy.deepcopy(models["neurons"])).model}


def multiply_adds(config: PreTrainedConfig, length: int) -> tuple[int, int]:
    """Multiply-adds of a sequence in the original's MLPs, and in the rest: projections, scores, and the head.

    A token reads itself and those before it. The head computes the last token's logits.
    """
    before = CONTEXT if length == 1 else 0
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    keys = width // heads * getattr(config, "num_key_value_heads", heads)
    read = sum(range(before + 1, before + length + 1))  # by all tokens together
    gated = hasattr(config, "intermediate_size")
    mlp = length * (3 * config.intermediate_size if gated else 2 * config.n_inner) * width
    attention = length * 2 * width * (width + keys) + 2 * width * read
    return layers * mlp, layers * attention + config.vocab_size * width


def arithmetic_limit(config: PreTrainedConfig, length: int) -> float:
    """The gain if all multiply-adds took equally long (Amdahl's law): 1 / (rest's share + KEEP * MLPs' share)."""
    mlp, rest = multiply_adds(config, length)
    return (mlp + rest) / (rest + KEEP * mlp)


class Decode:
    """One token of every sequence after ``CONTEXT`` tokens, which a model reads once: the cache is cut back."""

    def __init__(self, settings: SpeedSettings, batch: int) -> None:
        self.settings, self.batch = settings, batch
        self.caches: dict[PreTrainedModel, dict[str, DynamicCache]] = {}
        self.other = torch.ones(OTHER_MEMORY // 8, dtype=torch.int64)

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel) -> float:
        """Seconds of one step."""
        if model not in self.caches:
            self.caches[model] = empty_cache(model)
            model(input_ids=random_ids(model, self.settings, self.batch, CONTEXT), use_cache=True, **self.caches[model])
        ids, options = random_ids(model, self.settings, self.batch, 1), self.caches[model]
        self.other.sum()
        took = timed(model.device, lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True, **options))
        for cache in options.values():
            cache.crop(-1)
        return took


def turns_of(tokens: int, most: int) -> int:
    """Turns of a cell: few of those that take long."""
    return min(most, max(FEWEST, TURNED // tokens))


def measure(models: dict[str, PreTrainedModel], cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every turn of each model in a cell."""
    batch, length = cell["batch"], cell["length"]
    settings = SpeedSettings(seed=options.seed)
    work: Workload = Decode(settings, batch) if length == 1 else prefill(settings, batch, length)
    rounds = turns_of(batch * length, options.turns)
    seconds = alternate(list(models.values()), work, rounds, warm_up=batch * length < LARGE)
    return cell | {"seconds": dict(zip(models, seconds, strict=True))}


def wanted(options: argparse.Namespace, shape: str, dtype: str) -> Iterator[Cell]:
    """The cells of a shape and dtype, small ones first; none has more than ``--tokens`` per thread."""
    for threads, length, batch in itertools.product(options.threads, sorted(options.lengths), sorted(options.batches)):
        if batch * length <= options.tokens * threads:
            yield {"shape": shape, "dtype": dtype, "threads": threads, "batch": batch, "length": length}


def measure_missing(options: argparse.Namespace) -> dict[str, Any]:
    """The results, with the cells that were not in the file; each is written as soon as it is measured."""
    same = {"layers": options.layers, "vocabulary": VOCABULARY, "context": CONTEXT, "keep": KEEP}
    runs = Runs(options.out, seed=options.seed, **same)
    for shape, dtype in itertools.product(options.shape, options.dtype):
        missing = [cell for cell in wanted(options, shape, dtype) if not runs.has(cell)]
        models = models_of(config_of(shape, options.layers), DTYPES[dtype], options.seed) if missing else {}
        for cell in missing:
            begin = time.perf_counter()
            torch.set_num_threads(cell["threads"])
            runs.add(measure(models, cell, options))
            print(*cell.values(), f"in {time.perf_counter() - begin:.1f} s", flush=True)
    return runs.results


def gain(run: dict[str, Any], variant: str) -> float:
    """How many times as fast as the original: the median of the turns' ratios."""
    return compare(run["seconds"]["original"], run["seconds"][variant]).ratio


def limit(results: dict[str, Any], run: dict[str, Any]) -> float:
    """The arithmetic limit of a cell."""
    return arithmetic_limit(config_of(run["shape"], results["layers"]), run["length"])


def shown(run: dict[str, Any], variant: str) -> str:
    """A gain with the turns' smallest and largest."""
    pairs = zip(run["seconds"]["original"], run["seconds"][variant], strict=True)
    ratios = [one / two for one, two in pairs]
    return f"{gain(run, variant):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Table:
    """A row per cell."""
    rows = [
        [
            run["shape"], str(run["batch"]), str(run["length"]),
            f"{1000 * statistics.median(run['seconds']['original']):,.1f}",
            *(shown(run, variant) for variant in VARIANTS), f"{limit(results, run):.2f}",
        ]
        for run in runs
    ]  # fmt: skip
    return Table(["shape", "batch", "length", "original, ms", *VARIANTS, "arithmetic limit"], rows)


def groups(runs: Sequence[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The runs by these values, in rising order of the values and of shape, length and batch."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: [run[name] for name in (*names, "shape", "length", "batch")]):
        found.setdefault(tuple(run[name] for name in names), []).append(run)
    return found


def summary(results: dict[str, Any]) -> Table:
    """A row per shape, dtype and number of threads: medians over the cells of decode, and over those of prefill."""
    rows = []
    for (shape, dtype, threads), runs in groups(results["runs"], "shape", "dtype", "threads").items():
        cells = [shape, dtype, str(threads)]
        for decode in (True, False):
            chosen = [run for run in runs if (run["length"] == 1) == decode]
            columns = [[gain(run, variant) for run in chosen] for variant in VARIANTS]
            columns.append([limit(results, run) for run in chosen])
            cells += [f"{statistics.median(column):.2f}" if column else "" for column in columns]
        rows.append(cells)
    columns = [f"{phase}, {name}" for phase in ("decode", "prefill") for name in (*VARIANTS, "limit")]
    return Table(["shape", "dtype", "threads", *columns], rows)


def counted(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' * (threads > 1)}"


def picture(results: dict[str, Any], dtype: str) -> str:
    """Gain against tokens at once, by shape, on the most threads; the median of the cells of so many tokens."""
    threads = max(run["threads"] for run in results["runs"])
    series: dict[str, list[tuple[float, float]]] = {}
    for run in sorted(results["runs"], key=lambda run: (run["shape"], run["batch"] * run["length"])):
        if (run["dtype"], run["threads"]) == (dtype, threads):
            for variant in ("general", "slim"):
                point = run["batch"] * run["length"], gain(run, variant)
                series.setdefault(f"{run['shape']}, {variant}", []).append(point)
    curves = {
        name: [(x, statistics.median(y for place, y in points if place == x)) for x in dict(points)]
        for name, points in series.items()
    }
    most = max(int(points[-1][0]) for points in curves.values())
    last = {name: points[-1][1] for name, points in curves.items()}
    ends = ", ".join(
        f"{shape} {last[f'{shape}, general']:.2f} (slim {last[f'{shape}, slim']:.2f})"
        for shape in dict.fromkeys(name.partition(",")[0] for name in curves)
    )
    return lines(
        curves,
        title=f"Speed relative to the original at {most:,} tokens in {dtype}, {counted(threads)}: {ends}",
        x=f"tokens at once: batch x length (up to {max(run['batch'] for run in results['runs'])}: decode)",
        y="times the original's speed",
        level=("the original", 1.0),
        log_x=True,
    )


def write_page(results: dict[str, Any]) -> None:
    """The part of the page, and its pictures."""
    dtypes = sorted({run["dtype"] for run in results["runs"]})
    where = results["machine"]
    counts = sorted(len(run["seconds"]["original"]) for run in results["runs"])
    parts = [
        f"{where['processor']}, {where['cores']} cores; torch {where['torch']}, transformers {where['transformers']}, "
        f"krony {where['krony']}; {results['layers']} layers, a vocabulary of {results['vocabulary']:,}, seed "
        f"{results['seed']}; {counts[0]} to {counts[-1]} turns. Medians over all batches and lengths:",
        summary(results).markdown(),
    ]
    for dtype in dtypes:
        write_text(DOCS / f"speed-shapes-{dtype}.svg", picture(results, dtype))
        parts.append(f"![gain against tokens in {dtype}](speed-shapes-{dtype}.svg)")
    for (dtype, threads), runs in groups(results["runs"], "dtype", "threads").items():
        parts += [f"## {dtype}, {counted(threads)}", table(results, runs).markdown()]
    fill(DOCS / "speed-shapes.md", "benchmarks/speed_shapes.py", "\n\n".join(parts))


def main() -> None:
    """Measures what is missing in the results, and writes the page and its pictures."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 128, 512, 2048], help="1 is a decode")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="of a cell per thread, at most")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9, help="of each model in a cell, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed-shapes.json")
    options = parser.parse_args()
    if results := draw_or_measure(options, "speed-shapes", measure_missing, write_page):
        print(summary(results).markdown())


if __name__ == "__main__":
    main()
