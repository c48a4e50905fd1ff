"""Training text as rows."""

import json

import numpy as np
import pytest
import torch

from krony import KronyError
from krony.data.rows import Rows, load_rows

OPTIONS = {"length": 8, "vocabulary": 257}


def test_rows_are_the_documents_one_after_the_other(tokenizer, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("first one", "the second")))
    rows = load_rows(str(file), tokenizer, **OPTIONS)
    expected = tokenizer("first one")["input_ids"] + [256] + tokenizer("the second")["input_ids"]
    assert len(rows) == 2
    assert torch.cat([rows[0]["input_ids"], rows[1]["labels"]]).tolist() == expected[:16]
    assert len(load_rows(str(file), tokenizer, max_tokens=9, **OPTIONS)) == 1


def test_a_bin_is_read_where_it_lies(tokenizer, tmp_path):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    rows = load_rows(str(tmp_path / "train.bin"), tokenizer, **OPTIONS)
    assert isinstance(rows.tokens, np.memmap) and rows[1]["input_ids"].tolist() == list(range(8, 16))
    assert rows[0]["input_ids"].dtype == torch.int64


def test_python_docs_are_the_calibration_part(tokenizer):
    from krony.data import python_docs

    rows = load_rows("python-docs", tokenizer, **OPTIONS)
    first = tokenizer(python_docs.topics("calibration")[0])["input_ids"]
    assert rows[0]["input_ids"].tolist() == first[:8]


def test_split_keeps_all():
    train, last = Rows(np.arange(43), 4).split(3)
    assert (len(train), len(last)) == (7, 3)
    assert last[0]["input_ids"].tolist() == [28, 29, 30, 31]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", b"abc", "has 3 tokens: at least 8 make one row"),
        ("a.bin", b"abc", "has 3 bytes: a .bin file holds token ids of two bytes each"),
        ("a.bin", b"", "has 0 bytes"),
        ("a.bin", np.full(20, 300, dtype="<u2").tobytes(), "has token 300, the model knows 257"),
        ("a.bin", np.full(20, 70_000, dtype="<u4").tobytes(), "has token 4464, the model knows 257"),
        ("a.bin", (np.arange(100, dtype="<u4") % 250).tobytes(), "holds token ids of four bytes or more"),
        ("a.bin", (np.arange(100, dtype="<i8") % 250).tobytes(), "holds token ids of four bytes or more"),
        ("a.bin", (np.arange(100, dtype="<u4") * 1000).tobytes(), "holds token ids of four bytes or more"),
    ],
)
def test_bad_data(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KronyError, match=words):
        load_rows(str(tmp_path / name), tokenizer, **OPTIONS)


def test_names(tokenizer, tmp_path):
    with pytest.raises(KronyError, match="wikitext-2 is a test set"):
        load_rows("wikitext-2", tokenizer, **OPTIONS)
    with pytest.raises(KronyError, match="max_tokens says how much is read"):
        load_rows("someone/text", tokenizer, **OPTIONS)
    with pytest.raises(KronyError, match="no data set of that name can be read from the hub"):
        load_rows("someone/text", tokenizer, max_tokens=100, **OPTIONS)
    with pytest.raises(KronyError, match="can't be read"):
        load_rows(str(tmp_path / "none.bin"), tokenizer, **OPTIONS)


def test_a_set_on_the_hub_is_streamed(tokenizer, monkeypatch):
    import datasets

    read = []

    def endless(*_, **__):
        while True:
            read.append(1)
            yield {"text": "some words"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    assert len(load_rows("someone/text", tokenizer, max_tokens=100, **OPTIONS)) == 12
    assert len(read) == 10  # no more than was needed
