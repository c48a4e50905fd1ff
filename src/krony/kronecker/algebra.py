"""Sums of Kronecker products: shapes, counts, and the nearest one to a matrix.

A factor pair is ``A ⊗ B`` with ``A: (m1, n1)`` and ``B: (m2, n2)``. A sum of k pairs is stored stacked,
``left: (k, m1, n1)`` and ``right: (k, m2, n2)``, and represents a matrix ``W: (m1*m2, n1*n2)`` with
``W[i*m2 + p, j*n2 + q] = Σ_f left[f, i, j] · right[f, p, q]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from krony.errors import KronyError

BATCH = 2**20  # numbers in the small Gram matrices that one batched product makes


@dataclass(frozen=True)  # positional, unlike other records: m1, n1, m2, n2, k is the order of every formula
class KronShape:
    """How an ``(m1*m2, n1*n2)`` matrix is split into ``factors`` products of ``(m1, n1)`` by ``(m2, n2)``.

    Examples:
        >>> shape = KronShape.split(3072, 768, 1536, 768)
        >>> shape.right, shape.parameters, shape.rank
        ((2, 1), 1179650, 768)
    """

    m1: int
    n1: int
    m2: int
    n2: int
    factors: int = 1

    @classmethod
    def split(cls, rows: int, columns: int, m1: int, n1: int, factors: int = 1) -> KronShape:
        """The split of a ``rows`` by ``columns`` matrix whose left factors are ``(m1, n1)``.

        Raises:
            KronyError: the left factors don't divide the matrix, or ``factors`` exceeds the rank of its rearrangement.

        Examples:
            >>> KronShape.split(3072, 768, 1024, 256, factors=2)
            KronShape(m1=1024, n1=256, m2=3, n2=3, factors=2)
        """
        if m1 < 1 or n1 < 1 or rows % m1 or columns % n1:
            raise KronyError(f"a left factor of {m1}x{n1} does not divide a matrix of {rows}x{columns}")
        shape = cls(m1, n1, rows // m1, columns // n1, factors)
        if not 1 <= factors <= shape.max_factors:
            raise KronyError(
                f"{factors} factors of {m1}x{n1} in a matrix of {rows}x{columns}: "
                f"it takes from 1 to {shape.max_factors}"
            )
        return shape

    @property
    def rows(self) -> int:
        return self.m1 * self.m2

    @property
    def columns(self) -> int:
        return self.n1 * self.n2

    @property
    def left(self) -> tuple[int, int]:
        return self.m1, self.n1

    @property
    def right(self) -> tuple[int, int]:
        return self.m2, self.n2

    @property
    def kept_rows(self) -> int:
        """How many rows of the matrix stay where the factors are a choice of them: m1 per factor."""
        return self.m1 * self.factors

    @property
    def max_factors(self) -> int:
        """The largest rank of the rearranged matrix: this many factors reproduce any matrix."""
        return min(self.m1 * self.n1, self.m2 * self.n2)

    @property
    def parameters(self) -> int:
        """The number of elements of all factors, without scalars."""
        return self.factors * (self.m1 * self.n1 + self.m2 * self.n2)

    @property
    def rank(self) -> int:
        """The largest rank the sum can have: rank(A ⊗ B) = rank(A) rank(B), and sums add (paper, section 3.2)."""
        one = min(self.left) * min(self.right)
        return min(self.factors * one, self.rows, self.columns)

    @property
    def transposed(self) -> KronShape:
        """The split of the transposed matrix: (A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ."""
        return KronShape(self.n1, self.m1, self.n2, self.m2, self.factors)

    def __str__(self) -> str:
        return f"{self.m1}x{self.n1}" + (f":{self.factors}" if self.factors > 1 else "")


def dense(left: Tensor, right: Tensor, scalars: Tensor | None = None) -> Tensor:
    """The matrix ``Σ_f scalars[f] · left[f] ⊗ right[f]``: ``(k, m1, n1), (k, m2, n2), (k,) -> (m1*m2, n1*n2)``.

    ``torch.kron`` is avoided: it takes a view that fails on size-1 dimensions with odd strides.

    Examples:
        >>> dense(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0], [10.0]]]))
        tensor([[ 1.,  2.],
                [10., 20.]])
    """
    (_, m1, n1), (_, m2, n2) = left.shape, right.shape
    if scalars is not None:
        left = left * scalars[:, None, None]
    return torch.einsum("fij,fpq->ipjq", left, right).reshape(m1 * m2, n1 * n2)


def rearrange(weight: Tensor, shape: KronShape) -> Tensor:
    """Van Loan's R(W), ``(m1*n1, m2*n2)``: row (i, j) is the block of W that ``A[i, j]`` multiplies."""
    blocks = weight.reshape(shape.m1, shape.m2, shape.n1, shape.n2)  # (i, p, j, q)
    return blocks.permute(0, 2, 1, 3).reshape(shape.m1 * shape.n1, shape.m2 * shape.n2)


def nearest(weight: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """The factors of the sum nearest to ``weight`` in Frobenius norm (Van Loan & Pitsianis 1993; paper, Algorithm 1).

    Exact: the truncated SVD of R(W) by an eigendecomposition of the Gram matrix of R's short side. Short runs of
    products are summed in ``weight``'s precision (at least float32), everything else in float64.

    Args:
        weight: ``(shape.rows, shape.columns)``.

    Returns:
        ``left: (k, m1, n1)`` and ``right: (k, m2, n2)`` in ``weight``'s dtype, strongest factor first. The square root
        of each singular value goes into both.

    Examples:
        >>> left, right = nearest(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), KronShape(1, 2, 2, 1))
        >>> torch.allclose(dense(left, right), torch.tensor([[1.0, 2.0], [10.0, 20.0]]))
        True
    """
    if weight.mT.is_contiguous() and not weight.is_contiguous():  # (A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ, read in the order of memory
        left, right = nearest(weight.mT, shape.transposed)
        return left.mT.contiguous(), right.mT.contiguous()
    blocks = weight.reshape(shape.m1, shape.m2, shape.n1, shape.n2)  # (i, p, j, q)
    tall = shape.m1 * shape.n1 >= shape.m2 * shape.n2
    permuted = blocks.permute((0, 1, 3, 2) if tall else (1, 0, 2, 3))  # the long side's dimensions first and last
    r = permuted.reshape(len(permuted), -1, permuted.shape[-1])  # (long 1, short, long 2)
    r = r.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
    side = r.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=weight.device)
    for part in r.split(max(1, BATCH // side**2)):
        gram += torch.bmm(part, part.mT).sum(0, dtype=torch.float64)
    _, vectors = torch.linalg.eigh(gram)  # ascending; (short, short)
    short = vectors[:, -shape.factors :].flip(1).T.contiguous()  # (k, short)
    long = torch.matmul(short.to(r.dtype), r).transpose(0, 1).flatten(1)  # (k, long), rows of norm sigma
    sigma = torch.linalg.vector_norm(
        long, dim=1, keepdim=True, dtype=torch.float64
    )  # (k, 1); steadier than the root of an eigenvalue near zero
    root = sigma.sqrt()
    safe = torch.where(root > 0, root, 1.0)  # a factor beyond R's rank is zero, not 0/0
    long = long * (1 / safe).to(r.dtype)
    u, v = (long, short * root) if tall else (short * root, long)
    return u.to(weight.dtype).view(-1, *shape.left), v.to(weight.dtype).view(-1, *shape.right)
