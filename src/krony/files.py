"""Folders and files that are either whole or not there: written beside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from krony.errors import KronyError


def cache_folder() -> Path:
    """Where what can be computed again is kept: ``KRONY_CACHE``, or ``krony`` in the user's cache folder."""
    if named := os.environ.get("KRONY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krony"


def check_writable(out: Path) -> None:
    """Raises KronyError unless a new folder can be made at ``out``: it must be absent or empty, its parent writable."""
    if out.is_dir() and any(out.iterdir()):
        raise KronyError(f"{out} is not empty: name a new folder, or empty this one first")
    if out.exists() and not out.is_dir():
        raise KronyError(f"{out} is a file: name a folder to write the model to")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise KronyError(f"{out} can't be written: {error.strerror}") from None


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes when it doesn't.

    Raises KronyError if ``out`` can't be written or the disk is full.
    """
    check_writable(out)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp's is private
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        raise KronyError(f"{out} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
