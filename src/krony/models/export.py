"""Turns a compressed model back into one that transformers knows without krony."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.models.surgery import find_groups, kronecker_layers, original, plain_layer, put_in, take_out

FORMS = ("dense", "slim")
WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")  # what configs call the hidden width


@dataclass(frozen=True)
class Slim:
    """A plain model of a smaller hidden width, and the parameters that its one width gives back to narrower layers."""

    model: PreTrainedModel
    width: int
    padding: int


def export_model(model: PreTrainedModel, to: str = "dense") -> PreTrainedModel:
    """The model without Kronecker layers, changed in place.

    ``dense`` multiplies the factors out, scalars included: a plain model of the original's size. ``slim`` is ``slim``'s
    model: the same logits from a smaller hidden width, where that is exact.

    Raises KronyError for an unknown form, a model that isn't compressed, or one that can't be made slim.
    """
    if to not in FORMS:
        raise KronyError(f"export to {to!r} is unknown: it is one of {', '.join(FORMS)}")
    if to == "slim":
        return slim(model).model
    _check_compressed(model)
    return model.dequantize()


@torch.no_grad()
def slim(model: PreTrainedModel, multiple_of: int = 1) -> Slim:
    """Leaves away the hidden neurons whose column of the down matrix is exactly zero, in place.

    Such are those that neuron selection drops: the logits stay the same. Plain configs take one width for all layers,
    so narrower ones are padded with zero neurons.

    Args:
        multiple_of: the width is rounded up to a multiple of it, for tensor cores and quantised blocks.

    Raises:
        KronyError: a model that isn't compressed, or one whose neurons can't be left away exactly.
    """
    _check_compressed(model)
    if multiple_of < 1:
        raise KronyError(f"multiple_of is {multiple_of}: it takes a number of neurons from 1")
    compressed = kronecker_layers(model)
    downs = {group.sites[-1].name: group for group in find_groups(original(model))}
    alive = {name: _alive(model, name) for name in downs}
    widest = max(alive, key=lambda name: len(alive[name]))
    width = -(-len(alive[widest]) // multiple_of) * multiple_of
    full = min(group.sites[-1].in_features for group in downs.values())
    if width >= full:
        why = "is not compressed" if widest not in compressed else f"uses {len(alive[widest])} of its {full} neurons"
        rounded = "" if width == len(alive[widest]) else f", {width} when rounded up"
        raise KronyError(
            f"export to slim saves nothing exactly: {widest} {why}{rounded}. It takes right factors that are "
            "selections, as init neurons leaves them with epsilon 0, in every layer; --to dense always works"
        )
    attribute = _width_attribute(model)
    model = model.dequantize()
    padding = 0
    for name, group in downs.items():
        *ups, down = group.sites
        for site in group.sites:
            put_in(model, site.name, _narrow(model, site.name, alive[name], width, columns=site is down))
        padding += (width - len(alive[name])) * (sum(up.in_features for up in ups) + down.out_features)
    setattr(model.config, attribute, width)
    return Slim(model, width, padding)


def _check_compressed(model: PreTrainedModel) -> None:
    if not kronecker_layers(model):
        raise KronyError("this model has no Kronecker layers: there is nothing to export")


def _alive(model: PreTrainedModel, down: str) -> Tensor:
    """The hidden neurons that reach the output: those with a column of the down matrix that isn't zero."""
    compressed = kronecker_layers(model).get(down)
    weight = take_out(model, down)[0] if compressed is None else compressed.dense_weight()
    return weight.any(dim=0).nonzero().squeeze(1)


def _width_attribute(model: PreTrainedModel) -> str:
    for attribute in WIDTHS:
        if hasattr(model.config, attribute):
            return attribute
    raise KronyError(f"{type(model).__name__} has no hidden width in its config: export to slim can't set it")


def _narrow(model: PreTrainedModel, name: str, neurons: Tensor, width: int, *, columns: bool) -> nn.Module:
    """The layer for these neurons alone, padded with zeros to ``width``: columns of the down matrix, rows of others."""
    weight, bias = take_out(model, name)
    more = width - len(neurons)
    cut = weight[:, neurons] if columns else weight[neurons]
    cut = nn.functional.pad(cut, (0, more) if columns else (0, 0, 0, more))  # (out, in)
    if bias is not None and not columns:
        bias = nn.functional.pad(bias[neurons], (0, more))
    return plain_layer(model.get_submodule(name), cut, bias)
