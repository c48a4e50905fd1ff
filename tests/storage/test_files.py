"""Folders are whole or not there."""

import errno
import json

import pytest

from krony import KronyError
from krony.storage.files import check_writable, fresh_folder, write_json


def test_a_folder_appears_when_it_is_whole(tmp_path):
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


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(KronyError, match="can't be written"):
        write_json(tmp_path / "none/a.json", {})
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
