"""The quantizer that krony registers with transformers, so that ``from_pretrained`` builds Kronecker layers.

A compressed model is an ordinary transformers model whose config carries ``quantization_config`` with
``quant_method: krony`` and a map of module names to shapes. The same code serves every architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from krony._version import __version__
from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.embedding import KroneckerEmbedding
from krony.kronecker.linear import KroneckerLinear
from krony.models.dense import to_dense
from krony.models.fusion import fuse
from krony.models.split_attention import fused_attention, split_attention
from krony.models.surgery import is_linear, kronecker_embeddings, kronecker_layers, linear_size, put_in

if TYPE_CHECKING:  # this module is imported while transformers is being imported
    from transformers import PretrainedConfig, PreTrainedModel

METHOD = "krony"


@register_quantization_config(METHOD)
class KronyQuantizationConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a saved model's ``config.json``: which layers are Kronecker layers.

    Attributes:
        modules: module name -> ``{"left": [m1, n1], "right": [m2, n2], "factors": k, "scalars": bool}``.
        made_with: the options of the compression, for the record; loading ignores them.
    """

    def __init__(
        self, modules: dict[str, dict[str, Any]] | None = None, made_with: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.modules: Any = modules  # as a file says, so ``shape`` checks it
        self.made_with = made_with or {}

    def shape(self, name: str) -> tuple[KronShape, bool]:
        """The split of the module of this name, and whether it has scalars. Raises KronyError for a malformed entry.

        Examples:
            >>> entry = {"left": [4, 2], "right": [2, 1], "factors": 1, "scalars": False}
            >>> KronyQuantizationConfig({"h.0.mlp.c_fc": entry}).shape("h.0.mlp.c_fc")
            (KronShape(m1=4, n1=2, m2=2, n2=1, factors=1), False)
        """
        try:
            entry = self.modules[name]
            numbers = [*entry["left"], *entry["right"], entry["factors"]]
            if len(numbers) != 5 or not all(type(n) is int and n > 0 for n in numbers):
                raise ValueError
            return KronShape(*numbers), bool(entry["scalars"])
        except (KeyError, TypeError, ValueError):
            raise KronyError(
                f"config.json: quantization_config.modules[{name!r}] is malformed: "
                "it has left: [m1, n1], right: [m2, n2], factors: k, scalars: true or false"
            ) from None


@register_quantizer(METHOD)
class KronyQuantizer(HfQuantizer):
    """Puts empty Kronecker layers into a model before its weights are loaded; ``dequantize`` makes them dense again."""

    requires_calibration = True  # from_pretrained can't compress; krony.compress does
    is_trainable = True
    is_qat_trainable = True  # otherwise Trainer treats the model as frozen and quantised
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        put_layers_in(model, self.quantization_config)
        fuse(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        model.is_quantized = False  # .half(), .float() and training work as for a dense model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Makes the model dense, in place, in its present dtype or in ``dtype``, and returns it.

        transformers' own method would cast to the dtype that the config names.
        """
        model = self._dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return to_dense(model) if dtype is None else to_dense(model).to(dtype)


def put_layers_in(model: PreTrainedModel, config: KronyQuantizationConfig | dict[str, Any]) -> None:
    """Puts empty Kronecker layers where a saved config names them; does nothing for another method's config.

    Raises KronyError for a config that is malformed or does not fit the model.
    """
    if isinstance(config, dict):
        if config.get("quant_method") != METHOD:
            return
        config = KronyQuantizationConfig(**config)
    if not isinstance(config, KronyQuantizationConfig):
        return
    if not isinstance(config.modules, dict):
        raise KronyError("config.json: quantization_config.modules is not a map of module names to shapes")
    found = {}
    if fused := fused_attention(model):
        around = {_own_name(model, name.rpartition(".")[0]) for name in config.modules}
        split_attention(model, [name for name in fused if name in around])
    for name in config.modules:
        own = _own_name(model, name)
        if own is None:  # the head, in a model that is only the body
            continue
        shape, scalars = config.shape(name)
        put_in(model, own, _empty_layer(model, own, shape, scalars))
        found[own] = config.modules[name]
    config.modules = found


def _own_name(model: PreTrainedModel, name: str) -> str | None:
    """The name of a layer in ``model``: ``AutoModel`` builds only the body, whose names lack the prefix.

    Returns None for a layer outside the body if ``model`` is the body.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    if name in modules:
        return name
    if model.base_model is model:
        return name.removeprefix(prefix) if name.startswith(prefix) else None
    return prefix + name if prefix + name in modules else name


def _empty_layer(
    model: PreTrainedModel, name: str, shape: KronShape, scalars: bool
) -> KroneckerLinear | KroneckerEmbedding:
    """A layer without values in place of the one called ``name``. Raises KronyError if the shapes don't fit."""
    original = dict(model.named_modules()).get(name)
    if type(original) is nn.Embedding and shape.left[0] == original.num_embeddings:
        return _empty_embedding(original, name, shape)
    if original is None or not is_linear(original):
        raise KronyError(f"config.json: {name} is no linear layer of {type(model).__name__}")
    out, into = linear_size(original)
    if (shape.rows, shape.columns) != (out, into):
        raise KronyError(f"config.json: {name} is {out}x{into}, its factors make {shape.rows}x{shape.columns}")
    weight = original.weight
    return KroneckerLinear(
        shape, bias=original.bias is not None, scalars=scalars, device=weight.device, dtype=weight.dtype
    )


def _empty_embedding(original: nn.Embedding, name: str, shape: KronShape) -> KroneckerEmbedding:
    size, weight = tuple(original.weight.shape), original.weight
    if (shape.rows, shape.columns) != size or shape.factors != 1:
        raise KronyError(f"config.json: {name} is {size[0]}x{size[1]}, its factors make {shape.rows}x{shape.columns}")
    return KroneckerEmbedding(shape, device=weight.device, dtype=weight.dtype)


def recorded_options(config: PretrainedConfig) -> dict[str, Any]:
    """The options of the compression that a config records; empty for a plain model."""
    known = getattr(config, "quantization_config", None)
    if isinstance(known, dict):
        return known.get("made_with") or {}
    return getattr(known, "made_with", None) or {}


def compressions(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The recorded options of every compression of a model, the first one first; empty for a plain model."""
    found: list[dict[str, Any]] = []
    record: Any = recorded_options(config)
    while isinstance(record, dict) and record:
        found.insert(0, record)
        record = record.get("earlier")
    return found


def attach_quantizer(model: PreTrainedModel, made_with: dict[str, Any]) -> None:
    """Attaches the config and quantizer that ``save_pretrained`` needs to a compressed model, and fuses its MLPs.

    ``made_with`` holds the options of the compression, for the record. If the model was compressed before, its earlier
    options are kept under ``earlier``.
    """
    fuse(model)
    modules = {
        name: {
            "left": list(layer.shape.left),
            "right": list(layer.shape.right),
            "factors": layer.shape.factors,
            "scalars": layer.scalars is not None,
        }
        for name, layer in kronecker_layers(model).items()
    }
    for name, embedding in kronecker_embeddings(model).items():
        s = embedding.shape
        modules[name] = {"left": list(s.left), "right": list(s.right), "factors": 1, "scalars": False}
    made_with = {"krony": __version__} | made_with
    earlier = getattr(model.config, "quantization_config", None)
    if isinstance(earlier, KronyQuantizationConfig):  # other layers were compressed earlier
        made_with["earlier"] = earlier.made_with
    model.config.quantization_config = KronyQuantizationConfig(modules, made_with)
    quantizer = KronyQuantizer(model.config.quantization_config, pre_quantized=True)
    model.hf_quantizer = quantizer
