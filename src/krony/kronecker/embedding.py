"""KroneckerEmbedding: an embedding whose matrix is a Kronecker product, as in KnGPT2 (Edalati et al. 2021).

``E ≈ A ⊗ B`` with ``A: (vocabulary, width/n)`` and a row ``B: (1, n)``: a token's vector is its row of A, of which each
entry is multiplied by all of B. The head keeps the dense matrix. A head that was tied to the embedding becomes a matrix
of its own, so that such a model grows; only an untied one gets smaller (the paper's Appendix B).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from krony.kronecker.algebra import KronShape, dense, nearest


class KroneckerEmbedding(nn.Module):
    """The vectors of token ids: ``(...,) -> (..., width)``. A new module's parameters are uninitialised.

    Parameters of the module:
        weight: the left factor, ``(vocabulary, width/n)``; its name stops loading without krony, as in KroneckerLinear.
        right: the right factor, ``(1, n)``.

    Examples:
        >>> KroneckerEmbedding(KronShape(257, 24, 1, 2))(torch.tensor([3, 7])).shape
        torch.Size([2, 48])
    """

    def __init__(
        self, shape: KronShape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.left, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(shape.right, device=device, dtype=dtype))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the factors represent, ``(vocabulary, width)``, in ``dtype`` or else the factors' own."""
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
    """The product nearest to an embedding's matrix in Frobenius norm, in its dtype and on its device.

    Args:
        shape: one factor with a right factor of ``(1, n)``.
    """
    weight = embedding.weight.detach()
    new = KroneckerEmbedding(shape, device=weight.device, dtype=weight.dtype)
    left, right = nearest(weight.double(), shape)
    with torch.no_grad():
        new.weight.copy_(left[0])
        new.right.copy_(right[0])
    return new
