"""What each initialisation makes of a model at equal parameters, without any training.

    python benchmarks/quality.py MODEL --calibration FILE --data-dir DIR --out NAME
    python benchmarks/quality.py --draw-only --out NAME

Every method compresses the MLPs of all layers to the same number of parameters. Measured are the first tokens of
OpenWebText's validation sample (by the ``token`` protocol), of WikiText-2's test set and of LAMBADA's (by the ``paper``
protocol), with the accuracy of the last word. 8-bit weights (torchao) are there for comparison: of the original, and of
what ``krony export --to slim`` makes. DIR holds ``openwebtext/val.jsonl``, ``wikitext-2`` and ``lambada``.

Results are in ``benchmarks/results/quality-NAME.json``; a table and a picture are in ``docs``. Rows in the file are not
measured again, so that an interrupted run resumes, and more methods can be added. With --draw-only the table and the
picture are written from the file. Sizes are computed from the shapes of the model's matrices, which are in the file
too; ``tests/test_sizes.py`` computes them again. The README shows some rows; ``tests/test_readme.py`` checks them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import DOCS, DRAW_ONLY, RESULTS, read_results
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import krony
from krony.models.surgery import find_groups, is_linear, put_in, take_out
from krony.pages import Table
from krony.pictures import lines
from krony.runtime.hardware import machine
from krony.storage.files import cache_folder, write_json, write_text

STEPS = 150  # of reconstruction, per MLP
TUNING = 240  # steps, with one sequence each
METHODS: dict[str, dict] = {
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
CALIBRATED = tuple(method for method in METHODS if METHODS[method].get("init") not in ("van-loan", "prune"))
SETS = {"OpenWebText": "token", "WikiText-2": "paper", "LAMBADA": "paper"}
MEASURED = ("OpenWebText", "of original", "WikiText-2", "LAMBADA", "last word")
SCALE_BYTES = 4  # torchao keeps one float32 scale per output of an 8-bit matrix


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What sizes follow from: the parameters, and the linear layers as ``[out, in, has a bias, how many]``.

    The head is not among them: it shares its matrix with the embedding.
    """
    roles = {site.name: site.role for group in find_groups(model) for site in group.sites}
    shapes: dict[str, Counter] = {"up": Counter(), "down": Counter(), "other": Counter()}
    for name, module in model.named_modules():
        if is_linear(module) and module is not model.get_output_embeddings():
            weight, bias = take_out(model, name)  # (out, in)
            shapes[roles.get(name, "other")][(*weight.shape, bias is not None)] += 1
    matrices = {role: [[*shape, count] for shape, count in found.items()] for role, found in shapes.items()}
    return {"params": sum(p.numel() for p in model.parameters()), "matrices": matrices}


def slim_facts(facts: dict[str, Any], removed: float) -> dict[str, Any]:
    """The facts of the model that ``export --to slim`` makes with this share of the hidden neurons removed."""
    params, keep = facts["params"], 1 - removed
    ups, downs = [], []
    for out, into, bias, count in facts["matrices"]["up"]:
        ups.append([round(out * keep), into, bias, count])
        params -= (out - ups[-1][0]) * (into + bias) * count
    for out, into, bias, count in facts["matrices"]["down"]:
        downs.append([out, round(into * keep), bias, count])
        params -= out * (into - downs[-1][1]) * count
    return {"params": params, "matrices": facts["matrices"] | {"up": ups, "down": downs}}


def int8_bytes(facts: dict[str, Any], item: int) -> int:
    """Bytes with the matrices of the linear layers in 8 bits, and all else in ``item`` bytes per number."""
    shapes = [shape for found in facts["matrices"].values() for shape in found]
    numbers = sum(out * into * count for out, into, _, count in shapes)
    outputs = sum(out * count for out, _, _, count in shapes)
    return (facts["params"] - numbers) * item + numbers + outputs * SCALE_BYTES


def set_sizes(results: dict[str, Any]) -> None:
    """Computes the bytes of every row, and the parameters of slim models, from the model's facts."""
    facts, item = results["facts"], getattr(torch, results["dtype"]).itemsize
    for key, size in (("base", facts["params"] * item), ("int8", int8_bytes(facts, item))):
        if key in results:
            results[key] |= {"params": facts["params"], "bytes": size}
    for row in results["rows"]:
        if row["way"] == INT8:
            narrow = slim_facts(facts, row["removed"])
            row |= {"params": narrow["params"], "bytes": int8_bytes(narrow, item)}
        else:
            row["bytes"] = row["params"] * item


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
    method: str, keep: float, base: torch.nn.Module, ids: torch.Tensor, tokenizer: object, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: the model compressed by one method, and its quality."""
    model = copy.deepcopy(base)
    start = time.perf_counter()
    config = krony.KronyConfig(f"keep={keep:g}", seed=options.seed, **METHODS[method])
    calibration = ids if method in CALIBRATED else None
    report = krony.compress(model, config, calibration=calibration, cache=cache_folder())
    seconds = time.perf_counter() - start
    model = model.to(options.dtype)
    if method == INT8:
        model = in_int8(krony.export_model(model, to="slim"))
    row = {"way": method, "removed": 1 - keep, "params": report.params_after} | measure_model(model, tokenizer, options)
    read = report.calibration is not None and "is read" in report.calibration
    return row | {"seconds": seconds, "calibrated": read}


def measure_model(model: torch.nn.Module, tokenizer: object, options: argparse.Namespace) -> dict[str, Any]:
    """A model's quality, and the bytes that its tensors take."""
    return {"sets": evaluate(model, tokenizer, options), "measured_bytes": tensor_bytes(model)}


def in_int8(model: torch.nn.Module) -> torch.nn.Module:
    """The weights of the linear layers in 8 bits, except the head, which shares its matrix with the embedding."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        as_linear(model), Int8WeightOnlyConfig(), lambda m, name: type(m) is torch.nn.Linear and name != "lm_head"
    )
    return model


def as_linear(model: torch.nn.Module) -> torch.nn.Module:
    """GPT-2's transposed layers as ``nn.Linear``, which torchao knows."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        with torch.device("meta"):
            linear = torch.nn.Linear(*layer.weight.shape)
        linear.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        put_in(model, name, linear)
    return model


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters; an 8-bit one consists of its numbers and their scales."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    if type(tensor.data) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    names = tensor.data.tensor_data_names
    return sum(_bytes(getattr(tensor.data, name)) for name in names)


def check_sizes(results: dict[str, Any]) -> None:
    """Ends the run if a model took other bytes than its arithmetic says: then it was not what the table calls it."""
    rows = [results[key] | {"way": key} for key in ("base", "int8") if key in results] + results["rows"]
    for row in rows:
        if row.get("measured_bytes", row["bytes"]) != row["bytes"]:
            raise SystemExit(f"{row['way']}: {row['measured_bytes']:,} bytes, and by arithmetic {row['bytes']:,}")


def table(results: dict[str, Any]) -> Table:
    """All figures."""
    rows = []
    for row in _rows(results):
        removed, seconds = (f"{row['removed']:.0%}", f"{row['seconds']:.0f}") if row["removed"] else ("none", "")
        seconds += "*" if row.get("calibrated") else ""
        megabytes = f"{row['bytes'] / 1e6:.1f}"
        rows.append([removed, row["way"], f"{row['params']:,}", megabytes, *_cells(row, results), seconds])
    return Table(["removed", "init", "parameters", "MB", *MEASURED, "seconds"], rows)


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The original, also in 8 bits, and the compressed models."""
    originals = {"base": "the original", "int8": "the original, int8"}
    first = [{"way": way, "removed": 0.0} | results[key] for key, way in originals.items() if key in results]
    return first + sorted(results["rows"], key=lambda row: (row["removed"], list(METHODS).index(row["way"])))


def _cells(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """The columns of MEASURED."""
    first, second, third = (row["sets"][name]["perplexity"] for name in SETS)
    return [
        _short(first), _short(_ratio(row, results)), _short(second), _short(third),
        f"{row['sets']['LAMBADA']['accuracy']:.1%}",
    ]  # fmt: skip


def _ratio(row: dict[str, Any], results: dict[str, Any]) -> float:
    return row["sets"]["OpenWebText"]["perplexity"] / results["base"]["sets"]["OpenWebText"]["perplexity"]


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.2f}"


def picture(results: dict[str, Any]) -> str:
    """Perplexity relative to the original's against bytes: one curve per method, and 8-bit weights beside them."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(_rows(results), key=lambda row: row["bytes"]):
        series.setdefault(row["way"], []).append((row["bytes"] / 1e6, _ratio(row, results)))
    ordered = {way: series[way] for way in ("the original", "the original, int8", *METHODS) if way in series}
    half = {row["way"]: _ratio(row, results) for row in results["rows"] if row["removed"] == 0.5}
    best = min(half, key=lambda way: half[way])
    shown = dict.fromkeys((best, "neurons", "van-loan"))
    figures = ", ".join(f"{_short(half[way])} times ({way})" for way in shown)
    return lines(
        ordered,
        title=f"Half of the MLPs removed, no training: the original's perplexity rises {figures}; less is better",
        x="MB",
        y="times the original's perplexity",
        log=True,
        top=10.0,
    )


def document(results: dict[str, Any], name: str) -> str:
    """``docs/quality-NAME.md``."""
    where = results["machine"]
    return f"""# Quality without healing

Written by `python benchmarks/quality.py`.
{results["model"]}, seed {results["seed"]}, calibrated on {results["calibration_tokens"]:,} tokens. `reconstructed` is
`--reconstruct {STEPS}` and `tuned` is `--tune {TUNING}` on the same tokens. `int8` is torchao's quantisation of the
weights of the linear layers; `slim` is `krony export --to slim`.

Measured on the first {results["tokens"]:,} tokens of each set in {results["dtype"]}: perplexity on OpenWebText by the
`token` protocol, on WikiText-2 and LAMBADA by the `paper` protocol, and LAMBADA's last-word accuracy. "Removed" is a
share of the MLPs' parameters. "Seconds" is the time to compress on {where["threads"]} threads of {where["processor"]};
with * it includes the calibration's passes through the model, and without it their results were cached.

{table(results).markdown()}

![perplexity relative to the original's against size](quality-{name}.svg)
"""


def main() -> None:
    """Measures what is missing in the results, and writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", metavar="FILE|python-docs")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", required=True, metavar="NAME")
    parser.add_argument("--label", help="the model's name in the table; MODEL by default")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of each set to measure on")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5, 0.25])
    parser.add_argument("--ways", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="dtype to measure in"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw-only", action="store_true", help=DRAW_ONLY)
    options = parser.parse_args()
    if not options.draw_only:
        if None in (options.model, options.calibration, options.data_dir):
            parser.error("a measurement takes MODEL, --calibration and --data-dir")
        measure_missing(options)
    results = read_results(f"quality-{options.out}")
    write_text(DOCS / f"quality-{options.out}.md", document(results, options.out))
    write_text(DOCS / f"quality-{options.out}.svg", picture(results))
    print(document(results, options.out))


def measure_missing(options: argparse.Namespace) -> None:
    """Measures the rows that the results don't have; each is written as soon as it is measured."""
    file = RESULTS / f"quality-{options.out}.json"
    base, tokenizer = krony.load_model(options.model, dtype=torch.float32), krony.load_tokenizer(options.model)
    length = min(512, base.config.max_position_embeddings)
    ids = krony.calibration_set(
        options.calibration, tokenizer, tokens=options.calibration_tokens, length=length, seed=options.seed
    )
    results = read_results(f"quality-{options.out}") if file.exists() else {"rows": []}
    results |= {
        "model": options.label or options.model, "machine": machine(),
        "dtype": f"{options.dtype}".removeprefix("torch."),
        "seed": options.seed, "tokens": options.tokens, "calibration_tokens": ids.numel(), "facts": model_facts(base),
    }  # fmt: skip

    def keep_results() -> None:
        set_sizes(results)
        check_sizes(results)
        write_json(file, results)

    if "base" not in results:
        results["base"] = measure_model(copy.deepcopy(base).to(options.dtype), tokenizer, options)
    if "int8" not in results and INT8 in options.ways:
        results["int8"] = measure_model(in_int8(copy.deepcopy(base).to(options.dtype)), tokenizer, options)
    keep_results()
    for keep in options.keep:
        for method in options.ways:
            if any(row["way"] == method and row["removed"] == 1 - keep for row in results["rows"]):
                continue
            results["rows"].append(measure(method, keep, base, ids, tokenizer, options))
            keep_results()
            print(f"{keep:g} {method}: {_cells(results['rows'][-1], results)}", flush=True)


if __name__ == "__main__":
    main()
