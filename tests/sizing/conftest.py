"""The shipped model with thin MLPs, and little text: a size loses something there, and is measured in a moment."""

import pytest

import krony
from krony.models.export import slim


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("krony.sizing.text.HELD_TOKENS", 4096)


@pytest.fixture(scope="session")
def thin(tmp_path_factory):
    """The shipped model with 128 of its 1,024 hidden neurons a layer, as a folder."""
    model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
    text = krony.calibration_set("python-docs", tokenizer, tokens=4096)
    krony.compress(model, krony.KronyConfig("keep=0.125"), calibration=text)
    folder = tmp_path_factory.mktemp("thin")
    slim(model).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
