"""Data sets on the hub: their documents calibrate as far as they are needed, and no network takes no time."""

import pytest
from huggingface_hub import constants

import krony
from krony import KronyError
from krony.data import hub
from krony.data.calibration_set import HUB_CHARACTERS, documents_in


@pytest.fixture
def known(monkeypatch):
    """A hub that knows every name, with a set without end; returns how many documents were read."""
    import datasets

    read = []

    def endless(name, *, split, streaming):
        assert split == "train" and streaming
        while True:
            read.append(name)
            yield {"text": f"document {len(read)} of some words"}

    monkeypatch.setattr(hub, "ask", lambda *_: "known")
    monkeypatch.setattr(datasets, "load_dataset", endless)
    return read


def test_a_set_by_name_calibrates(known, tokenizer):
    ids = krony.calibration_set("openwebtext", tokenizer, tokens=512, length=32)
    assert ids.shape == (16, 32) and set(known) == {"Skylion007/openwebtext"}
    texts = documents_in("some/set", tokens=64)
    assert sum(map(len, texts[:-1])) <= HUB_CHARACTERS * 64 < sum(map(len, texts))


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
