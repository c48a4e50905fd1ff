"""Files and named sets, and each way a file can be wrong."""

import json
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_folder import DATA, needs_data
from krony import KronyError
from krony.data import python_docs
from krony.data.sets import join_documents, join_rows, load_texts, read_file


def test_wikitext_rows_are_those_of_the_hub(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/wiki.test.tokens").write_text(" \n = Title = \n \n A line . \n")
    assert load_texts("wikitext-2", tmp_path) == ["", " = Title = \n", "", " A line . \n"]


def test_lambada_rows_carry_no_line_break(tmp_path):
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada/lambada_test_plain_text.txt").write_text("one two\nthree four\n")
    assert load_texts("lambada", tmp_path) == ["one two", "three four"]


@needs_data
@pytest.mark.parametrize(("name", "rows"), [("wikitext-2", 4358), ("wikitext-103", 4358), ("lambada", 5153)])
def test_the_real_sets_have_the_hubs_number_of_rows(name, rows):
    assert len(load_texts(name, DATA)) == rows


@needs_data
def test_wikitext_2_has_gpt2s_number_of_tokens():
    """287,644 tokens is what transformers' perplexity page gets for wikitext-2-raw joined like this."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-tokenizer")
    text = (DATA / "wikitext-2-raw/wiki.test.raw").read_text()
    rows = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    assert len(join_rows(rows, tokenizer)) == 287_644


def test_jsonl_and_text(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    (tmp_path / "d.txt").write_text("a\nb\n")
    assert read_file(tmp_path / "d.jsonl") == ["one", "two"]
    assert read_file(tmp_path / "d.txt") == ["a\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("latin.txt", "naïve".encode("latin-1"), r"is not UTF-8 text \(byte 2\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r'line 2: not a JSON object with a "text"'),
        ("keys.jsonl", b'{"body": "a"}', r'line 1: not a JSON object with a "text"'),
        ("list.jsonl", b"[1]", r'line 1: not a JSON object with a "text"'),
        ("number.jsonl", b'{"text": 3}', r'line 1: "text" is not a string'),
    ],
)
def test_files_that_are_wrong(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KronyError, match=words):
        load_texts(str(tmp_path / name))


def test_a_missing_file_a_folder_and_an_unknown_name(tmp_path):
    with pytest.raises(KronyError, match="can't be read: No such file"):
        load_texts(str(tmp_path / "none.txt"))
    with pytest.raises(KronyError, match="is a folder"):
        load_texts(str(tmp_path))
    with pytest.raises(KronyError, match="nor a data set of this name"):
        load_texts("wikitext-4")
    with pytest.raises(KronyError, match=r"wiki.test.tokens can't be read"):
        load_texts("wikitext-2", tmp_path)
    with pytest.raises(KronyError, match="the name of a text is empty"):
        load_texts("")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(KronyError, match="Permission denied"):
        load_texts(str(path))


def test_without_the_hub_the_sentence_names_the_file_that_would_do():
    with pytest.raises(KronyError, match=r"with --data-dir DIR it is read from DIR/wikitext-2/wiki.test.tokens"):
        load_texts("wikitext-2")


def test_text_is_kept_to_the_letter(tmp_path):
    text = "tabs\t, \u2028 separators, and\x0bothers"
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    assert read_file(tmp_path / "d.jsonl") == [text]


def test_python_docs_parts_share_no_paragraph():
    held_out, calibration = (python_docs.topics(part) for part in ("held-out", "calibration"))
    paragraphs = {p.strip("\n") for text in held_out for p in text.split("\n\n")}
    assert held_out and calibration
    assert not any(p.strip("\n") in paragraphs for text in calibration for p in text.split("\n\n"))
    assert load_texts("python-docs") == held_out


def test_python_docs_split_follows_the_names():
    held = {"break", "customization", "lambda", "try", "pass"}
    assert {n for n in ("assert", "class", "for", "global", "import", *held) if python_docs.is_held_out(n)} == held
    with pytest.raises(ValueError, match="part 'test' is unknown"):
        python_docs.topics("test")


@given(texts=st.lists(st.text("ab \n", max_size=30), max_size=5), most=st.integers(0, 40), piece=st.integers(2, 9))
def test_the_first_tokens_are_those_of_the_whole(tokenizer, texts, most, piece):
    """Without tokenising what follows them."""
    with pytest.MonkeyPatch.context() as short:
        short.setattr("krony.data.sets._pieces.__defaults__", (piece,))
        for join in (join_documents, join_rows):
            assert torch.equal(join(texts, tokenizer, most), join(texts, tokenizer)[:most])


def test_what_follows_the_first_tokens_is_not_read(tokenizer):
    assert len(join_documents(["long enough", None], tokenizer, 5)) == 5  # None is no text
