"""Speed and agreement of engines that run exported models: the original against the slim model.

    python benchmarks/engines.py [MODEL] [--calibration TEXT] [--out NAME] [--draw-only]

Half of the neurons of MODEL (``demo`` by default) are removed. The original and the slim model are exported to GGUF,
ONNX and OpenVINO, and run by llama.cpp, ONNX Runtime and OpenVINO beside transformers, on two threads; and in bfloat16
by transformers, also with torchao's 8-bit and 4-bit weights (``pip install --group bench``). Each reads a prompt of 128
tokens and writes 64, ``REPEATS`` times in turn; the table has the medians. Agreement is how many of the greedy tokens
are those of transformers in float32, up to the first that isn't. Writes ``benchmarks/results/engines-NAME.json`` and
its table in ``docs/deployment.md``.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DOCS, RESULTS, arguments, fill, quiet_transformers, read_results
from llama_cpp import LlamaCpp
from quality_bytes import BITS, quantised, tensor_bytes
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import krony
from krony.engines.gguf import write_gguf
from krony.engines.graphs import past, write_graph
from krony.engines.plain import plain
from krony.evaluation.spread import spread
from krony.models.surgery import count_parameters
from krony.pages import Table
from krony.runtime.hardware import machine
from krony.storage.files import write_json

PROMPT, NEW, REPEATS, THREADS = 128, 64, 5, 2
KEEP = 0.5
ENGINES = {  # name -> form and type of the file
    "transformers": (None, "float32"),
    "transformers, bfloat16": (None, "bfloat16"),
    "torchao, int8": (None, "int8"),
    "torchao, int4": (None, "int4"),
    "llama.cpp, f32": ("gguf", "f32"),
    "llama.cpp, q8_0": ("gguf", "q8_0"),
    "ONNX Runtime": ("onnx", "float32"),
    "OpenVINO": ("openvino", "float32"),
}
NOTE = """The spread is that of [`krony bench`](options.md#speed): of five runs, the distance of the slowest from the
fastest, relative to the median. A gain within it may be chance, as most of those of the small model are. 8-bit weights
leave the continuation of float32 after some tokens. torchao's weights are on top of bfloat16; its 4-bit weights
have no fast product on this processor.
"""
Run = tuple[list[int], float, float]  # the tokens, prompt tokens per second, new tokens per second


def in_llama_cpp(file: Path) -> Callable[[torch.Tensor], Run]:
    """Runs a GGUF file."""
    engine = LlamaCpp(file, threads=THREADS, context=2 * (PROMPT + NEW))

    def run(ids: torch.Tensor) -> Run:
        made = engine.greedy(ids[0].tolist(), NEW)
        return made["tokens"], made["timings"]["prompt_per_second"], made["timings"]["predicted_per_second"]

    return run


class Loop:
    """A model, or an exported graph, that is called once per token."""

    def __init__(self, run: Callable[..., Any], begin: Callable[[], DynamicCache]) -> None:
        self.run, self.begin = run, begin

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> Run:
        found: list[int] = []
        new, cache, seen, times = ids, self.begin(), 0, [time.perf_counter()]
        for _ in range(NEW):
            seen += new.shape[1]
            made = self.run(
                input_ids=new, attention_mask=torch.ones(1, seen, dtype=torch.long),
                position_ids=torch.arange(seen - new.shape[1], seen)[None], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            new, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
            found.append(int(new))
            times.append(time.perf_counter())
        return found, ids.shape[1] / (times[1] - times[0]), (NEW - 1) / (times[-1] - times[1])


def started(engine: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Any, int]:
    """The engine with the model, and the bytes of its files."""
    form, kind = ENGINES[engine]
    if form is None:
        made = model if kind == "float32" else copy.deepcopy(model).to(torch.bfloat16)
        made = quantised(made, BITS[kind]) if kind in BITS else made
        return Loop(made, lambda: DynamicCache(config=model.config)), tensor_bytes(made)
    if form == "gguf":
        write_gguf(model, tokenizer, folder / "model.gguf", kind)
        return in_llama_cpp(folder / "model.gguf"), (folder / "model.gguf").stat().st_size
    from transformers.exporters import ExportedModel

    write_graph(model, folder, form)
    bytes_ = sum(file.stat().st_size for file in folder.iterdir())
    options: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}}
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = THREADS
        options = {"session_options": session}
    return Loop(ExportedModel.from_pretrained(folder, **options), lambda: past(model)), bytes_


def measure(name: str, calibration: str) -> dict[str, Any]:
    """All figures of a model."""
    torch.set_num_threads(THREADS)
    quiet_transformers()
    tokenizer = krony.load_tokenizer(name)
    original = krony.load_model(name, dtype="float32")
    ids = krony.calibration_set(calibration, tokenizer, tokens=49_152)
    small = krony.load_model(name, dtype="float32")
    krony.compress(small, krony.KronyConfig(keep=KEEP), calibration=ids)
    models = {"original": original, "slim": plain(small)[0]}
    prompt = ids[-1:, :PROMPT]
    rows = []
    for engine in ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"engine": engine}
            running = {}
            for which, model in models.items():
                place = Path(folder) / which
                place.mkdir()
                running[which], size = started(engine, model, tokenizer, place)
                row[which] = {"bytes": size, "runs": []}
            for run in running.values():
                run(prompt)  # warm
            for _ in range(REPEATS):
                for which, run in running.items():
                    tokens, read, write = run(prompt)
                    row[which]["runs"].append({"prefill": read, "decode": write})
                    row[which]["tokens"] = tokens
            rows.append(row)
            print(engine, *(f"{which} {speed(row, which, 'decode'):.1f} tokens/s" for which in models), flush=True)
    return {
        "model": Path(name).name, "calibration": Path(calibration).name, "keep": KEEP, "prompt": PROMPT, "new": NEW,
        "params": {which: count_parameters(model) for which, model in models.items()},
        "rows": rows, "versions": versions(), "machine": machine(), "seed": 0,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Those of the engines."""
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "torchao", "xllamacpp", "onnxruntime", "openvino")}


def speed(row: dict[str, Any], which: str, phase: str) -> float:
    """The median tokens per second."""
    return statistics.median(run[phase] for run in row[which]["runs"])


def agreement(row: dict[str, Any], results: dict[str, Any], which: str) -> int:
    """How many of the greedy tokens are those of transformers, up to the first that isn't."""
    wanted = next(r for r in results["rows"] if r["engine"] == "transformers")[which]["tokens"]
    return next((n for n, pair in enumerate(zip(row[which]["tokens"], wanted, strict=True)) if len(set(pair)) > 1), NEW)


def table(results: dict[str, Any]) -> Table:
    """A row per engine."""
    rows = []
    for row in results["rows"]:
        cells = [row["engine"]]
        cells += [f"{row[which]['bytes'] / 1e6:.1f} MB" for which in ("original", "slim")]
        for phase in ("prefill", "decode"):
            before, after = (speed(row, which, phase) for which in ("original", "slim"))
            cells += [f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.2f}"]
        spreads = [spread([run["decode"] for run in row[which]["runs"]]) for which in ("original", "slim")]
        cells.append("" if None in spreads else f"{max(spreads):.0%}")
        cells.append(f"{agreement(row, results, 'original')} / {agreement(row, results, 'slim')}")
        rows.append(cells)
    columns = ["engine", "original", "slim", "prefill, tokens/s", "slim", "gain", "decode, tokens/s", "slim", "gain"]
    return Table([*columns, "spread", f"same of {results['new']} tokens, original / slim"], rows)


def section(results: dict[str, Any]) -> str:
    """The text between the marks."""
    params, where = results["params"], results["machine"]
    engines = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""{results["model"]}: {params["original"]:,} parameters, slim {params["slim"]:,}; a prompt of {results["prompt"]} tokens and {results["new"]} new ones
({where["processor"]}, {THREADS} threads; {engines}; float32 unless the name says otherwise):

{table(results).markdown()}
"""  # noqa: E501


def main() -> None:
    """Measures, and writes the results and the table."""
    parser = arguments(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--out", help="name of the results", default="demo")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not options.draw_only:
        write_json(RESULTS / f"engines-{options.out}.json", measure(options.model, options.calibration))
    kept = sorted(path.stem for path in RESULTS.glob("engines-*.json"))
    fill(DOCS / "deployment.md", "benchmarks/engines.py", "\n".join([*(section(read_results(n)) for n in kept), NOTE]))


if __name__ == "__main__":
    main()
