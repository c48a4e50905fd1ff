"""Look into a model: norms as in the paper's Table 4, singular values, scalars, and the error of every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.init.registry import INITIALISATIONS
from krony.kronecker.assignment import assign
from krony.kronecker.forward_path import choose_path
from krony.kronecker.layer_schemes import DENSE, LayerSchemes
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import FusedMLP
from krony.models.quantizer import compressions
from krony.models.split_attention import splitting, wholes_of
from krony.models.surgery import Group, find_groups, is_chosen, is_linear, kronecker_layers, original, take_out

PREFILL = 512  # tokens that ``path`` is chosen for


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One matrix of a model, compared with that of the base model if there is one.

    Where the initialisation reorders hidden neurons, the comparison first puts them back in the order in which the MLP
    comes nearest to the base's.

    Attributes:
        name: the layer's name in the model.
        shape: ``(out, in)`` of a dense matrix, or the shapes of the factors.
        frobenius: Frobenius norm.
        l1: sum of the absolute values.
        singular_values: the largest, the median and the smallest.
        scalars: those of the factors, if there are any.
        path: the forward path of a compressed layer for 512 tokens.
        decode_path: its forward path for one token.
        why: the reason for ``path``, in words.
        fused: whether its MLP runs in one step (``krony.models.fusion``).
        base_frobenius: Frobenius norm of the base's matrix; None without a base, as all that follow.
        base_l1: sum of the absolute values of the base's matrix.
        kept: share of the base's Frobenius norm that is left (the percentage of Table 4, as a fraction).
        error: relative error ``‖W − Ŵ‖/‖W‖`` in the Frobenius norm.
    """

    name: str
    shape: str
    frobenius: float
    l1: float
    singular_values: tuple[float, float, float]
    scalars: list[float] | None = None
    path: str | None = None
    decode_path: str | None = None
    why: str | None = None
    fused: bool = False
    base_frobenius: float | None = None
    base_l1: float | None = None
    kept: float | None = None
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The view for ``--json``."""
        return asdict(self)


@torch.no_grad()
def inspect_model(model: PreTrainedModel, base: PreTrainedModel | None = None) -> list[LayerView]:
    """Norms, singular values, scalars and forward paths of the compressed layers, or of the MLPs of a dense model.

    Args:
        model: a causal LM, dense or compressed.
        base: the model that it was compressed from; adds the share of the norm that is left, and the error.

    Returns:
        One view per matrix, in the order of the model.

    Raises:
        KronyError: a model without MLPs, or a base that is compressed, has no such layer, or has it in another size.

    Examples:
        >>> import krony
        >>> views = krony.inspect_model(krony.demo_model())
        >>> len(views), views[0].name, views[0].shape
        (12, 'transformer.h.0.mlp.c_fc', '1024x256')
    """
    compressed = kronecker_layers(model)
    names = list(compressed) or [site.name for group in find_groups(model) for site in group.sites]
    if base is not None and kronecker_layers(base):
        raise KronyError("the base is a compressed model itself: name the model that this one was made from")
    if base is None:
        return [_view(model, name, compressed.get(name)) for name in names]
    with splitting(base, wholes_of(base, names)):
        orders = _orders(model, base)
        return [_view(model, name, compressed.get(name), base, orders.get(name)) for name in names]


def _view(
    model: PreTrainedModel,
    name: str,
    layer: KroneckerLinear | None,
    base: PreTrainedModel | None = None,
    order: NeuronOrder | None = None,
) -> LayerView:
    weight = take_out(model, name)[0].double() if layer is None else layer.dense_weight(torch.float64)
    values = torch.linalg.svdvals(weight)
    compared: dict[str, Any] = {} if base is None else _compare(name, weight, base, order)
    return LayerView(
        name=name,
        shape=f"{weight.shape[0]}x{weight.shape[1]}" if layer is None else str(layer.shape),
        frobenius=weight.norm().item(),
        l1=weight.abs().sum().item(),
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
class NeuronOrder:
    """Which hidden neuron of a compressed MLP corresponds to each of the base's, ``(n,)``.

    ``is_down``: whether neurons are the columns of the matrix.
    """

    order: Tensor
    is_down: bool


def _orders(model: PreTrainedModel, base: PreTrainedModel) -> dict[str, NeuronOrder]:
    """The order of the hidden neurons for every matrix of an MLP that reorders them.

    No file holds it. It is the order in which all matrices of the MLP together, each relative to its norm, come nearest
    to the base's.
    """
    records = compressions(model.config)
    found: dict[str, NeuronOrder] = {}
    layers, linear = kronecker_layers(model), {name for name, module in base.named_modules() if is_linear(module)}
    for group in find_groups(original(model)):
        if not all(site.name in layers and site.name in linear for site in group.sites):
            continue
        if not _is_reordered(group, records):
            continue
        gain: Any = 0.0  # (n of the base, n)
        for site in group.sites:
            old, new = take_out(base, site.name)[0].double(), layers[site.name].dense_weight(torch.float64)
            if old.shape != new.shape:
                break  # ``_compare`` raises the error
            old, new = (old.T, new.T) if site.role == "down" else (old, new)  # (n, width)
            gain = gain + old @ new.T / old.square().sum().clamp_min(torch.finfo(old.dtype).tiny)
        else:
            order = assign(gain)
            found |= {site.name: NeuronOrder(order, site.role == "down") for site in group.sites}
    return found


def _is_reordered(group: Group, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the compression that replaced this MLP reorders its neurons: the first one that chose it did."""
    for record in records:
        scheme, modules = record.get("scheme"), str(record.get("modules", "mlp"))
        names = [site.name for site in group.sites]
        if isinstance(scheme, list):  # pairs of a pattern and its scheme
            schemes = LayerSchemes(dict(scheme))
            chosen = all(schemes.scheme_for(name) != DENSE for name in names)
        else:
            matched = modules == "mlp" or all(re.search(modules, name) for name in names)
            chosen = matched and is_chosen(group.layer, str(record.get("layers", "all")))
        if chosen:
            method = INITIALISATIONS.get(str(record.get("init")))
            return method is not None and method.reorders_neurons
    return False


def _compare(name: str, weight: Tensor, base: PreTrainedModel, order: NeuronOrder | None) -> dict[str, float]:
    try:
        old = take_out(base, name)[0].double()
    except AttributeError:
        raise KronyError(f"the base model has no layer {name}: it is not what this model was compressed from") from None
    if old.shape != weight.shape:
        sizes = ["x".join(map(str, w.shape)) for w in (old, weight)]
        raise KronyError(f"{name} is {sizes[0]} in the base model and {sizes[1]} here: the base is another model")
    if order is not None:
        weight = weight[:, order.order] if order.is_down else weight[order.order]
    norm = old.norm().item()
    return {
        "base_frobenius": norm,
        "base_l1": old.abs().sum().item(),
        "kept": weight.norm().item() / norm if norm else 1.0,
        "error": (old - weight).norm().item() / norm if norm else 0.0,
    }
