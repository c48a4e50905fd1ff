"""Paths as the user names them: which can be read or written, and how a sentence names them."""

from __future__ import annotations

import stat
from pathlib import Path

from krony.errors import KronyError, WriteError


def check_regular(path: Path) -> None:
    """Raises KronyError unless ``path`` is a regular file: a pipe or a device may have no end, or no reader.

    Examples:
        >>> check_regular(Path("/dev/null"))
        Traceback (most recent call last):
        krony.errors.KronyError: /dev/null is a device: name a regular file
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise KronyError(f"{printable(path)} can't be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise KronyError(f"{printable(path)} is {kinds.get(stat.S_IFMT(mode), 'a device')}: name a regular file")


def check_text(path: Path) -> None:
    """Raises KronyError for a path that isn't UTF-8, because the writer of safetensors files takes no other."""
    try:
        if "\0" not in str(path).encode().decode():
            return
    except UnicodeEncodeError:
        pass
    raise KronyError(f"{printable(path)} can't be written: the name is not UTF-8")


def printable(text: str | Path) -> str:
    r"""The text with everything escaped that a terminal would act on, or that isn't UTF-8.

    Examples:
        >>> printable("a\x1b[31m é")
        'a\\x1b[31m é'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The sentence for what the operating system refused."""
    return WriteError(f"{printable(path)} can't be written: {error.strerror or error}")
