"""A folder with a model and its tokenizer, and what changes one of its files."""

import json

import pytest

from small_models import gpt2


@pytest.fixture
def folder(tmp_path, tokenizer):
    gpt2().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def change(folder):
    """Sets values in a JSON file of ``folder``, which it makes if it is not there."""

    def change(file, **values):
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | values))

    return change
