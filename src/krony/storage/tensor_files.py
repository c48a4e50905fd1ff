"""Safetensors folders: checked before anything is read from them, and read without memory maps.

A checkpoint is a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the shards it names.
``Checkpoint`` reads only the headers. A tensor's bytes, or those of some of its rows, are read when they are asked for;
a memory map's pages would count as this process's memory. Nothing outside the folder is opened. ``save_beside``
writes a file for a cache.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from krony.errors import KronyError, WriteError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
PIECE = 16 * 1024**2  # bytes copied at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint: its name, dtype and shape, and its place in a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # position of its first byte in the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor, or its rows ``first:last``. Raises KronyError if the file can't be read."""
        if not self.shape:
            return self._read(self.start, self.bytes).view(self.dtype).reshape(())
        last = self.shape[0] if last is None else last
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.start + first * row, (last - first) * row).view(self.dtype).reshape(-1, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        """All elements in order, as flat tensors ``(n,)`` of at most ``PIECE`` bytes."""
        count, step = math.prod(self.shape), PIECE // self.dtype.itemsize
        for begin in range(0, count, step):
            size = min(step, count - begin) * self.dtype.itemsize
            yield self._read(self.start + begin * self.dtype.itemsize, size).view(self.dtype)

    def _read(self, start: int, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(start)
                done = 0
                while done < size:
                    got = stream.readinto(view[done:])
                    if not got:
                        raise KronyError(f"{self.file} ends in the middle of {self.name}: fetch or write it again")
                    done += got
        except OSError as error:
            raise KronyError(f"{self.file} can't be read: {error.strerror}") from None
        return buffer


class Checkpoint:
    """The tensors of a folder by name, checked against the sizes of the files.

    Raises KronyError, naming the file: there are no weights or only pickles, a header is damaged, the index names files
    that are missing or outside the folder, or tensors that are in none of the files.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"x": torch.arange(6.0).view(3, 2)}, Path(folder) / "model.safetensors")
        ...     entry = Checkpoint(Path(folder)).entries["x"]
        ...     print(entry.shape, entry.bytes, entry.read(first=1))
        (3, 2) 24 tensor([[2., 3.],
                [4., 5.]])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.files: list[Path] = []
        if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
            self.files = [inside(folder, SINGLE)]
            self.entries = {entry.name: entry for entry in read_header(self.files[0])}
        elif (folder / INDEX).exists():
            self._read_shards()
        else:
            raise KronyError(_no_weights(folder))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def _read_shards(self) -> None:
        index = inside(self.folder, INDEX)
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise KronyError(f'{index}: "weight_map" is not a map of tensor names to file names')
        if not named:
            raise KronyError(f'{index}: "weight_map" names no tensor')
        found: dict[str, Entry] = {}
        for file in sorted(set(named.values())):
            if PurePosixPath(file).suffix != ".safetensors":
                raise KronyError(f"{index} names {file!r}: only .safetensors files are read")
            path = inside(self.folder, file, named_by=index)
            self.files.append(path)
            for entry in read_header(path):
                if named.get(entry.name) == file:
                    found[entry.name] = entry
        if missing := sorted(set(named) - set(found)):
            file = self.folder / named[missing[0]]
            raise KronyError(f"{file} has no tensor {missing[0]}, which {index.name} says it has")
        self.entries = found


def inside(folder: Path, name: str, *, named_by: Path | None = None) -> Path:
    """The file of this name in ``folder``. Raises KronyError if it is missing, or lies elsewhere by name or by link."""
    by = f"{named_by} names {name!r}" if named_by else f"{folder / name}"
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if not name or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise KronyError(f"{by}: a file of a model lies in its folder, so this is not opened")
    path = folder / name
    if not path.exists():
        raise KronyError(f"{by}, and there is no such file in {folder}" if named_by else f"{by} is missing")
    if not path.is_file():
        raise KronyError(f"{path} is not a file")
    check_link(folder, path)
    return path


def check_link(folder: Path, path: Path) -> None:
    """Raises KronyError if ``path`` leads out of ``folder``, except to the folder ``blobs`` of the hub's cache."""
    real, home = (Path(os.path.realpath(each)) for each in (path, folder))  # unlike resolve, takes links in a circle
    homes = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(h) for h in homes):
        raise KronyError(f"{path} links to {real}, out of the model's folder, so it is not opened: copy the file there")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises KronyError."""
    try:
        if path.stat().st_size > LONGEST_HEADER:
            raise KronyError(f"{path} has {path.stat().st_size:,} bytes: no such file of a model is so long")
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KronyError(f"{path} can't be read: {error.strerror}") from None
    except KronyError:
        raise
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        raise KronyError(f"{path} is not JSON") from None
    if not isinstance(read, dict):
        raise KronyError(f"{path} holds no JSON object")
    return read


def read_header(file: Path) -> list[Entry]:
    """The tensors in a safetensors file by its header, in the order of their bytes. Raises KronyError if damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, LONGEST_HEADER):
                raise KronyError(f"{file} is not a safetensors file{_guess(start)}: fetch or write it again")
            raw = stream.read(length)
    except OSError as error:
        raise KronyError(f"{file} can't be read: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
        header.pop("__metadata__", None)
        entries = [_entry(name, said, file, 8 + length) for name, said in header.items()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise KronyError(f"{file} has a damaged header ({error}): fetch or write it again") from None
    entries.sort(key=lambda entry: (entry.start, entry.bytes))
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            raise KronyError(f"{file} has a damaged header: {entry.name} does not begin where the one before it ends")
        position += entry.bytes
    if position != size:
        raise KronyError(f"{file} has {size:,} bytes and should have {position:,}: fetch or write it again")
    return entries


def _entry(name: str, said: Any, file: Path, data: int) -> Entry:
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is malformed")
    shape, offsets = said["shape"], said["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} is malformed")
    if not isinstance(said["dtype"], str) or said["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {said['dtype']!r}")
    start = data + (offsets[0] if offsets else 0)
    entry = Entry(name=name, file=file, dtype=DTYPES[said["dtype"]], shape=tuple(shape), start=start)
    if len(offsets) != 2 or offsets[1] - offsets[0] != entry.bytes:
        raise ValueError(f"{name!r} does not have the bytes of its shape and dtype")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _guess(start: bytes) -> str:
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04":
        return " but a pickle, which could run code when it is read"
    return " but a Git LFS pointer" if start[:8] == b"version " else ""


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds no {SINGLE}, and {pickles[0]} is a pickle, which could run code when it is read: "
            "convert it to safetensors where you trust it"
        )
    return f"{folder} holds no weights: there is no {SINGLE} and no {INDEX} in it"


def save_beside(tensors: dict[str, Tensor], file: Path, what: str) -> None:
    """Writes a safetensors file beside its place, then renames it; several processes may write the same file.

    Raises WriteError, which says that ``what`` can't be stored.
    """
    beside = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside)
        with beside.open("r+b") as stream:
            os.fsync(stream.fileno())
        beside.replace(file)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{file.parent}: {what} can't be stored there: {error}") from None
    finally:
        with suppress(OSError):  # if there is no folder, there is no file
            beside.unlink()
