"""Look into a model: norms as in the paper's Table 4, singular values, scalars, and the error of every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.join import JoinedMLP
from krony.linear import KroneckerLinear
from krony.planner import plan
from krony.surgery import find_groups, kronecker_layers, take_out

PREFILL = 512  # tokens that ``path`` is for


@dataclass(frozen=True)
class LayerView:
    """One matrix of a model, and of the base it was compressed from.

    ``kept`` is the share of the base's Frobenius norm that is left (Table 4's percentage, as a fraction), ``error``
    ‖W − Ŵ‖/‖W‖; both are None without a base. ``path`` is the forward path of a compressed layer at 512 tokens,
    ``decode_path`` that at one, ``why`` the reason in words (``krony.planner``), and ``joined`` whether its MLP runs as
    one step (``krony.join``).
    """

    name: str
    shape: str
    frobenius: float
    l1: float
    singular_values: tuple[float, float, float]  # largest, median, smallest
    scalars: list[float] | None = None
    path: str | None = None
    decode_path: str | None = None
    why: str | None = None
    joined: bool = False
    base_frobenius: float | None = None
    base_l1: float | None = None
    kept: float | None = None
    error: float | None = None

    def to_json(self) -> dict:
        return asdict(self)


@torch.no_grad()
def inspect(model: PreTrainedModel, base: PreTrainedModel | None = None) -> list[LayerView]:
    """Looks at the compressed layers of ``model``, or at its MLPs if it is dense, in the order of the model.

    Args:
        base: the model it was compressed from.

    Raises:
        KronyError: a model without MLPs, or a base that has no such layer or one of another size.
    """
    compressed = kronecker_layers(model)
    names = list(compressed) or [site.name for group in find_groups(model) for site in group.sites]
    return [_view(model, name, compressed.get(name), base) for name in names]


def _view(model: PreTrainedModel, name: str, layer: KroneckerLinear | None, base: PreTrainedModel | None) -> LayerView:
    weight = take_out(model, name)[0].double() if layer is None else layer.dense_weight(torch.float64)
    frobenius, l1 = weight.norm().item(), weight.abs().sum().item()
    values = torch.linalg.svdvals(weight)
    compared: dict[str, Any] = {} if base is None else _compare(name, weight, base)
    return LayerView(
        name=name,
        shape=f"{weight.shape[0]}x{weight.shape[1]}" if layer is None else str(layer.shape),
        frobenius=frobenius,
        l1=l1,
        singular_values=(values[0].item(), values.median().item(), values[-1].item()),
        scalars=None if layer is None or layer.scalars is None else layer.scalars.tolist(),
        **({} if layer is None else _paths(model, name, layer)),
        **compared,
    )


def _paths(model: PreTrainedModel, name: str, layer: KroneckerLinear) -> dict[str, Any]:
    device = layer.weight.device.type
    prefill, decode = (plan(layer.shape, tokens, device=device, forced=layer.path) for tokens in (PREFILL, 1))
    joined = isinstance(model.get_submodule(name.rpartition(".")[0]), JoinedMLP)
    return {"path": prefill.path, "decode_path": decode.path, "why": prefill.why, "joined": joined}


def _compare(name: str, weight: Tensor, base: PreTrainedModel) -> dict[str, float]:
    try:
        original = take_out(base, name)[0].double()
    except AttributeError:
        raise KronyError(f"the base model has no layer {name}: it is not what this model was compressed from") from None
    if original.shape != weight.shape:
        sizes = ["x".join(map(str, w.shape)) for w in (original, weight)]
        raise KronyError(f"{name} is {sizes[0]} in the base model and {sizes[1]} here: the base is another model")
    norm = original.norm().item()
    return {
        "base_frobenius": norm,
        "base_l1": original.abs().sum().item(),
        "kept": weight.norm().item() / norm if norm else 1.0,
        "error": (original - weight).norm().item() / norm if norm else 0.0,
    }
