"""A short training of each compressed MLP by itself, to give back what the original gave on the calibration text.

Every MLP is trained alone, on the inputs that the original model gives it, towards the original MLP's outputs:
``min Σ_t w_t e_tᵀ G e_t``, e_t = student(x_t) − original(x_t), with the calibration's token weights and G the loss's
sensitivity to the outputs: what the rest of the model does not feel is not repaired. There is no pass through the rest
of the model, so it costs seconds a layer. Right factors stay as they are: neurons that were dropped stay dropped.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.compression.moments import BATCH_TOKENS, MEMORY, token_weights
from krony.errors import KronyError
from krony.kronecker.linear import KroneckerLinear
from krony.models.modes import evaluating
from krony.models.surgery import Group, enclosing_layer, put_in
from krony.runtime.hardware import fast_dtype
from krony.runtime.progress import Progress

BATCH = 2048  # tokens a step
RATE = 0.05  # the highest, relative to the root mean square of what is trained, and to the error it starts from
WARM_UP = 0.1  # of the steps
ROUNDING = 0.01  # relative error that bfloat16 can't see


@dataclass(frozen=True)
class Examples:
    """What one group of the original model read: inputs ``(tokens, in)`` and token weights ``(tokens,)`` of mean 1."""

    inputs: Tensor
    weights: Tensor


def module_name(group: Group) -> str:
    """The module that a group is trained in: the MLP around its matrices, or the single layer itself."""
    last = group.sites[-1].name
    return last.rpartition(".")[0] if group.is_mlp else last


def check_reconstructible(model: nn.Module, group: Group) -> None:
    """Raises KronyError where the MLP is no module that can be run by itself: OPT's is part of its layer, and BLOOM's
    adds the residual stream.
    """
    if not group.is_mlp:
        return
    name = module_name(group)
    module = model.get_submodule(name)
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if module is enclosing_layer(model, group) or len(needed) != 1:
        raise KronyError(
            f"reconstruct runs every MLP by itself, and {name} ({type(module).__name__}) is more than an MLP: "
            "leave it out; tune trains all layers together"
        )


def examples(
    model: PreTrainedModel, groups: list[Group], ids: Tensor, *, token_weighting: bool, progress: Progress
) -> Iterator[Examples]:
    """The inputs of every group in order; as many are held as fit into memory, and the model runs again for the next.

    ``ids``: token ids ``(sequences, length)``.
    """
    dtype = fast_dtype(model.device)
    size = ids.numel() * max(group.sites[0].in_features for group in groups) * dtype.itemsize
    at_once = max(1, MEMORY // size)
    for start in range(0, len(groups), at_once):
        yield from _record(model, groups[start : start + at_once], ids, dtype, token_weighting, progress)


@torch.no_grad()
def _record(
    model: PreTrainedModel,
    groups: list[Group],
    ids: Tensor,
    dtype: torch.dtype,
    token_weighting: bool,
    progress: Progress,
) -> list[Examples]:
    inputs: list[list[Tensor]] = [[] for _ in groups]
    weights: list[list[Tensor]] = [[] for _ in groups]
    handles: list[Any] = []

    def watch(index: int, group: Group) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[index].append(args[0].flatten(0, -2).to(dtype))  # (tokens, in)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            weights[index].append(token_weights(output, token_weighting))

        handles.append(model.get_submodule(module_name(group)).register_forward_pre_hook(before))
        handles.append(enclosing_layer(model, group).register_forward_hook(after))

    for index, group in enumerate(groups):
        watch(index, group)
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    try:
        with evaluating(model):
            for start in range(0, len(ids), batch):
                progress(start, len(ids), "activations")
                model.base_model(input_ids=ids[start : start + batch].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    joined = [torch.cat(w) for w in weights]
    return [Examples(torch.cat(x), w / w.mean()) for x, w in zip(inputs, joined, strict=True)]


def reconstruct(
    original: nn.Module,
    layers: dict[str, KroneckerLinear],
    text: Examples,
    *,
    steps: int,
    seed: int,
    sensitivity: Tensor | None = None,
) -> tuple[float, float]:
    """Trains new ``layers`` to give together what ``original`` gives, in place and in float32.

    Args:
        original: an MLP, or the single layer that the only one of ``layers``, called "", takes the place of.
        layers: by their names in ``original``.
        sensitivity: G, ``(out, out)``; the identity by default.

    Returns the relative error of the outputs on the text in G's norm, ``‖new − original‖ / ‖original‖``, before and
    after. If the training did not lower it the layers are left as they were.
    """
    small: dict[str, Any] = {n: _Small(layer) for n, layer in layers.items()} if _leave_out(layers) else dict(layers)
    student = small[""] if "" in small else copy.deepcopy(original)
    for name, layer in small.items() if "" not in small else ():
        put_in(student, name, layer)
    parameters = [p for layer in small.values() for p in (layer.weight, layer.bias) if p is not None]
    sensitivity_root = None if sensitivity is None else _root(sensitivity).to(text.inputs.device, torch.float32)
    targets = _run(original, text.inputs)
    scale = (text.weights * _squared(targets, sensitivity_root)).mean().clamp_min(torch.finfo(torch.float32).tiny)
    before = _error(student, text, targets, scale, sensitivity_root)
    if before < ROUNDING and text.inputs.dtype != torch.float32:
        return before, before  # training in half precision would only add its rounding
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


class _Small(nn.Module):
    """A Kronecker layer of selections (``B_f = e_f``) without the neurons that are left out: a small dense layer."""

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
        """Gives the Kronecker layer what was learnt."""
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


def _leave_out(layers: dict[str, KroneckerLinear]) -> bool:
    """Whether these are an MLP's whose right factors leave hidden neurons out, and do nothing else."""
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
    """Tokens are drawn, a batch a step."""
    optimizer, schedule = relative_adamw(parameters, rate=rate, warm_up=WARM_UP, steps=steps)
    generator = torch.Generator().manual_seed(seed)
    device = text.inputs.device
    for _ in range(steps):
        chosen = torch.randint(len(text.inputs), (BATCH,), generator=generator).to(device)
        lost = _forward(student, text.inputs[chosen]) - targets[chosen]  # (BATCH, out)
        loss = (text.weights[chosen] * _squared(lost, sensitivity_root)).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _forward(module: nn.Module, inputs: Tensor) -> Tensor:
    """``(tokens, in) -> (tokens, out)`` in float32, with products in the dtype of the inputs."""
    low = inputs.dtype != torch.float32
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=low):
        return module(inputs if low else inputs.float()).float()


@torch.no_grad()
def _run(module: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([_forward(module, piece) for piece in inputs.split(4 * BATCH)])


def _error(
    student: nn.Module, text: Examples, targets: Tensor, scale: Tensor, sensitivity_root: Tensor | None
) -> float:
    lost = _run(student, text.inputs) - targets
    return ((text.weights * _squared(lost, sensitivity_root)).mean() / scale).sqrt().item()


def _squared(lost: Tensor, sensitivity_root: Tensor | None) -> Tensor:
    """``eᵀ G e`` of every row: ``(tokens, out) -> (tokens,)``."""
    return (lost if sensitivity_root is None else lost @ sensitivity_root).square().sum(-1)


def _root(sensitivity: Tensor) -> Tensor:
    """G's square root, with a little of the identity: 16,384 tokens don't tell that the loss ignores a direction."""
    values, vectors = torch.linalg.eigh(sensitivity.double())
    values = values.clamp_min(0)
    return (vectors * (values + ROUNDING * values.mean()).sqrt()) @ vectors.T
