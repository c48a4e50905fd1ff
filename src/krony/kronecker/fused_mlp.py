"""An MLP of Kronecker layers in one step: up, activation, down.

The order of the hidden features inside an MLP is free as long as both sides agree. So between two Kronecker layers the
hidden features stay *grouped*, ``(tokens, r, width)``, as the products leave them: nothing is turned around. Where the
right factors are columns on the way up and rows on the way down (``r×1`` and ``1×r``), hidden neuron ``p`` of every
group is ``act(Σ_f b[p, f] u_f + bias_p)``, and the rest of the MLP only needs ``z_f = Σ_p c[f, p] act(…)``: the neurons
of a group follow one another, and all the hidden features are never there at once. Neurons that ``c`` makes nothing
of are not computed, and those that ``b`` gives nothing are constants, which become part of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krony.kronecker.linear import KroneckerLinear, batched, kept

LOOP = 8  # up to so many neurons of a group are computed one after the other
SMALL = 2**16  # up to so many hidden features they are computed at once: fewer calls
TANH_GELU = ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh")


def fused_forward(x: Tensor, ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear) -> Tensor:
    """``down(act(ups[0](x)) * ups[1](x))``, without the second factor where there is one of ``ups``.

    ``x: (..., in)``; the hidden features are grouped alike on both sides: ``(m1, m2)`` of ups is ``(n1, n2)`` of down.
    """
    s, tokens = down.shape, x.numel() // ups[0].shape.columns
    paths, path = [up.path_for(tokens, x.device) for up in ups], down.path_for(tokens, x.device)
    columns = s.m2 == 1 and all(up.shape.n2 == 1 for up in ups)
    dense = path == "dense" or "dense" in paths
    if columns and dense and not any(layer.path for layer in (*ups, down)):
        pattern = _pattern(ups, down)
        dense = pattern is None or not pattern.diagonal  # a selection of neurons is a smaller dense MLP
        structured = not dense
    else:
        structured = columns and path == "right" and all(each == "left" for each in paths)
    if structured:
        return _columns_and_rows(x, ups, act, down).view(*x.shape[:-1], s.rows)
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
    """``(..., in) -> (t, m2, m1)``, with the bias."""
    s = up.shape
    plain = x.reshape(-1, s.n1, s.n2)
    left = path == "left"
    h = (
        up.combine_outputs(up.left_products(plain.transpose(1, 2)))
        if left
        else up.sum_left_products(up.combine_inputs(plain, plain=True))
    )
    bias = up.kept("bias", lambda: grouped_bias(up))
    return h if bias is None else h.add_(bias)


def grouped_bias(up: KroneckerLinear) -> Tensor | None:
    """The bias of a layer as its grouped outputs take it, ``(m2, m1)``."""
    return None if up.bias is None else up.bias.view(*up.shape.left[:1], up.shape.m2).T.contiguous()


def _activate(act: nn.Module, hidden: list[Tensor]) -> Tensor:
    """``act(hidden[0]) * hidden[1]``, over ``hidden`` itself where no gradient needs it."""
    over = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if type(act).__name__ not in TANH_GELU:
        a = act(hidden[0])
    elif over:
        a = torch.ops.aten.gelu.out(hidden[0], approximate="tanh", out=hidden[0])
    else:
        a = F.gelu(hidden[0], approximate="tanh")  # transformers' own writes it out, in eight passes over memory
    if len(hidden) == 1:
        return a
    return a.mul_(hidden[1]) if over else a * hidden[1]


@dataclass(frozen=True)
class _Mixes:
    """What columns and rows do to the neurons of a group that are computed, a of r.

    Attributes:
        b: a matrix ``(a, k)`` for each of the ups; None for the identity.
        biases: ``(a, width)`` for each of the ups, or None.
        c: ``(k, a)``; None for the identity.
        diagonal: whether every ``b`` and ``c`` is a diagonal matrix; then they are kept as columns ``(a, 1)``.
        bias: of the down layer, with what the constant neurons give.
        neurons: a.
    """

    b: list[Tensor | None]
    biases: list[Tensor | None]
    c: Tensor | None
    diagonal: bool
    bias: Tensor | None
    neurons: int


def _columns_and_rows(x: Tensor, ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear) -> Tensor:
    """``(..., in) -> (t, 1, out)`` for right factors ``r×1`` on the way up and ``1×r`` on the way down."""
    mixes = kept((*ups, down), "mixes", lambda: _mixes(ups, act, down))
    us: list[Tensor] = []
    biases: list[Tensor | None] = []
    for up, b, bias in zip(ups, mixes.b, mixes.biases, strict=True):
        rows = x.reshape(-1, 1, up.shape.n1)
        if b is None and bias is not None:  # the bias comes with the product
            us.append(up.left_products(rows, bias.flatten()))
            biases.append(None)
        else:
            u = up.left_products(rows)  # (t, k, width)
            us.append(u)
            biases.append(bias if bias is None or bias.dtype == u.dtype else bias.to(u.dtype))  # autocast leaves sums
    k, width = down.shape.factors, down.shape.n1
    if mixes.diagonal:
        z = _activate(act, [_scaled(*each) for each in zip(us, mixes.b, biases, strict=True)])  # (t, k, width)
        z = z if mixes.c is None else z * mixes.c
    elif k == 1 and mixes.neurons <= LOOP and (torch.compiler.is_compiling() or _is_large(x, mixes, width)):
        z = _one_by_one(us, mixes, biases, act)
    else:
        hidden = _activate(act, [_mixed(*each) for each in zip(us, mixes.b, biases, strict=True)])  # (t, a, width)
        z = batched(mixes.c, hidden)  # type: ignore[arg-type]
    return down.sum_left_products(z, mixes.bias)


def _is_large(x: Tensor, mixes: _Mixes, width: int) -> bool:
    return x.numel() // x.shape[-1] * mixes.neurons * width > SMALL


def _scaled(u: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return u if bias is None else u + bias
    return u * scale if bias is None else torch.addcmul(bias, u, scale.to(u.dtype))


def _mixed(u: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``(t, k, width) -> (t, a, width)``."""
    if b.shape[1] == 1:
        return _scaled(u, b, bias)
    h = batched(b, u)
    return h if bias is None else h.add_(bias)


def _one_by_one(us: list[Tensor], mixes: _Mixes, biases: list[Tensor | None], act: nn.Module) -> Tensor:
    """``z: (t, 1, width)`` of one factor, neuron by neuron of each group."""
    z: Tensor | None = None
    scales = [b.to(u.dtype).flatten().unbind() for b, u in zip(mixes.b, us, strict=True)]  # type: ignore[union-attr]
    weights = mixes.c.to(us[0].dtype).flatten().unbind()  # type: ignore[union-attr]
    for p in range(mixes.neurons):
        rows = [None if bias is None else bias[p] for bias in biases]
        a = _activate(act, [_scaled(u, s[p], row) for u, s, row in zip(us, scales, rows, strict=True)])
        z = a * weights[p] if z is None else z.addcmul_(a, weights[p])
    assert z is not None
    return z


def _mixes(ups: list[KroneckerLinear], act: nn.Module, down: KroneckerLinear) -> _Mixes:
    """The mixes with everything left out that zeros in the right factors make needless, where these are known."""
    b = [up.coefficients()[:, :, 0].T for up in ups]  # (r, k)
    c = down.coefficients()[:, 0]  # (k, r)
    biases = [grouped_bias(up) for up in ups]
    bias: Tensor | None = down.bias
    pattern = _pattern(ups, down)
    if pattern is None:
        return _Mixes(list(b), biases, c, False, bias, c.shape[1])
    if pattern.constant:
        bias = _with_constants(pattern.constant, biases, c, act, down)
    if len(pattern.alive) < c.shape[1]:
        index = torch.tensor(pattern.alive, device=c.device)
        b, c = [each[index] for each in b], c[:, index]
        biases = [None if each is None else each[index] for each in biases]
    if not pattern.diagonal:
        return _Mixes(list(b), biases, c, False, bias, len(pattern.alive))
    columns = [None if one else m.diagonal()[:, None] for m, one in zip((*b, c), pattern.ones, strict=True)]
    return _Mixes(columns[:-1], biases, columns[-1], True, bias, len(pattern.alive))


def _with_constants(
    constant: list[int], biases: list[Tensor | None], c: Tensor, act: nn.Module, down: KroneckerLinear
) -> Tensor | None:
    """The bias of the down layer and what neurons of constant value give: ``(out,)``."""
    if biases[0] is None and act(c.new_zeros(1)).item() == 0:
        return down.bias
    zero = c.new_zeros(len(constant), down.shape.n1)
    hidden = [zero.clone() if each is None else each[constant] for each in biases]  # (constants, width)
    z = c[:, constant] @ _activate(act, hidden)  # (k, width)
    return down.sum_left_products(z[None], down.bias).flatten()


@dataclass(frozen=True)
class _Pattern:
    """Which neurons of a group are computed, and how simple the mixes of those are.

    Attributes:
        alive: those that are computed.
        constant: those whose value does not depend on the input; without gradients, they aren't computed.
        diagonal: whether each computed neuron has a factor of its own, on the way up and down.
        ones: for each of the mixes, the last one down's, whether that diagonal is all ones.
    """

    alive: list[int]
    constant: list[int]
    diagonal: bool
    ones: list[bool]


def _pattern(ups: list[KroneckerLinear], down: KroneckerLinear) -> _Pattern | None:
    """Where the right factors are zero; None where they may be trained, or can't be read: in a captured graph."""
    layers, grad = (*ups, down), torch.is_grad_enabled()
    if torch.compiler.is_compiling() or any(layer.state() is None or layer.right.is_meta for layer in layers):
        return None
    if grad and any(layer.right.requires_grad for layer in layers):
        return None
    parts = [part for layer in layers for part in (layer.right, layer.scalars) if part is not None]
    state = (grad, *((part.data_ptr(), part._version, part.dtype) for part in parts))
    made = down._made.get("pattern")
    if made is None or made[0] != state:
        made = down._made["pattern"] = state, _read_pattern(ups, down, grad)
    return made[1]


@torch.no_grad()
def _read_pattern(ups: list[KroneckerLinear], down: KroneckerLinear, grad: bool) -> _Pattern | None:
    b = [up.right[:, :, 0].T.cpu() for up in ups]  # (r, k)
    c = down.right[:, 0].cpu()  # (k, r)
    used = c.any(dim=0)
    fixed = torch.stack([(each == 0).all(dim=1) for each in b]).all(dim=0) & (not grad)
    alive = (used & ~fixed).nonzero().flatten()
    if not len(alive):
        return None
    chosen = [*(each[alive] for each in b), c[:, alive].T]  # (a, k)
    diagonal = len(alive) == len(c) and all(torch.equal(m, torch.diag(m.diagonal())) for m in chosen)
    ones = [diagonal and _is_one(m, layer, grad) for m, layer in zip(chosen, (*ups, down), strict=True)]
    return _Pattern(alive.tolist(), (used & fixed).nonzero().flatten().tolist(), diagonal, ones)


def _is_one(matrix: Tensor, layer: KroneckerLinear, grad: bool) -> bool:
    """Whether the layer's diagonal mix, scalars included, is the identity and stays so."""
    if layer.scalars is None:
        return bool((matrix.diagonal() == 1).all())
    return not (grad and layer.scalars.requires_grad) and bool((matrix.diagonal() * layer.scalars.cpu() == 1).all())
