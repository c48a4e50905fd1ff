"""Folders and files that are complete or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from krony.errors import KronyError, WriteError
from krony.storage.locks import WORK, working_in
from krony.storage.paths import cannot_write, check_text, printable

DEVICES = Path("/dev")  # whose names, such as /dev/stdout, must not be replaced


def cache_folder() -> Path:
    """The folder for what can be computed again: ``KRONY_CACHE``, or ``krony`` in the user's cache folder."""
    if named := os.environ.get("KRONY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krony"


def check_cache(folder: Path, what: str) -> None:
    """Makes a folder of the cache. Raises WriteError, which says that ``what`` can't be kept, unless it takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(
            f"{printable(folder)}: {what} can't be stored there: {error.strerror}: name another folder (KRONY_CACHE), "
            "or keep nothing (--no-cache, in Python cache=None)"
        ) from None


def check_writable(out: Path) -> None:
    """Raises KronyError unless a folder can take the place of ``out``, which must be absent or empty.

    It tries exactly what ``fresh_folder`` does at the end of the work: it makes a folder beside ``out``, renames it
    and removes it. Afterwards everything is as it was.
    """
    _check_name(out)
    with working_in(out):
        try:
            for path in (out, out.with_name(f"{out.name}{WORK}")):
                if path.is_symlink():
                    raise KronyError(f"{printable(path)} is a symbolic link: name the folder itself, or another")
            if out.is_dir() and any(out.iterdir()):
                raise KronyError(f"{printable(out)} is not empty: name a new folder, or empty this one first")
            if out.exists() and not out.is_dir():
                raise KronyError(f"{printable(out)} is a file: name a folder")
            _rehearse(out)
        except OSError as error:
            raise cannot_write(out, error) from None


def _rehearse(out: Path) -> None:
    """Puts an empty folder in the place of ``out``, and takes it away again. Raises OSError where that fails."""
    beside = _folder_beside(out)
    try:
        with tempfile.TemporaryFile(dir=beside):
            pass
        if not out.exists():
            beside.rename(out)
            out.rmdir()
            return
        beside.rmdir()
        out.rename(beside)  # an empty folder may be a mount point, or another user's in a shared folder
        beside.rename(out)
    except OSError as error:
        if error.errno != errno.EXDEV:  # overlayfs: an image's folder can be removed, though not renamed
            raise
    finally:
        with suppress(OSError):
            beside.rmdir()


def check_file(file: Path, kind: str = "", inside: Path | None = None) -> None:
    """Raises KronyError where ``file`` can't be written, or isn't named as its kind is, such as ``.svg``.

    Its folder must exist, or be ``inside``, the folder that the verb writes. It tries exactly what ``write_text`` does
    at the end of the work. Afterwards everything is as it was.
    """
    check_text(file)
    shown = printable(file)
    if kind and file.suffix != kind:
        raise KronyError(f"{shown}: it is written as {kind[1:].upper()}, so the name ends in {kind}")
    real, folder = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    out = folder if inside is None else Path(os.path.realpath(inside))
    try:
        if file.is_dir():
            raise KronyError(f"{shown} is a folder: name a file to write")
        if inside is not None and (out.is_relative_to(real) or real.is_relative_to(out.parent / f"{out.name}{WORK}")):
            raise KronyError(f"{shown} is where {printable(inside)} is written: name another file")
        if file.exists() and (not file.is_file() or folder == DEVICES):
            raise KronyError(f"{shown} is a pipe or a device: name a regular file")
        if folder.is_dir():
            _rehearse_file(file)
        elif folder == out and inside is not None:  # OUT isn't there yet: its parent takes the same names
            probe = next(parent for parent in out.parents if parent.exists()) / _file_beside(file).name
            probe.touch()
            probe.unlink()
        else:
            raise KronyError(f"{shown} can't be written: there is no folder {printable(file.parent)}")
    except OSError as error:
        raise cannot_write(file, error) from None


def _rehearse_file(file: Path) -> None:
    """Writes an empty file in the place of ``file``, or moves what is there away and back. Raises OSError."""
    beside = _file_beside(file)
    if os.path.lexists(beside):  # another process writes it now, or was killed: the folder takes such names
        return
    beside.touch()
    beside.unlink()
    if os.path.lexists(file):  # it may be a mount point, or another user's in a shared folder
        file.rename(beside)
        beside.rename(file)
    else:
        file.touch()
        file.unlink()


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes when it doesn't.

    Raises KronyError if ``out`` can't be written, another process writes it, or the disk is full. If OUT was filled
    meanwhile, the folder is kept under another name, which the sentence says.

    Examples:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with fresh_folder(Path(parent) / "out") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     print(sorted(str(path.relative_to(parent)) for path in Path(parent).rglob("*")))
        ['out', 'out/config.json']
    """
    _check_name(out)
    with working_in(out):
        check_writable(out)
        for left in out.parent.iterdir():  # of a process that was killed: a living one has the lock
            if re.fullmatch(re.escape(_prefix(out)) + "[a-z0-9_]{8}", left.name):
                shutil.rmtree(left, ignore_errors=True)
        try:
            beside = _folder_beside(out)
        except OSError as error:
            raise cannot_write(out, error) from None
        try:
            yield beside
            _give_usual_permissions(beside)
            put_in_place(beside, out)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or f"{error} (is the disk full?)"  # not the system's own sentence
            raise WriteError(f"{printable(out)} can't be written: {reason}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _give_usual_permissions(folder: Path) -> None:
    """Gives a folder and its files those of new ones, as the umask says: mkdtemp's and safetensors' are private."""
    probe = folder / ".permissions"
    probe.mkdir()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(usual if path.is_dir() else usual & 0o666)


def put_in_place(folder: Path, out: Path) -> None:
    """Renames a complete folder to ``out``, which is absent or empty.

    Raises KronyError if OUT was filled meanwhile; the folder is then kept under the name that the sentence says.
    """
    try:
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        kept = _free_name(out)
        folder.rename(kept)
        raise KronyError(
            f"{printable(out)} can't be replaced ({error.strerror}), so {printable(kept)} is what was made for it"
        ) from error


def _free_name(out: Path) -> Path:
    names = (out.with_name(f"{out.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _check_name(path: Path) -> None:
    """Raises KronyError for what names no new file or folder: ``.``, ``..``, ``/``, or what isn't UTF-8."""
    check_text(path)
    if path.name in ("", ".."):
        raise KronyError(f"{path} names a folder that is in use: name a new one, such as {path / 'out'}")


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _folder_beside(out: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))


def _file_beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def write_json(path: Path, payload: Any) -> None:
    """Writes ``payload`` as indented JSON. Raises KronyError if the file can't be written."""
    write_text(path, json.dumps(payload, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all. Raises KronyError if it can't be written."""
    beside = _file_beside(path)
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
