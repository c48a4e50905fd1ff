"""What each initialisation makes of a model at equal parameters, without any training.

    python benchmarks/quality.py MODEL --calibration FILE --data-dir DIR --out NAME

Every way compresses the MLPs of all layers to the same parameters and is evaluated on the first tokens of OpenWebText's
validation sample (every token weighing alike), of WikiText-2's test set (the paper's protocol) and of LAMBADA's, with
the accuracy of the last word. Beside krony stand 8-bit weights (torchao), of the original and of what ``export --to
slim`` makes. DIR holds ``openwebtext/val.jsonl``, ``wikitext-2`` and ``lambada``. The figures go to
``benchmarks/results/quality-NAME.json`` and, as a table and a picture, to ``docs``; what was measured stays in the
file, so that a run that is interrupted, or is given other ways, goes on. The README shows some rows of SmolLM2's
file; ``tests/test_readme.py`` checks them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

import krony
from krony.models.surgery import put_in
from krony.pages import Table, lines
from krony.runtime.hardware import machine
from krony.storage.files import cache_folder, write_json

ROOT = Path(__file__).resolve().parents[1]
STEPS = 150  # of reconstruction, an MLP
TUNING = 240  # steps, a sequence each
WAYS: dict[str, dict] = {
    "neurons": {},
    "neurons, global": {"allocation": "global"},
    "neurons, global, reconstructed": {"allocation": "global", "reconstruct": STEPS},
    "neurons, global, tuned": {"allocation": "global", "tune": TUNING},
    "neurons, global, reconstructed, tuned": {"allocation": "global", "reconstruct": STEPS, "tune": TUNING},
    "svd": {"init": "svd"},
    "van-loan": {"init": "van-loan"},
    "prune": {"init": "prune"},
    "neurons, slim, int8": {},
}
INT8 = "neurons, slim, int8"
CALIBRATED = tuple(way for way in WAYS if WAYS[way].get("init") not in ("van-loan", "prune"))
SETS = {"OpenWebText": "token", "WikiText-2": "paper", "LAMBADA": "paper"}
MEASURED = ("OpenWebText", "of original", "WikiText-2", "LAMBADA", "last word")


def evaluate(model: torch.nn.Module, tokenizer: object, options: argparse.Namespace) -> dict[str, dict]:
    """Perplexity (and last-word accuracy) on each set."""
    sources = dict(zip(SETS, (str(options.data_dir / "openwebtext/val.jsonl"), "wikitext-2", "lambada"), strict=True))
    figures = {}
    for name, protocol in SETS.items():
        result = krony.evaluate(
            model, tokenizer, sources[name], data_dir=options.data_dir, protocol=protocol, max_tokens=options.tokens
        )
        figures[name] = {"perplexity": result.perplexity, "accuracy": result.accuracy, "tokens": result.tokens}
    return figures


def measure(
    way: str, keep: float, base: torch.nn.Module, ids: torch.Tensor, tokenizer: object, options: argparse.Namespace
) -> dict:
    """One row: the model compressed one way, and what is left of it."""
    model = copy.deepcopy(base)
    start = time.perf_counter()
    config = krony.KronyConfig(f"keep={keep:g}", seed=options.seed, **WAYS[way])
    calibration = ids if way in CALIBRATED else None
    report = krony.compress(model, config, calibration=calibration, cache=cache_folder())
    seconds = time.perf_counter() - start
    model = model.to(options.dtype)
    if way == INT8:
        model = in_int8(krony.export_model(model, to="slim"))
    figures = evaluate(model, tokenizer, options)
    row = {"way": way, "removed": 1 - keep, "params": report.params_after, "bytes": size(model)}
    read = report.calibration is not None and "is read" in report.calibration
    return row | {"seconds": seconds, "calibrated": read, "sets": figures}


def measure_whole(model: torch.nn.Module, tokenizer: object, options: argparse.Namespace) -> dict:
    """The row of a model whose MLPs are whole."""
    figures = evaluate(model, tokenizer, options)
    return {"params": sum(p.numel() for p in model.parameters()), "bytes": size(model), "sets": figures}


def in_int8(model: torch.nn.Module) -> torch.nn.Module:
    """The weights of the model's linear layers in 8 bits, but for the head, whose matrix is the embedding's."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        as_linear(model), Int8WeightOnlyConfig(), lambda m, name: type(m) is torch.nn.Linear and name != "lm_head"
    )
    return model


def as_linear(model: torch.nn.Module) -> torch.nn.Module:
    """GPT-2's transposed layers as ``nn.Linear``, which is what torchao knows."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        with torch.device("meta"):
            linear = torch.nn.Linear(*layer.weight.shape)
        linear.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        put_in(model, name, linear)
    return model


def size(model: torch.nn.Module) -> int:
    """Bytes of the parameters; an 8-bit one is its numbers and their scales."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    if type(tensor.data) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    names = tensor.data.tensor_data_names
    return sum(_bytes(getattr(tensor.data, name)) for name in names)


def table(results: dict) -> Table:
    """All figures."""
    rows = []
    for row in _rows(results):
        removed, seconds = (f"{row['removed']:.0%}", f"{row['seconds']:.0f}") if row["removed"] else ("none", "")
        seconds += "*" if row.get("calibrated") else ""
        megabytes = f"{row['bytes'] / 1e6:.0f}"
        rows.append([removed, row["way"], f"{row['params']:,}", megabytes, *_cells(row, results), seconds])
    return Table(["removed", "init", "parameters", "MB", *MEASURED, "seconds"], rows)


def _rows(results: dict) -> list[dict]:
    """The original, in 8 bits too, and what was made of it."""
    originals = {"base": "the original", "int8": "the original, int8"}
    first = [{"way": way, "removed": 0.0} | results[key] for key, way in originals.items() if key in results]
    return first + sorted(results["rows"], key=lambda row: (row["removed"], list(WAYS).index(row["way"])))


def _cells(row: dict, results: dict) -> list[str]:
    """What MEASURED names."""
    first, second, third = (row["sets"][name]["perplexity"] for name in SETS)
    ratio = first / results["base"]["sets"]["OpenWebText"]["perplexity"]
    return [_short(first), _short(ratio), _short(second), _short(third), f"{row['sets']['LAMBADA']['accuracy']:.1%}"]


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.2f}"


def picture(results: dict) -> str:
    """Perplexity against parameters, a line for each way."""
    series = {}
    for way in (way for way in WAYS if way != INT8):  # whose gain is bytes
        rows = sorted((row for row in results["rows"] if row["way"] == way), key=lambda row: row["params"])
        if rows:
            series[way] = [(row["params"] / 1e6, row["sets"]["OpenWebText"]["perplexity"]) for row in rows]
    original = results["base"]["sets"]["OpenWebText"]["perplexity"]
    labels = "parameters, millions", "perplexity on OpenWebText, no training"
    return lines(series, *labels, level=("the original", original))


def main() -> None:
    """Measures what isn't measured yet, and writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, metavar="FILE|python-docs")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", required=True, metavar="NAME")
    parser.add_argument("--label", help="the model's name in the table; MODEL by default")
    parser.add_argument("--tokens", type=int, default=16_384, help="evaluated of each set")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5, 0.25])
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="evaluated in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    file = ROOT / "benchmarks/results" / f"quality-{options.out}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    base, tokenizer = krony.load_model(options.model, dtype=torch.float32), krony.load_tokenizer(options.model)
    length = min(512, base.config.max_position_embeddings)
    ids = krony.calibration_set(
        options.calibration, tokenizer, tokens=options.calibration_tokens, length=length, seed=options.seed
    )
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    results |= {
        "model": options.label or options.model, "machine": machine(),
        "dtype": f"{options.dtype}".removeprefix("torch."),
        "seed": options.seed, "tokens": options.tokens, "calibration_tokens": ids.numel(),
    }  # fmt: skip
    if "base" not in results:
        results["base"] = measure_whole(copy.deepcopy(base).to(options.dtype), tokenizer, options)
        write_json(file, results)
    if "int8" not in results and INT8 in options.ways:
        results["int8"] = measure_whole(in_int8(copy.deepcopy(base).to(options.dtype)), tokenizer, options)
        write_json(file, results)
    for keep in options.keep:
        for way in options.ways:
            if any(row["way"] == way and row["removed"] == 1 - keep for row in results["rows"]):
                continue
            results["rows"].append(measure(way, keep, base, ids, tokenizer, options))
            write_json(file, results)
            print(f"{keep:g} {way}: {_cells(results['rows'][-1], results)}", flush=True)
    text = (
        "# Quality without healing\n\nWritten by `python benchmarks/quality.py`.\n"
        f"{results['model']}, seed {options.seed}; calibration on {ids.numel():,} tokens; `tuned` is `--tune {TUNING}` "
        f"on them, `reconstructed` `--reconstruct {STEPS}`; int8 is torchao's, of weights alone. "
        f"The first {options.tokens:,} tokens of each set in "
        f"{results['dtype']}, OpenWebText by the `token` protocol, the others by the `paper` one. "
        "Removed is a share of the MLPs' parameters; then perplexities, LAMBADA's "
        f"last-word accuracy, and seconds to compress on {results['machine']['threads']} threads of "
        f"{results['machine']['processor']} "
        "(*: with the calibration's passes through the model; the others found its moments kept)."
        f"\n\n{table(results).markdown()}\n\n![perplexity against parameters](quality-{options.out}.svg)\n"
    )
    (ROOT / "docs" / f"quality-{options.out}.md").write_text(text, encoding="utf-8")
    (ROOT / "docs" / f"quality-{options.out}.svg").write_text(picture(results), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
