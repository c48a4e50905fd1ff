"""Runs a model one transformer layer at a time: the other layers stay on disk, and so do the hidden states.

The model lies on the meta device. To run layer i on the calibration text, the complete model runs, so that masks and
position embeddings are the usual ones, with two changes: every other layer returns its input unchanged, and layer i
reads the hidden states that layer i − 1 wrote to a file. Layer i writes its output to another file. The hidden states
equal those of a run of the complete model in the same batches, bit for bit. Gradients run through the layers in the
same way, from the last one to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.moments import MomentAccumulator, SensitivityAccumulator, drawn_likelihood, text_batches
from krony.compression.reconstruction import Examples, recorded
from krony.errors import KronyError
from krony.init.base import Moments
from krony.models.surgery import Group
from krony.storage.shards import TensorFile
from krony.storage.tensor_files import Entry, read_header

Read = Callable[[str], Tensor]  # reads a parameter or buffer of the model by name, in the model's dtype


class Blocks:
    """Runs the layers of ``model``, which is on the meta device, one by one on ``ids: (sequences, length)``.

    The weights of a layer stay in memory until ``release``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: str,
        ids: Tensor,
        read: Read,
        *,
        weighted: bool,
        gradients: bool = False,
        device: str = "cpu",
    ) -> None:
        """Fills all modules outside the stack but the head.

        Args:
            stack: dotted name of the list of layers.
            read: reads a parameter or buffer by name.
            weighted: whether tokens are weighted by ``1/‖h_t‖²``.
            gradients: whether ``forward`` and ``sensitivities`` will be called.
            device: where the layers run.
        """
        self.model, self.stack, self.ids, self.read = model, stack, ids, read
        self.weighted, self.device = weighted, device
        self.backward, others = text_batches(ids, sensitivity=gradients)
        self.all = self.backward + others
        self.layers: list[nn.Module] = list(model.get_submodule(stack))
        self.returns = 0  # length of the tuple that a layer returns; 0 for a tensor
        base = {id(m) for m in model.base_model.modules()} - {id(m) for layer in self.layers for m in layer.modules()}
        self.around = _with_tensors(model, lambda module: id(module) in base)
        base |= {id(m) for layer in self.layers for m in layer.modules()}
        self.head = _with_tensors(model, lambda module: id(module) not in base)
        for name in self.around:
            _fill_one(model, name, read, device)

    def step(self, index: int, groups: Sequence[Group], before: Path | None, after: Path | None) -> list[Moments]:
        """Runs layer ``index`` on the complete text, and returns the moments of its ``groups``.

        Args:
            before: the file with the layer's inputs; None for the first layer, which reads the embeddings.
            after: the file to write for the next layer; None after the last layer that is compressed.
        """
        self.fill(index)
        sums = [MomentAccumulator(self.model, group, self.weighted) for group in groups]
        try:
            self._pass(index, self.all, before, after)
        finally:
            for accumulator in sums:
                accumulator.remove()
        return [accumulator.moments(self.ids.numel()) for accumulator in sums]

    def examples(self, index: int, groups: Sequence[Group], before: Path | None) -> Iterator[Examples]:
        """The inputs of the ``groups`` of layer ``index``, whose weights are in memory, in order.

        The layer runs on the complete text again when they are asked for; ``before`` as in ``step``.
        """
        read = partial(self._pass, index, self.all, before, None)
        return recorded(self.model, groups, self.ids.numel(), read, device=self.device, token_weighting=self.weighted)

    def forward(self, index: int, before: Path | None, after: Path) -> None:
        """Runs layer ``index`` on the sequences that measure the sensitivity; files as in ``step``."""
        self.fill(index)
        self._pass(index, self.backward, before, after)

    def sensitivities(
        self, index: int, groups: Sequence[Group], before: Path | None, above: Path | None, below: Path | None
    ) -> list[Tensor | None]:
        """Runs layer ``index`` forward and backward, and returns the sensitivity of its ``groups``.

        Args:
            before: the file with the layer's inputs that ``forward`` wrote; None for the first layer.
            above: the file with the gradient of the loss with respect to the layer's outputs; None for the last layer,
                after which the head and the loss are computed.
            below: the file to write the gradient with respect to the layer's inputs to; None where no layer needs it.
        """
        self.fill(index)
        sums = [SensitivityAccumulator(self.model, group) for group in groups]
        run = _Backward(self._entry(before), self._entry(above), below, sum(map(len, self.backward)), self.device)
        try:
            with torch.enable_grad(), self._alone(index, run), self._embeddings(needed=before is None):
                for rows in self.backward:
                    rows = rows.to(self.device)
                    if above is None:
                        run.descend(drawn_likelihood(self._logits(rows), rows))
                    else:
                        self.model.base_model(input_ids=rows, use_cache=False)
                        run.descend()
        finally:
            for accumulator in sums:
                accumulator.remove()
            for name in self.head if above is None else ():
                release(self.model, name)
        run.sync()
        return [accumulator.sensitivity() for accumulator in sums]

    def _logits(self, rows: Tensor) -> Tensor:
        """``(sequences, length, vocabulary)``."""
        for name in self.head:
            if any(tensor.is_meta for tensor in self.model.get_submodule(name).parameters(recurse=False)):
                _fill_one(self.model, name, self.read, self.device)
        return self.model(input_ids=rows, use_cache=False).logits

    def _pass(self, index: int, batches: Sequence[Tensor], before: Path | None, after: Path | None) -> None:
        """Runs layer ``index`` on these ``batches`` of sequences; files as in ``step``."""
        run = _Run(self._entry(before), after, sum(map(len, batches)), self.device)
        with torch.no_grad(), self._alone(index, run), self._embeddings(needed=before is None):
            for rows in batches:
                self.model.base_model(input_ids=rows.to(self.device), use_cache=False)
        run.sync()

    @staticmethod
    def _entry(file: Path | None) -> Entry | None:
        """The only tensor in a file."""
        return None if file is None else read_header(file)[0]

    def fill(self, index: int) -> None:
        """Reads the weights of layer ``index``."""
        fill(self.model, f"{self.stack}.{index}", self.read, self.device)

    def release(self, index: int) -> None:
        """Frees the weights of layer ``index``."""
        release(self.model, f"{self.stack}.{index}")

    @contextmanager
    def _alone(self, index: int, run: _Run) -> Iterator[None]:
        """In the block, layer ``index`` reads and writes through ``run``, and other layers return their input."""

        def pass_on(*args: Any, **options: Any) -> Any:
            hidden = args[0] if args else options["hidden_states"]
            return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden

        own = self.layers[index].forward

        def forward(*args: Any, **options: Any) -> Any:
            hidden = run.enter(args[0] if args else options.pop("hidden_states"))
            output = own(hidden, *args[1:], **options)
            self.returns = len(output) if isinstance(output, tuple) else 0
            run.leave(output[0] if isinstance(output, tuple) else output)
            return output

        for layer in self.layers:
            layer.forward = pass_on
        self.layers[index].forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the method of the class is visible again

    @contextmanager
    def _embeddings(self, *, needed: bool) -> Iterator[None]:
        """Frees the token embeddings, the largest matrix of many models, in the block unless they are ``needed``."""
        table = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is table)
        if needed:
            if table.weight.is_meta:  # freed by an earlier layer
                _fill_one(self.model, name, self.read, self.device)
            yield
            return
        release(self.model, name)
        width, dtype = table.weight.shape[1], self.model.dtype
        table.forward = lambda ids: torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)
        try:
            yield
        finally:
            del table.forward


class _Run:
    """Reads the inputs of a layer and writes its outputs, batch after batch."""

    def __init__(self, entering: Entry | None, after: Path | None, rows: int, device: str) -> None:
        self.entering, self.device = entering, device
        self.out = None if after is None else _States(after, rows)
        self.row = 0

    def enter(self, hidden: Tensor) -> Tensor:
        """The inputs of these rows, ``(batch, length, width)``: from the file, or ``hidden`` for the first layer."""
        return hidden if self.entering is None else self.entering.read(self.row, self.row + len(hidden)).to(self.device)

    def leave(self, hidden: Tensor) -> None:
        """Writes the outputs of these rows, ``(batch, length, width)``, if a next layer needs them."""
        if self.out is not None:
            self.out.write(self.row, hidden)
        self.row += len(hidden)

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        if self.out is not None:
            self.out.sync()


class _Backward(_Run):
    """Reads the inputs of a layer and the gradient of its outputs, and writes the gradient of its inputs."""

    def __init__(self, entering: Entry | None, above: Entry | None, below: Path | None, rows: int, device: str) -> None:
        super().__init__(entering, below, rows, device)
        self.above = above
        self.inputs = self.outputs = torch.empty(0)  # of the present batch, (batch, length, width)

    def enter(self, hidden: Tensor) -> Tensor:
        self.inputs = super().enter(hidden).detach().requires_grad_()
        return self.inputs

    def leave(self, hidden: Tensor) -> None:
        self.outputs = hidden

    def descend(self, loss: Tensor | None = None) -> None:
        """The backward pass of the present batch: from ``loss``, a scalar, or from the outputs' gradient in the file.

        No weight has a gradient.
        """
        last = self.row + len(self.inputs)
        if loss is None:
            assert self.above is not None
            self.outputs.backward(self.above.read(self.row, last).to(self.device))
        else:
            loss.backward()
        if self.out is not None:
            assert self.inputs.grad is not None
            self.out.write(self.row, self.inputs.grad)
        self.row = last
        self.inputs = self.outputs = torch.empty(0)


class _States:
    """A file of ``rows`` sequences of hidden states, ``(rows, length, width)``, which gets its shape from the first."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self.file: TensorFile | None = None

    def write(self, row: int, states: Tensor) -> None:
        """Writes consecutive sequences, the first at index ``row``: ``(batch, length, width)``."""
        if self.file is None:
            self.file = TensorFile(self.path, {"hidden": (states.dtype, (self.rows, *states.shape[1:]))})
            self.file.create()
        self.file.put("hidden", states, at=row * states[0].numel())

    def sync(self) -> None:
        """Waits until the disk has them."""
        if self.file is not None:
            self.file.sync()


def _with_tensors(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[str]:
    """The modules of the model that are ``chosen`` and have parameters or buffers of their own."""
    return [
        name for name, module in model.named_modules() if chosen(module) and (module._parameters or module._buffers)
    ]


def stack_name(groups: Sequence[Group], model: nn.Module) -> str:
    """The dotted name of the ``nn.ModuleList`` that contains all groups. Raises KronyError if there is none."""
    stacks = set()
    for group in groups:
        parts = group.sites[0].name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            raise KronyError(f"{group.sites[0].name} is in no transformer layer, so it can't be run layer by layer")
        stacks.add(".".join(parts[: numbers[0]]))
    if len(stacks) != 1:
        raise KronyError(
            f"the layers are in several stacks ({', '.join(sorted(stacks))}), so they can't run one by one"
        )
    stack = stacks.pop()
    if not isinstance(model.get_submodule(stack), nn.ModuleList):
        raise KronyError(f"{stack} is no list of layers, so it can't be run layer by layer")
    return stack


def fill(model: PreTrainedModel, name: str, read: Read, device: str = "cpu") -> None:
    """Reads the weights of a module on the meta device and its submodules; transformers initialises other buffers."""
    for inner, _ in model.get_submodule(name).named_modules():
        _fill_one(model, ".".join(part for part in (name, inner) if part), read, device)


def _fill_one(model: PreTrainedModel, name: str, read: Read, device: str) -> None:
    """``fill`` for a single module without its submodules."""
    module, prefix = model.get_submodule(name), f"{name}." if name else ""
    for key, value in module._parameters.items():
        if value is not None:
            parameter = nn.Parameter(read(prefix + key).to(device), requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # so that transformers leaves it alone
            module._parameters[key] = parameter
    not_saved = module._non_persistent_buffers_set
    for key, buffer in module._buffers.items():
        if buffer is not None:
            empty = torch.empty_like(buffer, device=device) if key in not_saved else None
            module._buffers[key] = read(prefix + key).to(device) if empty is None else empty
    if not_saved:
        with torch.no_grad():
            model._init_weights(module)


def release(model: nn.Module, name: str) -> None:
    """Moves a module back to the meta device, which frees its weights."""
    model.get_submodule(name).to("meta")
