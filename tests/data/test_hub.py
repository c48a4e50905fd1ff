"""Data sets on the hub: their documents calibrate as far as they are needed, and no network takes no time."""

import pytest
from huggingface_hub import constants

import krony
from krony import KronyError
from krony.data import hub
from krony.data.calibration_set import HUB_CHARACTERS, documents_in
from krony.data.rows import load_rows
from krony.data.sets import LONGEST_TOKEN, load_texts
from small_models import gpt2


@pytest.fixture
def known(monkeypatch):
    """A hub that knows every name, with a set without end; returns how many documents were read."""
    import datasets

    read = []

    def endless(*name, split, streaming):
        assert streaming
        while True:
            read.append("/".join((*name, split)))
            yield {"text": f"document {len(read)} of some words"}

    monkeypatch.setattr(hub, "ask", lambda *_: "known")
    monkeypatch.setattr(datasets, "load_dataset", endless)
    return read


def test_a_set_by_name_calibrates(known, tokenizer):
    ids = krony.calibration_set("openwebtext", tokenizer, tokens=512, length=32)
    assert ids.shape == (16, 32) and set(known) == {"Skylion007/openwebtext/train"}
    texts = documents_in("some/set", tokens=64)
    assert sum(map(len, texts[:-1])) <= HUB_CHARACTERS * 64 < sum(map(len, texts))


@pytest.mark.parametrize(
    ("data", "read"), [("a/b:c@d", "a/b/c/d"), ("a/b@d", "a/b/d"), ("a/b:c", "a/b/c/train"), ("openwebtext", None)]
)
def test_configuration_and_split(known, tokenizer, data, read):
    """Every verb that reads text takes them: compress, heal, data prepare and eval."""
    read = read or "Skylion007/openwebtext/train"
    krony.calibration_set(data, tokenizer, tokens=64, length=32)
    load_rows(data, tokenizer, length=32, vocabulary=257, max_tokens=64)
    next(iter(hub.hub_set(data, streaming=True)))
    if data != "openwebtext":
        load_texts(data, tokens=16)
        assert known.pop() == read.replace("/train", "/test")
        known[:] = [name for name in known if not name.endswith("/test")]
    assert set(known) == {read}


def test_eval_reads_as_much_as_it_measures(known, tokenizer):
    result = krony.evaluate(gpt2(), tokenizer, "some/set", max_tokens=64, window=32)
    assert result.tokens == 62 and len(known) < 64 * LONGEST_TOKEN
    assert set(known) == {"some/set/test"}


@pytest.mark.parametrize("data", ["a/b:c:d", "a/b@c@d", "a/b:", ":c", "@d"])
def test_a_name_of_another_form(data, tokenizer):
    with pytest.raises(KronyError, match=r"on the hub it is name\[:configuration\]\[@split\]"):
        krony.calibration_set(data, tokenizer)


def test_python_docs_has_no_splits(tokenizer):
    for data in ("python-docs:x", "python-docs@train"):
        with pytest.raises(KronyError, match="python-docs has no configurations and no splits"):
            krony.calibration_set(data, tokenizer)


def test_the_test_split_is_for_eval_alone(known, tokenizer):
    for read in (
        lambda: krony.calibration_set("some/set@test", tokenizer),
        lambda: load_rows("some/set@test[:10%]", tokenizer, length=8, vocabulary=257, max_tokens=64),
        lambda: krony.heal(gpt2(), "some/set", val="some/set@test", tokenizer=tokenizer, max_tokens=2048),
    ):
        with pytest.raises(KronyError, match="is a test set, to measure on"):
            read()


def test_a_misspelt_test_set_is_not_looked_for_on_the_hub(monkeypatch, tokenizer):
    monkeypatch.setattr(hub, "load_split", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(KronyError, match="nor a data set of this name"):
        load_texts("wikitext-3")


def test_a_name_that_the_hub_does_not_know(monkeypatch, tokenizer):
    monkeypatch.setattr(hub, "ask", lambda *_: "unknown")
    with pytest.raises(KronyError, match="nosuch: there is no such file, and no data set of that name on the hub"):
        krony.calibration_set("nosuch", tokenizer)


def test_without_network_datasets_looks_in_its_cache_alone(monkeypatch):
    import datasets

    seen = []

    def load(*_, **__):
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError

    monkeypatch.setattr(hub, "ask", lambda *_: "no answer")
    monkeypatch.setattr(datasets, "load_dataset", load)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(KronyError, match=r"can be read from the hub \(ConnectionError\)"):
        hub.hub_set("some/set")
    assert seen == [(True, True)] and before == constants.HF_HUB_OFFLINE


def test_the_sentence_names_the_cause(known, monkeypatch, tokenizer):
    import datasets

    def load(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found lambada.py\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    words = r"from the hub \(RuntimeError: Dataset scripts are no longer supported, but found lambada.py\)$"
    with pytest.raises(KronyError, match=words):
        krony.calibration_set("some/set", tokenizer)


def test_a_set_is_named_with_the_split_and_the_revision_that_were_read(monkeypatch, tokenizer, tmp_path):
    import datasets

    asked = []

    def load(name, *, split, streaming, revision):
        asked.append((name, split, revision))
        return iter([{"text": "some words. " * 100}])

    monkeypatch.setattr(hub, "ask", lambda *_: "known")
    commit = "0123abc" + 33 * "d"  # the hub takes no shorter ones
    monkeypatch.setattr(hub, "revision", lambda *_: commit)
    monkeypatch.setattr(datasets, "load_dataset", load)
    krony.calibration_set("openwebtext", tokenizer, tokens=512, length=32)
    assert asked == [("Skylion007/openwebtext", "train", commit)]
    assert hub.read_as("openwebtext") == "Skylion007/openwebtext (split train, revision 0123abc)"
    assert hub.read_as("a/b:c@d") == "a/b:c (split d, revision 0123abc)"
    monkeypatch.setattr(hub, "revision", lambda *_: None)
    assert hub.read_as("some/set") == "some/set (split train, as it is in the cache)"
    (tmp_path / "file").touch()
    for name in ("python-docs", "a/text.jsonl", str(tmp_path / "file")):
        assert hub.read_as(name) == name
