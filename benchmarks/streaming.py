"""Memory and time of ``krony compress --stream`` for a checkpoint that is larger than the memory it may use.

    python benchmarks/streaming.py [FOLDER] [--layers 20] [--reconstruct N] [--keep] [--draw-only]

Builds a Llama-shaped checkpoint of random weights in FOLDER (4096 wide, hidden width 11008, bfloat16, four shards;
8.6 GB with 20 layers), compresses all of it with ``van-loan`` and its first eight layers with ``neurons``, each in a
process of its own, and ``van-loan`` again in memory: the tensors must be the same. With ``--reconstruct N`` it measures
only ``neurons`` with N steps of training each MLP, and adds that to the results with its own machine. Writes
``benchmarks/results/streaming.json`` and the table in ``docs/streaming.md``. The memory named is that of ``--dry-run``.
Peak memory is the kernel's ``ru_maxrss``, the figure that GNU time prints: mapped pages are in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import DOCS, RESULTS, arguments, fill, read_results
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from krony.models.source import empty_model
from krony.pages import Table
from krony.runtime.hardware import machine
from krony.storage.files import write_json
from krony.storage.shards import Shards, total

LIMITS = {"van-loan": 2.5, "neurons": 6.0}  # GB that each must stay under


def build(folder: Path, layers: int, hidden: int = 4096, inner: int = 11008, shards: int = 4) -> int:
    """Writes a sharded Llama of this size with random weights and a tokenizer of bytes; returns the size in bytes."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=hidden // 128,
        vocab_size=32_000, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    layout = {name: (torch.bfloat16, tuple(v.shape)) for name, v in empty_model(config).state_dict().items()}
    folder.mkdir(parents=True)
    writer = Shards(folder, layout, -(-total(layout) // shards) + 100_000_000)
    writer.create()
    torch.manual_seed(0)
    for name, (dtype, shape) in layout.items():
        ones = name.endswith("norm.weight")
        writer.put(name, torch.ones(shape, dtype=dtype) if ones else torch.empty(shape, dtype=dtype).normal_(std=0.02))
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return total(layout)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def measured(arguments: list[str]) -> dict[str, float]:
    """Runs ``krony`` with these arguments; processor seconds, and the peak of its resident memory in GB."""
    process = subprocess.Popen([sys.executable, "-m", "krony", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"krony {' '.join(arguments)} failed")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def named_gb(arguments: list[str]) -> float:
    """The memory in GB that ``--dry-run`` names for ``krony`` with these arguments."""
    command = [sys.executable, "-m", "krony", *arguments, "--dry-run", "--json", "-"]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return float(json.loads(said)["memory_bytes"]) / 1e9


def fingerprint(folder: Path) -> str:
    """A hash over the tensors in order of their names: names, types, shapes and bytes."""
    places = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    made = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], "pt") as tensors:
            value = tensors.get_tensor(name)
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def main() -> None:
    """Builds the checkpoint, compresses it, and writes the results and the page."""
    parser = arguments(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "krony-streaming")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens of neurons")
    parser.add_argument("--inits", default="van-loan,neurons")
    parser.add_argument("--reconstruct", type=int, default=0, help="measure only neurons, with N steps per MLP")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    options = parser.parse_args()
    results = read_results("streaming") if options.draw_only else measure(options)
    _write_page(results)
    if any(run["peak_gb"] > LIMITS.get(_name(run), math.inf) for run in results["runs"]):
        raise SystemExit(f"over the limits {LIMITS}")


def measure(options: argparse.Namespace) -> dict:
    """All figures, which are also written to the results."""
    source, out = options.folder / "source", options.folder / "out"
    if not source.exists():
        build(source, options.layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    runs = []
    for init in ["neurons"] if options.reconstruct else options.inits.split(","):
        arguments = ["compress", str(source), str(out), "--scheme", "keep=0.5", "--init", init, "--stream"]
        layers = options.layers
        if init == "neurons":
            layers = min(8, layers)
            arguments += ["--layers", f"0-{layers - 1}", "--calibration", "python-docs"]
            arguments += ["--calibration-tokens", str(options.tokens), "--reconstruct", str(options.reconstruct)]
        run = {"named_gb": named_gb(arguments), **measured(arguments)}
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        steps = {"reconstruct": options.reconstruct} if init == "neurons" else {}
        sizes = {"layers": layers, "read_gb": size / 1e9, "written_gb": written / 1e9}
        runs.append({"init": init, **steps, **sizes, **run})
        print(runs[-1], flush=True)
        if init == "van-loan":
            streamed = fingerprint(out)
            shutil.rmtree(out)
            arguments[-1] = "--no-stream"
            run = {"named_gb": named_gb(arguments), **measured(arguments)}
            runs.append(runs[-1] | {"init": f"{init}, through memory", **run})
            print(runs[-1], flush=True)
            if fingerprint(out) != streamed:
                raise SystemExit("streaming and memory gave different tensors")
        shutil.rmtree(out)
    if not options.keep:
        shutil.rmtree(options.folder)
    results = {"runs": runs, "calibration_tokens": options.tokens, "machine": machine()}
    if options.reconstruct:
        earlier = read_results("streaming")
        others = [run for run in earlier["runs"] if run.get("reconstruct", 0) != options.reconstruct]
        results = earlier | {"runs": [*others, runs[0] | {name: results[name] for name in results if name != "runs"}]}
    write_json(RESULTS / "streaming.json", results)
    return results


def _name(run: dict) -> str:
    return f"{run['init']}, `--reconstruct {run['reconstruct']}`" if run.get("reconstruct") else run["init"]


def _where(results: dict) -> str:
    threads = results["machine"]["threads"]
    return f"{results['machine']['processor']}, {threads} thread{'' if threads == 1 else 's'}"


def _write_page(results: dict) -> None:
    rows = [
        [_name(run), str(run["layers"]), f"{run['read_gb']:.1f} GB", f"{run['written_gb']:.1f} GB"]
        + [f"{run['named_gb']:.2f} GB" if "named_gb" in run else ""]
        + [f"{run['peak_gb']:.2f} GB", f"{run['cpu_seconds']:,.0f} s"]
        for run in results["runs"]
    ]
    headings = ["init", "layers compressed", "read", "written", "memory named", "peak memory", "processor time"]
    table = Table(headings, rows).markdown()
    same = "In memory, the tensors of `van-loan` are the same to the bit. " if len(rows) > len(LIMITS) else ""
    text = f"{table}\n\n{same}{_where(results)}. `neurons` read {results['calibration_tokens']:,} tokens.\n"
    for run in results["runs"]:
        if run.get("reconstruct"):
            text += f"\n{_name(run)}: {_where(run)}, {run['calibration_tokens']:,} tokens.\n"
    fill(DOCS / "streaming.md", "benchmarks/streaming.py", text)


if __name__ == "__main__":
    main()
