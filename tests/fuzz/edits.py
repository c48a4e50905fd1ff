"""Edits of sound files. Each takes the file and plain values, so that a case can be kept as JSON.

Bytes are kept as text in Latin-1, one character a byte.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

HUGE = 6 * 10**9  # bytes of what unpacks to more than a memory may hold


def write(file: Path, content: str) -> None:
    """The content is another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("latin-1"))


def splice(file: Path, start: int, length: int, content: str) -> None:
    """``length`` bytes from ``start`` are replaced; the start is taken modulo the file's length."""
    raw = file.read_bytes()
    start %= len(raw) + 1
    file.write_bytes(raw[:start] + content.encode("latin-1") + raw[start + length :])


def put(file: Path, path: list[Any], value: Any) -> None:
    """A value in a JSON file is another."""
    said = json.loads(file.read_text())
    _within(said, path)[path[-1]] = value
    file.write_text(json.dumps(said))


def drop(file: Path, path: list[Any]) -> None:
    """A value in a JSON file is missing."""
    said = json.loads(file.read_text())
    del _within(said, path)[path[-1]]
    file.write_text(json.dumps(said))


def header(file: Path, path: list[Any], value: Any) -> None:
    """A value in the header of a safetensors file is another."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    said = json.loads(raw[8 : 8 + length])
    _within(said, path)[path[-1]] = value
    text = json.dumps(said).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def tensor(file: Path, name: str, how: str) -> None:
    """A tensor of a safetensors or a ``.pt`` file is as one of ``TENSORS`` makes it."""
    from safetensors.torch import load_file, save_file

    if file.suffix == ".pt":
        tensors = torch.load(file)
        tensors[name] = TENSORS[how](tensors[name])
        torch.save(tensors, file)
    else:
        tensors = load_file(file)
        tensors[name] = TENSORS[how](tensors[name]).contiguous()
        save_file(tensors, file, {"format": "pt"})


def rename(file: Path, name: str, other: str) -> None:
    """A tensor of a ``.pt`` file has another name."""
    tensors = torch.load(file)
    tensors[other] = tensors.pop(name)
    torch.save(tensors, file)


def member(file: Path, name: str, content: str | None, deflated: bool = False) -> None:
    """A member of a zip archive has another content, or is missing."""
    with zipfile.ZipFile(file) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    members = [pair for pair in members if pair[0] != name]
    if content is not None:
        members.append((name, content.encode("latin-1")))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for pair in members:
            archive.writestr(*pair)


def opcodes(file: Path, start: int, length: int, content: str) -> None:
    """Bytes of the pickle in a ``.pt`` file are others."""
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        raw = archive.read(name)
    start %= len(raw) + 1
    member(file, name, raw[:start].decode("latin-1") + content + raw[start + length :].decode("latin-1"))


def pack(file: Path, kind: str) -> None:
    """The file is compressed under its own name."""
    raw = file.read_bytes()
    if kind == "gz":
        file.write_bytes(gzip.compress(raw))
    elif kind == "zst":  # one frame of one raw block, as no compressor is needed to write it
        block = struct.pack("<I", (len(raw) % 2**17) << 3 | 1)[:3] + raw[: 2**17]
        file.write_bytes(b"\x28\xb5\x2f\xfd" + b"\xa0" + struct.pack("<I", len(raw)) + block)
    elif kind == "zip":
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("a", raw)
        file.write_bytes(made.getvalue())
    else:  # zeros without end, in a few megabytes
        piece = gzip.compress(bytes(2**26), 9)
        with file.open("wb") as stream:
            for _ in range(HUGE // 2**26):
                stream.write(piece)


def move(file: Path, other: str) -> None:
    """The file has another name in the same folder."""
    file.rename(file.parent / other)


def remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def link(file: Path, to: str) -> None:
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(to)


def fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir(parents=True)


def mode(file: Path, bits: int) -> None:
    file.chmod(bits)


def sparse(file: Path, size: int) -> None:
    """The file is ``size`` bytes long, and what is added takes no space on the disk."""
    os.truncate(file, size)


EDITS: dict[str, Callable[..., None]] = {
    made.__name__: made
    for made in (
        *(write, splice, put, drop, header, tensor, rename, member, opcodes, pack),
        *(move, remove, link, fifo, folder, mode, sparse),
    )
}


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[:1].fill_(value)
        return tensor

    return fill


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: _filled(float(name)) for name in ("nan", "inf", "-inf", "1e38", "-1e38", "1e-45")},
    **{
        str(kind).removeprefix("torch."): methodcaller("to", kind)
        for kind in (
            *(torch.int32, torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64),
            *(torch.float8_e4m3fn,),
        )
    },
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "scalar": lambda t: t.reshape(-1)[0].clone(),
    "empty": lambda t: t.new_empty(0),
    "no rows": lambda t: t[:0],
    "flat": lambda t: t.reshape(-1),
    "one more dimension": lambda t: t[None],
    "turned": lambda t: t.mT.contiguous() if t.ndim > 1 else t[None],
    "expanded": lambda t: t.reshape(-1)[:1].expand(10**9),
    "a row repeated": lambda t: t[:1].expand(t.shape).clone() if len(t) else t,
    "zeros": torch.zeros_like,
    "negative": lambda t: -t,
    "a parameter": torch.nn.Parameter,
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[: len(t) // 2],
    "large": lambda t: t * 1e20,
}


def _within(tree: Any, path: list[Any]) -> Any:
    """What holds the last step of a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree
