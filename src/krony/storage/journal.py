"""The folder beside OUT that long work goes on from: what it is for, what is done, and who is at it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from krony.errors import KronyError
from krony.storage.files import Lock, check_writable, write_json
from krony.storage.tensor_files import read_json


class Journal:
    """``OUT.work``: the job's key, one line for each unit that is done, and whatever files the work keeps there.

    Raises KronyError if OUT can't be written, if the folder is another job's, or if another process is at it.
    """

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.out, self.key = out, json.loads(json.dumps(key))
        self.folder = work_folder(out)
        self._job, self._lines = self.folder / "job.json", self.folder / "done.jsonl"
        self.done: list[dict[str, Any]] = []
        self._lock: Lock | None = None

    def open(self) -> None:
        """Makes the folder, or takes up what is there."""
        if self._job.exists() and not any(p.is_dir() for p in self.folder.iterdir()) and self.out.exists():
            shutil.rmtree(self.folder)  # of a process that was killed after it had put OUT in its place
        check_writable(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KronyError(f"{self.folder} can't be written: {error.strerror}") from None
        self._lock = Lock(self.folder)
        if not self._lock.take():
            raise KronyError(f"{self.folder}: another process is working there: wait for it, or name another OUT")
        if not self._job.exists():
            if any(path.suffix != ".partial" for path in self.folder.iterdir()):
                self.close()
                raise KronyError(f"{self.folder} is in the way: work on {self.out} is kept there, so remove it first")
            write_json(self._job, self.key)
        differing = differences(read_json(self._job), self.key)
        if differing:
            self.close()
            raise KronyError(
                f"{self.folder} is of a run with {differing}, which did not end: give the same command again to go on "
                "from there, or remove it"
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
                break  # the last line of a process that was killed while it wrote it
        self._lines.write_text("".join(json.dumps(one) + "\n" for one in done), encoding="utf-8")
        return done

    def note(self, unit: dict[str, Any]) -> None:
        """Writes down that a unit is done. Raises KronyError."""
        try:
            with self._lines.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(unit) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise KronyError(f"{self._lines} can't be written: {error.strerror}") from None
        self.done.append(unit)

    def restart(self) -> None:
        """Forgets what is done."""
        self._lines.unlink(missing_ok=True)
        self.done = []

    def publish(self, folder: Path) -> None:
        """Gives OUT's place to a folder that was made in here, and deletes the rest. Raises KronyError."""
        try:
            if self.out.exists():
                self.out.rmdir()  # an empty one
            folder.rename(self.out)
        except OSError as error:
            raise KronyError(f"{self.out} can't be written: {error.strerror}") from None
        self.remove()

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leaves the folder to whoever comes next."""
        if self._lock is not None:
            self._lock.release()


def work_folder(out: Path) -> Path:
    """Where work on ``out`` is kept until it is whole."""
    return out.with_name(f"{out.name}.work")


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two keys differ in, in words; empty where they are equal."""
    return ", ".join(
        f"{name} {_short(there.get(name))} (now {_short(here.get(name))})"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
