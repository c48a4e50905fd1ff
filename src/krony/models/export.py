"""Turns a compressed model into a plain one that transformers loads without krony."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.models.source import empty_model
from krony.models.surgery import find_groups, kronecker_layers, original, plain_config, plain_layer, put_in, take_out

FORMS = ("dense", "slim")
WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")  # names of the hidden width in configs


@dataclass(frozen=True, kw_only=True)
class Slim:
    """A plain model with a smaller hidden width.

    Attributes:
        model: the model.
        width: the hidden width of every layer.
        padding: the number of zero parameters that bring narrower layers to this width.
        kept: how many of its neurons each layer uses.
    """

    model: PreTrainedModel
    width: int
    padding: int
    kept: tuple[int, ...]

    def __str__(self) -> str:
        if not self.padding:
            return f"hidden width {self.width}"
        return padding_sentence(self.kept, self.width, self.padding)


def export_model(model: PreTrainedModel, to: str = "dense") -> PreTrainedModel:
    """Replaces the Kronecker layers of a model by plain ones, in place, and returns the model.

    ``to="dense"`` multiplies the factors and scalars out: a plain model of the original's size. ``to="slim"`` gives the
    same logits from a smaller hidden width (see ``slim``).

    Raises KronyError for an unknown form, a model that isn't compressed, or one that can't be made slim exactly.

    Examples:
        >>> import krony
        >>> model = krony.demo_model()
        >>> report = krony.compress(model, krony.KronyConfig("512x256", init="van-loan", layers="0"))
        >>> plain = krony.export_model(model)
        >>> type(plain.transformer.h[0].mlp.c_fc).__name__
        'Conv1D'
    """
    if to not in FORMS:
        raise KronyError(
            f"export to {to!r} is unknown: it is one of {', '.join(FORMS)}, and krony export writes others"
        )
    if to == "slim":
        return slim(model).model
    _check_compressed(model)
    return model.dequantize()


@torch.no_grad()
def slim(model: PreTrainedModel, multiple_of: int = 1, *, padded: bool = True) -> Slim:
    """Removes the hidden neurons whose column of the down matrix is exactly zero, in place; the logits stay the same.

    Neuron selection with epsilon 0 leaves such neurons. Plain configs have one width for all layers, so narrower layers
    are padded with zero neurons.

    Args:
        multiple_of: rounds the width up to a multiple of this number, for tensor cores and quantised blocks.
        padded: whether all layers get one width. Without it every layer has its own (``multiple_of`` is not read),
            which transformers can run and save, but not load again; some engines can.

    Raises:
        KronyError: the model isn't compressed, no neuron can be removed from every layer exactly, or the config can't
            say the new width.
    """
    _check_compressed(model)
    if multiple_of < 1:
        raise KronyError(f"multiple_of is {multiple_of}: it is a number of neurons, at least 1")
    compressed = kronecker_layers(model)
    downs = {group.sites[-1].name: group for group in find_groups(original(model))}
    alive = {name: _alive(model, name) for name in downs}
    widest = max(alive, key=lambda name: len(alive[name]))
    width = -(-len(alive[widest]) // multiple_of) * multiple_of
    full = min(group.sites[-1].in_features for group in downs.values())
    if (width if padded else min(map(len, alive.values()))) >= full:
        raise _nothing_to_remove(widest, len(alive[widest]), full, compressed=widest in compressed)
    attribute = _width_attribute(model)
    if padded:
        _check_config_says(model, attribute, width)
    model = model.dequantize()
    padding = 0
    for name, group in downs.items():
        *ups, down = group.sites
        own = width if padded else len(alive[name])
        for site in group.sites:
            put_in(model, site.name, _narrow(model, site.name, alive[name], own, columns=site is down))
        padding += (own - len(alive[name])) * (sum(up.in_features for up in ups) + down.out_features)
    setattr(model.config, attribute, width)
    return Slim(model=model, width=width, padding=padding, kept=tuple(map(len, alive.values())))


def _nothing_to_remove(layer: str, used: int, full: int, *, compressed: bool) -> KronyError:
    """The sentence for a model whose widest layer stays as wide as it is."""
    if used < full:
        return KronyError(
            f"export to slim keeps the {used} neurons that are used in {layer}, and rounded up they are all {full}: "
            "choose a smaller multiple"
        )
    why = "all of them are used" if compressed else "nothing is compressed"
    return KronyError(
        f"export to slim removes neurons, and {why} in {layer}: it needs init neurons with epsilon 0 in every layer; "
        "--to dense always works"
    )


def padding_sentence(kept: Sequence[int], width: int, padding: int) -> str:
    """What the padding of ``slim`` takes, and how to have less; ``kept`` are the neurons that each layer uses."""
    mean = -(-sum(kept) // len(kept))
    return (
        f"in slim form every layer has {width} hidden neurons, and {padding:,} zero parameters fill up those that use "
        f"fewer, {mean} on average: krony compress --max-width N, from {mean} on, has less of them"
    )


def _check_compressed(model: PreTrainedModel) -> None:
    if any(name.endswith("base_layer") for name, _ in model.named_modules()):
        raise KronyError("this model has adapters of PEFT on its layers: take them off first, by peft's unload()")
    if not kronecker_layers(model):
        raise KronyError(
            "this model is plain already: it has no Kronecker layers that could be made dense or slim (krony compress "
            "makes them)"
        )


def _alive(model: PreTrainedModel, down: str) -> Tensor:
    """The hidden neurons that reach the output, ``(n,)``: their column of the down matrix isn't zero."""
    compressed = kronecker_layers(model).get(down)
    weight = take_out(model, down)[0] if compressed is None else compressed.dense_weight()
    return weight.any(dim=0).nonzero().squeeze(1)


def _width_attribute(model: PreTrainedModel) -> str:
    """The name of the hidden width in the model's config. Raises KronyError if there is none."""
    for attribute in WIDTHS:
        if hasattr(model.config, attribute):
            return attribute
    raise KronyError(f"{type(model).__name__} has no hidden width in its config, so export to slim can't set it")


def _check_config_says(model: PreTrainedModel, attribute: str, width: int) -> None:
    """Raises KronyError unless a model built from the config with this width has MLPs of this width.

    Some read another attribute (a shared expert has its own), or a share of this one.
    """
    config = plain_config(model)
    setattr(config, attribute, width)
    for group in find_groups(empty_model(config)):
        if group.sites[-1].in_features != width:
            raise KronyError(
                f"export to slim can't set the width of {group.sites[-1].name} in the config: with {attribute} {width} "
                f"it is {group.sites[-1].in_features}; --to dense always works"
            )


def _narrow(model: PreTrainedModel, name: str, neurons: Tensor, width: int, *, columns: bool) -> nn.Module:
    """The layer with only these neurons, padded with zeros to ``width``: columns of the down matrix, rows of others."""
    weight, bias = take_out(model, name)
    missing = width - len(neurons)
    cut = weight[:, neurons] if columns else weight[neurons]
    cut = nn.functional.pad(cut, (0, missing) if columns else (0, 0, 0, missing))  # (out, in)
    if bias is not None and not columns:
        bias = nn.functional.pad(bias[neurons], (0, missing))
    return plain_layer(model.get_submodule(name), cut, bias)
