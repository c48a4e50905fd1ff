"""The folder beside OUT from which long work resumes: what the work is, and which of its units are complete."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from krony.errors import KronyError
from krony.storage.files import check_writable, put_in_place, write_json
from krony.storage.locks import WORK, working_in
from krony.storage.paths import cannot_write
from krony.storage.tensor_files import read_json


class Journal:
    """``OUT.work``: the job's key, one line for each complete unit, and whatever files the work keeps there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     for unit in ("first", "second"):  # the second run knows what the first has done
        ...         journal = Journal(Path(parent) / "out", {"scheme": "96M"})
        ...         journal.open()
        ...         print(journal.done)
        ...         journal.note({"unit": unit})
        ...         journal.close()
        []
        [{'unit': 'first'}]
    """

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.out, self.key = out, json.loads(json.dumps(key))
        self.folder = work_folder(out)
        self._job, self._lines = self.folder / "job.json", self.folder / "done.jsonl"
        self.done: list[dict[str, Any]] = []
        self._lock = ExitStack()

    def open(self) -> None:
        """Takes the lock of OUT, and makes the folder or reads what an interrupted run left in it.

        Raises KronyError if OUT can't be written, the folder is another job's, or another process works there.
        """
        self._lock.enter_context(working_in(self.out))
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self._job.exists() and not any(p.is_dir() for p in self.folder.iterdir()) and self.out.exists():
            shutil.rmtree(self.folder)  # of a process that was killed after it had put OUT in its place
        check_writable(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        if not self._job.exists():
            if any(path.suffix != ".partial" for path in self.folder.iterdir()):
                raise KronyError(f"{self.folder} is in the way: work on {self.out} is kept there, so remove it first")
            write_json(self._job, self.key)
        differing = differences(read_json(self._job), self.key)
        if differing:
            raise KronyError(
                f"{self.folder} is from a run with {differing}, which was interrupted: "
                "give the same command again to resume it, or remove the folder"
            )
        self.done = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self._lines.exists():
            return []
        done = []
        for line in self._lines.read_text(encoding="utf-8").splitlines():
            try:
                done.append(json.loads(line))
            except ValueError:
                break  # the last line, of a process that was killed while writing it
        self._lines.write_text("".join(json.dumps(one) + "\n" for one in done), encoding="utf-8")
        return done

    def note(self, unit: dict[str, Any]) -> None:
        """Records on disk that a unit is complete. Raises KronyError."""
        try:
            with self._lines.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(unit) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise cannot_write(self._lines, error) from None
        self.done.append(unit)

    def restart(self) -> None:
        """Forgets all complete units."""
        self._lines.unlink(missing_ok=True)
        self.done = []

    def publish(self, folder: Path) -> None:
        """Renames a folder made in here to OUT, and deletes the rest. Raises KronyError."""
        put_in_place(folder, self.out)
        self.remove()

    def remove(self) -> None:
        """Deletes the folder, and gives the lock back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Gives the lock back, and leaves the folder for the run that resumes."""
        self._lock.close()


def work_folder(out: Path) -> Path:
    """The folder that holds the work on ``out`` until it is complete."""
    return out.with_name(out.name + WORK)


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two keys differ in, in words; empty if they are equal.

    Examples:
        >>> differences({"scheme": "96M", "seed": 0}, {"scheme": "81M", "seed": 0})
        'scheme "96M" (now "81M")'
    """
    return ", ".join(
        f"{name} {_short(there.get(name))} (now {_short(here.get(name))})"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
