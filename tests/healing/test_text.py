"""What is trained on and what is validated on: complete documents, never the same ones, never calibrated on."""

import json
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest

from krony import KronyConfig, KronyError, compress
from krony.data import python_docs
from krony.data.calibration_set import digest
from krony.data.rows import Rows, load_rows
from krony.errors import KronyWarning
from krony.healing.text import Reader, calibration_documents, load_text
from krony.models.quantizer import KronyQuantizationConfig
from small_models import gpt2

LENGTH = 32
END = 256


def documents(count: int = 100, words: int = 20) -> list[str]:
    """Different texts, of about 130 bytes each, which are as many tokens."""
    return [" ".join(f"{number:03d}-{word}" for word in range(words)) for number in range(count)]


@pytest.fixture
def reader(tokenizer) -> Reader:
    return Reader(tokenizer=tokenizer, length=LENGTH, vocabulary=257, end=END)


def calibrated(reader: Reader, texts: list[str]) -> Reader:
    return Reader(
        tokenizer=reader.tokenizer, length=LENGTH, vocabulary=257, end=END, calibrated=frozenset(map(digest, texts))
    )


def jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def binary(path, texts, reader) -> str:
    np.concatenate(reader.tokens([*texts, ""])).astype("<u2").tofile(path)
    return str(path)


def words(rows: Rows, reader: Reader) -> str:
    return reader.tokenizer.decode(rows.tokens.tolist())


def inside(rows: Rows, texts: list[str], reader: Reader) -> set[str]:
    """The documents of which some of the beginning is in these rows."""
    there = words(rows, reader)
    return {text for text in texts if text[:10] in there}


@pytest.mark.parametrize("kind", ["jsonl", "bin", "rows"])
def test_complete_documents_are_held_out(tmp_path, reader, kind):
    texts = documents()
    data = jsonl(tmp_path / "t.jsonl", texts) if kind == "jsonl" else binary(tmp_path / "t.bin", texts, reader)
    if kind == "rows":
        data = load_rows(data, None, length=LENGTH, vocabulary=257)
    train, validation = load_text(data, None, reader)
    assert len(validation) == 16 and len(validation.tokens) == 16 * LENGTH
    trained, held = inside(train, texts, reader), inside(validation, texts, reader)
    assert held and not trained & held and trained | held == set(texts)
    assert [piece for piece in words(train, reader).split("<|endoftext|>") if piece] == [
        t for t in texts if t in trained
    ]
    again = load_text(data, None, reader)[1]
    assert np.array_equal(validation.tokens, again.tokens)
    if kind != "jsonl":
        assert held == set(texts[-len(held) :])  # the last ones, so that a .bin stays a memory map
        assert isinstance(train.tokens, np.memmap)


def test_the_choice_depends_on_the_documents_alone(tmp_path, reader):
    texts = documents()
    first = load_text(jsonl(tmp_path / "a.jsonl", texts), None, reader)[1]
    mixed = texts + texts[:50]
    random.Random(0).shuffle(mixed)
    train, second = load_text(jsonl(tmp_path / "b.jsonl", mixed), None, reader)
    assert np.array_equal(first.tokens, second.tokens)
    assert not inside(train, texts, reader) & inside(second, texts, reader)  # no copy of a document either


@pytest.mark.parametrize("kind", ["jsonl", "bin"])
def test_what_was_calibrated_on_never_validates(tmp_path, reader, kind):
    texts = documents()
    data = jsonl(tmp_path / "t.jsonl", texts) if kind == "jsonl" else binary(tmp_path / "t.bin", texts, reader)
    known = inside(load_text(data, None, reader)[1], texts, reader)
    train, validation = load_text(data, None, calibrated(reader, list(known)))
    held = inside(validation, texts, reader)
    assert len(validation) == 16 and not held & known and not held & inside(train, texts, reader)
    with pytest.raises(KronyError, match="has no document to validate on that the model was not calibrated on: name"):
        load_text(data, None, calibrated(reader, texts))


def test_named_validation_text_leaves_out_what_was_calibrated_on(tmp_path, reader):
    texts = documents()
    data, val = jsonl(tmp_path / "t.jsonl", texts[:50]), jsonl(tmp_path / "v.jsonl", texts[50:])
    for name in (val, binary(tmp_path / "v.bin", texts[50:], reader)):
        with pytest.warns(KronyWarning, match="10 documents left out, because the model was calibrated on"):
            _, validation = load_text(data, name, calibrated(reader, texts[50:60]))
        assert inside(validation, texts, reader) == set(texts[60:])
        with pytest.raises(KronyError, match="has no document to validate on that the model was not calibrated on"):
            load_text(data, name, calibrated(reader, texts[50:]))


def test_a_document_that_validates_is_not_trained_on(tmp_path, reader):
    texts = documents()
    data, val = jsonl(tmp_path / "t.jsonl", texts), jsonl(tmp_path / "v.jsonl", texts[:30])
    with pytest.warns(KronyWarning, match=r"t\.jsonl: 30 documents left out, for validation alone"):
        train, validation = load_text(data, val, reader)
    assert inside(train, texts, reader) == set(texts[30:]) and inside(validation, texts, reader) == set(texts[:30])
    with pytest.raises(KronyError, match=r"t\.jsonl is the training text: name other text to validate on"):
        load_text(data, data, reader)


def test_named_text_is_trained_on_as_it_is(tmp_path, tokenizer, reader):
    """The same rows as ever: the documents one after the other, the last without the end-of-text token."""
    texts = documents()
    data, val = jsonl(tmp_path / "t.jsonl", texts[:60]), jsonl(tmp_path / "v.jsonl", texts[60:])
    for most in (None, 2000):
        train, validation = load_text(data, val, reader, max_tokens=most)
        expected = load_rows(data, tokenizer, length=LENGTH, vocabulary=257, max_tokens=most)
        assert np.array_equal(train.tokens, expected.tokens)
        limit = None if most is None else 16 * LENGTH
        expected = load_rows(val, tokenizer, length=LENGTH, vocabulary=257, max_tokens=limit)
        assert np.array_equal(validation.tokens, expected.tokens)


def test_max_tokens_bounds_the_validation_text(tmp_path, reader):
    """A tenth, but at least 16 rows."""
    texts = documents(400)
    data, val = jsonl(tmp_path / "t.jsonl", texts[:200]), jsonl(tmp_path / "v.jsonl", texts[200:])
    for most, expected in ((1000, 16 * LENGTH), (9000, 900)):
        train, validation = load_text(data, val, reader, max_tokens=most)
        assert len(train.tokens) == most and len(validation.tokens) == expected
    train, validation = load_text(data, None, reader, max_tokens=9000)
    assert len(validation.tokens) == 16 * LENGTH and 8000 < len(train.tokens) < 9000 - 16 * LENGTH


def test_python_docs_validate_on_their_held_out_part(tokenizer, reader):
    """Also by default: its topics quote each other, so that one held out of the others would be half known."""
    train, validation = load_text("python-docs", None, reader, max_tokens=4000)
    held_out = tokenizer(python_docs.topics("held-out")[0])["input_ids"]
    assert validation.tokens[: len(held_out)].tolist() == held_out[: 16 * LENGTH]
    assert train.tokens[:50].tolist() == tokenizer(python_docs.topics("calibration")[0])["input_ids"][:50]
    _, named = load_text("python-docs", "python-docs", reader, max_tokens=4000)
    assert named.tokens.tolist() == validation.tokens.tolist()


def test_few_rows_are_warned_of(tmp_path, reader):
    data = jsonl(tmp_path / "t.jsonl", documents(10))
    with pytest.warns(KronyWarning, match="only 4 rows validate, and fewer than 16 make an unsteady loss"):
        load_text(data, None, reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text(jsonl(tmp_path / "u.jsonl", documents()), None, reader)


def test_large_documents_are_held_out_only_where_all_are(tmp_path, reader):
    """One of two is held out, though a tenth of the text would do; a large one among small ones is not."""
    large = [text * 10 for text in documents(2)]
    train, validation = load_text(jsonl(tmp_path / "t.jsonl", large), None, reader)
    assert len(inside(train, large, reader)) == len(inside(validation, large, reader)) == 1
    for number in range(5):  # whatever its digest is
        mixed = [f"large {number}: {large[0] * 5}", *documents()]
        train, validation = load_text(jsonl(tmp_path / f"{number}.jsonl", mixed), None, reader)
        assert mixed[0] in inside(train, mixed, reader) and len(validation) == 16


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.bin"])
def test_one_document_can_not_be_split(tmp_path, reader, name):
    path, text = tmp_path / name, "one document, and no more than that. " * 100
    if name == "t.txt":
        path.write_text(text)
    elif name == "t.jsonl":
        jsonl(path, [text, text])
    else:
        np.array(reader.tokenizer(text)["input_ids"], dtype="<u2").tofile(path)
    with pytest.raises(
        KronyError, match=r"is one document, and validation takes complete documents .*: name other text with --val"
    ):
        load_text(str(path), None, reader)


def test_text_needs_a_tokenizer(tmp_path, reader):
    blind = Reader(tokenizer=None, length=LENGTH, vocabulary=257, end=END)
    with pytest.raises(KronyError, match="text is read with a tokenizer"):
        load_text("python-docs", None, blind)
    data = binary(tmp_path / "t.bin", documents(), reader)
    assert len(load_text(data, None, blind)[1]) == 16
    with pytest.raises(KronyError, match="also to leave out of tokens the documents that it was calibrated on"):
        load_text(data, None, replace(blind, calibrated=frozenset({"known"})))
    with pytest.raises(KronyError, match="max_tokens is 0"):
        load_text(data, None, blind, max_tokens=0)


def test_a_model_says_what_it_was_calibrated_on(tokenizer):
    model = gpt2()
    assert calibration_documents(model) == frozenset()
    compress(model, KronyConfig("keep=0.5", init="van-loan", layers="0-1"))
    assert calibration_documents(model) == frozenset()
    config: KronyQuantizationConfig = model.config.quantization_config
    config.made_with["calibration_documents"] = [digest("a"), digest("b"), 7]
    config.made_with = {"calibration_documents": [digest("c")], "earlier": config.made_with}
    assert calibration_documents(model) == {digest("a"), digest("b"), digest("c")}
    assert Reader.of(model, tokenizer, LENGTH).calibrated == calibration_documents(model)
    model.config.quantization_config = {"quant_method": "krony", "made_with": {"calibration_documents": "abc"}}
    assert calibration_documents(model) == frozenset()
