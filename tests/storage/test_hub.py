"""The hub is asked once, for seconds, and every answer has a word."""

import httpx2 as httpx
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from krony.storage import hub


@pytest.fixture(autouse=True)
def no_memory():
    hub.ask.cache_clear()
    yield
    hub.ask.cache_clear()


ANSWER = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
ANSWERS = {
    "known": None,
    "unknown": RepositoryNotFoundError("404", response=ANSWER),
    "no name": HFValidationError("no"),
    "no answer": OSError("no route"),
}


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("word", list(ANSWERS))
def test_every_answer(monkeypatch, kind, word):
    asked = []

    def info(self, name, timeout=None):
        asked.append((name, timeout))
        if ANSWERS[word] is not None:
            raise ANSWERS[word]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, f"{kind}_info", info)
    assert hub.ask("a/b", kind) == word and hub.ask("a/b", kind) == word
    assert asked == [("a/b", hub.SECONDS)] and hub.SECONDS <= 5


def test_offline_it_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: 1 / 0)
    assert hub.ask("a/b", "model") == "no answer"
