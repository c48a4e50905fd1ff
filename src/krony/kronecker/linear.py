"""KroneckerLinear: a linear layer whose weight is a sum of Kronecker products that is never multiplied out.

The product ``(Σ_f s_f A_f ⊗ B_f) x`` is, with x read as an ``(n1, n2)`` matrix X, ``Σ_f s_f A_f X B_fᵀ``. Either factor
may come first; which one is cheaper depends on the shapes, and where neither beats the dense matrix the layer makes it
(``krony.kronecker.forward_path``).

Both ways work on *grouped* features, ``(tokens, n2, n1)`` in and ``(tokens, m2, m1)`` out: what the left factors
multiply lies side by side, so that all left factors are one large product. Ordinary features are ``(tokens, n1, n2)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krony.kronecker.algebra import KronShape, dense
from krony.kronecker.forward_path import ForwardPath, dense_from, structured_path

CHAIN = 4  # up to so many left factors are multiplied one after the other, which needs no second copy of them


class KroneckerLinear(nn.Module):
    """``y = x Wᵀ + bias`` with ``W = Σ_f scalars[f] · weight[f] ⊗ right[f]``, ``W: (out, in)``.

    Parameters of the module:
        weight: the left factors, ``(k, m1, n1)``. The name is that of a dense layer's matrix on purpose: whoever loads
            the checkpoint without krony is stopped by the shape instead of getting random weights.
        right: the right factors, ``(k, m2, n2)``.
        scalars: ``(k,)``, or None.
        bias: ``(m1*m2,)``, or None.

    ``path`` forces one of the forward paths; None leaves it to ``krony.kronecker.forward_path``.

    In eval mode without gradients, what is made of the parameters is kept from call to call, and made anew when they
    change, be it in place or by an optimiser. What no tensor of torch's knows of, a change in place through ``.data``,
    is not seen: call ``eval()`` after it.
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
        self._made: dict[str, tuple[tuple, Any]] = {}
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
        """The matrix that the factors stand for, ``(out, in)``, computed in ``dtype`` or the factors' own."""
        dtype = dtype or self.weight.dtype
        scalars = None if self.scalars is None else self.scalars.to(dtype)
        return dense(self.weight.to(dtype), self.right.to(dtype), scalars)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        s = self.shape
        path = self.path_for(x.numel() // s.columns, x.device)
        if path == "dense":
            return F.linear(x, self.kept("dense", self.dense_weight), self.bias)
        plain = x.reshape(-1, s.n1, s.n2)
        if path == "left":
            y = self.combine_outputs(self.left_products(plain.transpose(1, 2)), plain=True)  # (t, m1, m2)
        elif s.m2 == 1:
            return self.sum_left_products(self.combine_inputs(plain, plain=True), self.bias).view(*x.shape[:-1], s.rows)
        else:
            y = self.sum_left_products(self.combine_inputs(plain, plain=True)).transpose(1, 2)  # (t, m1, m2)
        y = y.reshape(*x.shape[:-1], s.rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast leaves sums alone

    def path_for(self, tokens: int, device: torch.device) -> ForwardPath:
        """The path that so many tokens take."""
        if self.path is not None:
            return self.path
        start = self._dense_from[device.type == "cpu", not self.changing]
        if start is None:  # so that torch.compile need not know the number of tokens
            return self._structured
        return "dense" if tokens >= start else self._structured

    def left_products(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Each left factor times each group of the input, plus ``bias: (k*m1,)``: ``(t, n2, n1) -> (t, n2*k, m1)``."""
        s, k = self.shape, self.shape.factors
        u = F.linear(x.reshape(-1, s.n1), self.weight.view(k * s.m1, s.n1), bias)  # (t*n2, k*m1)
        return u.view(-1, s.n2 * k, s.m1)

    def combine_outputs(self, u: Tensor, *, plain: bool = False) -> Tensor:
        """What comes after ``left_products``: ``(t, n2*k, m1) -> (t, m2, m1)``, or ``(t, m1, m2)`` if ``plain``."""
        matrix = self.kept("after", lambda: self.coefficients().permute(1, 2, 0).flatten(1))  # (m2, n2*k)
        if plain:
            return torch.matmul(u.transpose(1, 2), matrix.T)
        return u * matrix if matrix.shape[1] == 1 else batched(matrix, u)

    def combine_inputs(self, x: Tensor, *, plain: bool = False) -> Tensor:
        """What ``sum_left_products`` takes: ``(t, n2, n1)``, or ``(t, n1, n2)`` if ``plain``, to ``(t, m2*k, n1)``."""
        matrix = self.kept("before", lambda: self.coefficients().transpose(0, 1).flatten(0, 1))  # (m2*k, n2)
        return torch.matmul(x, matrix.T).transpose(1, 2) if plain else batched(matrix, x)

    def sum_left_products(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """Every left factor times its group, and the sum of them: ``(t, m2*k, n1) -> (t, m2, m1)``."""
        s, k = self.shape, self.shape.factors
        if k > CHAIN or (k > 1 and torch.is_autocast_enabled(z.device.type)):
            stacked = self.kept("stacked", lambda: self.weight.transpose(0, 1).reshape(s.m1, k * s.n1))
            y = F.linear(z.reshape(-1, k * s.n1), stacked, bias)  # (t*m2, m1)
        else:
            rows = z.reshape(-1, k, s.n1)  # (t*m2, k, n1)
            y = F.linear(rows[:, 0], self.weight[0], bias)
            for f in range(1, k):
                y.addmm_(rows[:, f], self.weight[f].T)
        return y.view(-1, s.m2, s.m1)

    def coefficients(self) -> Tensor:
        """The right factors with the scalars in them, ``(k, m2, n2)``."""
        return self.right if self.scalars is None else self.right * self.scalars[:, None, None]

    @property
    def changing(self) -> bool:
        """Whether the factors are to be read anew in every call: training, gradients wanted, or a graph captured."""
        return self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()

    def state(self) -> tuple | None:
        """Tells one state of the parameters from another; None where that can't be told (inference tensors)."""
        weight, right, scalars, bias = self.weight, self.right, self.scalars, self.bias
        try:
            return (
                weight.data_ptr(), weight._version, right.data_ptr(), right._version,
                None if scalars is None else (scalars.data_ptr(), scalars._version),
                None if bias is None else (bias.data_ptr(), bias._version),
            )  # fmt: skip
        except RuntimeError:
            return None

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """``kept`` of this layer alone."""
        return kept((self,), what, make)

    def train(self, mode: bool = True) -> KroneckerLinear:
        self._made.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> KroneckerLinear:
        self._made.clear()  # other memory, perhaps at an old address
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_made": {}}  # a copy makes its own

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"in={s.columns}, out={s.rows}, left={s.m1}x{s.n1}, right={s.m2}x{s.n2}, factors={s.factors}, "
            f"scalars={self.scalars is not None}, bias={self.bias is not None}"
        )


def batched(matrix: Tensor, x: Tensor) -> Tensor:
    """``(a, b), (t, b, n) -> (t, a, n)``; ``matmul`` would turn x around first."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


def kept(layers: tuple[KroneckerLinear, ...], what: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made once for as long as the layers' parameters stay the same; anew where they are changing.

    The last of ``layers`` keeps it.
    """
    holder = layers[-1]
    if holder.changing:
        return make()
    states = tuple(layer.state() for layer in layers)
    if None in states:
        return make()
    made = holder._made.get(what)
    if made is None or made[0] != states:
        made = holder._made[what] = states, make()
    return made[1]
