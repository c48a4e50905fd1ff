"""A model that runs one transformer layer at a time: the others are on disk, and what they said is kept.

The skeleton lies on the meta device. To run layer i on the calibration text the skeleton runs as a whole, so that masks
and position embeddings are what they always are, but for two things: every other layer hands its input on unchanged,
and layer i takes the hidden states that were kept from layer i − 1. What it gives is kept in turn, in a file of its
own, and is what an undivided run in the same batches gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.moments import BATCH_TOKENS, MomentAccumulator, batches
from krony.errors import KronyError
from krony.init.base import Moments
from krony.models.surgery import Group
from krony.storage.shards import TensorFile
from krony.storage.tensor_files import Entry, read_header

Read = Callable[[str], Tensor]  # a parameter or buffer of the model by name, in the dtype that the model wants


class Blocks:
    """The stack of layers of ``model``, which is on the meta device, and the text ``ids: (sequences, length)``."""

    def __init__(
        self, model: PreTrainedModel, stack: str, ids: Tensor, read: Read, *, weighted: bool, device: str = "cpu"
    ) -> None:
        self.model, self.stack, self.ids, self.read = model, stack, ids, read
        self.weighted, self.device = weighted, device
        self.layers: list[nn.Module] = list(model.get_submodule(stack))  # type: ignore[call-overload]
        self.returns = 0  # how many things a layer returns; 0 for a bare tensor
        for name in self._around():
            _fill_one(model, name, read, device)

    def step(self, index: int, groups: Sequence[Group], before: Path | None, after: Path | None) -> list[Moments]:
        """Runs layer ``index`` on the whole text, and gives the moments of its ``groups``. The layer stays filled.

        Args:
            before: the file with what enters it; None for the first layer, which the embeddings feed.
            after: the file to write for the next layer; None after the last.
        """
        fill(self.model, f"{self.stack}.{index}", self.read, self.device)
        run = _Run(None if before is None else read_header(before)[0], after, len(self.ids), self.device)
        sums = [MomentAccumulator(self.model, group, self.weighted, False) for group in groups]
        try:
            with torch.no_grad(), self._alone(index, run), self._embeddings(needed=before is None):
                for rows in batches(self.ids, BATCH_TOKENS):
                    self.model.base_model(input_ids=rows.to(self.device), use_cache=False)
        finally:
            for one in sums:
                one.remove()
        if run.file is not None:
            run.file.sync()
        return [one.moments(self.ids.numel()) for one in sums]

    def release(self, index: int) -> None:
        """Lets the layer's weights go."""
        release(self.model, f"{self.stack}.{index}")

    def _around(self) -> list[str]:
        """The modules of the base model that hold something and are not in the stack."""
        inner = {id(m) for layer in self.layers for m in layer.modules()}
        base = {id(m) for m in self.model.base_model.modules()}
        return [
            name
            for name, module in self.model.named_modules()
            if id(module) in base - inner and (module._parameters or module._buffers)
        ]

    @contextmanager
    def _alone(self, index: int, run: _Run) -> Iterator[None]:
        """While the block lasts, layer ``index`` goes through ``run``, and the others pass on what they get."""

        def pass_on(*args: Any, **options: Any) -> Any:
            hidden = args[0] if args else options["hidden_states"]
            return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden

        own = self.layers[index].forward

        def forward(*args: Any, **options: Any) -> Any:
            hidden = run.enter(args[0] if args else options.pop("hidden_states"))
            given = own(hidden, *args[1:], **options)
            self.returns = len(given) if isinstance(given, tuple) else 0
            run.leave(given[0] if isinstance(given, tuple) else given)
            return given

        for layer in self.layers:
            layer.forward = pass_on  # type: ignore[method-assign]
        self.layers[index].forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own shows again

    @contextmanager
    def _embeddings(self, *, needed: bool) -> Iterator[None]:
        """The table of token embeddings, the largest matrix of many models, is needed for the first layer alone."""
        table = self.model.get_input_embeddings()
        if needed:
            yield
            return
        name = next(name for name, module in self.model.named_modules() if module is table)
        release(self.model, name)
        width, dtype = table.weight.shape[1], self.model.dtype
        table.forward = lambda ids: torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)
        try:
            yield
        finally:
            del table.forward


class _Run:
    """What enters a layer and what leaves it, batch after batch."""

    def __init__(self, entering: Entry | None, after: Path | None, rows: int, device: str) -> None:
        self.entering, self.after, self.rows, self.device = entering, after, rows, device
        self.row = 0
        self.file: TensorFile | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        """``(batch, length, width)``: what was kept for these rows, or for the first layer what the embeddings gave."""
        return hidden if self.entering is None else self.entering.read(self.row, self.row + len(hidden)).to(self.device)

    def leave(self, hidden: Tensor) -> None:
        if self.after is not None:
            if self.file is None:
                self.file = TensorFile(self.after, {"hidden": (hidden.dtype, (self.rows, *hidden.shape[1:]))})
                self.file.create()
            self.file.put("hidden", hidden, at=self.row * hidden[0].numel())
        self.row += len(hidden)


def stack_name(groups: Sequence[Group], model: nn.Module) -> str:
    """The list of layers that all groups are in. Raises KronyError if there isn't one."""
    found = set()
    for group in groups:
        parts = group.sites[0].name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            raise KronyError(f"{group.sites[0].name} is in no transformer layer, so it can't be run layer by layer")
        found.add(".".join(parts[: numbers[0]]))
    if len(found) != 1:
        raise KronyError(f"the layers are in several stacks ({', '.join(sorted(found))}): they can't be run one by one")
    stack = found.pop()
    if not isinstance(model.get_submodule(stack), nn.ModuleList):
        raise KronyError(f"{stack} is no list of layers, so it can't be run layer by layer")
    return stack


def fill(model: PreTrainedModel, name: str, read: Read, device: str = "cpu") -> None:
    """Gives a module that is on the meta device, and all in it, its weights, and buffers as transformers makes them."""
    for inner, _ in model.get_submodule(name).named_modules():
        _fill_one(model, ".".join(part for part in (name, inner) if part), read, device)


def _fill_one(model: PreTrainedModel, name: str, read: Read, device: str) -> None:
    module, prefix = model.get_submodule(name), f"{name}." if name else ""
    for key, value in module._parameters.items():
        if value is not None:
            made = nn.Parameter(read(prefix + key).to(device), requires_grad=False)
            made._is_hf_initialized = True  # type: ignore[attr-defined]  # so that transformers leaves it alone
            module._parameters[key] = made
    passing = module._non_persistent_buffers_set
    for key, buffer in module._buffers.items():
        if buffer is not None:
            empty = torch.empty_like(buffer, device=device) if key in passing else None
            module._buffers[key] = read(prefix + key).to(device) if empty is None else empty
    if passing:
        with torch.no_grad():
            model._init_weights(module)


def release(model: nn.Module, name: str) -> None:
    """Puts a module back on the meta device."""
    model.get_submodule(name).to("meta")
