"""KroneckerLinear: a linear layer whose weight is a sum of Kronecker products.

The product ``(Σ_f s_f A_f ⊗ B_f) x`` is, with x read as an ``(n1, n2)`` matrix X, ``Σ_f s_f A_f X B_fᵀ``. Either factor
may come first; which order is cheaper depends on the shapes. Where neither order beats the dense matrix, the layer
makes that matrix (``krony.kronecker.forward_path``).

Both orders work on *grouped* features, ``(tokens, n2, n1)`` in and ``(tokens, m2, m1)`` out: the numbers that the left
factors multiply are contiguous, so that all left factors are one large matrix product. Ordinary features are
``(tokens, n1, n2)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krony.kronecker.algebra import KronShape, dense
from krony.kronecker.derived import derived, is_reusing
from krony.kronecker.forward_path import ForwardPath, dense_from, structured_path

CHAIN = 4  # at most this many left factors are multiplied one after the other, which needs no second copy of them

Value = TypeVar("Value")


class KroneckerLinear(nn.Module):
    """``y = x Wᵀ + bias`` with ``W = Σ_f scalars[f] · weight[f] ⊗ right[f]``, ``W: (out, in)``.

    A new layer's parameters are uninitialised: ``krony.compress`` or a checkpoint fills them.

    Parameters of the module:
        weight: the left factors, ``(k, m1, n1)``. It has the name of a dense layer's matrix on purpose: loading the
            checkpoint without krony then stops at the shape instead of leaving random weights.
        right: the right factors, ``(k, m2, n2)``.
        scalars: ``(k,)``, or None.
        bias: ``(m1*m2,)``, or None.

    Attributes:
        path: forces one of the forward paths; None leaves the choice to ``krony.kronecker.forward_path``.

    Every call reads the parameters as they are, however they were changed. In eval mode without gradients, the tokens
    that continue one key-value cache share the tensors derived from them (``krony.kronecker.derived``).

    Examples:
        >>> layer = KroneckerLinear(KronShape(m1=4, n1=3, m2=2, n2=1))
        >>> layer.dense_weight().shape, layer(torch.zeros(5, 3)).shape
        (torch.Size([8, 3]), torch.Size([5, 8]))
        >>> sum(parameter.numel() for parameter in layer.parameters())  # 4*3 + 2*1 and 8 of the bias
        22
    """

    def __init__(
        self,
        shape: KronShape,
        *,
        bias: bool = True,
        scalars: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.path: ForwardPath | None = None
        self._structured = structured_path(shape)
        self._dense_from = {
            (on_cpu, cached): dense_from(shape, cached=cached, device="cpu" if on_cpu else "other")
            for on_cpu in (True, False)
            for cached in (True, False)
        }

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.weight = parameter(shape.factors, *shape.left)
        self.right = parameter(shape.factors, *shape.right)
        self.scalars = parameter(shape.factors) if scalars else None
        self.bias = parameter(shape.rows) if bias else None

    @property
    def in_features(self) -> int:
        return self.shape.columns

    @property
    def out_features(self) -> int:
        return self.shape.rows

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the factors represent, ``(out, in)``, computed in ``dtype`` or else in the factors' own."""
        dtype = dtype or self.weight.dtype
        scalars = None if self.scalars is None else self.scalars.to(dtype)
        return dense(self.weight.to(dtype), self.right.to(dtype), scalars)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        s = self.shape
        path = self.path_for(x.numel() // s.columns, x.device, is_reusing())
        if path == "dense":
            return F.linear(x, self.derived("dense", self.dense_weight), self.bias)
        plain = x.reshape(-1, s.n1, s.n2)
        if path == "left":
            y = self.combine_outputs(self.left_products(plain.transpose(1, 2)), plain=True)  # (t, m1, m2)
        elif s.m2 == 1:
            return self.sum_left_products(self.combine_inputs(plain, plain=True), self.bias).view(*x.shape[:-1], s.rows)
        else:
            y = self.sum_left_products(self.combine_inputs(plain, plain=True)).transpose(1, 2)  # (t, m1, m2)
        y = y.reshape(*x.shape[:-1], s.rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast leaves sums alone

    def path_for(self, tokens: int, device: torch.device, reusing: bool) -> ForwardPath:
        """The path that a call with this many tokens takes; ``reusing``: as ``is_reusing`` says."""
        if self.path is not None:
            return self.path
        start = self._dense_from[device.type == "cpu", reusing]
        if start is None:  # asked first, so that torch.compile doesn't specialise on the number of tokens
            return self._structured
        return "dense" if tokens >= start else self._structured

    def left_products(self, x: Tensor) -> Tensor:
        """Multiplies each group by each left factor: ``(t, n2, n1) -> (t, n2*k, m1)``."""
        s, k = self.shape, self.shape.factors
        u = F.linear(x.reshape(-1, s.n1), self.weight.view(k * s.m1, s.n1))  # (t*n2, k*m1)
        return u.view(-1, s.n2 * k, s.m1)

    def combine_outputs(self, u: Tensor, *, plain: bool = False) -> Tensor:
        """Combines ``left_products`` by the right factors: ``(t, n2*k, m1) -> (t, m2, m1)``; ``plain``: (t, m1, m2)."""
        matrix = self.derived("outputs", lambda: self.coefficients().permute(1, 2, 0).flatten(1))  # (m2, n2*k)
        if plain:
            return torch.matmul(u.transpose(1, 2), matrix.T)
        return u * matrix if matrix.shape[1] == 1 else batched(matrix, u)

    def combine_inputs(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """Combines inputs by the right factors: ``(t, n2, n1)``, ``(t, n1, n2)`` if ``plain``, to ``(t, m2*k, n1)``."""
        matrix = self.derived("inputs", lambda: self.coefficients().transpose(0, 1).flatten(0, 1))  # (m2*k, n2)
        return torch.matmul(x, matrix.T).transpose(1, 2) if plain else batched(matrix, x)

    def sum_left_products(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiplies each group by its left factor and sums over factors: ``(t, m2*k, n1) -> (t, m2, m1)``."""
        s, k = self.shape, self.shape.factors
        if k == 1:
            y = F.linear(z.reshape(-1, s.n1), self.weight.view(s.m1, s.n1), bias)
        elif k > CHAIN or torch.is_autocast_enabled(z.device.type):
            stacked = self.derived("stacked", lambda: self.weight.transpose(0, 1).reshape(s.m1, k * s.n1))
            y = F.linear(z.reshape(-1, k * s.n1), stacked, bias)  # (t*m2, m1)
        else:
            rows = z.reshape(-1, k, s.n1)  # (t*m2, k, n1)
            y = F.linear(rows[:, 0], self.weight[0], bias)
            for f in range(1, k):
                y.addmm_(rows[:, f], self.weight[f].T)
        return y.view(-1, s.m2, s.m1)

    def coefficients(self) -> Tensor:
        """The right factors multiplied by the scalars, ``(k, m2, n2)``."""
        return self.right if self.scalars is None else self.right * self.scalars[:, None, None]

    def derived(self, name: str, make: Callable[[], Value]) -> Value:
        """``krony.kronecker.derived.derived`` for a value that depends on this layer alone."""
        return derived((self,), name, make)

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"in={s.columns}, out={s.rows}, left={s.m1}x{s.n1}, right={s.m2}x{s.n2}, factors={s.factors}, "
            f"scalars={self.scalars is not None}, bias={self.bias is not None}"
        )


def batched(matrix: Tensor, x: Tensor) -> Tensor:
    """``(a, b), (t, b, n) -> (t, a, n)``; ``matmul`` would transpose x first."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)
