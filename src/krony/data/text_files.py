"""Text files as documents: plain text, JSON lines and JSON, each also compressed by gzip or zstd.

What a file is follows from its content: compressed bytes are unpacked whatever the name, and neither binary data nor
JSON is ever taken for text. Of the name only the ending counts, and it says how a text is cut into documents.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from krony.errors import KronyError
from krony.runtime.hardware import memory
from krony.storage.paths import check_regular

LINES = {".jsonl", ".ndjson", ".jl"}  # a JSON object per line
PACKED = {".gz", ".gzip", ".zst", ".zstd"}  # endings of compressed files, before which the format's own ending stands
SAFE, RATIO = 10**9, 200  # bytes that are always unpacked, and how many times the file's size; text has 3 to 20 times
PIECE = 1 << 20  # bytes unpacked at once
FRAME_PIECE = 1 << 12  # bytes of a zstd frame unpacked at once: each may become 32,768 bytes
BINARY = {
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}  # first bytes of what isn't UTF-8


def read_documents(path: Path) -> list[str]:
    """The documents of a file.

    ``.jsonl``, ``.ndjson`` and ``.jl``: the ``text`` of the JSON object on each line. ``.json``: the ``text`` of one
    object, or of each in a list; JSON lines under this name are read too. Any other file is one document. ``.gz`` and
    ``.zst`` may follow each ending.

    Raises KronyError, naming the file and the line: a missing or empty file, no regular file, text that isn't UTF-8,
    JSON that has no ``text`` or is in a file of another name, a damaged archive or one that unpacks to too much.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "two.jsonl"
        ...     _ = file.write_text('{"text": "one"}\\n{"text": "two"}\\n')
        ...     read_documents(file)
        ['one', 'two']
    """
    text, kind = read_text(path), _kind(path)
    if kind == ".json" or kind in LINES:
        documents = _documents_of_json(text, path) if kind == ".json" else _documents_of_lines(text, path)
        if not documents:
            raise KronyError(f"{path} is empty: there is no document in it")
        return documents
    if _holds_json(text):
        raise KronyError(f'{path} holds JSON with a "text": name it .jsonl or .json, and each "text" is a document')
    return [text]


def names_file(data: str) -> bool:
    """Whether ``data`` is a file's name, and not that of a data set on the hub. Raises KronyError for an empty name.

    Examples:
        >>> [names_file(data) for data in ("train.txt", "openwebtext", "some/set.v2@train")]
        [True, False, False]
    """
    if not data.strip():
        raise KronyError("the name of a text is empty: name a text or jsonl file, python-docs, or a set on the hub")
    path = Path(data)
    return path.exists() or (bool(path.suffix) and not {"@", ":"} & set(data))


def read_text(path: Path) -> str:
    """The text of a file: unpacked, without a byte order mark, line breaks as ``\\n``. Raises KronyError."""
    raw = _unpacked(path)
    if kind := _valid_but_no_text(raw):
        raise KronyError(f"{path} is not UTF-8 text: it is {kind}, so unpack or convert it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = next((f": it is {kind}, so unpack or convert it" for s, kind in BINARY.items() if raw.startswith(s)), "")
        raise KronyError(f"{path} is not UTF-8 text (byte {error.start}){kind}") from None
    if not text.strip():
        raise KronyError(f"{path} is empty: there is no text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _valid_but_no_text(raw: bytes) -> str | None:
    """What bytes are that can be valid UTF-8 and still are no text."""
    if raw.startswith(b"PK\x03\x04"):
        return "a zip archive"
    if raw[257:262] == b"ustar":
        return "a tar archive"
    start = raw[:1000]
    zeros = len(start) >= 4 and (not any(start[0::2]) or not any(start[1::2]))  # every second byte
    return "UTF-16 text" if zeros else None


def is_text(text: str) -> bool:
    """Whether a string can be encoded, which one with half of a surrogate pair can't.

    Examples:
        >>> is_text("naïve"), is_text("\\ud83d")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    """The ending that says what is in the file, in small letters: ``.jsonl`` of ``a.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _documents_of_lines(text: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            documents.append(_document(line, f"{path}, line {number}"))
    return documents


def _documents_of_json(text: str, path: Path) -> list[str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines, which often have this ending
            return _documents_of_lines(text, path)
        raise KronyError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise KronyError(f"{path}: not JSON that can be read") from None
    if isinstance(found, list):
        return [_text_of(one, f"{path}, entry {number}") for number, one in enumerate(found, start=1)]
    return [_text_of(found, str(path))]


def _document(line: str, where: str) -> str:
    try:
        return _text_of(json.loads(line), where)
    except KronyError:  # which is a ValueError too
        raise
    except (ValueError, RecursionError):
        raise KronyError(f'{where}: not a JSON object with a "text"') from None


def _text_of(found: Any, where: str) -> str:
    if not isinstance(found, dict) or "text" not in found:
        raise KronyError(f'{where}: not a JSON object with a "text"')
    if not isinstance(found["text"], str):
        raise KronyError(f'{where}: "text" is not a string')
    if not is_text(found["text"]):
        raise KronyError(f'{where}: "text" has half of a surrogate pair, which is no character')
    return found["text"]


def _holds_json(text: str) -> bool:
    """Whether a text is JSON with documents: by its first line, or completely."""
    start = text.lstrip()
    if start[0] not in "{[":
        return False
    for candidate in (start.partition("\n")[0], text):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        first = found[0] if isinstance(found, list) and found else found
        return isinstance(first, dict) and isinstance(first.get("text"), str)
    return False


def _unpacked(path: Path) -> bytes:
    """The bytes of a regular file, unpacked if they are compressed. Raises KronyError."""
    if path.is_dir():
        raise KronyError(f"{path} is a folder: name a text or jsonl file in it")
    check_regular(path)
    size, room = path.stat().st_size, memory() // 2
    pieces: list[bytes] = []
    have = 0
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        for piece in _reader(start)(path):
            pieces.append(piece)
            have += len(piece)
            if have > SAFE and have > RATIO * size:
                raise KronyError(f"{path} unpacks to more than {RATIO} times its size: that is no text")
            if have > room:
                raise KronyError(f"{path} has more text than fits into the {memory() / 1e9:.0f} GB of memory: cut it")
    except OSError as error:  # of the system, or of gzip, which has no number
        reason = f"can't be read: {error.strerror}" if error.errno else f"is damaged ({error})"
        raise KronyError(f"{path} {reason}") from None
    except (EOFError, zlib.error) as error:
        raise KronyError(f"{path} is cut short or damaged ({error}): fetch or write it again") from None
    return b"".join(pieces)


def _reader(start: bytes) -> Callable[[Path], Iterator[bytes]]:
    """What reads a file that begins like this. No text in UTF-8 begins like a compressed file."""
    if start[:2] == b"\x1f\x8b":
        return _gzip
    return _zstd if start == b"\x28\xb5\x2f\xfd" else _plain


def _plain(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def _gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as stream:
        while piece := stream.read(PIECE):
            yield piece


def _zstd(path: Path) -> Iterator[bytes]:
    module = _zstd_module()
    if module is None:
        raise KronyError(f"{path} is compressed by zstd, which takes the package zstandard: pip install zstandard")
    try:
        yield from _frames(path, module)
    except module.ZstdError as error:
        raise EOFError(str(error)) from None


def _frames(path: Path, module: ModuleType) -> Iterator[bytes]:
    """The content of all frames. The package zstandard itself ends a file that is cut short without an error."""
    if module.__name__ != "zstandard":
        with module.open(path) as stream:
            while piece := stream.read(PIECE):
                yield piece
        return
    with path.open("rb") as stream:
        frame, rest = None, b""
        while packed := rest or stream.read(FRAME_PIECE):
            frame = frame or module.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            rest = frame.unused_data
            frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last frame has no end")


def _zstd_module() -> ModuleType | None:
    """Python 3.14's own, its backport, or the package zstandard: whichever is there."""
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        try:
            return import_module(name)
        except ImportError:
            continue
    return None
