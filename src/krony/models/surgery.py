"""Finds the linear layers of a model that krony replaces, reads their matrices, and puts other layers in their place.

Every matrix outside this file is ``(out, in)``. GPT-2's ``Conv1D`` stores ``(in, out)``: ``take_out`` and
``plain_layer`` transpose it, and nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.embedding import KroneckerEmbedding
from krony.kronecker.linear import KroneckerLinear
from krony.kronecker.schemes import ModelShape, resolve

if TYPE_CHECKING:  # this module is imported while transformers is being imported
    from transformers import PretrainedConfig, PreTrainedModel

Role = Literal["up", "down", "other"]

# The names of an MLP's matrices in transformers: the up matrices (to the hidden width), and the down matrix (back).
MLP_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("c_fc",), "c_proj"),  # GPT-2, GPT-Neo, StarCoder
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),  # OPT, Phi
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
)
WRAPPED = ".base_layer"  # what PEFT calls a layer inside its adapter
FUSED = "gate_up_proj"  # in Phi-3 and GLM: gate and up matrix in one


@dataclass(frozen=True)
class Site:
    """A linear layer: its dotted name, its role in an MLP, and its size.

    Examples:
        >>> site = Site("h.0.mlp.c_proj", "down", out_features=768, in_features=3072)
        >>> site.tall, str(site.shape("keep=0.5"))
        ((3072, 768), '768x1536')
    """

    name: str
    role: Role
    out_features: int
    in_features: int

    @property
    def tall(self) -> tuple[int, int]:
        """Rows and columns of its matrix when the hidden width (outside an MLP: the larger side) counts the rows."""
        return (self.in_features, self.out_features) if self.is_turned else (self.out_features, self.in_features)

    @property
    def is_turned(self) -> bool:
        """Whether a scheme is transposed for this layer."""
        return self.role == "down" or (self.role == "other" and self.in_features > self.out_features)

    def shape(self, scheme: str) -> KronShape:
        """The split that ``scheme`` means for this layer. Raises KronyError, naming the layer, if it does not fit."""
        try:
            shape = resolve(scheme, *self.tall)
        except KronyError as error:
            raise KronyError(f"{self.name}: {error}") from None
        return shape.transposed if self.is_turned else shape


@dataclass(frozen=True)
class Group:
    """Layers that are compressed together: the matrices of one MLP, the down matrix last, or a single layer."""

    sites: tuple[Site, ...]

    @property
    def is_mlp(self) -> bool:
        """Whether the last layer is a down matrix."""
        return self.sites[-1].role == "down"

    @property
    def layer(self) -> int | None:
        """The zero-based number of the transformer layer that contains the group; None outside any layer."""
        return layer_index(self.sites[0].name)


def layer_index(name: str) -> int | None:
    """The zero-based number of the transformer layer that a module belongs to: the first number in its name.

    Examples:
        >>> layer_index("transformer.h.11.mlp.c_fc"), layer_index("lm_head")
        (11, None)
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def find_groups(model: nn.Module, modules: str = "mlp", layers: str = "all") -> list[Group]:
    """The layers of ``model`` to compress, in the order of the model.

    Args:
        modules: ``mlp`` for the MLPs of every layer, or a regular expression searched in the names of linear layers.
        layers: ``all``, ``odd``, ``even`` or a zero-based inclusive range ``2-28``.

    Raises:
        KronyError: nothing matches, the expression or the range is malformed, or a layer shares its weight.
    """
    groups = _mlps(model) if modules == "mlp" else _matching(model, modules)
    if not groups:
        raise KronyError(_no_mlp(model))
    chosen = [g for g in groups if is_chosen(g.layer, layers)]
    if not chosen:
        numbers = sorted({g.layer for g in groups if g.layer is not None})
        available = f"the layers {numbers[0]}-{numbers[-1]} of this model" if numbers else f"{groups[0].sites[0].name}"
        raise KronyError(f"layers {layers!r} chooses none of {available}")
    return chosen


def linear_names(model: nn.Module) -> list[str]:
    """The names of all linear layers that krony can replace, in the order of the model."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def groups_of(model: nn.Module, chosen: Collection[str]) -> list[Group]:
    """The groups of these linear layers; an MLP whose matrices are all among them is one group.

    Raises KronyError if one of them shares its weight.
    """
    _refuse_tied(model, sorted(chosen))
    mlps = _mlps(model)
    complete = {s.name: g for g in mlps if all(s.name in chosen for s in g.sites) for s in g.sites}
    sites = {s.name: s for g in mlps for s in g.sites}
    groups = [
        complete.get(name) or Group((sites.get(name) or _site(name, model.get_submodule(name), "other"),))
        for name in linear_names(model)
        if name in chosen
    ]
    return list(dict.fromkeys(groups))


def is_chosen(layer: int | None, layers: str) -> bool:
    """Whether ``--layers`` chooses the layer of this number; only ``all`` chooses a module outside any layer.

    Raises KronyError if ``layers`` is none of ``all``, ``odd``, ``even`` and a zero-based inclusive range.

    Examples:
        >>> is_chosen(3, "odd"), is_chosen(3, "4-8"), is_chosen(None, "all")
        (True, False, True)
    """
    if layers == "all":
        return True
    if layers in ("odd", "even"):
        return layer is not None and layer % 2 == (layers == "odd")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", layers)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise KronyError(f"layers {layers!r} is not understood: use all, odd, even, or a range such as 2-28")
    return layer is not None and int(match[1]) <= layer <= int(match[2] or match[1])


def model_shape(model: nn.Module, groups: list[Group]) -> ModelShape:
    """The sizes that ``krony.kronecker.schemes`` needs. Parameters that layers share are counted once."""
    return ModelShape(count_parameters(model), tuple(site.tall for group in groups for site in group.sites))


def count_parameters(model: nn.Module) -> int:
    """The number of unique parameters: a head tied to the embedding is counted once (paper, Appendix B)."""
    return sum(p.numel() for p in model.parameters())


def count_untied(model: PreTrainedModel) -> int:
    """The number of parameters where a tied head counts beside the embedding, as in other papers (Appendix B)."""
    return count_parameters(model) + (model.get_output_embeddings().weight.numel() if is_tied(model) else 0)


def take_out(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight ``(out, in)`` and the bias ``(out,)`` or None of a linear layer: detached views, not copies."""
    module: Any = model.get_submodule(name)
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def put_in(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule called ``name`` by ``module``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def turned_weights(model: nn.Module) -> set[str]:
    """The names of the weights that are stored ``(in, out)``."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def plain_layer(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the class and mode of ``like``, ``nn.Linear`` or ``Conv1D``, with copies of these values.

    ``weight: (out, in)`` and ``bias: (out,)`` or None keep their dtype and device.
    """
    out, into = weight.shape
    with torch.device("meta"):
        new = Conv1D(out, into) if isinstance(like, Conv1D) else nn.Linear(into, out, bias=bias is not None)
    new.weight = nn.Parameter(
        (weight.T if isinstance(like, Conv1D) else weight).clone(memory_format=torch.contiguous_format)
    )
    new.bias = None if bias is None else nn.Parameter(bias.clone())
    return new.train(like.training)


def kronecker_layers(model: nn.Module) -> dict[str, KroneckerLinear]:
    """The compressed linear layers of a model, by dotted name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, KroneckerLinear)}


def kronecker_embeddings(model: nn.Module) -> dict[str, KroneckerEmbedding]:
    """The factorised embeddings of a model, by dotted name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, KroneckerEmbedding)}


def original(model: PreTrainedModel) -> PreTrainedModel:
    """The uncompressed model on the meta device: its modules without their values."""
    with torch.device("meta"):
        return type(model)(plain_config(model))


def plain_config(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's config without ``quantization_config``."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def enclosing_layer(model: nn.Module, group: Group) -> nn.Module:
    """The transformer layer that contains the group. Raises KronyError if none does."""
    return model.get_submodule(_layer_name(group))


def check_measurable(group: Group) -> None:
    """Raises KronyError for a group outside the transformer layers, such as the head: text is measured in these."""
    _layer_name(group)


def _layer_name(group: Group) -> str:
    parts = group.sites[0].name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise KronyError(
            f"{group.sites[0].name} is in no transformer layer, and calibration text is measured in these: leave the "
            "text out, or this matrix"
        )
    return ".".join(parts[: number + 1])


def embedding_of(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """The name and module of the input embedding. Raises KronyError unless it is an ``nn.Embedding``."""
    module = model.get_input_embeddings()
    if type(module) is not nn.Embedding:
        raise KronyError(f"the input embedding of this model is a {type(module).__name__}: it can't be factorised")
    return next(name for name, m in model.named_modules() if m is module), module


def embedding_shape(model: PreTrainedModel, size: int) -> tuple[str, KronShape]:
    """The name of the embedding, and its split with a right factor of ``1 x size``.

    Raises KronyError for a size that does not divide the width, and for an embedding that can't be factorised.
    """
    name, module = embedding_of(model)
    vocabulary, width = module.weight.shape
    if size < 2 or width % size:
        raise KronyError(f"embedding {size}: the right factor's columns are a divisor of the width {width}, at least 2")
    return name, KronShape(vocabulary, width // size, 1, size)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head shares its weight with the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie(model: PreTrainedModel) -> None:
    """Records that the head has its own matrix, so that saving and loading no longer tie it to the embedding."""
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def is_linear(module: nn.Module | None) -> bool:
    """Whether krony can replace it: ``nn.Linear`` itself (a subclass may compute something else) or ``Conv1D``."""
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def linear_size(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of an ``nn.Linear`` or a ``Conv1D``."""
    first, second = tuple(module.weight.shape)  # type: ignore[arg-type]
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _site(name: str, module: nn.Module, role: Role) -> Site:
    return Site(name, role, *linear_size(module))


def _mlps(model: nn.Module) -> list[Group]:
    return [mlp for name, module in model.named_modules() if (mlp := _mlp(name, module))]


def _mlp(name: str, module: nn.Module) -> Group | None:
    """The MLP whose matrices are children of ``module``; None if there is none."""
    children = dict(module.named_children())
    for ups, down in MLP_NAMES:
        if all(is_linear(children.get(child)) for child in (*ups, down)):
            prefix = f"{name}." if name else ""
            sites = [_site(prefix + up, children[up], "up") for up in ups]
            return Group((*sites, _site(prefix + down, children[down], "down")))
    return None


def _matching(model: nn.Module, pattern: str) -> list[Group]:
    """Groups of the linear layers whose names match; an MLP whose matrices all match stays one group."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise KronyError(f"modules {pattern!r} is not a regular expression: {error}") from None
    names = linear_names(model)
    chosen = {n for n in names if expression.search(n)}
    if not chosen:
        raise KronyError(f"modules {pattern!r} matches no linear layer; there are, for example, {_examples(names)}")
    return groups_of(model, chosen)


def _refuse_tied(model: nn.Module, chosen: list[str]) -> None:
    """Raises KronyError if one of these layers shares its weight with another module."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name in chosen:
        shared = names[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise KronyError(f"{name} shares its weight ({' = '.join(shared)}), so it can't be replaced on its own")


def _examples(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:4]) or "none at all"


def _no_mlp(model: nn.Module) -> str:
    """Why no MLP was found in this model, and what to do instead: the text of an error."""
    if layers := kronecker_layers(model):
        return f"this model is compressed already ({len(layers)} layers): compress the original instead"
    names = linear_names(model)
    for name, module in model.named_modules():
        if stacked := [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3]:
            return (
                f"{name} holds the matrices of all its experts in one tensor ({stacked[0]}), and krony replaces linear "
                f"layers: choose others with modules=REGEX, for example {_examples(names)}"
            )
        if is_linear(module) and name.endswith(FUSED):
            return (
                f"{name} holds the gate and the up matrix in one, so krony can't tell the hidden neurons apart: choose "
                "single matrices with modules='gate_up_proj|down_proj', and init van-loan, als or prune"
            )
    if adapted := next((name for name, _ in model.named_modules() if name.endswith(WRAPPED)), None):
        return (
            f"this model carries adapters, such as that of {adapted.removesuffix(WRAPPED)}: merge them into it first "
            "(peft's merge_and_unload)"
        )
    return (
        f"no MLP is known in {type(model).__name__}: choose linear layers with modules=REGEX; "
        f"there are, for example, {_examples(names)}"
    )
