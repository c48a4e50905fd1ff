"""An MLP of Kronecker layers computed by one function: up, activation, down.

The order of the hidden features inside an MLP is free as long as both sides use the same one. So between two Kronecker
layers the hidden features stay *grouped*, ``(tokens, r, width)``, as the products leave them: nothing is transposed.
Where the right factors are columns on the way up and rows on the way down (``r×1`` and ``1×r``), hidden neuron ``p`` of
every group is ``act(Σ_f b[p, f] u_f + bias_p)``, and the rest of the MLP only needs ``z_f = Σ_p c[f, p] act(…)``: the
neurons of a group can be computed one after the other, and the hidden features never need to be in memory together.
Neurons whose weights in ``c`` are zero are not computed. Neurons whose weights in ``b`` are zero are constants, which
become part of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krony.kronecker.derived import derived, is_capturing, is_reusing
from krony.kronecker.linear import KroneckerLinear, batched

LOOP = 8  # at most this many neurons of a group are computed one after the other
SMALL = 2**16  # at most this many hidden features are computed together: fewer calls
TANH_GELU = ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh")


def fused_forward(x: Tensor, ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear) -> Tensor:
    """``down(act(ups[0](x)) * ups[1](x))``, or ``down(act(ups[0](x)))`` of one up layer: ``(..., in) -> (..., out)``.

    The hidden features have the same groups on both sides: ``(m1, m2)`` of every up layer is ``(n1, n2)`` of ``down``.
    """
    s, tokens = down.shape, x.numel() // ups[0].shape.columns
    call = tokens, x.device, is_reusing()
    paths, path = [up.path_for(*call) for up in ups], down.path_for(*call)
    columns = s.m2 == 1 and all(up.shape.n2 == 1 for up in ups)
    dense = path == "dense" or "dense" in paths
    pattern = None
    if columns and dense and not any(layer.path for layer in (*ups, down)):
        pattern = _pattern(ups, down)
        structured = pattern is not None and pattern.diagonal  # a selection of neurons is a smaller dense MLP
        dense = not structured
    else:
        structured = columns and path == "right" and all(each == "left" for each in paths)
    if structured:
        return _columns_and_rows(x, ups, act, down, pattern).view(*x.shape[:-1], s.rows)
    if dense:
        return down(_activate(act, [up(x) for up in ups]))
    hidden = _activate(act, [_expand(x, up, p) for up, p in zip(ups, paths, strict=True)])  # (t, r, width)
    if path == "left":
        y = down.combine_outputs(down.left_products(hidden), plain=True)  # (t, m1, m2)
    else:
        y = down.sum_left_products(down.combine_inputs(hidden)).transpose(1, 2)
    y = y.reshape(*x.shape[:-1], s.rows)
    return y if down.bias is None else y + down.bias.to(y.dtype)


def _expand(x: Tensor, up: KroneckerLinear, path: str) -> Tensor:
    """The up layer with grouped outputs and its bias: ``(..., in) -> (t, m2, m1)``."""
    s = up.shape
    plain = x.reshape(-1, s.n1, s.n2)
    left = path == "left"
    h = (
        up.combine_outputs(up.left_products(plain.transpose(1, 2)))
        if left
        else up.sum_left_products(up.combine_inputs(plain, plain=True))
    )
    bias = up.derived("bias", lambda: grouped_bias(up))
    return h if bias is None else h.add_(bias)


def grouped_bias(up: KroneckerLinear) -> Tensor | None:
    """The bias of a layer in the order of its grouped outputs, ``(m2, m1)``; None for a layer without bias."""
    return None if up.bias is None else up.bias.view(up.shape.m1, up.shape.m2).T.contiguous()


def _activate(act: nn.Module, hidden: list[Tensor]) -> Tensor:
    """``act(hidden[0]) * hidden[1]``; overwrites ``hidden`` where no gradient needs it."""
    overwrite = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if type(act).__name__ not in TANH_GELU:
        a = act(hidden[0])
    elif overwrite:
        a = F.gelu(hidden[0], approximate="tanh", out=hidden[0])  # type: ignore[call-arg]  # mypy knows no out
    else:
        a = F.gelu(hidden[0], approximate="tanh")  # transformers' own makes eight passes over memory
    if len(hidden) == 1:
        return a
    return a.mul_(hidden[1]) if overwrite else a * hidden[1]


@dataclass(frozen=True, kw_only=True)
class _Combination:
    """How right factors that are columns and rows combine the left products into neurons, and neurons into inputs.

    A group has r neurons, of which a are computed.

    Attributes:
        lefts: the left factors of each up layer, one below the other, ``(k * width, in)``.
        b: one matrix ``(a, k)`` for each up layer; None for the identity.
        biases: ``(a, width)`` for each up layer, or None.
        c: ``(k, a)``; None for the identity.
        diagonal: whether every ``b`` and ``c`` is a diagonal matrix; then they are stored as columns ``(a, 1)``.
        bias: the bias of the down layer plus the contribution of the constant neurons, ``(out,)``, or None.
        neurons: a.
    """

    lefts: list[Tensor]
    b: list[Tensor | None]
    biases: list[Tensor | None]
    c: Tensor | None
    diagonal: bool
    bias: Tensor | None
    neurons: int


def _columns_and_rows(
    x: Tensor, ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear, pattern: _Pattern | None
) -> Tensor:
    """``(..., in) -> (t, 1, out)`` for right factors ``r×1`` on the way up and ``1×r`` on the way down.

    ``pattern`` is None if it was not read yet.
    """
    parts = derived((*ups, down), "combination", lambda: _combination(ups, act, down, pattern or _pattern(ups, down)))
    rows, width = x.reshape(-1, x.shape[-1]), down.shape.n1
    us: list[Tensor] = []
    biases: list[Tensor | None] = []
    for left, b, bias in zip(parts.lefts, parts.b, parts.biases, strict=True):
        groups = -1, len(left) // width, width  # (t, k, width)
        if b is None and bias is not None:  # the matrix product adds the bias
            us.append(F.linear(rows, left, bias.flatten()).view(groups))
            biases.append(None)
        else:
            u = F.linear(rows, left).view(groups)
            us.append(u)
            biases.append(bias if bias is None or bias.dtype == u.dtype else bias.to(u.dtype))  # autocast leaves sums
    if parts.diagonal:
        z = _activate(act, [_scaled(*each) for each in zip(us, parts.b, biases, strict=True)])  # (t, k, width)
        z = z if parts.c is None else z * parts.c
    elif _loops(parts, len(rows), width):
        z = _one_by_one(us, parts, biases, act)
    else:
        triples = zip(us, parts.b, biases, strict=True)
        hidden = _activate(act, [_combined(u, b, bias) for u, b, bias in triples])  # type: ignore[arg-type]
        z = batched(parts.c, hidden)  # type: ignore[arg-type]  # (t, a, width) -> (t, k, width)
    return down.sum_left_products(z, parts.bias)


def _loops(parts: _Combination, tokens: int, width: int) -> bool:
    """Whether the neurons of a group are computed one after the other: few neurons, of one factor on both sides."""
    if parts.neurons > LOOP or len(parts.c) > 1 or any(len(left) > width for left in parts.lefts):  # type: ignore[arg-type]
        return False
    return torch.compiler.is_compiling() or tokens * parts.neurons * width > SMALL


def _scaled(u: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return u if bias is None else u + bias
    return u * scale if bias is None else torch.addcmul(bias, u, scale.to(u.dtype))


def _combined(u: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``(t, k, width) -> (t, a, width)``."""
    if b.shape[1] == 1:
        return _scaled(u, b, bias)
    h = batched(b, u)
    return h if bias is None else h.add_(bias)


def _one_by_one(us: list[Tensor], parts: _Combination, biases: list[Tensor | None], act: nn.Module) -> Tensor:
    """``z: (t, 1, width)`` of one factor, one neuron of every group after the other."""
    z: Tensor | None = None
    scales = [b.to(u.dtype).flatten().unbind() for b, u in zip(parts.b, us, strict=True)]  # type: ignore[union-attr]
    weights = parts.c.to(us[0].dtype).flatten().unbind()  # type: ignore[union-attr]
    for p in range(parts.neurons):
        rows = [None if bias is None else bias[p] for bias in biases]
        a = _activate(act, [_scaled(u, s[p], row) for u, s, row in zip(us, scales, rows, strict=True)])
        z = a * weights[p] if z is None else z.addcmul_(a, weights[p])
    assert z is not None
    return z


def _combination(
    ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear, pattern: _Pattern | None
) -> _Combination:
    """The combination without everything that zeros in the right factors make needless, where these are known."""
    lefts = [up.weight.flatten(0, 1) for up in ups]
    b = [up.coefficients()[:, :, 0].T for up in ups]  # (r, k)
    c = down.coefficients()[:, 0]  # (k, r)
    biases = [grouped_bias(up) for up in ups]
    bias: Tensor | None = down.bias
    if pattern is None:
        return _Combination(lefts=lefts, b=list(b), biases=biases, c=c, diagonal=False, bias=bias, neurons=c.shape[1])
    if pattern.constant:
        bias = _with_constants(pattern.constant, biases, c, act, down)
    neurons = len(pattern.computed)
    if neurons < c.shape[1]:
        index = torch.tensor(pattern.computed, device=c.device)
        b, c = [each[index] for each in b], c[:, index]
        biases = [None if each is None else each[index] for each in biases]
    if not pattern.diagonal:
        return _Combination(lefts=lefts, b=list(b), biases=biases, c=c, diagonal=False, bias=bias, neurons=neurons)
    columns = [None if one else m.diagonal()[:, None] for m, one in zip((*b, c), pattern.ones, strict=True)]
    return _Combination(
        lefts=lefts, b=columns[:-1], biases=biases, c=columns[-1], diagonal=True, bias=bias, neurons=neurons
    )


def _with_constants(
    constant: list[int], biases: list[Tensor | None], c: Tensor, act: nn.Module, down: KroneckerLinear
) -> Tensor | None:
    """The bias of the down layer plus the contribution of neurons whose value is constant: ``(out,)``."""
    if biases[0] is None and act(c.new_zeros(1)).item() == 0:
        return down.bias
    zero = c.new_zeros(len(constant), down.shape.n1)
    hidden = [zero.clone() if each is None else each[constant] for each in biases]  # (constants, width)
    z = c[:, constant] @ _activate(act, hidden)  # (k, width)
    return down.sum_left_products(z[None], down.bias).flatten()


@dataclass(frozen=True, kw_only=True)
class _Pattern:
    """Which neurons of a group are computed, and how simple their combination is.

    Attributes:
        computed: the neurons that are computed.
        constant: the neurons whose value does not depend on the input; without gradients, they aren't computed.
        diagonal: whether each computed neuron has a factor of its own, on the way up and down.
        ones: for every up layer and then the down layer, whether that diagonal is all ones.
    """

    computed: list[int]
    constant: list[int]
    diagonal: bool
    ones: list[bool]


def _pattern(ups: list[KroneckerLinear], down: KroneckerLinear) -> _Pattern | None:
    """Where the right factors are zero; None where they are trained or their values can't be read.

    Values can't be read on the meta device, in a compiled graph, while a CUDA graph is captured and of fake tensors.
    """
    layers, grad = (*ups, down), torch.is_grad_enabled()
    if torch.compiler.is_compiling() or is_capturing() or any(layer.right.is_meta for layer in layers):
        return None
    if grad and any(layer.right.requires_grad for layer in layers):
        return None
    return derived(layers, "pattern", lambda: _read_pattern(layers, grad))


def _read_pattern(layers: tuple[KroneckerLinear, ...], grad: bool) -> _Pattern | None:
    """``_pattern`` of the up layers and, last, the down layer."""
    try:
        rights, scalars = _read(layers)
    except RuntimeError:  # fake and functional tensors have no values
        return None
    b, c = [right[:, :, 0].T for right in rights[:-1]], rights[-1][:, 0]  # (r, k), (k, r)
    used = (c != 0).any(axis=0)
    constant = np.zeros_like(used) if grad else ~np.any([(each != 0).any(axis=1) for each in b], axis=0)
    computed = np.flatnonzero(used & ~constant)
    if not len(computed):
        return None
    k = len(c)
    chosen = [*(each[computed] for each in b), c[:, computed].T]  # (a, k)
    diagonal = all(m.shape == (k, k) and (m[~np.eye(k, dtype=bool)] == 0).all() for m in chosen)
    ones = [
        bool(diagonal and not (grad and layer.scalars is not None and layer.scalars.requires_grad))
        and bool((m.diagonal() * scale == 1).all())
        for m, scale, layer in zip(chosen, scalars, layers, strict=True)
    ]
    return _Pattern(
        computed=computed.tolist(), constant=np.flatnonzero(used & constant).tolist(), diagonal=diagonal, ones=ones
    )


def _read(layers: tuple[KroneckerLinear, ...]) -> tuple[list[np.ndarray], list[np.ndarray | float]]:
    """The values of the right factors, ``(k, m2, n2)``, and of the scalars, ``(k,)`` or 1, in one transfer."""
    tensors = [part for layer in layers for part in (layer.right, layer.scalars) if part is not None]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    parts = iter(np.split(flat.double().cpu().numpy(), np.cumsum([tensor.numel() for tensor in tensors])))
    rights: list[np.ndarray] = []
    scalars: list[np.ndarray | float] = []
    for layer in layers:
        rights.append(next(parts).reshape(layer.right.shape))
        scalars.append(1.0 if layer.scalars is None else next(parts))
    return rights, scalars
