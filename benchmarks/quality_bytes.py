"""The sizes of the models of ``quality.py``: computed from the shapes of their matrices, and weighed.

A head that is tied to the embedding is counted once, with the embedding, and is not quantised.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from krony.models.surgery import find_groups, is_linear, put_in, take_out

BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 4  # torchao keeps one float32 scale per output of an 8-bit matrix
GROUP = 32  # inputs that share a scale and a zero point in a 4-bit matrix


def bits_of(way: str) -> int | None:
    """The bits per weight that the name of a row ends with, or None."""
    return next((bits for name, bits in BITS.items() if way.endswith(name)), None)


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


def quantised_bytes(facts: dict[str, Any], item: int, bits: int) -> int:
    """Bytes with the matrices of the linear layers in 8 or 4 bits, and all else in ``item`` bytes per number."""
    shapes = [shape for found in facts["matrices"].values() for shape in found]
    total = facts["params"] * item
    for out, into, _, count in shapes:
        if bits == 8:
            total += (out * into + out * SCALE_BYTES - out * into * item) * count
        elif into % GROUP == 0:  # torchao leaves other matrices as they are
            scales = out * into // GROUP * 2 * item  # with the zero points
            total += (out * into // 2 + scales - out * into * item) * count
    return total


def set_sizes(results: dict[str, Any]) -> None:
    """Computes the bytes of every row, and the parameters of slim models, from the model's facts."""
    facts, item = results["facts"], getattr(torch, results["dtype"]).itemsize
    for key in ("base", *BITS):
        if key in results:
            size = facts["params"] * item if key == "base" else quantised_bytes(facts, item, BITS[key])
            results[key] |= {"params": facts["params"], "bytes": size}
    for row in results["rows"]:
        bits = bits_of(row["way"])
        if bits is not None:
            narrow = slim_facts(facts, row["removed"])
            row |= {"params": narrow["params"], "bytes": quantised_bytes(narrow, item, bits)}
        else:
            row["bytes"] = row["params"] * item


def check_sizes(results: dict[str, Any]) -> None:
    """Ends the run if a model took other bytes than its arithmetic says: then it was not what the table calls it."""
    rows = [results[key] | {"way": key} for key in ("base", *BITS) if key in results] + results["rows"]
    for row in rows:
        if row.get("measured_bytes", row["bytes"]) != row["bytes"]:
            raise SystemExit(f"{row['way']}: {row['measured_bytes']:,} bytes, and by arithmetic {row['bytes']:,}")


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters; a quantised one consists of its numbers and their scales."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    if type(tensor.data) is torch.Tensor:
        return tensor.numel() * tensor.element_size()
    names = tensor.data.tensor_data_names
    return sum(_bytes(getattr(tensor.data, name)) for name in names)


def quantised(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """The weights of the linear layers in 8 or 4 bits, except the head, which shares its matrix with the embedding.

    Of torchao's 4-bit weights only those of its prototypes run on a CPU (0.18); they are groups of 32 inputs with a
    scale and a zero point, in the tinygemm layout.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    quantize_(as_linear(model), config, lambda m, name: type(m) is torch.nn.Linear and name != "lm_head")
    return model


def as_linear(model: torch.nn.Module) -> torch.nn.Module:
    """GPT-2's transposed layers as ``nn.Linear``, which other libraries know."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        with torch.device("meta"):
            linear = torch.nn.Linear(*layer.weight.shape)
        linear.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        put_in(model, name, linear)
    return model
