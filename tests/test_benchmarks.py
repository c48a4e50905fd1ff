"""The benchmarks stand on the library, and the pages are what they draw from their results."""

import ast
import importlib
import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "benchmarks/results/speed-shapes.json"
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
DRAWN = [
    ("demo", [], ["quickstart.md"], ["demo.svg"]),
    ("decomposition", [], ["decomposition.md"], ["decomposition.svg"]),
    ("interpretability", [], ["interpretability.md"], ["interpretability-right.svg", "interpretability-ablation.svg"]),
    ("healing", [], ["healing-curves.md"], ["healing-curves-512x256.svg", "healing-curves-256x256.svg"]),
    ("quality", ["--out", "smollm2"], ["quality-smollm2.md"], ["quality-smollm2.svg", "quality-smollm2-rivals.svg"]),
    ("quality", ["--out", "demo"], ["quality-demo.md"], ["quality-demo.svg"]),
    ("engines", [], ["deployment.md"], []),
    ("scalars", [], ["paper.md"], ["scalars.svg"]),
    ("right_factors", [], ["paper.md"], []),
    ("calibration_text", [], ["options.md"], []),
    ("sizes", [], ["sizes.md"], ["sizes.svg"]),
    ("speed", [], ["speed.md"], ["speed.svg"]),
    ("speed", ["--compile"], ["speed-compiled.md"], ["speed-compiled.svg"]),
    ("speed_shapes", [], ["speed-shapes.md"], ["speed-shapes-bfloat16.svg", "speed-shapes-float32.svg"]),
    ("compressor_speed", [], ["compressor-speed.md"], []),
    ("streaming", [], ["streaming.md"], []),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_benchmark_imports_the_command_line(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[:2] == ["krony", "cli"] for name in names), f"line {node.lineno}"


def title(svg: str) -> str:
    return next(e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("title") and e.text)


@pytest.mark.parametrize(("script", "options", "pages", "pictures"), DRAWN, ids=lambda value: str(value)[:24])
def test_pages_are_drawn_from_the_results(script, options, pages, pictures, tmp_path, monkeypatch, capsys):
    """Without a measurement: the same text, and pictures with the same title."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for page in pages:
        shutil.copy(ROOT / "docs" / page, tmp_path)  # some have a part that is written by hand
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--draw-only", *options])
    module.main()
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / "docs" / page).read_text(encoding="utf-8")
    for picture in pictures:
        drawn, kept = ((folder / picture).read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
        assert title(drawn) == title(kept)
        assert re.search(r"\d", title(kept))  # by how much


def test_the_arithmetic_of_a_selection(monkeypatch):
    """Of dropping neurons block by block: the integral that the benchmark takes is near the sum over the blocks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    compressor_speed = importlib.import_module("compressor_speed")
    neurons, out, block = 1536, 576, 32
    blocks = range(neurons - block, neurons // 2 - 1, -block)  # neurons that are left after each
    summed = sum(2 * block * left * (left + out + block) for left in blocks) + neurons**3
    assert compressor_speed.dropping(neurons, neurons // 2, out) == pytest.approx(summed, rel=0.02)


def test_what_scalars_could_move_by_is_the_sum_of_the_schedule(monkeypatch):
    """As transformers' own schedule has it, which the trainer uses."""
    import torch
    from transformers import get_scheduler

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scalars = importlib.import_module("scalars")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=scalars.RATE)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": scalars.OWN_RATE})
    schedule = get_scheduler(
        "cosine_with_min_lr", optimizer, 50, 256, scheduler_specific_kwargs={"min_lr": scalars.RATE / 100}
    )
    sums = [0.0, 0.0]
    for _ in range(256):
        sums = [total + group["lr"] for total, group in zip(sums, optimizer.param_groups, strict=True)]
        optimizer.step()
        schedule.step()
    for total, rate in zip(sums, (scalars.RATE, scalars.OWN_RATE), strict=True):
        assert scalars.reach(256, rate, 50, 0.01) == pytest.approx(total, rel=0.01)


def test_the_answer_on_scalars_follows_from_the_runs(monkeypatch):
    """Invented runs that come to 4, and such that don't."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scalars = importlib.import_module("scalars")

    def runs(end):
        return {
            "runs": [
                one | {"loss": 2.0 + one["frozen"], "points": [[0, 1, 1, 1, 1, 1], [9, 0, 1, end, 5, 9]]}
                for one in scalars.wanted([0, 1])
            ]
        }

    assert len(scalars.wanted([0, 1])) == 12
    assert "? Yes, here.** With" in scalars.answer(runs(4.2)) and "1 → 4.20, α → 4.20" in scalars.answer(runs(4.2))
    assert "? Not here.** With" in scalars.answer(runs(1.5))
    assert "Frozen the model ends at 20.09, trained from 4 at 7.39" in scalars.answer(runs(1.5))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_multiply_adds_of_shapes_are_those_that_run(kind, monkeypatch):
    """As torch counts them, one token after the other: a token reads itself and those before it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from krony.evaluation.workloads import empty_cache

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = importlib.import_module("speed_shapes")
    monkeypatch.setattr(shapes, "CONTEXT", 3)
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    config = (
        LlamaConfig(**heads, num_key_value_heads=2, intermediate_size=48)
        if kind == "llama"
        else GPT2Config(**heads, n_inner=48)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache, steps = empty_cache(model), []
    for token in range(5):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[token]]), use_cache=True, **cache)
        counted = {name.rpartition(".")[2]: 0 for name in counter.get_flop_counts()}
        for name, flops in counter.get_flop_counts().items():
            counted[name.rpartition(".")[2]] += sum(flops.values()) // 2
        attention = counted["self_attn" if kind == "llama" else "attn"]
        steps.append((counted["mlp"], attention, counted["lm_head"]))
    mlp, attention, head = (list(part) for part in zip(*steps, strict=True))
    assert shapes.multiply_adds(config, 1) == (mlp[3], attention[3] + head[3])  # after three
    assert shapes.multiply_adds(config, 5) == (sum(mlp), sum(attention) + head[4])
    assert shapes.arithmetic_limit(config, 1) == pytest.approx(
        1 / ((attention[3] + head[3] + mlp[3] / 2) / (attention[3] + head[3] + mlp[3]))
    )


def test_models_of_shapes_have_half_of_the_mlps_and_the_right_factors_they_are_named_for(monkeypatch):
    import torch
    from transformers import LlamaConfig

    from krony.models.surgery import kronecker_layers

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = importlib.import_module("speed_shapes")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    models = shapes.models_of(config, torch.float32, 0)
    assert list(models) == ["original", *shapes.VARIANTS]
    for name in ("general", "neurons"):
        layers = kronecker_layers(models[name])
        assert {tuple(layer.weight.shape) for layer in layers.values()} == {(1, 32, 32)} and len(layers) == 6
        zeros = {tuple((layer.right == 0).flatten().tolist()) for layer in layers.values()}
        assert zeros == {(False, False) if name == "general" else (False, True)}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes["original"] - sizes["slim"] == 2 * 3 * 32 * 32
    assert sizes["general"] == sizes["neurons"] == sizes["slim"] + 2 * 3 * 2
    assert not kronecker_layers(models["slim"])
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        torch.testing.assert_close(models["slim"](input_ids=ids).logits, models["neurons"](input_ids=ids).logits)


def test_the_tables_of_shapes_follow_from_the_runs():
    """Gains and limits, computed again from the seconds and the published widths."""
    results = json.loads(SHAPES.read_text(encoding="utf-8"))
    page = (ROOT / "docs/speed-shapes.md").read_text(encoding="utf-8")
    widths = {"llama-1b": (2048, 512, 3 * 8192), "qwen-0.5b": (896, 128, 3 * 4864), "gpt2-xl": (1600, 1600, 2 * 6400)}
    printed = {}
    for dtype, threads, text in re.findall(
        r"^## (\w+), (\d+) threads?\n\n(.*?)(?=^#|\Z)", page, re.DOTALL | re.MULTILINE
    ):
        for row in re.findall(r"^\| (\S+-\S+) \| (\d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE):
            shape, batch, length, cells = row
            printed[shape, dtype, int(threads), int(batch), int(length)] = cells.split(" | ")
    assert len(printed) == len(results["runs"]) > 0
    for run in results["runs"]:
        first = run["seconds"]["original"]
        cells = [f"{statistics.median(first) * 1e3:,.1f}"]
        for variant in ("general", "neurons", "slim"):
            ratios = [a / b for a, b in zip(first, run["seconds"][variant], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        width, keys, inner = widths[run["shape"]]
        length, layers = run["length"], results["layers"]
        read = 129 if length == 1 else length * (length + 1) / 2
        mlp = layers * length * width * inner
        rest = layers * 2 * width * (length * (width + keys) + read) + width * results["vocabulary"]
        share = mlp / (mlp + rest)
        cells.append(f"{1 / (1 - share + share / 2):.2f}")
        assert printed[tuple(run[key] for key in ("shape", "dtype", "threads", "batch", "length"))] == cells
