"""Runs ``krony …`` in this process: what it printed, and its exit code."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch

from krony.cli.app import main


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def krony(monkeypatch, capsys):
    def run(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["krony", *map(str, arguments)])
        code = 0
        capsys.readouterr()  # what the test itself has printed, such as progress of saving a model
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(krony):
    """Runs what must fail: exit code 2, one sentence on stderr, nothing on stdout."""

    def run(*arguments) -> str:
        done = krony(*arguments)
        assert done.code == 2, done
        assert "Traceback" not in done.err and done.out == ""
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        return done.err

    return run


@pytest.fixture
def compressed(krony, gpt2_folder, tmp_path):
    """A compressed GPT-2 with its tokenizer, as a folder."""
    out = tmp_path / "compressed"
    assert krony("compress", gpt2_folder, out, "--scheme", "keep=0.5", "--init", "van-loan").code == 0
    return out


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(40)[None]
