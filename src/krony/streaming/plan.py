"""Plans a compression layer by layer: the tensors that it reads and writes, and the memory it needs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from krony.compression.plan import LIBRARIES, CompressionPlan, plan
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.kronecker.linear import KroneckerLinear
from krony.models.source import ModelSource, empty_model, parse_dtype
from krony.models.surgery import Group, put_in
from krony.runtime import distributed
from krony.runtime.hardware import check_device, memory
from krony.storage.shards import TensorLayout, total
from krony.storage.tensor_files import Checkpoint, Entry
from krony.streaming.blockwise import stack_name
from krony.streaming.tensors import file_names, find_entries, saved_tensors

REST = "embeddings, head and norms"
# Weights as safetensors alone: repositories often hold them again in other formats.
DOWNLOAD = "hf download NAME --include '*.safetensors' --include '*.json' --include '*.model' --local-dir FOLDER"


PLAIN = (
    "layer by layer, --reconstruct trains towards the plain outputs of each MLP, and neurons are chosen by them: "
    "weighing errors by how much they change the loss needs the gradient through the full model"
)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The plan of a compression layer by layer; ``prepare`` makes it, ``krony.streaming.stream.run`` runs it.

    Attributes:
        folder: the model's folder.
        settled: the groups and their splits.
        source: the original model, on the meta device.
        target: the compressed model, on the meta device.
        entries: the file and position of each tensor of the source, by name.
        layout: dtype and shape of each tensor to write, by its name in the target.
        names: name in the target -> name in the files.
        reads: whether calibration text is read.
    """

    folder: Path
    settled: CompressionPlan
    source: PreTrainedModel
    target: PreTrainedModel
    entries: dict[str, Entry]
    layout: TensorLayout
    names: dict[str, str]
    reads: bool

    @property
    def config(self) -> KronyConfig:
        """The options of the compression."""
        return self.settled.config

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors in the source's files."""
        return sum(entry.bytes for entry in set(self.entries.values()))  # tied names share an entry

    @property
    def write_bytes(self) -> int:
        """Bytes of tensors to write."""
        return total(self.layout)

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of temporary hidden states in ``OUT.work`` for this many tokens: the inputs and outputs of a layer."""
        if not self.reads:
            return 0
        return 2 * tokens * self.source.get_input_embeddings().weight.shape[1] * self.source.dtype.itemsize

    @property
    def differs(self) -> str | None:
        """How the result differs from that of ``krony.compress``, in a sentence; None if it doesn't."""
        return PLAIN if self.config.reconstruct else None

    def memory_bytes(self, tokens: int) -> int:
        """About how many bytes of memory the run needs at most for this many tokens, libraries included."""
        names = self._layers()
        per_layer = [sum(_is_in(group, name) for group in self.settled.groups) for name in names]
        at_once = max([1, *per_layer])
        working = self.settled.working_memory(self.source.dtype.itemsize, tokens if self.reads else 0, at_once)
        if not self.reads:
            return working
        layers = [_bytes_of(self.source.get_submodule(name)) for name in names]
        table = _bytes_of(self.source.get_input_embeddings())
        return max(layers) + max(working, table + LIBRARIES)  # the embeddings are freed before moments are used

    def units(self) -> list[str]:
        """The units of work in order: every layer by name, then everything outside the layers."""
        return [*self._layers(), REST]

    def _layers(self) -> list[str]:
        """The names of all layers; none if nothing has to be done layer by layer."""
        inside = [group for group in self.settled.groups if group.layer is not None or self.reads]
        if not inside:
            return []
        stack = stack_name(inside, self.source)
        return [f"{stack}.{n}" for n in range(len(self.source.get_submodule(stack)))]


def _is_in(group: Group, layer: str) -> bool:
    """Whether the group is in the layer of this name."""
    return group.sites[0].name.startswith(f"{layer}.")


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
            in the hub's cache, and ``config.reconstruct``, whose result differs, stream only for True.
        dtype: dtype of the compressed model, ``auto`` for that of the files.
        device: where layers run and factors are computed.
        reads: whether calibration text is given, even if the initialisation doesn't need it.

    Raises:
        KronyError: ``wanted`` is True and the model can't be streamed, the folder is damaged, or there is no such
            device.
    """
    check_device(device)
    why = _obstacle(source, config, device)
    if wanted and why:
        raise KronyError(f"--stream: {source.name} can't be compressed layer by layer: {why}")
    if wanted is False or source.files is None or why:
        return None
    if wanted is None and (source.folder is None or config.reconstruct):
        return None
    one_by_one = config.initialisation.per_matrix and not reads
    if wanted is None and not one_by_one and 2 * Checkpoint(source.files).bytes <= memory():
        return None
    return _settle(source, source.files, config, dtype=dtype, reads=reads)


def _obstacle(source: ModelSource, config: KronyConfig, device: str = "cpu") -> str | None:
    """Why the model can't be compressed layer by layer, in words; None if it can."""
    if source.files is None:
        return f"it is neither a folder nor in the hub's cache, so download it first ({DOWNLOAD})"
    if config.allocation == "global":
        return "--allocation global needs the gradient through the full model"
    if config.tune:
        return "--tune needs the gradient through the full model"
    if config.embedding is not None:
        return "--embedding unties the head, which is outside the layers"
    if config.split_attention:
        return "--split-attention makes layers that its files don't have"
    if config.reinit:
        return "--reinit draws the full model at random"
    if device == "auto":
        return "--device auto spreads the full model over devices"
    if distributed.count() > 1:
        return f"that works in one process, and there are {distributed.count()}"
    if source.is_compressed:
        return "it is compressed already"
    if file_names(source.skeleton) is None:
        return f"transformers rearranges the tensors of a {source.config.model_type} while it loads them"
    return None


def prepare(
    source: ModelSource, config: KronyConfig, *, dtype: str | torch.dtype = "auto", reads: bool = False
) -> Stream:
    """Reads the headers of the model's files and plans the tensors to write. No weights are read.

    ``reads``: whether calibration text will be given, even if the initialisation doesn't need it.

    Raises KronyError if the model can't be compressed layer by layer, or if its files are damaged or incomplete.
    """
    why = _obstacle(source, config)
    if why or source.files is None:
        raise KronyError(f"{source.name} can't be compressed layer by layer: {why}")
    return _settle(source, source.files, config, dtype=dtype, reads=reads)


def _settle(where: ModelSource, folder: Path, config: KronyConfig, *, dtype: str | torch.dtype, reads: bool) -> Stream:
    checkpoint = Checkpoint(folder)
    model_config = copy.deepcopy(where.config)  # it gets the dtype of what is written
    model_config.dtype = _dtype(where.dtype(dtype), model_config.dtype, checkpoint)
    source, target = empty_model(model_config).eval(), empty_model(model_config)
    settled = plan(source, config)
    for name, shape in settled.shapes.items():
        old: Any = source.get_submodule(name)
        new = KroneckerLinear(
            shape,
            bias=old.bias is not None,
            scalars=config.has_scalars(shape.factors),
            device="meta",
            dtype=old.weight.dtype,
        )
        put_in(target, name, new)
    stream = Stream(
        folder=folder,
        settled=settled,
        source=source,
        target=target,
        entries=find_entries(source, checkpoint),
        layout={name: (value.dtype, tuple(value.shape)) for name, value in saved_tensors(target).items()},
        names=file_names(target) or {},
        reads=reads or config.needs_text_for is not None,
    )
    stream.units()  # raises KronyError unless there is one stack of layers
    return stream


def _dtype(wanted: str | torch.dtype, configured: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that loading would give: ``wanted``, the config's, or that of the first floating-point tensor."""
    dtype = parse_dtype(wanted)
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(configured, torch.dtype):
        return configured
    return next((e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point), torch.float32)
