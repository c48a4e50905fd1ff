"""One writer at a time, and whoever comes second is told who holds the lock."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest

from krony import KronyError
from krony.errors import KronyWarning
from krony.storage.files import fresh_folder
from krony.storage.locks import locked, working_in

HOLDER = """
import sys
from pathlib import Path
from krony.storage.locks import working_in
with working_in(Path(sys.argv[1])):
    {then}
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(folder, then="pass") -> subprocess.Popen:
    """Another process that holds the lock until its stdin is closed."""
    command = [sys.executable, "-c", HOLDER.format(then=then), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("name", ["out", "out.work"])
def test_a_second_process_is_told_who_holds_it(tmp_path, name):
    process = holding(tmp_path / name)
    who = rf"out is in use by process {process.pid} on {os.uname().nodename} since \d+-\d\d-\d\d \d\d:\d\d:\d\d \(.*-c "
    for mine in ("out", "out.work"):  # they share one lock
        with pytest.raises(KronyError, match=who), working_in(tmp_path / mine):
            pass
    process.communicate()
    with working_in(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process_however_it_ends(tmp_path, number):
    process = holding(tmp_path / "out")
    process.send_signal(number)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.holder", ".out.lock"]
    with working_in(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.holder").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_child_does_not_keep_a_killed_parents_lock(tmp_path):
    """Workers of a data loader outlive a parent that is killed."""
    process = holding(tmp_path / "out", "import os, time; pid = os.fork(); pid or (time.sleep(60), os._exit(0))")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    process.kill()
    process.wait()
    try:
        with working_in(tmp_path / "out"):
            pass
    finally:
        os.kill(int(children.stdout), signal.SIGKILL)


def test_a_thread_takes_it_again_and_another_thread_does_not(tmp_path):
    with working_in(tmp_path / "out"):
        with working_in(tmp_path / "out.work"), fresh_folder(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.lock").exists()  # still held
        with ThreadPoolExecutor(1) as pool, pytest.raises(KronyError, match="is in use by process"):
            pool.submit(working_in(tmp_path / "out").__enter__).result()


COUNTER = """
import sys, time
from pathlib import Path
from krony import KronyError
from krony.storage.locks import locked
file = Path(sys.argv[1])
added = 0
while added < 40:
    try:
        with locked(file):
            value = int(file.read_text())
            time.sleep(0.0005)
            file.write_text(str(value + 1))
            added += 1
    except KronyError:
        pass
"""


def test_the_lock_files_removal_lets_nobody_in(tmp_path):
    """Four processes take and release one lock 160 times: no update is lost though the lock file comes and goes."""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path / "count")]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_parent_folders_are_made_and_go_again_if_nothing_is_in_them(tmp_path):
    with working_in(tmp_path / "a/b/out"):
        assert (tmp_path / "a/b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with working_in(tmp_path / "a/b/out"):
        (tmp_path / "a/kept").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "kept"]
    with (
        pytest.raises(KronyError, match=r"kept/c/out can't be written: .*kept is a file"),
        working_in(tmp_path / "a/kept/c/out"),
    ):
        pass


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b"", "by another process: wait"),
        (b"[1]", "by another process: wait"),
        (b'{"pid": 1}', "by another process: wait"),
        (b"[" * 100_000, "by another process: wait"),
        (
            json.dumps({"pid": 1, "host": "h\x1b[2J", "command": "x" * 9000, "since": "now\n"}).encode(),
            r"by process 1 on h\\x1b\[2J since now\\n \(x{199}…\): wait",
        ),
    ],
)
def test_a_record_that_is_damaged_or_hostile(tmp_path, record, words):
    process = holding(tmp_path / "out")
    (tmp_path / ".out.holder").write_bytes(record)
    with pytest.raises(KronyError, match=words), working_in(tmp_path / "out"):
        pass
    (tmp_path / ".out.holder").unlink()
    os.mkfifo(tmp_path / ".out.holder")
    with pytest.raises(KronyError, match="by another process: wait"), working_in(tmp_path / "out"):
        pass
    process.communicate()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.warns(KronyWarning, match="out is on a file system without locks"), working_in(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_lock_where_nothing_can_be_written(tmp_path):
    for path, words in [("/proc/out", "can't be written"), (tmp_path / ("n" * 255), "can't be written: File name too")]:
        with pytest.raises(KronyError, match=words), locked(tmp_path / path):
            pass
    with pytest.raises(KronyError, match="is the root of the file system"), locked(tmp_path / "/"):
        pass
    with (
        pytest.raises(KronyError, match=r"out\\udcff can't be written: the name is not UTF-8"),
        locked(tmp_path / "out\udcff"),
    ):
        pass


def test_the_second_waits_for_nothing(tmp_path):
    process = holding(tmp_path / "out")
    start = time.monotonic()
    with pytest.raises(KronyError), working_in(tmp_path / "out"):
        pass
    assert time.monotonic() - start < 5
    process.communicate()
