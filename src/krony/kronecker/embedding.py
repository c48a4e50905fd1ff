"""KroneckerEmbedding: an embedding whose matrix is a Kronecker product, as in KnGPT2 (Edalati et al. 2021).

``E ≈ A ⊗ B`` with ``A: (vocabulary, width/n)`` and a row ``B: (1, n)``: a token's vector is its row of A, each entry
of which stands for n neighbours. The head keeps the whole matrix, so that a tied one becomes a matrix of its own: what
the embedding saves the head costs again (the paper's Appendix B).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from krony.kronecker.algebra import KronShape, dense, nearest

if TYPE_CHECKING:  # this module is imported while transformers is being imported
    pass


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


def factorised(embedding: nn.Embedding, shape: KronShape) -> KroneckerEmbedding:
    """The nearest product to an embedding in Frobenius norm, in its dtype and on its device."""
    weight = embedding.weight.detach()
    new = KroneckerEmbedding(shape, device=weight.device, dtype=weight.dtype)
    left, right = nearest(weight.double(), shape)
    with torch.no_grad():
        new.weight.copy_(left[0])
        new.right.copy_(right[0])
    return new
