"""A case: a command of krony, and edits to the sound files that it reads."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzz.edits import EDITS

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the command line.

    Attributes:
        kind: what kind of input is damaged.
        command: the verb and its arguments; paths are relative to the folder of the sound files.
        edits: the name of an edit, the file (with ``*`` the first that matches), and what the edit takes
            (``edits.EDITS``), in order.
    """

    kind: str
    command: list[str]
    edits: list[list[Any]] = field(default_factory=list)

    def damage(self, place: Path) -> None:
        """Makes the edits in ``place``, a copy of the sound files. One that no longer applies is left out."""
        for name, file, *values in self.edits:
            target = next(iter(place.glob(file)), place / file) if "*" in file else place / file
            with suppress(OSError, LookupError, TypeError, ValueError, RuntimeError):
                if not target.exists() or target.is_file() or target.is_dir():  # a pipe or a device has no end
                    EDITS[name](target, *values)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Case:
        return cls(**json.loads(file.read_text()))
