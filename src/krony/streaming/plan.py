"""Plans a compression layer by layer: the tensors that it reads and writes, and the memory it needs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.allocation import Allocation
from krony.compression.moments import BATCH_TOKENS, SENSITIVITY_TOKENS
from krony.compression.plan import LIBRARIES, CompressionPlan, plan
from krony.config import KronyConfig
from krony.data.calibration_set import LENGTH
from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.source import ModelSource, empty_model, parse_dtype
from krony.models.surgery import Group, put_in
from krony.runtime import distributed
from krony.runtime.hardware import check_device, memory
from krony.storage.shards import TensorLayout, total
from krony.storage.tensor_files import Checkpoint, Entry
from krony.streaming.blockwise import stack_name
from krony.streaming.tensors import file_names, find_entries, saved_tensors, stored_apart

REST = "embeddings, head and norms"
# Weights as safetensors alone: repositories often hold them again in other formats.
DOWNLOAD = "hf download NAME --include '*.safetensors' --include '*.json' --include '*.model' --local-dir FOLDER"

FORWARD, BACKWARD, MOMENTS, FACTORS = "forward", "backward", "moments", "factors"


@dataclass(frozen=True)
class Unit:
    """A part of the work, after which an interrupted run resumes.

    Attributes:
        task: what is done: ``FORWARD`` and ``BACKWARD`` measure the sensitivity, ``MOMENTS`` the rest of what the
            allocation needs, and ``FACTORS`` writes the new layers and copies what is not replaced.
        layer: the index of the transformer layer; None for everything outside the layers.
        name: for people.
    """

    task: str
    layer: int | None
    name: str


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The plan of a compression layer by layer; ``prepare`` makes it, ``krony.streaming.stream.run`` runs it.

    Attributes:
        folder: the model's folder.
        settled: the groups and their splits.
        shapes: module name -> split of every matrix that is replaced; ``with_allocation`` changes them.
        source: the original model, on the meta device.
        target: the compressed model, on the meta device.
        entries: the file and position of each tensor of the source, by name.
        layout: dtype and shape of each tensor to write, by its name in the target.
        names: name in the target -> name in the files.
        reads: whether calibration text is read.
        kept: the neurons that an MLP keeps, by the name of its first matrix, where an allocation has chosen them.
    """

    folder: Path
    settled: CompressionPlan
    shapes: dict[str, KronShape]
    source: PreTrainedModel
    target: PreTrainedModel
    entries: dict[str, Entry]
    layout: TensorLayout
    names: dict[str, str]
    reads: bool
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> KronyConfig:
        """The options of the compression."""
        return self.settled.config

    @property
    def allocates(self) -> bool:
        """Whether the shapes are known only when the text has been read."""
        return self.config.allocation == "global"

    @property
    def measures_gradients(self) -> bool:
        """Whether gradients run through the layers."""
        return self.reads and self.config.needs_gradient

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors in the source's files."""
        return sum(entry.bytes for entry in set(self.entries.values()))  # tied names share an entry

    @property
    def write_bytes(self) -> int:
        """Bytes of tensors to write; with an allocation about as many."""
        return total(self.layout)

    def with_allocation(self, allocation: Allocation) -> Stream:
        """The same plan with these splits and choices of neurons; layers without a split stay dense."""
        target = _target(self.source, allocation.shapes, self.config)
        return replace(
            self, shapes=allocation.shapes, kept=allocation.kept, target=target, layout=_layout(target),
            names=file_names(target) or {},
        )  # fmt: skip

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of temporary files in ``OUT.work`` for this many tokens: hidden states, gradients, and moments."""
        if not self.reads:
            return 0
        layers = len(self.layers)
        state = self.source.config.get_text_config().hidden_size * self.source.dtype.itemsize  # of one token
        states = 2 * tokens * state  # the inputs and outputs of a layer
        kept = 0
        if self.measures_gradients:
            kept += sum(4 * group.sites[-1].out_features ** 2 for group in self.settled.groups)
        if self.allocates:
            kept += sum(
                4 * n**2 for g in self.settled.groups for n in (g.sites[0].in_features, g.sites[-1].in_features)
            )
            states = (layers if self.config.reconstruct else 2) * tokens * state
        if self.measures_gradients:
            states = max(states, layers * min(tokens, SENSITIVITY_TOKENS) * state)
        return kept + states

    def memory_bytes(self, tokens: int) -> int:
        """About how many bytes of memory the run needs at most for this many tokens, libraries included."""
        names = self.layers
        at_once = max([1, *(len(self.groups_of(number)) for number in range(len(names)))])
        working = self.settled.working_memory(self.source.dtype.itemsize, tokens if self.reads else 0, at_once)
        if not self.reads:
            return working
        layers = [_bytes_of(self.source.get_submodule(name)) for name in names]
        table = _bytes_of(self.source.get_input_embeddings())
        held = max(working, table + LIBRARIES)  # the embeddings are freed before moments are used
        if self.measures_gradients:
            held = max(held, LIBRARIES + table + self._loss_bytes(tokens))
        return max(layers) + held

    def _loss_bytes(self, tokens: int) -> int:
        """About how many bytes the head and the loss take: three float32 numbers for each logit, measured."""
        head = self.source.get_output_embeddings()
        batch = min(tokens, max(BATCH_TOKENS // 4, LENGTH))
        return _bytes_of(head) + 3 * 4 * batch * head.weight.shape[0]

    def units(self) -> list[Unit]:
        """The work in order."""
        numbers = range(len(self.layers))
        with_groups = [number for number in numbers if self.groups_of(number)]
        tasks: list[tuple[str, Iterable[int]]] = []
        if self.measures_gradients:
            tasks += [(FORWARD, numbers[:-1]), (BACKWARD, reversed(numbers[with_groups[0] :]))]
        if self.allocates:
            tasks.append((MOMENTS, numbers[: with_groups[-1] + 1]))
        measured = [Unit(task, n, f"{self.layers[n]}, {task}") for task, some in tasks for n in some]
        return [*measured, *(Unit(FACTORS, n, self.layers[n]) for n in numbers), Unit(FACTORS, None, REST)]

    def groups_of(self, layer: int | None) -> list[Group]:
        """The groups of the layer of this index; None for those outside the layers."""
        return [group for group in self.settled.groups if self.layer_of(f"{group.sites[0].name}.") == layer]

    def layer_of(self, tensor: str) -> int | None:
        """The index of the layer that contains a tensor of this name; None if none does."""
        return next((n for n, name in enumerate(self.layers) if tensor.startswith(f"{name}.")), None)

    @cached_property
    def layers(self) -> list[str]:
        """The names of all layers; none if nothing has to be done layer by layer."""
        inside = [group for group in self.settled.groups if group.layer is not None or self.reads]
        if not inside:
            return []
        stack = stack_name(inside, self.source)
        return [f"{stack}.{n}" for n in range(len(self.source.get_submodule(stack)))]


def _bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def choose(
    source: ModelSource, config: KronyConfig, *, wanted: bool | None, dtype: str, device: str, reads: bool = False
) -> Stream | None:
    """The plan for compressing layer by layer, or None for loading the model.

    Args:
        wanted: True to stream, False to load the model. None streams a folder if the initialisation works on one
            matrix at a time and no text is read; otherwise if the weights exceed half of the machine's memory. A model
            in the hub's cache streams only for True.
        dtype: dtype of the compressed model, ``auto`` for that of the files.
        device: where layers run and factors are computed.
        reads: whether calibration text is given, even if the initialisation doesn't need it.

    Raises:
        KronyError: ``wanted`` is True and the model can't be streamed, the folder is damaged, or there is no such
            device.
    """
    check_device(device)
    if wanted is False or (wanted is None and source.folder is None):
        return None
    why = _obstacle(source, config, reads=reads, device=device)
    if wanted and why:
        raise KronyError(f"--stream: {source.name} can't be compressed layer by layer: {why}")
    if source.files is None or why:
        return None
    one_by_one = config.initialisation.per_matrix and not reads
    if wanted is None and not one_by_one and 2 * Checkpoint(source.files).bytes <= memory():
        return None
    return _settle(source, source.files, config, dtype=dtype, reads=reads)


def _obstacle(source: ModelSource, config: KronyConfig, *, reads: bool, device: str = "cpu") -> str | None:
    """Why the model can't be compressed layer by layer, in words; None if it can."""
    if source.files is None:
        return f"it is neither a folder nor in the hub's cache, so download it first ({DOWNLOAD})"
    if config.tune:
        return "--tune trains all layers together"
    if config.embedding is not None:
        return "--embedding unties the head, which is outside the layers"
    if config.split_attention:
        return "--split-attention makes layers that its files don't have"
    if config.reinit:
        return "--reinit draws the full model at random"
    if device == "auto":
        return "--device auto spreads the full model over devices"
    if distributed.launched() > 1:
        return f"that works in one process, and there are {distributed.launched()}"
    if source.is_compressed:
        return "it is compressed already"
    sharing = getattr(source.config.get_text_config(), "num_kv_shared_layers", 0)
    if sharing and (reads or config.needs_text_for):
        return "some of its layers use keys and values of earlier ones, so on text it runs only as a whole"
    if file_names(source.skeleton) is None:
        return f"transformers rearranges the tensors of a {source.config.model_type} while it loads them"
    if apart := stored_apart(source.skeleton, Checkpoint(source.files)):
        return f"{apart[0]} and {apart[1]} are one by its config, and its files hold them with other values"
    return None


def prepare(
    source: ModelSource, config: KronyConfig, *, dtype: str | torch.dtype = "auto", reads: bool = False
) -> Stream:
    """Reads the headers of the model's files and plans the tensors to write. No weights are read.

    ``reads``: whether calibration text will be given, even if the initialisation doesn't need it.

    Raises KronyError if the model can't be compressed layer by layer, or if its files are damaged or incomplete.
    """
    why = _obstacle(source, config, reads=reads)
    if why or source.files is None:
        raise KronyError(f"{source.name} can't be compressed layer by layer: {why}")
    return _settle(source, source.files, config, dtype=dtype, reads=reads)


def _settle(where: ModelSource, folder: Path, config: KronyConfig, *, dtype: str | torch.dtype, reads: bool) -> Stream:
    checkpoint = Checkpoint(folder)
    model_config = copy.deepcopy(where.config)  # it gets the dtype of what is written
    model_config.dtype = _dtype(where.dtype(dtype), model_config.dtype, checkpoint)
    source = empty_model(model_config).eval()
    settled = plan(source, config)
    target = _target(source, settled.shapes, config)
    stream = Stream(
        folder=folder,
        settled=settled,
        shapes=settled.shapes,
        source=source,
        target=target,
        entries=find_entries(source, checkpoint),
        layout=_layout(target),
        names=file_names(target) or {},
        reads=reads or config.needs_text_for is not None,
    )
    assert stream.layers is not None  # raises KronyError unless there is one stack of layers
    return stream


def _target(source: PreTrainedModel, shapes: dict[str, KronShape], config: KronyConfig) -> PreTrainedModel:
    """The compressed model, on the meta device."""
    target = empty_model(copy.deepcopy(source.config))
    for name, shape in shapes.items():
        old: Any = source.get_submodule(name)
        new = KroneckerLinear(
            shape,
            bias=old.bias is not None,
            scalars=config.has_scalars(shape.factors),
            device="meta",
            dtype=old.weight.dtype,
        )
        put_in(target, name, new)
    return target


def _layout(target: PreTrainedModel) -> TensorLayout:
    """Dtype and shape of each tensor to write, by its name in the model."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in saved_tensors(target).items()}


def _dtype(wanted: str | torch.dtype, configured: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that loading would give: ``wanted``, the config's, or that of the first file's first floating-point
    tensor by name, as transformers reads it.
    """
    dtype = parse_dtype(wanted)
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(configured, torch.dtype):
        return configured
    first = sorted((e for e in checkpoint.entries.values() if e.file == checkpoint.files[0]), key=lambda e: e.name)
    return next((e.dtype for e in first if e.dtype.is_floating_point), torch.float32)
