"""KroneckerLinear: a linear layer whose weight is a sum of Kronecker products that is never multiplied out.

The product ``(Σ_f s_f A_f ⊗ B_f) x`` is, with x read as an ``(n1, n2)`` matrix X, ``Σ_f s_f A_f X B_fᵀ``. Either factor
may come first; which one is cheaper depends on the shapes, and where neither beats the dense matrix the layer forms it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krony.kron import KronShape, dense

Path = Literal["left", "right", "dense"]


def multiply_adds(shape: KronShape) -> dict[Path, int]:
    """Multiply-adds a token of each forward path: left factor first, right factor first, and the dense matrix."""
    s, k = shape, shape.factors
    return {
        "left": k * s.m1 * s.n1 * s.n2 + k * s.m1 * s.m2 * s.n2,
        "right": k * s.n1 * s.m2 * s.n2 + k * s.m1 * s.n1 * s.m2,
        "dense": s.rows * s.columns,
    }


def cheapest_path(shape: KronShape) -> Path:
    """The path of fewest multiply-adds; of equals the first in ``multiply_adds``."""
    costs = multiply_adds(shape)
    return min(costs, key=lambda path: costs[path])


class KroneckerLinear(nn.Module):
    """``y = x Wᵀ + bias`` with ``W = Σ_f scalars[f] · weight[f] ⊗ right[f]``, ``W: (out, in)``.

    Parameters of the module:
        weight: the left factors, ``(k, m1, n1)``. The name is that of a dense layer's matrix on purpose: whoever loads
            the checkpoint without krony is stopped by the shape instead of getting random weights.
        right: the right factors, ``(k, m2, n2)``.
        scalars: ``(k,)``, or None.
        bias: ``(m1*m2,)``, or None.

    ``path`` forces one of the forward paths; None lets the shapes decide.
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
        self.path: Path | None = None
        self._made: tuple[tuple, Tensor] | None = None

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
        """The matrix that the factors stand for, ``(out, in)``, computed in ``dtype`` or the factors' own."""
        dtype = dtype or self.weight.dtype
        scalars = None if self.scalars is None else self.scalars.to(dtype)
        return dense(self.weight.to(dtype), self.right.to(dtype), scalars)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        path = self.path or cheapest_path(self.shape)
        if path == "dense":
            return F.linear(x, self._kept(self.dense_weight), self.bias)
        right = self.right if self.scalars is None else self.right * self.scalars[:, None, None]
        if path == "left" and self.shape.n2 == 1:
            y = self._left_then_mix(x, right)
        elif path == "right" and self.shape.m2 == 1:
            return self._mix_then_left(x, right)
        else:
            y = (_left_first if path == "left" else _right_first)(x, self.weight, right)
        return y if self.bias is None else y + self.bias

    def _left_then_mix(self, x: Tensor, right: Tensor) -> Tensor:
        """Right factors are columns, as in matrices to the hidden width: two plain products, nothing turned around."""
        s, k = self.shape, self.shape.factors
        stacked = self.weight[0] if k == 1 else self._kept(lambda: self.weight.transpose(0, 1).reshape(s.m1 * k, s.n1))
        u = F.linear(x, stacked).reshape(-1, k)  # (t*m1, k)
        return (u @ right.view(k, s.m2)).view(*x.shape[:-1], s.rows)

    def _mix_then_left(self, x: Tensor, right: Tensor) -> Tensor:
        """Right factors are rows, as in matrices back from the hidden width: the input shrinks first."""
        s, k = self.shape, self.shape.factors
        stacked = self.weight[0] if k == 1 else self._kept(lambda: self.weight.permute(1, 2, 0).reshape(s.m1, s.n1 * k))
        z = x.reshape(-1, s.n2) @ right.view(k, s.n2).T  # (t*n1, k)
        return F.linear(z.view(*x.shape[:-1], s.n1 * k), stacked, self.bias)

    def _kept(self, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made once for as long as the factors stay the same; anew where gradients are wanted."""
        parameters = list(self.parameters())
        changing = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if changing or any(p.is_inference() for p in parameters):
            return make()
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in parameters)
        if self._made is None or self._made[0] != state:
            self._made = state, make()
        return self._made[1]

    def train(self, mode: bool = True) -> KroneckerLinear:
        self._made = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_made": None}  # a copy makes its own

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"in={s.columns}, out={s.rows}, left={s.m1}x{s.n1}, right={s.m2}x{s.n2}, factors={s.factors}, "
            f"scalars={self.scalars is not None}, bias={self.bias is not None}"
        )


def _left_first(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """All left factors in one product, then a small mix by the right ones."""
    (k, m1, n1), (_, m2, n2) = left.shape, right.shape
    columns = x.reshape(-1, n1, n2).transpose(1, 2)  # (t, n2, n1)
    u = columns @ left.reshape(k * m1, n1).T  # (t, n2, k*m1)
    u = u.view(-1, n2 * k, m1).transpose(1, 2)  # (t, m1, n2*k)
    mix = right.permute(2, 0, 1).reshape(n2 * k, m2)
    return (u @ mix).reshape(*x.shape[:-1], m1 * m2)


def _right_first(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A small mix of the input by the right factors, then all left factors in one product."""
    (k, m1, n1), (_, m2, n2) = left.shape, right.shape
    mix = right.permute(2, 1, 0).reshape(n2, m2 * k)
    z = x.reshape(-1, n1, n2) @ mix  # (t, n1, m2*k)
    z = z.view(-1, n1, m2, k).permute(0, 2, 3, 1).reshape(-1, m2, k * n1)  # (t, m2, k*n1)
    y = z @ left.permute(0, 2, 1).reshape(k * n1, m1)  # (t, m2, m1)
    return y.transpose(1, 2).reshape(*x.shape[:-1], m1 * m2)
