"""Safetensors files whose layout is fixed before the first tensor exists, and which are filled in any order.

Names, dtypes and shapes alone determine the files. They get their header and their full size at once, so a full disk is
noticed at the start. Each tensor is written at its place when it is ready, completely or in pieces. An interrupted run
resumes with the files as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krony.errors import WriteError
from krony.storage.files import write_json
from krony.storage.paths import cannot_write
from krony.storage.tensor_files import DTYPE_NAMES, INDEX

SHARD_SIZE = 5 * 1000**3  # bytes of tensors per file

TensorLayout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Examples:
        >>> nbytes(torch.bfloat16, (3, 4))
        24
    """
    return math.prod(shape) * dtype.itemsize


def total(layout: TensorLayout) -> int:
    """Bytes of all tensors."""
    return sum(nbytes(*one) for one in layout.values())


class TensorFile:
    """One safetensors file that is being written.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = TensorFile(Path(folder) / "x.safetensors", {"x": (torch.float32, (3,))})
        ...     file.create()
        ...     file.put("x", torch.tensor([2.0, 3.0]), at=1)
        ...     load_file(file.path)
        {'x': tensor([0., 2., 3.])}
    """

    def __init__(self, path: Path, layout: TensorLayout) -> None:
        self.path = path
        order = sorted(
            layout, key=lambda name: -layout[name][0].itemsize
        )  # wide dtypes first, so that all tensors are aligned
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.offsets: dict[str, int] = {}
        position = 0
        for name in order:
            dtype, shape = layout[name]
            size = nbytes(dtype, shape)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            self.offsets[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size = len(self._head) + position

    def create(self) -> None:
        """Makes the file with its header and its full size. Raises WriteError, for example on a full disk."""
        try:
            with self.path.open("wb") as stream:
                stream.write(self._head)
                stream.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, self.size)
                else:
                    stream.truncate(self.size)
        except OSError as error:
            raise WriteError(f"{self.path} can't be written: {error.strerror} ({self.size:,} bytes)") from None

    def exists(self) -> bool:
        """Whether the file exists with its full size."""
        return self.path.is_file() and self.path.stat().st_size == self.size

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Writes consecutive elements of a tensor, the first at index ``at`` of the flat tensor. Raises WriteError."""
        data = values.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            with self.path.open("r+b", buffering=0) as stream:
                stream.seek(len(self._head) + self.offsets[name] + at * values.dtype.itemsize)
                view = memoryview(data.numpy())  # type: ignore[arg-type]
                while view:
                    view = view[stream.write(view) :]
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def sync(self) -> None:
        """Waits until the disk has the file. Raises WriteError."""
        try:
            with self.path.open("r+b") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None


class Shards:
    """The files of a checkpoint in ``folder``: one, or several of at most ``shard_size`` bytes with an index.

    Each tensor is in the file that ``save_pretrained`` puts it in; one that is larger than a shard has its own.
    """

    def __init__(self, folder: Path, layout: TensorLayout, shard_size: int = SHARD_SIZE) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards  # heavy; what save_pretrained calls

        self.folder, self.layout = folder, layout
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
        split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
        self.files = [
            TensorFile(folder / file, {name: layout[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        ]
        self.file_of = {name: file for file in self.files for name in file.offsets}

    def create(self) -> None:
        """Makes all files, and the index where there are several. Raises WriteError."""
        for file in self.files:
            file.create()
        if len(self.files) > 1:
            counts = {"total_parameters": sum(math.prod(shape) for _, shape in self.layout.values())}
            where = {name: self.file_of[name].path.name for name in sorted(self.layout)}
            metadata = counts | {"total_size": total(self.layout)}
            write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": where})

    def exist(self) -> bool:
        """Whether all files exist with their full size."""
        index = len(self.files) == 1 or (self.folder / INDEX).is_file()
        return index and all(file.exists() for file in self.files)

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Writes consecutive elements of a tensor, the first at index ``at`` of the flat tensor. Raises WriteError."""
        self.file_of[name].put(name, values, at)

    def sync(self) -> None:
        """Waits until the disk has all files. Raises WriteError."""
        for file in self.files:
            file.sync()
