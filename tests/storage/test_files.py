"""Folders and files are complete or absent, and what can't be written is known before the work."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from krony import KronyError
from krony.storage.files import check_file, check_writable, fresh_folder, write_json, write_text


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep/er/out"
    with fresh_folder(out) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out/a").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_its_permissions_are_those_of_any_new_folder(tmp_path, umask):
    """Whatever wrote the files; safetensors makes private ones."""
    before = os.umask(umask)
    try:
        with fresh_folder(tmp_path / "out") as folder:
            (folder / "logs").mkdir()
            for name in ("logs/a", "model.safetensors"):
                (folder / name).touch(mode=0o600)
            (folder / "link").symlink_to(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.lstat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes.pop("link") == 0o777
    assert modes == {
        "out": 0o777 & ~umask, "logs": 0o777 & ~umask, "a": 0o666 & ~umask, "model.safetensors": 0o666 & ~umask
    }  # fmt: skip


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), fresh_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(KronyError, match="out can't be written: No space left"), fresh_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_and_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(KronyError, match="is not empty"):
        check_writable(tmp_path)
    with pytest.raises(KronyError, match="is a file"):
        check_writable(tmp_path / "a")


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(KronyError, match="can't be written"):
        check_writable(tmp_path / "a/b")


def test_json_is_complete_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(KronyError, match="can't be written"):
        write_json(tmp_path / "none/a.json", {})
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own at ``folder``; without the right to mount the test is skipped."""
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting takes a privileged root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def state(folder: Path) -> dict:
    """Names, inodes, modes and times of everything below."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (s.st_ino, s.st_mode, s.st_mtime_ns) for path, s in found.items()}


def refused_before_and_not_after(out: Path, words: str) -> None:
    """By the check, and by the folder itself before its block begins; everything stays as it was."""
    before = state(out.parent) if out.parent.is_dir() and out != Path("/") else None
    with pytest.raises(KronyError, match=words) as refusal:
        check_writable(out)
    assert "\n" not in str(refusal.value)
    with pytest.raises(KronyError, match=words), fresh_folder(out):
        pytest.fail("the work has begun")
    if before is not None:
        assert state(out.parent) == before


def test_the_check_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o711)
    (tmp_path / "file.json").write_text("x")
    (tmp_path / "link.json").symlink_to("file.json")
    before = state(tmp_path)
    for out in ("empty", "new", "deep/er/new"):
        check_writable(tmp_path / out)
    for file in ("new.json", "file.json", "link.json"):
        check_file(tmp_path / file, ".json")
    check_file(tmp_path / "new/figures.json", inside=tmp_path / "new")
    assert state(tmp_path) == before and (tmp_path / "file.json").read_text() == "x"


def test_an_empty_mount_point(tmp_path):
    (tmp_path / "out").mkdir()
    with mounted(tmp_path / "out"):
        refused_before_and_not_after(tmp_path / "out", "out can't be written: Device or resource busy")
        check_writable(tmp_path / "out/new")


def test_a_file_system_that_is_read_only(tmp_path):
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-o", "ro"):
        refused_before_and_not_after(tmp_path / "disk/out", "out can't be written: Read-only file system")
        with pytest.raises(KronyError, match=r"x.json can't be written: Read-only file system"):
            check_file(tmp_path / "disk/x.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission(tmp_path):
    (tmp_path / "parent").mkdir(mode=0o555)
    refused_before_and_not_after(tmp_path / "parent/out", "out can't be written: Permission denied")
    with pytest.raises(KronyError, match=r"x.json can't be written: Permission denied"):
        check_file(tmp_path / "parent/x.json")


@pytest.mark.parametrize("target", ["nowhere", "empty"])
def test_a_symbolic_link(tmp_path, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(target)
    refused_before_and_not_after(tmp_path / "out", "out is a symbolic link: name the folder itself")


def test_names_that_are_no_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "a/..", "/"):
        refused_before_and_not_after(Path(name), "names a folder that is in use: name a new one, such as")
    for name in ("n" * 240, "n" * 254, "n" * 300, "\u00e9" * 127):
        refused_before_and_not_after(tmp_path / name, "can't be written: File name too long")
    refused_before_and_not_after(tmp_path / "out\udcff", r"out\\udcff can't be written: the name is not UTF-8")
    refused_before_and_not_after(tmp_path / "o\0t", r"o\\x00t can't be written")
    (tmp_path / "file").touch()
    refused_before_and_not_after(tmp_path / "file/out", r"file/out can't be written: .*file is a file")
    os.mkfifo(tmp_path / "pipe")
    refused_before_and_not_after(tmp_path / "pipe", "pipe is a file: name a folder")


def test_files_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    out = tmp_path / "out"
    for file, words in [
        (tmp_path / "pipe", "pipe is a pipe or a device: name a regular file"),
        (tmp_path / "null", "null is a pipe or a device: name a regular file"),
        (Path("/dev/null"), "/dev/null is a pipe or a device"),
        (Path("/dev/stdout"), "/dev/stdout is a pipe or a device"),
        (tmp_path, "is a folder: name a file to write"),
        (Path(), "is a folder: name a file to write"),
        (tmp_path / ("n" * 250), "can't be written: File name too long"),
        (out / ("n" * 250), "can't be written: File name too long"),
        (tmp_path / "x\udcff", r"x\\udcff can't be written: the name is not UTF-8"),
        (tmp_path / "none/x.json", "can't be written: there is no folder .*none"),
        (out / "figures/x.json", "can't be written: there is no folder .*figures"),
        (out, "out is where .*out is written: name another file"),
        (tmp_path / "a/../out", "out is where .*out is written: name another file"),
        (tmp_path / "out.work/x.json", "x.json is where .*out is written: name another file"),
        (Path("/proc/x.json"), "/proc/x.json can't be written: No such file"),
    ]:
        with pytest.raises(KronyError, match=words):
            check_file(file, inside=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "pipe"]
    (tmp_path / "mount").touch()
    (tmp_path / "source").touch()
    bind = ["mount", "--bind", str(tmp_path / "source"), str(tmp_path / "mount")]
    if subprocess.run(bind, capture_output=True, check=False).returncode == 0:  # as containers mount single files
        try:
            with pytest.raises(KronyError, match="mount can't be written: Device or resource busy"):
                check_file(tmp_path / "mount")
        finally:
            subprocess.run(["umount", str(tmp_path / "mount")], check=True)


WRITER = """
import sys
from pathlib import Path
from krony.storage.files import fresh_folder
with fresh_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("x")
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_two_writers_of_one_folder(tmp_path):
    """The second is refused before its work, not after it."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    assert first.stdout.readline() == "at work\n"
    second = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert second.returncode == 1 and second.stdout == ""
    assert f"KronyError: {tmp_path}/out is in use by process {first.pid} on" in second.stderr
    first.communicate()
    assert first.returncode == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_a_folder_that_was_filled_meanwhile_does_not_cost_the_work(tmp_path):
    with (
        pytest.raises(KronyError, match=r"out can't be replaced .*, so .*out-1 is what was made for it"),
        fresh_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("x")
        (tmp_path / "out/theirs").mkdir(parents=True)
    assert (tmp_path / "out-1/a").read_text() == "x" and (tmp_path / "out/theirs").is_dir()


def test_another_folders_partial_is_not_cleared_away(tmp_path):
    """The name of the other begins as that of a partial folder of ours does."""
    with fresh_folder(tmp_path / "a.partial-x") as other, fresh_folder(tmp_path / "a"):
        assert other.is_dir()


def test_text_goes_through_no_symbolic_link(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "y")
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "link").read_text() == "y"


def test_a_work_folder_that_is_a_link_is_refused(tmp_path):
    """Otherwise checkpoints would be written into another folder, and removed from there at the end."""
    (tmp_path / "other").mkdir()
    (tmp_path / "out.work").symlink_to("other")
    with pytest.raises(KronyError, match=r"out\.work is a symbolic link"):
        check_writable(tmp_path / "out")
