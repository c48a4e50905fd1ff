"""The output of verbs: tables and sentences for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from krony.errors import KronyWarning
from krony.runtime.progress import Progress
from krony.storage.paths import printable


def quiet_libraries() -> None:
    """Turns off the progress bars and log messages of transformers, datasets and huggingface_hub.

    krony's own warnings become one line each.
    """
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()  # no line for each retry
    warnings.showwarning = _show_warning


def complain(sentence: str, *, kind: str = "error", style: str = "red") -> None:
    """Prints an error or a warning on one line of stderr; does nothing if the terminal is gone."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    with suppress(OSError):  # after SIGHUP there may be no terminal
        console.print(f"{kind}:", printable(sentence), style=style, markup=False)


def escaped(text: str) -> str:
    """The text with control characters escaped, which names in files may hold; line breaks and tabs stay.

    Examples:
        >>> print(escaped("a\\x1b[31m b"))
        a\\x1b[31m b
    """
    return "".join(part if part in "\n\t" else printable(part) for part in re.split(r"([\n\t])", text))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, KronyWarning):
        complain(str(message), kind="warning", style="yellow")


class Output:
    """Prints for a verb: to stdout, or to stderr if the JSON goes to stdout."""

    def __init__(self, json_to: str | None, out: Path | None = None) -> None:
        """Checks that the JSON file can be written. Raises KronyError if not.

        Args:
            json_to: value of ``--json``: a file, ``-`` for stdout, or None.
            out: the folder that the verb writes; the JSON file may be inside it.
        """
        from rich.console import Console

        from krony.storage.files import check_file

        if json_to is not None and json_to != "-":
            check_file(Path(json_to), inside=out)  # fails now, not after hours of work
        self.json_to = json_to
        first = os.environ.get("RANK", "0") == "0"  # only the first of several processes prints
        self.console = Console(stderr=json_to == "-", highlight=False, soft_wrap=True, quiet=not first, emoji=False)
        if not self.console.is_terminal:
            self.console.width = 200  # in a file or a pipe nothing is cut off

    def say(self, sentence: str) -> None:
        """Prints a line."""
        self.console.print(escaped(sentence), markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is text, aligned left, and the others are figures, aligned right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(escaped(cell)) for cell in row))
        self.console.print(table, soft_wrap=False)

    def json(self, payload: Any) -> None:
        """Writes the figures to the destination of ``--json``, if it is given; those that are not finite as null."""
        from krony.storage.files import write_json

        payload = _finite(payload)
        if self.json_to == "-":
            print(json.dumps(payload, indent=2, allow_nan=False))
        elif self.json_to is not None:
            write_json(Path(self.json_to), payload)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yields a callback that drives a bar on stderr in the block; without a terminal it shows nothing."""
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True, quiet=self.console.quiet, emoji=False)
        where, times = TextColumn("{task.completed}/{task.total}"), (TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), where, *times)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, what: bar.update(
                task, completed=done, total=total, description=escape(escaped(what))
            )


def _finite(payload: Any) -> Any:
    """``payload`` with None for infinities and NaN, which JSON doesn't have."""
    if isinstance(payload, Mapping):
        return {key: _finite(value) for key, value in payload.items()}
    if isinstance(payload, (list, tuple)):
        return [_finite(value) for value in payload]
    return None if isinstance(payload, float) and not math.isfinite(payload) else payload
