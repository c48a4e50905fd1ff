"""Fused MLPs: finds the MLPs of Kronecker layers in a model and lets one function compute each of them.

The class of such an MLP changes; its parameters, names and submodules don't. An MLP runs as its own class defines it
where hooks watch its layers or other modules replaced them. The body around the layers lets them reuse derived tensors
while it continues a key-value cache (``krony.kronecker.derived``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from krony.kronecker.derived import reuse_while_decoding, stop_reusing
from krony.kronecker.fused_mlp import fused_forward
from krony.kronecker.linear import KroneckerLinear


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The names of an MLP's submodules: ``after(down(act(ups[0](x)) * ups[1](x)))``, or of one up layer."""

    ups: tuple[str, ...]
    act: str
    down: str
    after: tuple[str, ...]


def fuse(model: nn.Module) -> None:
    """Fuses every MLP of Kronecker layers in ``model`` that allows it, in place. Fusing twice changes nothing."""
    for body in _bodies(model):
        reuse_while_decoding(body)
    for module in list(model.modules()):
        if isinstance(module, FusedMLP) or not any(isinstance(c, KroneckerLinear) for c in module.children()):
            continue
        parts = find_parts(module)
        if parts is not None and _fits(module, parts):
            module.krony_parts = parts  # type: ignore[assignment]
            module.__class__ = _fused_class(type(module))


def unfuse(model: nn.Module) -> None:
    """Undoes ``fuse``: the fused MLPs of ``model`` have their own class again, in place."""
    for body in _bodies(model):
        stop_reusing(body)
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = type(module).__bases__[1]
            del module.krony_parts


def _bodies(model: nn.Module) -> list[nn.Module]:
    """The innermost model of transformers around each Kronecker layer: its forward takes the key-value cache."""
    from transformers import PreTrainedModel  # this module is imported while transformers is being imported

    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module, body: nn.Module | None) -> None:
        body = module if isinstance(module, PreTrainedModel) else body
        if isinstance(module, KroneckerLinear) and body is not None:
            found[body] = None
        for child in module.children():
            visit(child, body)

    visit(model, None)
    return list(found)


def find_parts(module: nn.Module) -> Parts | None:
    """The submodules that the forward of ``module`` calls, if it is an MLP and does nothing else; None if it isn't."""
    from torch.fx import Graph, Tracer

    class Leaves(Tracer):
        def is_leaf_module(self, *_: Any) -> bool:
            return True

    try:
        graph: Graph = Leaves().trace(module)
    except Exception:  # a forward with control flow can raise anything
        return None
    nodes = list(graph.nodes)
    x, output = nodes[0], nodes[-1]  # the first argument, and what is returned
    calls = [node for node in nodes if node.op.startswith("call_")]
    after: list[str] = []
    node = output.args[0]
    while _calls_one(node) and not isinstance(module.get_submodule(node.target), KroneckerLinear):
        after.insert(0, str(node.target))
        node = node.args[0]
    if not _calls_one(node):
        return None
    down, hidden = str(node.target), node.args[0]
    pair = [hidden]
    if getattr(hidden, "op", "") == "call_function" and hidden.target.__name__ == "mul" and len(hidden.args) == 2:
        pair = sorted(hidden.args, key=lambda n: _is_up(module, n))  # the activation first
    if not _calls_one(pair[0]):
        return None
    ups = [pair[0].args[0], *pair[1:]]
    if not all(_is_up(module, up) and up.args[0] is x for up in ups):
        return None
    if len(calls) != 3 + len(after) + 2 * (len(ups) - 1):  # something else is computed too
        return None
    return Parts(ups=tuple(str(up.target) for up in ups), act=str(pair[0].target), down=down, after=tuple(after))


def _calls_one(node: Any) -> bool:
    """Whether the node calls a submodule with one argument."""
    return getattr(node, "op", "") == "call_module" and len(node.args) == 1 and not node.kwargs


def _is_up(module: nn.Module, node: Any) -> bool:
    return _calls_one(node) and isinstance(module.get_submodule(node.target), KroneckerLinear)


def _fits(module: nn.Module, parts: Parts) -> bool:
    """Whether all are Kronecker layers whose hidden features are in the same groups."""
    ups, down = [module.get_submodule(name) for name in parts.ups], module.get_submodule(parts.down)
    layers = [*ups, down]
    if not all(type(layer) is KroneckerLinear for layer in layers):
        return False
    return all((up.shape.m1, up.shape.m2) == (down.shape.n1, down.shape.n2) for up in ups)  # type: ignore[union-attr]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _classes:
        body = {"__module__": own.__module__, "__doc__": own.__doc__}
        _classes[own] = type(own.__name__, (FusedMLP, own), body)
    return _classes[own]


def _rebuild(own: type[nn.Module]) -> nn.Module:
    made = _fused_class(own)
    return made.__new__(made)


class FusedMLP(nn.Module):
    """The base class that ``fuse`` puts before an MLP's own class; ``krony_parts`` names its submodules."""

    krony_parts: Parts

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[1],), self.__dict__.copy()  # pickle can't find a class made at run time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the MLP's own class."""
        parts, children = self.krony_parts, self._modules
        ups, down = [children[name] for name in parts.ups], children[parts.down]
        act = children[parts.act]
        if kwargs or len(args) != 1 or not all(map(_is_plain, (*ups, down))) or _is_watched(act):
            return super().forward(*args, **kwargs)
        y = fused_forward(args[0], ups, act, down)  # type: ignore[arg-type]
        for name in parts.after:
            y = children[name](y)  # type: ignore[misc]
        return y


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) is KroneckerLinear and not _is_watched(module)


def _is_watched(module: nn.Module | None) -> bool:
    """Whether a user relies on this module being called: it has hooks, or an instance's own forward."""
    return module is None or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
        or "forward" in module.__dict__
    )
