"""Safetensors files that are laid out before the first tensor is there, and filled in any order.

What a checkpoint will hold is known from names, dtypes and shapes alone. So its files get their header and their full
size at once (a full disk says so at the start), and each tensor is written at its place when it is ready, whole or in
pieces. What was interrupted goes on with the files as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.storage.files import write_json
from krony.storage.tensor_files import DTYPE_NAMES, INDEX, SINGLE

SHARD_SIZE = 5 * 1000**3  # bytes of tensors a file

TensorLayout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def total(layout: TensorLayout) -> int:
    """Bytes of all tensors."""
    return sum(nbytes(*one) for one in layout.values())


class TensorFile:
    """One safetensors file that is being written."""

    def __init__(self, path: Path, layout: TensorLayout) -> None:
        self.path = path
        order = sorted(layout, key=lambda name: -layout[name][0].itemsize)  # wide ones first: all are aligned
        header: dict = {"__metadata__": {"format": "pt"}}
        self.starts: dict[str, int] = {}
        position = 0
        for name in order:
            dtype, shape = layout[name]
            size = nbytes(dtype, shape)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            self.starts[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size = len(self._head) + position

    def create(self) -> None:
        """Makes the file with its header and its full size. Raises KronyError, on a full disk for one."""
        try:
            with self.path.open("wb") as stream:
                stream.write(self._head)
                stream.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, self.size)
                else:
                    stream.truncate(self.size)
        except OSError as error:
            raise KronyError(f"{self.path} can't be written: {error.strerror} ({self.size:,} bytes)") from None

    def is_there(self) -> bool:
        """Whether the file was created, all of it."""
        return self.path.is_file() and self.path.stat().st_size == self.size

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Writes elements of a tensor, from element ``at`` on. Raises KronyError."""
        data = values.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            with self.path.open("r+b", buffering=0) as stream:
                stream.seek(len(self._head) + self.starts[name] + at * values.dtype.itemsize)
                view = memoryview(data.numpy())  # type: ignore[arg-type]
                while view:
                    view = view[stream.write(view) :]
        except OSError as error:
            raise KronyError(f"{self.path} can't be written: {error.strerror}") from None

    def sync(self) -> None:
        """Waits until the disk has it."""
        try:
            with self.path.open("r+b") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            raise KronyError(f"{self.path} can't be written: {error.strerror}") from None


class Shards:
    """The files of a checkpoint in ``folder``: one, or several of about ``shard_size`` bytes with an index."""

    def __init__(self, folder: Path, layout: TensorLayout, shard_size: int = SHARD_SIZE) -> None:
        self.folder, self.layout = folder, layout
        parts: list[dict] = [{}]
        filled = 0
        for name, one in layout.items():
            size = nbytes(*one)
            if parts[-1] and filled + size > shard_size:
                parts.append({})
                filled = 0
            parts[-1][name] = one
            filled += size
        count = len(parts)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]
        self.files = [TensorFile(folder / name, part) for name, part in zip(names, parts, strict=True)]
        self.home = {name: file for file in self.files for name in file.starts}

    def create(self) -> None:
        """Makes all files, and the index where there are several. Raises KronyError."""
        for file in self.files:
            file.create()
        if len(self.files) > 1:
            counts = {"total_parameters": sum(math.prod(shape) for _, shape in self.layout.values())}
            where = {name: self.home[name].path.name for name in sorted(self.layout)}
            metadata = counts | {"total_size": total(self.layout)}
            write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": where})

    def are_there(self) -> bool:
        """Whether all files were created."""
        index = len(self.files) == 1 or (self.folder / INDEX).is_file()
        return index and all(file.is_there() for file in self.files)

    def put(self, name: str, values: Tensor, at: int = 0) -> None:
        """Writes elements of a tensor, from element ``at`` on. Raises KronyError."""
        self.home[name].put(name, values, at)

    def sync(self) -> None:
        """Waits until the disk has everything."""
        for file in self.files:
            file.sync()
