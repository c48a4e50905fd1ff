"""Makes a compressed model dense again: factors multiplied out, and every module of the class that it had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from krony.models.fusion import unfuse
from krony.models.split_attention import SplitAttention, joined
from krony.models.surgery import kronecker_embeddings, kronecker_layers, original, plain_layer, put_in

if TYPE_CHECKING:  # this module is imported while transformers is being imported
    from transformers import PreTrainedModel


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiplies the factors of every compressed layer out, in place, and returns the model.

    Each layer becomes one of the class that the uncompressed model has there, in the dtype and on the device of its
    factors. Q, K and V that were split become one matrix again.
    """
    dense = original(model)
    unfuse(model)
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitAttention)}
    for name, layer in kronecker_layers(model).items():
        parent = name.rpartition(".")[0]
        like = dense.get_submodule(parent if parent in split else name)
        bias = None if layer.bias is None else layer.bias.detach()
        plain = plain_layer(like, layer.dense_weight().detach(), bias)
        put_in(model, name, plain.train(layer.training))
    for name, module in split.items():
        put_in(model, name, joined(module, dense.get_submodule(name)))
    for name, embedding in kronecker_embeddings(model).items():
        weight = embedding.dense_weight().detach()
        put_in(model, name, nn.Embedding.from_pretrained(weight, freeze=False).train(embedding.training))
    return model
