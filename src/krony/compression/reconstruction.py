"""A short training of each compressed MLP by itself, towards the original's outputs on the calibration text.

The training uses the inputs that the MLP has in the original model, and the original MLP's outputs as targets:
``min Σ_t w_t e_tᵀ G e_t`` with e_t = student(x_t) − original(x_t), the token weights w of the calibration, and the
sensitivity G of the loss to the outputs, so that errors count as much as they change the loss. No pass runs through the
rest of the model, so it takes seconds per layer. Right factors do not change: dropped neurons stay dropped.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.compression.moments import BATCH_TOKENS, MEMORY, batches, token_weights
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.base import Moments
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.modes import evaluating
from krony.models.surgery import Group, enclosing_layer
from krony.runtime.hardware import fast_dtype
from krony.runtime.progress import Progress

BATCH = 2048  # tokens per step
PIECE = 4 * BATCH  # tokens at a time where no gradients are needed
RATE = 0.05  # the highest rate, relative to a parameter's root mean square, and to the relative error at the start
WARM_UP = 0.1  # share of the steps
ROUNDING = 0.01  # relative error below which bfloat16 can't improve


@dataclass(frozen=True)
class Examples:
    """One group's inputs ``(tokens, in)`` in the original model, and token weights ``(tokens,)`` with mean 1."""

    inputs: Tensor
    weights: Tensor


def module_name(group: Group) -> str:
    """The name of the module that is trained: the MLP that contains the group's matrices, or the single layer."""
    last = group.sites[-1].name
    return last.rpartition(".")[0] if group.is_mlp else last


def check_reconstructible(model: nn.Module, group: Group) -> None:
    """Raises KronyError if the MLP is no module that runs by itself.

    OPT's MLP is part of its layer, and BLOOM's adds the residual stream.
    """
    if not group.is_mlp:
        return
    name = module_name(group)
    module = model.get_submodule(name)
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if module is enclosing_layer(model, group) or len(needed) != 1:
        raise KronyError(
            f"reconstruct runs every MLP by itself, and {name} ({type(module).__name__}) is more than an MLP: "
            "leave reconstruct out, or use tune, which trains all layers together"
        )


def examples(
    model: PreTrainedModel, groups: list[Group], ids: Tensor, *, token_weighting: bool, progress: Progress
) -> Iterator[Examples]:
    """The inputs of every group, in order.

    The model runs once for as many groups as fit into ``MEMORY`` bytes, and again for the next ones.

    Args:
        ids: token ids ``(sequences, length)``.
        token_weighting: weighs tokens by ``1/‖h_t‖²``, else all tokens weigh the same.
    """

    def read() -> None:
        done = 0
        with evaluating(model):
            for rows in batches(ids, BATCH_TOKENS):
                progress(done, len(ids), "activations")
                model.base_model(input_ids=rows.to(model.device), use_cache=False)
                done += len(rows)

    return recorded(model, groups, ids.numel(), read, device=model.device, token_weighting=token_weighting)


def recorded(
    model: nn.Module,
    groups: Sequence[Group],
    tokens: int,
    read: Callable[[], None],
    *,
    device: torch.device | str,
    token_weighting: bool,
) -> Iterator[Examples]:
    """The inputs of every group, in order: bfloat16 where that is fast on ``device``, else float32.

    Args:
        tokens: the number of tokens of the text.
        read: runs the groups' layers on the complete text. It is called once for as many groups as fit into ``MEMORY``
            bytes, when the first of them is asked for.
        token_weighting: as in ``examples``.
    """
    dtype = fast_dtype(device)
    at_once = kept_at_once(groups, tokens, dtype.itemsize)
    for start in range(0, len(groups), at_once):
        part = groups[start : start + at_once]
        inputs = [torch.empty(tokens, g.sites[0].in_features, dtype=dtype, device=device) for g in part]
        records = _records(model, part, inputs, token_weighting, read)
        del inputs
        while records:  # frees each when the next one is asked for
            yield records.pop(0).examples()


@torch.no_grad()
def _records(
    model: nn.Module, groups: Sequence[Group], inputs: list[Tensor], token_weighting: bool, read: Callable[[], None]
) -> list[_Record]:
    """A filled record per group."""
    records = [_Record(model, group, place, token_weighting) for group, place in zip(groups, inputs, strict=True)]
    try:
        read()
    finally:
        for record in records:
            record.remove()
    return records


class _Record:
    """Keeps the inputs of one group in ``inputs: (tokens, in)``, and the tokens' weights, while its layer runs."""

    def __init__(self, model: nn.Module, group: Group, inputs: Tensor, token_weighting: bool) -> None:
        """Registers the hooks; call ``remove`` after the last forward pass."""
        self.inputs, self.filled = inputs, 0
        self.weighted = token_weighting
        self.weights: list[Tensor] = []
        self.handles: list[Any] = [
            model.get_submodule(module_name(group)).register_forward_pre_hook(self._take),
            enclosing_layer(model, group).register_forward_hook(self._weigh),
        ]

    def _take(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)  # (tokens of the batch, in)
        self.inputs[self.filled : self.filled + len(x)] = x
        self.filled += len(x)

    def _weigh(self, _: nn.Module, __: Any, output: Any) -> None:
        self.weights.append(token_weights(output, self.weighted))

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def examples(self) -> Examples:
        """What was kept."""
        weights = torch.cat(self.weights)  # (tokens,)
        return Examples(self.inputs, weights / weights.mean())


def kept_at_once(groups: Sequence[Group], tokens: int, itemsize: int) -> int:
    """How many groups' inputs fit into ``MEMORY`` bytes, at least one; ``itemsize``: bytes per number."""
    return max(1, MEMORY // (tokens * itemsize * max(group.sites[0].in_features for group in groups)))


def training_memory(group: Group, shapes: Mapping[str, KronShape], tokens: int) -> int:
    """About how many bytes the training of one group takes besides its inputs.

    In float32: the old matrices; of the new ones themselves, copies to train, their first values, gradients, and
    AdamW's two moments; the targets; and the activations of one piece of the text. In float64: the factors before.
    """
    old = sum(site.out_features * site.in_features for site in group.sites)
    new = sum(shapes[site.name].parameters for site in group.sites)
    widest = max(max(site.out_features, site.in_features) for site in group.sites)
    numbers = old + 6 * new + tokens * group.sites[-1].out_features + len(group.sites) * PIECE * widest
    return 4 * numbers + 8 * new


def reconstruct_group(
    model: PreTrainedModel,
    group: Group,
    text: Examples,
    moments: Moments | None,
    config: KronyConfig,
    layers: dict[str, KroneckerLinear],
) -> None:
    """Trains the group's new layers, by their names in the model, in float32, and returns them to their dtype.

    The sensitivity of the moments weighs the errors where it is known.
    """
    name = module_name(group)
    original = copy.deepcopy(model.get_submodule(name)).eval().float()
    dtype = next(iter(layers.values())).weight.dtype
    new = {full.removeprefix(name).removeprefix("."): layer.float() for full, layer in layers.items()}
    sensitivity = None if moments is None else moments.sensitivity
    reconstruct(original, new, text, steps=config.reconstruct, seed=config.seed, sensitivity=sensitivity)
    for layer in layers.values():
        layer.to(dtype)


def reconstruct(
    original: nn.Module,
    layers: dict[str, KroneckerLinear],
    text: Examples,
    *,
    steps: int,
    seed: int,
    sensitivity: Tensor | None = None,
) -> tuple[float, float]:
    """Trains new ``layers`` towards the outputs of ``original``, in place and in float32.

    Args:
        original: an MLP, or a single layer.
        layers: the new layers by their names in ``original``; a single layer has the name "".
        text: inputs and token weights.
        steps: number of steps of ``BATCH`` tokens.
        seed: seed of the batches.
        sensitivity: G, ``(out, out)``; None for the identity.

    Returns:
        The relative error of the outputs on the text in the norm of G, ``‖new − original‖ / ‖original‖``, before and
        after. If the training does not lower it, the layers keep their values.
    """
    small: dict[str, Any] = dict(layers)
    if _drops_neurons(layers):
        small = {name: _Small(layer) for name, layer in layers.items()}
    student = small[""] if "" in small else _with(original, small)
    parameters = [p for layer in small.values() for p in (layer.weight, layer.bias) if p is not None]
    sensitivity_root = None if sensitivity is None else _root(sensitivity).to(text.inputs.device, torch.float32)
    targets = _run(original, text.inputs)
    scale = _loss(text, targets.split(PIECE), sensitivity_root).clamp_min(torch.finfo(torch.float32).tiny)
    before = _error(student, text, targets, scale, sensitivity_root)
    if before < ROUNDING and text.inputs.dtype != torch.float32:
        return before, before  # training in half precision would only add rounding errors
    first = [p.detach().clone() for p in parameters]
    with torch.enable_grad():
        _descend(student, parameters, text, targets, scale, sensitivity_root, steps, RATE * min(1.0, before), seed)
    after = _error(student, text, targets, scale, sensitivity_root)
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, first, strict=True):
                parameter.copy_(value)
        return before, before
    for layer in small.values():
        if isinstance(layer, _Small):
            layer.write_back()
    return before, after


def _with(original: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """A copy of an MLP with other layers; the old ones are not copied."""
    return copy.deepcopy(original, {id(original.get_submodule(name)): layer for name, layer in layers.items()})


class _Small(nn.Module):
    """A small dense layer: a Kronecker layer with ``B_f = e_f``, without the dropped neurons."""

    def __init__(self, layer: KroneckerLinear) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: not a submodule
        self.is_up = layer.shape.n2 == 1
        left = layer.weight.detach() * (1.0 if layer.scalars is None else layer.scalars.detach()[:, None, None])
        # up: rows i·k + f, (groups·k, in); down: columns i·k + f, (out, groups·k)
        rows = left.transpose(0, 1) if self.is_up else left.permute(1, 2, 0)
        self.weight = nn.Parameter(rows.reshape(-1, left.shape[2]) if self.is_up else rows.flatten(1))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if bias is not None and self.is_up:
            bias = bias.view(layer.shape.m1, -1)[:, : layer.shape.factors].flatten()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the trained values into the Kronecker layer."""
        (layer,) = self.layer
        k = layer.shape.factors
        if self.is_up:
            left = self.weight.view(-1, k, self.weight.shape[1]).transpose(0, 1)
        else:
            left = self.weight.view(len(self.weight), -1, k).permute(2, 0, 1)
        layer.weight.copy_(left if layer.scalars is None else left / layer.scalars[:, None, None])
        if layer.bias is not None and self.bias is not None:
            if self.is_up:
                layer.bias.view(layer.shape.m1, -1)[:, :k].copy_(self.bias.view(-1, k))
            else:
                layer.bias.copy_(self.bias)


def _drops_neurons(layers: dict[str, KroneckerLinear]) -> bool:
    """Whether these are an MLP's layers whose right factors only drop hidden neurons."""
    *ups, down = layers.values()
    hidden = ups and all(up.shape.n2 == 1 for up in ups) and down.shape.m2 == 1
    return bool(hidden) and all(map(_is_selection, layers.values()))


def _is_selection(layer: KroneckerLinear) -> bool:
    """Whether every right factor is the unit vector ``e_f``."""
    k, size = layer.shape.factors, layer.shape.m2 * layer.shape.n2
    return torch.equal(layer.right.detach().float().cpu().view(k, size), torch.eye(k, size))


def _descend(
    student: nn.Module, parameters: list[nn.Parameter], text: Examples, targets: Tensor, scale: Tensor,
    sensitivity_root: Tensor | None, steps: int, rate: float, seed: int,
) -> None:  # fmt: skip
    """Trains ``parameters`` on one random batch of tokens per step."""
    optimizer, schedule = relative_adamw(parameters, rate=rate, warm_up=WARM_UP, steps=steps)
    generator = torch.Generator().manual_seed(seed)
    device = text.inputs.device
    for _ in range(steps):
        chosen = torch.randint(len(text.inputs), (BATCH,), generator=generator).to(device)
        difference = _forward(student, text.inputs[chosen]) - targets[chosen]  # (BATCH, out)
        loss = (text.weights[chosen] * _squared(difference, sensitivity_root)).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _forward(module: nn.Module, inputs: Tensor) -> Tensor:
    """``(tokens, in) -> (tokens, out)`` in float32; matrix products run in the dtype of the inputs."""
    low = inputs.dtype != torch.float32
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=low):
        return module(inputs if low else inputs.float()).float()


@torch.no_grad()
def _run(module: nn.Module, inputs: Tensor) -> Tensor:
    """``_forward`` in pieces that bound the memory."""
    outputs = torch.empty(len(inputs), _forward(module, inputs[:1]).shape[1], device=inputs.device)
    for x, y in zip(inputs.split(PIECE), outputs.split(PIECE), strict=True):
        y.copy_(_forward(module, x))
    return outputs


@torch.no_grad()
def _error(
    student: nn.Module, text: Examples, targets: Tensor, scale: Tensor, sensitivity_root: Tensor | None
) -> float:
    """The relative error of the student's outputs on the text, in the norm of G."""
    pieces = zip(text.inputs.split(PIECE), targets.split(PIECE), strict=True)
    differences = (_forward(student, x) - y for x, y in pieces)
    return (_loss(text, differences, sensitivity_root) / scale).sqrt().item()


def _loss(text: Examples, differences: Iterable[Tensor], sensitivity_root: Tensor | None) -> Tensor:
    """The mean of ``w_t e_tᵀ G e_t`` over the text; the differences come in pieces that bound the memory."""
    return (text.weights * torch.cat([_squared(e, sensitivity_root) for e in differences])).mean()


def _squared(difference: Tensor, sensitivity_root: Tensor | None) -> Tensor:
    """``eᵀ G e`` of every row: ``(tokens, out) -> (tokens,)``."""
    return (difference if sensitivity_root is None else difference @ sensitivity_root).square().sum(-1)


def _root(sensitivity: Tensor) -> Tensor:
    """The square root of G plus a small multiple of the identity: 16,384 tokens can't show that a direction is free."""
    values, vectors = torch.linalg.eigh(sensitivity.double())
    values = values.clamp_min(0)
    return (vectors * (values + ROUNDING * values.mean()).sqrt()) @ vectors.T
