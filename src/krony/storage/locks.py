"""One writer at a time: a lock is a file beside what it guards, and ends with the process that holds it.

``filelock`` takes the lock from the operating system, so no crash, kill or power cut leaves one behind. A second file,
``.NAME.holder``, says who holds it; it is kept apart because Windows lets nobody read a locked file.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from krony.errors import KronyError, KronyWarning
from krony.storage.paths import cannot_write, check_regular, check_text, printable

WORK = ".work"  # OUT.work holds the unfinished work on OUT
PATIENCE = 1.0  # seconds: a check takes the lock for a moment only, and a holder that ends removes the file under it
LONGEST_RECORD = 65_536  # bytes read of a holder's record
LONGEST_COMMAND = 200  # characters shown of a holder's command line
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system without locks

_held: set[tuple[int, int, Path]] = set()  # process, thread and lock file


@contextmanager
def working_in(folder: Path, *, is_mine: bool = True) -> Iterator[None]:
    """Holds the lock of ``OUT`` while the block runs. ``OUT`` and ``OUT.work`` share one lock; ``folder`` is either.

    ``is_mine`` is False where another process of the same run holds it for all: then nothing is locked.

    The folder need not exist. Inside the block the same thread may take the lock again, so a verb can hold it from
    before its work until ``fresh_folder`` has put OUT in its place.

    Raises KronyError if another process or thread holds it (the sentence says who), or if no file can be made there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with working_in(Path(parent) / "out.work"):
        ...         print(sorted(path.name for path in Path(parent).iterdir()))
        ...     print(sorted(path.name for path in Path(parent).iterdir()))
        ['.out.holder', '.out.lock']
        []
    """
    if not is_mine:
        yield
        return
    shared = folder.with_name(folder.name.removesuffix(WORK) or folder.name) if folder.name else folder
    with locked(shared):
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of ``path``, two hidden files beside it. Makes its parent folders, and removes them if left empty.

    Raises KronyError as ``working_in`` does, and for a path that is no file's name.
    """
    check_text(path)
    real = Path(os.path.realpath(path))
    if not real.name:
        raise KronyError(f"{path} is the root of the file system: name a folder in it")
    lock, holder = (real.with_name(f".{real.name}.{kind}") for kind in ("lock", "holder"))
    key = os.getpid(), threading.get_ident(), lock
    if key in _held:
        yield
        return
    with _parents_of(lock, path):
        mine = FileLock(lock, timeout=PATIENCE)
        _take(mine, path, holder)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            _give_back(mine, holder)


def _take(lock: FileLock, path: Path, holder: Path) -> None:
    """Takes the lock and writes down who holds it. Raises KronyError."""
    try:
        try:
            lock.acquire()
        except Timeout:
            with tempfile.TemporaryFile(dir=holder.parent):  # in /proc and the like, no file can be made
                raise
    except Timeout:
        raise KronyError(
            f"{printable(path)} is in use by {_who(holder)}: wait until it has finished, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(path, error) from None
        warnings.warn(
            f"{printable(path)} is on a file system without locks: make sure that no other process writes there",
            KronyWarning,
            stacklevel=2,
        )
    try:
        beside = _beside(holder)
        holder.unlink(missing_ok=True)  # of a process that was killed
        beside.write_text(json.dumps(_record()), encoding="utf-8")
        beside.replace(holder)
    except OSError as error:
        _give_back(lock, holder)
        raise cannot_write(path, error) from None


def _give_back(lock: FileLock, holder: Path) -> None:
    """Removes the files, the lock's while it is held: whoever has it open already finds it gone, and tries again."""
    for file in (_beside(holder), holder, Path(lock.lock_file)):
        with suppress(OSError):
            file.unlink(missing_ok=True)
    lock.release()


def _beside(holder: Path) -> Path:
    """What the holder's record is written to, before it takes its name complete."""
    return holder.with_name(f"{holder.name}.new")


@contextmanager
def _parents_of(file: Path, named: Path) -> Iterator[None]:
    """Makes the folders above ``file``; afterwards those that it made go again if nothing is in them."""
    try:
        missing = [folder for folder in file.parents if not folder.exists()]
        there = file.parents[len(missing)]
        if not there.is_dir():
            raise KronyError(f"{printable(named)} can't be written: {printable(there)} is a file")
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(named, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # the first that isn't empty ends it
            for folder in missing:
                folder.rmdir()


def _record() -> dict[str, Any]:
    command = shlex.join(sys.orig_argv)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}


def _who(holder: Path) -> str:
    """The holder in words; its record is another user's text, so it is bounded and printed escaped."""
    try:
        check_regular(holder)
        with holder.open("rb") as stream:
            said = json.loads(stream.read(LONGEST_RECORD))
        pid, host, command, since = (printable(str(said[key])) for key in ("pid", "host", "command", "since"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # KronyError is a ValueError
        return "another process"
    if len(command) > LONGEST_COMMAND:
        command = command[: LONGEST_COMMAND - 1] + "…"
    return f"process {pid[:20]} on {host[:80]} since {since[:20]} ({command})"
