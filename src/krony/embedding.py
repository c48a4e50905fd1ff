"""KroneckerEmbedding: an embedding whose matrix is a Kronecker product, as in KnGPT2 (Edalati et al. 2021).

``E ≈ A ⊗ B`` with ``A: (vocabulary, width/n)`` and a row ``B: (1, n)``: a token's vector is its row of A, each entry
of which stands for n neighbours. The head keeps the whole matrix, so that a tied one becomes a matrix of its own: what
the embedding saves the head costs again (the paper's Appendix B).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from krony.errors import KronyError
from krony.kron import KronShape, dense, nearest

if TYPE_CHECKING:  # this module is imported while transformers is being imported
    from transformers import PreTrainedModel


class KroneckerEmbedding(nn.Module):
    """``(...,)`` token ids -> ``(..., width)``.

    Parameters of the module:
        weight: the left factor, ``(vocabulary, width/n)``; the name stops loading without krony, as in KroneckerLinear.
        right: the right factor, ``(1, n)``.
    """

    def __init__(
        self, shape: KronShape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.left, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(shape.right, device=device, dtype=dtype))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the factors stand for, ``(vocabulary, width)``, in ``dtype`` or the factors' own."""
        dtype = dtype or self.weight.dtype
        return dense(self.weight.to(dtype)[None], self.right.to(dtype)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """``(...,) -> (..., width)``."""
        short = nn.functional.embedding(ids, self.weight)  # (..., width/n)
        return (short[..., None] * self.right[0]).flatten(-2)

    def extra_repr(self) -> str:
        s = self.shape
        return f"vocabulary={s.rows}, width={s.columns}, left={s.m1}x{s.n1}, right={s.m2}x{s.n2}"


def embedding_of(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """The name and module of the input embedding. Raises KronyError where it is no plain one."""
    module = model.get_input_embeddings()
    if type(module) is not nn.Embedding:
        raise KronyError(f"the input embedding of this model is a {type(module).__name__}: it can't be factorised")
    return next(name for name, m in model.named_modules() if m is module), module


def embedding_shape(model: PreTrainedModel, size: int) -> tuple[str, KronShape]:
    """The name of the embedding, and its split with a right factor of ``1 x size``. Raises KronyError."""
    name, module = embedding_of(model)
    vocabulary, width = module.weight.shape
    if size < 2 or width % size:
        raise KronyError(f"embedding {size}: its right factor takes from 2 columns, and a divisor of the width {width}")
    return name, KronShape(vocabulary, width // size, 1, size)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def factorised(embedding: nn.Embedding, shape: KronShape) -> KroneckerEmbedding:
    """The nearest product to an embedding in Frobenius norm, in its dtype and on its device."""
    weight = embedding.weight.detach()
    new = KroneckerEmbedding(shape, device=weight.device, dtype=weight.dtype)
    left, right = nearest(weight.double(), shape)
    with torch.no_grad():
        new.weight.copy_(left[0])
        new.right.copy_(right[0])
    return new


def untie(model: PreTrainedModel) -> None:
    """Lets the head keep a matrix of its own from now on, in memory and when it is saved and loaded."""
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
