"""Look into a model: norms as in the paper's Table 4, singular values, scalars, and the error of every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.init.registry import INITIALISATIONS
from krony.kronecker.assignment import assign
from krony.kronecker.forward_path import choose_path
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import FusedMLP
from krony.models.surgery import find_groups, is_linear, kronecker_layers, original, take_out

PREFILL = 512  # tokens that ``path`` is for


@dataclass(frozen=True)
class LayerView:
    """One matrix of a model, and of the base it was compressed from.

    ``kept`` is the share of the base's Frobenius norm that is left (Table 4's percentage, as a fraction), ``error``
    ‖W − Ŵ‖/‖W‖; both are None without a base. Where the initialisation moves hidden neurons they are put back first, to
    where their MLP comes nearest to the base's. ``path`` is the forward path of a compressed layer at 512 tokens,
    ``decode_path`` that at one, ``why`` the reason in words, and ``fused`` whether its MLP runs as one step
    (``krony.models.fusion``).
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
    fused: bool = False
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
        KronyError: a model without MLPs, or a base that is compressed, or has no such layer or one of another size.
    """
    compressed = kronecker_layers(model)
    names = list(compressed) or [site.name for group in find_groups(model) for site in group.sites]
    if base is not None and kronecker_layers(base):
        raise KronyError("the base is a compressed model itself: name the model that this one was made from")
    places = {} if base is None else _places(model, base)
    return [_view(model, name, compressed.get(name), base, places.get(name)) for name in names]


def _view(
    model: PreTrainedModel,
    name: str,
    layer: KroneckerLinear | None,
    base: PreTrainedModel | None,
    place: Place | None,
) -> LayerView:
    weight = take_out(model, name)[0].double() if layer is None else layer.dense_weight(torch.float64)
    frobenius, l1 = weight.norm().item(), weight.abs().sum().item()
    values = torch.linalg.svdvals(weight)
    compared: dict[str, Any] = {} if base is None else _compare(name, weight, base, place)
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
    prefill, decode = (choose_path(layer.shape, tokens, device=device, forced=layer.path) for tokens in (PREFILL, 1))
    fused = isinstance(model.get_submodule(name.rpartition(".")[0]), FusedMLP)
    return {"path": prefill.path, "decode_path": decode.path, "why": prefill.why, "fused": fused}


@dataclass(frozen=True)
class Place:
    """Which hidden neuron of a compressed MLP stands for each of the base's, ``(n,)``: columns of a down matrix."""

    order: Tensor
    is_down: bool


def _places(model: PreTrainedModel, base: PreTrainedModel) -> dict[str, Place]:
    """For every matrix of an MLP whose hidden neurons were moved.

    No file says where they went; it is where all matrices of the MLP together, each by its own size, come nearest.
    """
    made_with = getattr(getattr(model.config, "quantization_config", None), "made_with", {})
    method = INITIALISATIONS.get(made_with.get("init", ""))
    if method is None or not method.reorders_neurons:
        return {}
    found: dict[str, Place] = {}
    layers, linear = kronecker_layers(model), {name for name, module in base.named_modules() if is_linear(module)}
    for group in find_groups(original(model)):
        if not all(site.name in layers and site.name in linear for site in group.sites):
            continue
        gain: Any = 0.0  # (n of the base, n)
        for site in group.sites:
            whole, new = take_out(base, site.name)[0].double(), layers[site.name].dense_weight(torch.float64)
            if whole.shape != new.shape:
                break  # ``_compare`` says so
            whole, new = (whole.T, new.T) if site.role == "down" else (whole, new)  # (n, width)
            gain = gain + whole @ new.T / whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
        else:
            order = assign(gain)
            found |= {site.name: Place(order, site.role == "down") for site in group.sites}
    return found


def _compare(name: str, weight: Tensor, base: PreTrainedModel, place: Place | None) -> dict[str, float]:
    try:
        whole = take_out(base, name)[0].double()
    except AttributeError:
        raise KronyError(f"the base model has no layer {name}: it is not what this model was compressed from") from None
    if whole.shape != weight.shape:
        sizes = ["x".join(map(str, w.shape)) for w in (whole, weight)]
        raise KronyError(f"{name} is {sizes[0]} in the base model and {sizes[1]} here: the base is another model")
    if place is not None:
        weight = weight[:, place.order] if place.is_down else weight[place.order]
    norm = whole.norm().item()
    return {
        "base_frobenius": norm,
        "base_l1": whole.abs().sum().item(),
        "kept": weight.norm().item() / norm if norm else 1.0,
        "error": (whole - weight).norm().item() / norm if norm else 0.0,
    }
