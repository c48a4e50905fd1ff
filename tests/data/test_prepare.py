"""train.bin and val.bin: nanoGPT's bytes, whatever happens on the way."""

import errno
import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
from datasets import Dataset

from krony import KronyError, calibration_set
from krony.data import prepare as preparation
from krony.data.prepare import prepare
from krony.storage.files import fresh_folder
from processes import CONTEXT, Process, krony


@pytest.fixture
def documents() -> list[str]:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 60))) for _ in range(300)]
    return [*texts, "a text that spells <|endoftext|> itself"]


@pytest.fixture
def file(documents, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def expected(documents, tokenizer, share=0.0005) -> dict[str, bytes]:
    """nanoGPT's way: split, encode each document as plain text, append the end of text."""
    split = Dataset.from_dict({"text": documents}).train_test_split(test_size=share, seed=2357, shuffle=True)
    made = {}
    for name, part in (("train", split["train"]), ("val", split["test"])):
        ids = [id for text in part["text"] for id in [*(text.encode()), None]]
        known = tokenizer.get_vocab()
        alphabet = {byte: known[tokenizer.tokenize(chr(byte))[0]] for byte in {i for i in ids if i is not None}}
        made[name] = np.array([256 if id is None else alphabet[id] for id in ids], dtype=np.uint16).tobytes()
    return made


def test_it_writes_what_nanogpt_does(file, documents, tokenizer, tmp_path):
    seen = []
    parts = prepare(str(file), tokenizer, tmp_path / "out", progress=lambda *a: seen.append(a))
    for name, content in expected(documents, tokenizer).items():
        assert (tmp_path / f"out/{name}.bin").read_bytes() == content
        assert parts[name].tokens == len(content) // 2
    assert (parts["train"].documents, parts["val"].documents) == (300, 1)  # 0.0005 of 301, rounded up
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]
    assert seen[-1][:2] == (300, 300) and "train, " in seen[-1][2]
    with pytest.raises(KronyError, match=r"train.bin exists: name another folder"):
        prepare(str(file), tokenizer, tmp_path / "out")


def prepared(file, tokenizer, out, pause, begin=None) -> None:
    """All that a process does: prepares in small batches, slowly, once all of ``begin`` are there."""
    preparation.BATCH, preparation.KEPT_EVERY = 4, 200
    if begin is not None:
        begin.wait()
    prepare(str(file), tokenizer, out, progress=lambda *_: time.sleep(pause))


def worker(file, tokenizer, tmp_path, pause=0.02, name="process", begin=None) -> Process:
    return Process(tmp_path / name, prepared, file, tokenizer, tmp_path / "out", pause, begin)


def test_after_a_kill_it_resumes_where_it_was(file, documents, tokenizer, tmp_path, monkeypatch):
    """SIGKILL somewhere on the way; the bytes are those of an uninterrupted run."""
    out = tmp_path / "out"
    process = worker(file, tokenizer, tmp_path)
    while not (out / "prepare.json").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng(os.getpid()).uniform(0, 0.6)))
    process.send(signal.SIGKILL)
    process.ended()
    assert not (out / "train.bin").exists() and not (out / "val.bin").exists()
    known = json.loads((out / "prepare.json").read_text())["parts"]["train"]
    assert known["documents"] < 300
    with pytest.raises(KronyError, match=r"the beginning of other work \(.*, val_share 0.0005, and now it is 0.1\)"):
        prepare(str(file), tokenizer, out, val_share=0.1)
    with (out / "train.bin.partial").open("ab") as partial:
        partial.write(b"half a batch that no note speaks of")
    seen = []
    prepare(str(file), tokenizer, out, progress=lambda *a: seen.append(a))
    assert min(done for done, total, _ in seen) > known["documents"]
    for name, content in expected(documents, tokenizer).items():
        assert (out / f"{name}.bin").read_bytes() == content


def test_a_text_that_has_changed_is_not_mixed_with_what_was_read_of_it(file, tokenizer, tmp_path, monkeypatch):
    def stopped(done, total, what):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(preparation, "KEPT_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(file), tokenizer, out, progress=stopped)
    file.write_text(file.read_text().replace("a", "b"))  # as many documents
    with pytest.raises(KronyError, match=r"the beginning of other work \(.*, which has changed since\)"):
        prepare(str(file), tokenizer, out)


def test_what_was_removed_is_written_again(file, documents, tokenizer, tmp_path, monkeypatch):
    """Stopped before the names appear, and then somebody removes what is there but for the note."""
    out, write_names = tmp_path / "out", preparation.Path.replace

    def stopped(self, target):
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return write_names(self, target)

    monkeypatch.setattr(preparation.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(file), tokenizer, out)
    monkeypatch.undo()
    for partial in out.glob("*.bin.partial"):
        partial.unlink()
    prepare(str(file), tokenizer, out)
    for name, content in expected(documents, tokenizer).items():
        assert (out / f"{name}.bin").read_bytes() == content


def test_a_full_disk(file, documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BATCH", 4)
    monkeypatch.setattr(preparation, "KEPT_EVERY", 100)
    calls = []

    def full(_):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparation.os, "fsync", full)
    with pytest.raises(KronyError, match="out can't be written, No space left on device: the same command resumes"):
        prepare(str(file), tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    prepare(str(file), tokenizer, tmp_path / "out")
    assert (tmp_path / "out/train.bin").read_bytes() == expected(documents, tokenizer)["train"]


def test_a_set_on_the_hub(documents, tokenizer, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, *, split, streaming):
        asked.append((name, split, streaming))
        return Dataset.from_dict({"text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare("openwebtext", tokenizer, tmp_path / "out")
    assert asked == [("Skylion007/openwebtext", "train", False)]
    assert (tmp_path / "out/val.bin").read_bytes() == expected(documents, tokenizer)["val"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_dict({"words": ["a"]}))
    with pytest.raises(KronyError, match="some/set has no column text: it has words"):
        prepare("some/set", tokenizer, tmp_path / "other")
    for missing in (None, ["a", "b"]):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, no=missing, **__: Dataset.from_dict({"text": [no] * 9})
        )
        with pytest.raises(KronyError, match=r"some/set: an entry of its column text is (NoneType|list), not a string"):
            prepare("some/set", tokenizer, tmp_path / "other")
        with pytest.raises(KronyError, match="not a string"):
            calibration_set("some/set", tokenizer)


def test_one_document_is_not_split(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("one document")
    with pytest.raises(KronyError, match="is one document, which can't be split"):
        prepare(str(tmp_path / "t.txt"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(str(tmp_path / "t.txt"), tokenizer, tmp_path / "out", val_share=0)["train"].tokens == 13
    assert not (tmp_path / "out/val.bin").exists()


class Large:
    """A tokenizer of more tokens than two bytes tell apart."""

    def __len__(self):
        return 128_256


def test_mistakes(file, tokenizer, tmp_path):
    out = tmp_path / "out"
    for arguments, options, words in [
        ((str(file), Large(), out), {}, "has 128,256 entries, and a .bin file holds ids below 65,536"),
        ((str(file), tokenizer, out), {"val_share": 1.0}, "the val share is 1.0: it is a share"),
        (("wikitext-2", tokenizer, out), {}, "wikitext-2 is a test set"),
        ((str(tmp_path / "a.bin"), tokenizer, out), {}, "is prepared already: prepare takes text"),
        ((str(tmp_path / "none.jsonl"), tokenizer, out), {}, "No such file"),
        ((str(file), tokenizer, file), {}, "is a file: name a folder"),
        (("some/set", tokenizer, out), {}, "no data set of that name can be read from the hub"),
    ]:
        with pytest.raises(KronyError, match=words):
            prepare(*arguments, **options)
    assert not out.exists()


def test_two_at_once_into_one_folder(file, documents, tokenizer, tmp_path):
    """One does the work, and every other is refused and told who holds the folder."""
    begin = CONTEXT.Barrier(3)
    processes = [worker(file, tokenizer, tmp_path, pause=0.05, name=f"process-{n}", begin=begin) for n in range(3)]
    said = {process.pid: process.ended()[1] for process in processes}
    done = [process.pid for process in processes if process.exitcode == 0]
    assert len(done) == 1, said
    for process in processes:
        if process.pid not in done:
            assert re.search(rf"KronyError: .*out.* is in use by process {done[0]} on .* since ", said[process.pid])
    for name, content in expected(documents, tokenizer).items():
        assert (tmp_path / f"out/{name}.bin").read_bytes() == content
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]


def test_others_of_a_folder_that_is_being_filled(file, documents, tokenizer, tmp_path):
    """While the folder is new, a verb that would put a model there is refused too; and so is one that resumes."""
    process = worker(file, tokenizer, tmp_path, pause=0.2)
    while not (tmp_path / "out/prepare.json").exists() and process.is_alive():
        time.sleep(0.01)
    with pytest.raises(KronyError, match=f"out is in use by process {process.pid} on"), fresh_folder(tmp_path / "out"):
        pass
    with pytest.raises(KronyError, match=f"out.* is in use by process {process.pid} on"):
        prepare(str(file), tokenizer, tmp_path / "out")
    process.send(signal.SIGKILL)
    process.ended()
    prepare(str(file), tokenizer, tmp_path / "out")
    assert (tmp_path / "out/train.bin").read_bytes() == expected(documents, tokenizer)["train"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "process", "text.jsonl"]


def slow_command(*arguments) -> None:
    """All that a process does: ``krony data prepare`` in small batches, slowly."""
    ids, preparation.BATCH = preparation._ids, 4
    preparation._ids = lambda *a: (time.sleep(0.05), ids(*a))[1]
    krony("data", "prepare", *arguments)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_what_is_done(file, documents, tokenizer, gpt2_folder, tmp_path, name, code):
    """The files are too short for a record on the way: this one is made because of the signal."""
    out = tmp_path / "out"
    process = Process(tmp_path / "process", slow_command, file, out, "--tokenizer", gpt2_folder)
    while not (out / "train.bin.partial").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send(getattr(signal, name))
    returned, said = process.ended()
    assert returned == code, said
    noted = json.loads((out / "prepare.json").read_text())["parts"]
    tokens = sum(part["tokens"] for part in noted.values())
    assert 0 < noted["train"]["documents"] < 300
    assert (out / "train.bin.partial").stat().st_size == 2 * noted["train"]["tokens"]
    assert said == f"stopped: {out} holds the first {tokens:,} tokens: the same command resumes there\n"
    seen = []
    prepare(str(file), tokenizer, out, progress=lambda *a: seen.append(a))
    assert min(done for done, *_ in seen) > noted["train"]["documents"]
    for split, content in expected(documents, tokenizer).items():
        assert (out / f"{split}.bin").read_bytes() == content


def test_a_damaged_record(file, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (
        "{",
        "[]",
        "{}",
        '{"parts": {"train": 3}}',
        '{"parts": {"train": {"documents": "x", "tokens": 0}}}',
    ):
        (tmp_path / "out/prepare.json").write_text(content)
        with pytest.raises(KronyError, match=r"prepare.json (is damaged|is not JSON|holds no JSON object)"):
            prepare(str(file), tokenizer, tmp_path / "out")


def test_a_parent_that_cannot_be_written(file, documents, tokenizer, tmp_path, monkeypatch):
    """As of a volume at /data that belongs to the user."""
    (tmp_path / "out").mkdir()
    access = os.access
    monkeypatch.setattr(preparation.os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    beside = []
    prepare(str(file), tokenizer, tmp_path / "out", progress=lambda *_: beside.extend(tmp_path.glob(".out*")))
    assert beside == []
    assert (tmp_path / "out/train.bin").read_bytes() == expected(documents, tokenizer)["train"]


def test_a_folder_where_the_progress_is_recorded_is_refused_before_the_work(file, tokenizer, tmp_path):
    (tmp_path / "out/prepare.json").mkdir(parents=True)
    with pytest.raises(KronyError, match=r"prepare\.json is a folder"):
        prepare(str(file), tokenizer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prepare.json"]
