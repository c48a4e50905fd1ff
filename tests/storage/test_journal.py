"""Work that resumes from OUT.work."""

import json

import pytest

from krony import KronyError
from krony.storage.journal import Journal, differences, work_folder


def test_a_killed_run_is_resumed_after_its_last_complete_unit(tmp_path):
    journal = Journal(tmp_path / "out", {"seed": 0})
    journal.open()
    journal.note({"unit": "a"})
    with (journal.folder / "done.jsonl").open("a") as lines:
        lines.write('{"unit": "b')  # killed here
    journal.close()
    again = Journal(tmp_path / "out", {"seed": 0})
    again.open()
    assert again.done == [{"unit": "a"}]
    again.note({"unit": "b"})
    (again.folder / "model").mkdir()
    again.publish(again.folder / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_jobs_folder_and_a_strangers(tmp_path):
    journal = Journal(tmp_path / "out", {"seed": 0})
    journal.open()
    journal.close()
    with pytest.raises(KronyError, match=r"out.work is from a run with seed 0 \(now 1\)"):
        Journal(tmp_path / "out", {"seed": 1}).open()
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work/notes.txt").touch()
    with pytest.raises(KronyError, match=r"other.work is in the way"):
        Journal(tmp_path / "other", {}).open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.work", "out.work"]  # no lock is left


def test_what_was_made_is_kept_when_out_was_filled_meanwhile(tmp_path):
    journal = Journal(tmp_path / "out", {})
    journal.open()
    (journal.folder / "model").mkdir()
    (journal.folder / "model/config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    (tmp_path / "out-1").touch()
    with pytest.raises(KronyError, match=r"out can't be replaced \(Directory not empty\), so .*out-2 is what was made"):
        journal.publish(journal.folder / "model")
    journal.remove()
    assert (tmp_path / "out-2/config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1", "out-2"]


def test_killed_after_out_was_in_its_place(tmp_path):
    work_folder(tmp_path / "out").mkdir()
    (tmp_path / "out.work/job.json").write_text(json.dumps({}))
    (tmp_path / "out").mkdir()
    journal = Journal(tmp_path / "out", {})
    journal.open()
    assert journal.done == []
    journal.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_differences_are_named():
    assert differences({"a": 1}, {"a": 1}) == ""
    assert differences({"a": "x" * 50, "b": 1}, {"a": 2, "c": 3}) == (
        f'a "{"x" * 36}… (now 2), b 1 (now null), c null (now 3)'
    )
