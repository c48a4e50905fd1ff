"""Every size that the tables of the docs print is computed again from the shapes of the models' matrices.

The arithmetic here is written out, not taken from the benchmarks that print the tables.
"""

import json
import re
from pathlib import Path

import pytest
from transformers import GPT2Config

from krony.kronecker.schemes import ModelShape, resolve

ROOT = Path(__file__).parents[1]
HEADER = 100_000  # bytes that the header of a safetensors file takes at most
ITEM = {"float32": 4, "bfloat16": 2}
DEMO = ModelShape(5_918_720, ((1024, 256),) * 12)
GPT2 = ModelShape(124_439_808, ((3072, 768),) * 24)


def results(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose first line begins with these words."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(first):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def with_scalars(shape: ModelShape, scheme: str) -> int:
    """The parameters of a compressed model: a sum of several products has a scalar for each."""
    factors = [resolve(scheme, *matrix).factors for matrix in shape.matrices]
    return shape.parameters_with(scheme) + sum(k for k in factors if k > 1)


def gpt2_parameters(config: GPT2Config) -> int:
    """A GPT-2's parameters, the tied head counted once."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = 2 * width * inner + inner + width
    return (config.vocab_size + config.n_positions) * width + config.n_layer * (attention + mlp + 4 * width) + 2 * width


def quantised(facts: dict, item: int, removed: float, bits: int) -> tuple[int, int]:
    """Parameters and bytes with the linear layers in few bits, and this share of the hidden neurons left out.

    8 bits: a float32 scale per output. 4 bits: a scale and a zero point for each 32 inputs, in the model's dtype.
    """
    narrower = {"up": (1 - removed, 1), "down": (1, 1 - removed), "other": (1, 1)}
    params = others = facts["params"]
    quantised = 0
    for role, shapes in facts["matrices"].items():
        for out, into, has_bias, count in shapes:
            high, wide = (round(side * share) for side, share in zip((out, into), narrower[role], strict=True))
            shorter_biases = (out - high) * count if has_bias else 0
            params -= (out * into - high * wide) * count + shorter_biases
            others -= out * into * count + shorter_biases
            scales = 4 * high if bits == 8 else 2 * item * high * wide // 32
            quantised += (high * wide * bits // 8 + scales) * count
    return params, others * item + quantised


@pytest.mark.parametrize("name", ["smollm2", "demo"])
def test_quality_tables(name):
    measured = results(f"quality-{name}")
    facts, item = measured["facts"], ITEM[measured["dtype"]]
    tall = [(out, into) for out, into, _, count in facts["matrices"]["up"] for _ in range(count)]
    tall += [(into, out) for out, into, _, count in facts["matrices"]["down"] for _ in range(count)]
    shape = ModelShape(facts["params"], tuple(tall))
    printed = rows(f"docs/quality-{name}.md", "| removed | init |")
    untrained = {(row["way"], row["removed"]) for row in measured["rows"] if not row.get("distilled")}
    assert len(printed) == len(untrained) + len({"base", "int8", "int4"} & set(measured))
    added = sum(out * count for out, _, bias, count in facts["matrices"]["down"] if not bias)  # FLAP's biases
    for removed, method, parameters, megabytes, *_ in printed:
        share = 0.0 if removed == "none" else float(removed.rstrip("%")) / 100
        if method.endswith(("int8", "int4")):
            params, size = quantised(facts, item, share, bits=int(method[-1]))
        elif method == "the original":
            params, size = facts["params"], facts["params"] * item
        else:
            params = int(parameters.replace(",", ""))
            uniform = with_scalars(shape, f"keep={1 - share:g}")
            if method in ("neurons", "van-loan", "prune", "wanda", "magnitude", "random-neurons"):
                assert params == uniform
            elif method == "flap":
                assert params == uniform + added
            elif method.startswith(("torch-pruning", "optipfair")):
                assert params == quantised(facts, item, share, bits=8)[0]  # those of slim
            elif method == "svd":  # the largest rank within as many parameters
                per_rank = sum(high + wide for high, wide in tall)
                assert uniform - per_rank < params <= uniform
            else:  # neurons divided among layers: the same number, and right factors of other sizes
                assert abs(params - uniform) < 0.002 * uniform
            size = params * item
        assert parameters == f"{params:,}" and megabytes == f"{size / 1e6:.1f}", (removed, method)


def test_the_facts_of_the_shipped_model():
    """What the sizes are computed from is in the model itself."""
    import krony
    from krony.models.surgery import find_groups, take_out

    facts, model = results("quality-demo")["facts"], krony.demo_model()
    assert facts["params"] == sum(p.numel() for p in model.parameters()) == DEMO.parameters
    for role, place in (("up", 0), ("down", -1)):
        shapes = [tuple(take_out(model, g.sites[place].name)[0].shape) for g in find_groups(model)]
        assert facts["matrices"][role] == [[*shapes[0], True, len(shapes)]] and len(set(shapes)) == 1


@pytest.mark.parametrize("name", ["speed", "speed-compiled"])
def test_speed_tables(name):
    svd = GPT2.parameters + 24 * (153 * (3072 + 768) - 3072 * 768)  # two thin matrices of rank 153
    expected = {
        "GPT-2 124M": GPT2.parameters,
        "81M multiplied out": GPT2.parameters_with("81M"),
        "DistilGPT2's shape": gpt2_parameters(GPT2Config(n_layer=6)),
        "whitened SVD, 81M": svd,
        "n_inner=768": gpt2_parameters(GPT2Config(n_inner=768)),
    }
    expected |= {f"krony {scheme}": with_scalars(GPT2, scheme) for scheme in ("81M", "96M", "80M")}
    measured = {model["name"]: model for model in results(name)["models"]}
    printed = rows(f"docs/{name}.md", "| model | parameters |")
    assert [cells[0] for cells in printed] == list(measured)
    for model, parameters, megabytes, *_ in printed:
        assert parameters == f"{expected[model]:,}", model
        assert megabytes == f"{measured[model]['bytes'] / 1e6:,.1f}"
        assert 0 <= measured[model]["bytes"] - 4 * expected[model] < HEADER, model


def test_healing_tables():
    text = (ROOT / "docs/healing-curves.md").read_text(encoding="utf-8")
    for scheme, part in re.findall(r"^## (\d+x\d+):(.*?)^The same models", text, re.DOTALL | re.MULTILINE):
        shown = re.findall(r"^\| ([\w -]+) \| ([\d,]+) \| [\d,.]+ \|", part, re.MULTILINE)
        assert len(shown) == 6
        for init, parameters in shown:
            whole = init == "the original"
            assert parameters == f"{DEMO.parameters if whole else DEMO.parameters_with(scheme):,}", (scheme, init)


def test_the_demo_table():
    for init, parameters, megabytes, *_ in rows("docs/quickstart.md", "|  | parameters | MB | perplexity"):
        params = DEMO.parameters if init == "original" else DEMO.parameters_with("keep=0.5")
        assert parameters == f"{params:,}" and megabytes == f"{4 * params / 1e6:.1f}", init
