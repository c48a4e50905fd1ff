"""Attention matrices that hold Q, K and V in one, split into three layers, so that each can be replaced by itself.

GPT-2's ``c_attn`` is one matrix of which the attention takes three parts. Nothing relates the rows of these parts to
each other, so a sum of Kronecker products fits them better one by one. ``SplitAttention`` stands in the matrix's place
and returns the same outputs. Only matrices whose rows are Q, then K, then V are split: those of ``MATRICES``. In others
the three parts of each head stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krony.errors import KronyError
from krony.models.surgery import is_linear, linear_size, plain_layer, put_in, take_out

PARTS = ("q", "k", "v")


def _thirds(attention: Any, rows: int) -> tuple[int, ...]:
    return (rows // 3,) * 3


def _self_attention(attention: Any, rows: int) -> tuple[int, ...]:
    return () if attention.is_cross_attention else _thirds(attention, rows)  # cross-attention has K and V alone


def _by_heads(attention: Any, rows: int) -> tuple[int, ...]:
    shared = attention.num_key_value_heads * attention.head_dim
    return (rows - 2 * shared, shared, shared)


# class of the attention in transformers -> its matrix, and the rows of Q, K and V in it
MATRICES: dict[str, tuple[str, Callable[[Any, int], tuple[int, ...]]]] = {
    "GPT2Attention": ("c_attn", _self_attention),
    "MptAttention": ("Wqkv", _thirds),
    "Phi3Attention": ("qkv_proj", _by_heads),
}


class SplitAttention(nn.Module):
    """Three linear layers ``q``, ``k`` and ``v`` that read the same input, their outputs side by side.

    The input is ``(..., in)``, the output ``(..., q + k + v)`` in the dtype of the layers.

    Examples:
        >>> SplitAttention(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(self, q: nn.Module, k: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)  # (..., q + k + v)


def fused_attention(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The attention matrices of ``model`` that hold Q, K and V: dotted name -> rows of each."""
    found = {}
    for name, module in model.named_modules():
        child, rows_of = MATRICES.get(type(module).__name__, ("", _thirds))
        matrix = getattr(module, child, None)
        if matrix is not None and is_linear(matrix) and (rows := rows_of(module, linear_size(matrix)[0])):
            found[f"{name}.{child}"] = rows
    return found


def split_attention(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Splits these matrices of ``model`` in place, and returns them by name.

    The three layers share the storage of the matrix until ``plain_layer`` or an initialisation gives them their own.
    Raises KronyError for a name that ``fused_attention`` doesn't have.
    """
    fused, before = fused_attention(model), {}
    for name in names:
        if name not in fused:
            raise KronyError(f"{name} of {type(model).__name__} does not hold Q, then K, then V: it can't be split")
        matrix = before[name] = model.get_submodule(name)
        weight, bias = take_out(model, name)
        weights = weight.split(fused[name])  # views (rows, in)
        biases = [None] * 3 if bias is None else bias.split(fused[name])
        parts = [_view(matrix, rows, own) for rows, own in zip(weights, biases, strict=True)]
        put_in(model, name, SplitAttention(*parts).train(matrix.training))
    return before


@contextmanager
def splitting(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Splits these matrices for the block. Those of which it has replaced no part are whole again afterwards."""
    before = split_attention(model, names)
    try:
        yield
    finally:
        for name, matrix in before.items():
            parts = dict(model.get_submodule(name).named_children())
            if all(is_linear(part) for part in parts.values()):
                put_in(model, name, matrix)
                continue
            for child, part in parts.items():
                if is_linear(part):  # a copy, so that the rest of the matrix can be freed
                    put_in(model, f"{name}.{child}", plain_layer(part, *take_out(model, f"{name}.{child}")))


def wholes_of(model: nn.Module, names: Collection[str]) -> list[str]:
    """The matrices of ``model`` that hold Q, K and V, and of which these names mean parts; each once."""
    around = {name.rpartition(".")[0] for name in names}
    return [name for name in fused_attention(model) if name in around]


def joined(split: SplitAttention, like: nn.Module) -> nn.Module:
    """One matrix of the class of ``like`` from three layers that are plain."""
    parts = [take_out(split, part) for part in PARTS]
    weight = torch.cat([weight for weight, _ in parts])  # (q + k + v, in)
    biases = [bias for _, bias in parts if bias is not None]
    return plain_layer(like, weight, torch.cat(biases) if biases else None).train(split.training)


def _view(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the class of ``like`` on a part of its storage: ``weight: (rows, in)``, ``bias: (rows,)`` or None."""
    rows, into = weight.shape
    is_turned = isinstance(like, Conv1D)
    with torch.device("meta"):
        part = Conv1D(rows, into) if is_turned else nn.Linear(into, rows, bias=bias is not None)
    needed = like.weight.requires_grad
    part.weight = nn.Parameter(weight.T if is_turned else weight, requires_grad=bool(needed))
    part.bias = None if bias is None else nn.Parameter(bias, requires_grad=bool(needed))
    return part.train(like.training)
