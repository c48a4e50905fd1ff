"""Options: dataclass fields with the sentence that ``--help`` shows, shared by Python and the command line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **command_line: Any) -> Any:
    """A dataclass field with a default and an explanation.

    Args:
        default: the value where nothing is given.
        help: one sentence for ``--help``.
        command_line: how the command line shows it: ``metavar``, ``show_default``, ``flag`` (the option's name where it
            is not the field's), ``panel`` (the heading it stands under), ``type`` (where the field's is no type that a
            command line can read), ``min`` and ``max``.
    """
    return field(default=default, metadata={"help": help, **command_line})
