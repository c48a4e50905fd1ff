"""The memory of ``krony heal`` in each process: computed for large models, and measured for a small one.

    python benchmarks/large_models.py [--draw-only | --compute-only]

Computed: Llama-shaped models of 1, 7 and 70 billion parameters with half of their MLPs' neurons, on 1, 8 and 64
devices, as ``krony heal --dry-run`` says it. Measured: a Llama-shaped model of 49 million parameters on CPUs, alone,
with a copy in each of two processes, and sharded. The figures are peaks of the resident memory of a process in the
complete run with its checkpoint, over what it held before the model was made, after a run of a tiny model. Of a sharded
run the first process keeps the whole models; the other takes what a device needs. Writes
``benchmarks/results/large_models.json`` and the tables in ``docs/large-models.md``. With --compute-only, what was
measured stays and what is computed is renewed.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DOCS, RESULTS, fill, read_results, results_of
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from krony.config import KronyConfig
from krony.data.rows import Rows
from krony.healing.footprint import footprint
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES, Recipe
from krony.healing.training import train_on_rows
from krony.models.source import empty_model
from krony.runtime.hardware import machine
from krony.storage.files import write_json

SHAPES = {  # width, hidden width, layers, heads, key-value heads, vocabulary, tied: Llama 3.2 1B, Llama 2 7B and 70B
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "7B": (4096, 11_008, 32, 32, 32, 32_000, False),
    "70B": (8192, 28_672, 80, 64, 8, 32_000, False),
}
DEVICES = (1, 8, 64)
SMALL = (768, 2048, 6, 12, 12, 8192, True)
TINY = (64, 128, 2, 4, 4, 8192, True)
STEP = Recipe(sequences=4, batch=2, length=128, warm_up=0, evaluations=1)
Shape = tuple[int, int, int, int, int, int, bool]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is measured."""

    processes: int
    shard: bool = False
    taught: bool = False
    half: bool = False
    again: bool = False

    @property
    def options(self) -> HealOptions:
        """What the run is told."""
        return HealOptions(
            device="cpu", shard=self.shard, freeze=(), keep_anyway=True, gradient_checkpointing=self.again
        )


CASES = {
    "one process": Case(processes=1),
    "one, with a teacher": Case(processes=1, taught=True),
    "one, products in bfloat16": Case(processes=1, half=True),
    "one, with a teacher, products in bfloat16": Case(processes=1, taught=True, half=True),
    "two, a copy each": Case(processes=2),
    "two, sharded": Case(processes=2, shard=True),
    "two, sharded, with a teacher": Case(processes=2, shard=True, taught=True),
    "two, sharded, activations computed again": Case(processes=2, shard=True, again=True),
    "two, sharded, products in bfloat16": Case(processes=2, shard=True, half=True),
    "two, sharded, both": Case(processes=2, shard=True, half=True, again=True),
    "two, sharded, with a teacher, products in bfloat16": Case(processes=2, shard=True, taught=True, half=True),
}


def config(width: int, hidden: int, layers: int, heads: int, shared: int, words: int, tied: bool) -> LlamaConfig:
    """A Llama-shaped config."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )  # fmt: skip


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """The model with Kronecker layers of half the neurons, without values."""
    from krony.compression.plan import plan
    from krony.models.quantizer import KronyQuantizationConfig, put_layers_in

    shapes = plan(model, KronyConfig("keep=0.5", init="van-loan")).shapes.items()
    entries: dict[str, dict[str, Any]] = {
        name: {"left": list(shape.left), "right": list(shape.right), "factors": shape.factors, "scalars": False}
        for name, shape in shapes
    }
    put_layers_in(model, KronyQuantizationConfig(entries))
    return model


def computed(*names: str) -> list[dict[str, Any]]:
    """A row per model, of these or all, and number of devices, copied and sharded."""
    rows = []
    recipe = replace(RECIPES["quick"], sequences=64, batch=1, length=2048)
    for name in names or SHAPES:
        student, teacher = halved(empty_model(config(*SHAPES[name]))), empty_model(config(*SHAPES[name]))
        for devices in DEVICES:
            for shard in (False, True):
                if shard and devices == 1:
                    continue
                options = HealOptions(shard=shard, gradient_checkpointing=True)
                one = footprint(student, teacher.bfloat16(), recipe, options, processes=devices, half=True)
                rows.append({"model": name, "devices": devices, "sharded": shard} | one.to_json())
    return rows


def work(case: str, out: Path) -> None:
    """One process of a measurement: writes the bytes that its run took at most."""
    chosen = CASES[case]
    torch.set_num_threads(1)
    text = Rows((np.arange(24 * STEP.length) * 3 % 8000).astype(np.uint16), STEP.length)
    from krony.models import precision
    from krony.runtime import distributed

    fast = torch.bfloat16 if chosen.half else torch.float32
    precision.fast_dtype = lambda _: fast  # the same on all processors
    distributed.init()
    folder = Path(os.environ["KRONY_WORK"])

    def train(name: str, shape: Shape) -> None:
        torch.manual_seed(0)  # the same weights in all processes
        with torch.device("meta" if chosen.shard and not distributed.is_first() else "cpu"):
            model, *teachers = (
                AutoModelForCausalLM.from_config(config(*shape), dtype=torch.float32) for _ in range(1 + chosen.taught)
            )
        train_on_rows(
            model, *text.split(4), work=folder / name, recipe=STEP, options=chosen.options,
            teacher=teachers[0] if teachers else None,
        )  # fmt: skip

    train("warm", TINY)  # what code takes is there afterwards
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    train("run", SMALL)
    out.with_name(f"{out.name}-{distributed.rank()}").write_text(str(resident("VmHWM") - before))


def resident(name: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measured(case: str) -> dict[str, Any]:
    """What a run takes, and what was computed for it."""
    chosen = CASES[case]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"OMP_NUM_THREADS": "1", "KRONY_WORK": f"{folder}/work"}
        if chosen.processes > 1:  # with these, a single process would keep DDP's buckets too
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            common["WORLD_SIZE"] = str(chosen.processes)
        free.close()
        common["MALLOC_MMAP_THRESHOLD_"] = "131072"  # freed tensors leave the resident memory
        command = [sys.executable, __file__, "--work", case, f"{folder}/bytes"]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(chosen.processes)]
        if chosen.processes == 1:
            ranks = [{}]
        runs = [subprocess.Popen(command, env=os.environ | common | rank) for rank in ranks]
        if any(codes := [run.wait() for run in runs]):
            raise SystemExit(f"{case} ended with {codes}")
        found = [int(Path(f"{folder}/bytes-{rank}").read_text()) for rank in range(chosen.processes)]
    row: dict[str, Any] = {"case": case}
    for which, said in foretold(case).items():
        row[which] = {"measured": found[0 if which == "first" else -1], "computed": said}
    return row


def foretold(case: str) -> dict[str, int]:
    """What is computed for a run that is measured: the bytes of the first process, and of the other if there is one."""
    chosen = CASES[case]
    model, teacher = (empty_model(config(*SMALL)).float() for _ in range(2))
    common: dict[str, Any] = {"processes": chosen.processes, "half": chosen.half}
    on_cpu, elsewhere = (
        footprint(model, teacher if chosen.taught else None, STEP, options, **common)
        for options in (chosen.options, replace(chosen.options, device=None))
    )
    if chosen.processes == 1:
        return {"first": on_cpu.peak}
    return {"first": on_cpu.peak, "other": (elsewhere if chosen.shard else on_cpu).peak}


def compute_again() -> dict[str, Any]:
    """The kept results with everything computed anew."""
    results = read_results("large_models")
    for row in results["measured"]:
        for which, said in foretold(row["case"]).items():
            row[which]["computed"] = said
    return results | {"computed": computed()}


def draw(results: dict[str, Any]) -> None:
    """Fills the tables of the page."""
    gb = 1000**3
    lines = [
        "| model | devices | weights | parameters | gradients | AdamW | activations | teacher | peak | main memory |"
    ]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    parts = ("parameters", "gradients", "optimizer", "activations", "teacher", "peak", "main")
    for row in results["computed"]:
        how = "sharded" if row["sharded"] else "a copy each"
        figures = " | ".join(f"{row[part] / gb:,.1f}" for part in parts)
        lines.append(f"| {row['model']} | {row['devices']} | {how} | {figures} |")
    small = ["| run | first process, measured | computed | ratio | other process, measured | computed | ratio |"]
    small.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in results["measured"]:
        pairs = [(row[which]["measured"], row[which]["computed"]) for which in ("first", "other") if which in row]
        cells = [f"{found / gb:.3f} | {said / gb:.3f} | {said / found:.2f}" for found, said in pairs]
        small.append(f"| {row['case']} | {' | '.join([*cells, *[' | | '] * (2 - len(cells))])} |")
    fill(DOCS / "large-models.md", "benchmarks/large_models.py, computed", "\n".join(lines))
    fill(DOCS / "large-models.md", "benchmarks/large_models.py, measured", "\n".join(small))


def measure() -> dict[str, Any]:
    """Both tables."""
    rows = [measured(case) for case in CASES]
    return {"computed": computed(), "measured": rows, "machine": machine() | {"threads": 1}, "seed": 0}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:] == ["--compute-only"]:
        renewed = compute_again()
        write_json(RESULTS / "large_models.json", renewed)
        draw(renewed)
    else:
        draw(results_of("large_models", measure, __doc__))
