"""Folders and files that are either whole or not there: written beside, then renamed."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from krony.errors import KronyError

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process left is not cleared away there
    fcntl = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Where what can be computed again is kept: ``KRONY_CACHE``, or ``krony`` in the user's cache folder."""
    if named := os.environ.get("KRONY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krony"


def check_writable(out: Path) -> None:
    """Raises KronyError unless a folder can be made at ``out``: it must be absent or empty. Makes nothing itself."""
    if out.is_dir() and any(out.iterdir()):
        raise KronyError(f"{out} is not empty: name a new folder, or empty this one first")
    if out.exists() and not out.is_dir():
        raise KronyError(f"{out} is a file: name a folder to write the model to")
    _try_to_write(out, next(folder for folder in out.absolute().parents if folder.exists()))


def check_file(file: Path, kind: str = "", inside: Path | None = None) -> None:
    """Raises KronyError where ``file`` can't be written, or isn't named as its kind is, such as ``.svg``.

    Its folder must be there, or be ``inside``, which will be.
    """
    if kind and file.suffix != kind:
        raise KronyError(f"{file}: it is written as {kind[1:].upper()}, so the name ends in {kind}")
    if file.is_dir():
        raise KronyError(f"{file} is a folder: name a file to write")
    if file.parent.is_dir():
        _try_to_write(file, file.parent)
    elif inside is None or not file.parent.absolute().is_relative_to(inside.absolute()):
        raise KronyError(f"{file} can't be written: there is no folder {file.parent}")


def _try_to_write(path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KronyError(f"{path} can't be written: {error.strerror}") from None


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes when it doesn't.

    Raises KronyError if ``out`` can't be written or the disk is full.
    """
    check_writable(out)
    prefix = f".{out.name}.partial-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(prefix)}*"):
            _clear_away(left)
        beside = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    except OSError as error:
        raise KronyError(f"{out} can't be written: {error.strerror}") from None
    lock = Lock(beside)
    lock.take()
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp's is private
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        raise KronyError(f"{out} can't be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        lock.release()


class Lock:
    """Says that a folder is in use, for as long as this process lives: its death, whatever the cause, ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def take(self) -> bool:
        """Takes the lock; False if another process has it. Where there are no locks it is True, and none is held."""
        if fcntl is None:
            return True
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:  # a file system without locks
            os.close(descriptor)
            return True
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _clear_away(folder: Path) -> None:
    """Deletes what a process that was killed left half-written; one that is being written is locked, and stays."""
    lock = Lock(folder)
    with suppress(OSError):
        if lock.take() and lock.held:
            shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def write_json(path: Path, payload: Any) -> None:
    """Writes ``payload`` as indented JSON. Raises KronyError if the file can't be written."""
    write_text(path, json.dumps(payload, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises KronyError if it can't be written."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise KronyError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)
