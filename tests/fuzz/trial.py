"""Runs a case in a forked process, and says what is wrong with how it ends.

A command ends with exit code 0; with 1 and one sentence, ``not done: …``; or with 2 and one sentence, ``error: …``, and
then everything is as it was before. It takes at most ``SECONDS`` and ``MEMORY``, and prints nothing that a terminal
would act on.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil

from fuzz.cases import Case

SECONDS = 20
MEMORY = 2 * 1024**3  # bytes
OUT_OF_MEMORY = "there is not enough memory"
NOTES = ("warning:", "note:")  # lines on stderr beside the sentence
LEFT = (".partial", ".lock", ".holder", ".work")  # what a command that ended leaves nowhere


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended.

    Attributes:
        code: the exit code; None if a signal ended it.
        printed: what it printed on stdout and stderr.
        problem: what is wrong with that, or None.
        seconds: processor time.
        memory: the most bytes that it added to those of the process it was forked from.
    """

    code: int | None
    printed: str
    problem: str | None
    seconds: float
    memory: int


def run(case: Case, sound: Path) -> Outcome:
    """Runs a case on a copy of the sound files, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        place, spare = Path(home) / "place", Path(home) / "spare"
        shutil.copytree(sound, place)
        spare.mkdir()
        case.damage(place)
        before = _names(place)
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:  # it begins with a part of the memory of this one, such as a long test session
            os.write(writer, str(psutil.Process().memory_info().rss).encode())
            _become(case, place, spare)
        os.close(writer)
        with os.fdopen(reader) as told:
            shared = int(told.read())
        _, status, used = os.wait4(process, 0)
        printed = {name: (spare / name).read_text(errors="backslashreplace") for name in ("stdout", "stderr")}
        ended = os.waitstatus_to_exitcode(status)
        memory = max(0, used.ru_maxrss * 1024 - shared)
        problem = _problem(ended, printed, memory) or _left(ended, before, _names(place), spare, case)
        _writable_again(place)
        return Outcome(
            code=ended if ended >= 0 else None,
            printed=printed["stdout"] + printed["stderr"],
            problem=problem,
            seconds=used.ru_utime + used.ru_stime,
            memory=memory,
        )


def _become(case: Case, place: Path, spare: Path) -> None:
    """Turns a forked process into the command, and ends it."""
    code = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.disable()
        os.chdir(place)
        (spare / "tmp").mkdir()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(spare / name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", errors="backslashreplace") for n in (1, 2))
        os.environ |= {"KRONY_CACHE": str(place / "cache"), "TMPDIR": str(spare / "tmp")}
        tempfile.tempdir = None
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        room = _address_space() + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from krony.cli.app import main

        sys.argv = ["krony", *case.command]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _problem(ended: int, printed: dict[str, str], memory: int) -> str | None:
    """What is wrong with how a command ended and with what it printed."""
    if ended == -signal.SIGALRM:
        return f"it takes more than {SECONDS} seconds"
    if ended < 0:
        return f"it is ended by signal {-ended}"
    lines = [line for line in printed["stderr"].splitlines() if not line.startswith(NOTES)]
    kind = {1: "not done:", 2: "error:"}.get(ended)
    if any(line.startswith("Traceback") for line in lines) or ended not in (0, 1, 2):
        return f"a traceback: {lines[-1] if lines else ''}"
    if OUT_OF_MEMORY in printed["stderr"]:
        return "there is not enough memory for it"
    if memory > MEMORY:
        return f"it takes {memory / 1e9:.1f} GB of memory"
    if kind is None and lines:
        return f"it says {lines[0]!r} and ends with exit code 0"
    if kind is not None and (len(lines) != 1 or not lines[0].startswith(kind)):
        return f"exit code {ended} comes with {len(lines)} lines instead of one that begins with {kind}"
    odd = {c for text in printed.values() for c in text if not c.isprintable() and c not in "\n\t"}
    return f"it prints {sorted(odd)}" if odd else None


def _left(ended: int, before: set[str], after: set[str], spare: Path, case: Case) -> str | None:
    """What a command left that it should not have, or took away."""
    if temporary := list((spare / "tmp").iterdir()):
        return f"it leaves {temporary[0].name} in the folder for temporary files"
    if Path("/tmp/krony-was-here").exists():
        return "it ran code of a file"
    new, gone = after - before, before - after - {".out.lock", ".out.holder"}  # of a process that was killed
    kept = {"out.work"} if ended == 1 or case.command[0] == "heal" else set()  # checkpoints, which the sentence names
    asked = {argument.rpartition("=")[2] for argument in case.command}
    new = {name for name in new if name.partition("/")[0] not in kept and name not in asked}
    if rests := sorted(name for name in new if name.endswith(LEFT)):
        return f"it leaves {rests[0]}"
    if ended == 2:
        new = {name for name in new if name.partition("/")[0] != "cache"}
    if ended == 2 and new | gone:
        return f"it fails and leaves {sorted(new)[:3]}, or takes away {sorted(gone)[:3]}"
    return None


def _names(place: Path) -> set[str]:
    return {os.fsencode(path.relative_to(place)).decode(errors="backslashreplace") for path in place.rglob("*")}


def _writable_again(place: Path) -> None:
    """Folders may have lost their permissions."""
    for folder in place.rglob("*"):
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
