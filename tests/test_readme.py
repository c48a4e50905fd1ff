"""Every command and every line of Python in the README runs, with a small model in GPT-2's place."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^(krony .*?)(?:\s+#.*)?$", README, re.MULTILINE)
SMALL = {"--tune": "4", "--reconstruct": "4", "--max-tokens": "16384"}  # in place of the README's numbers, for time
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, tokenizer):
    """A folder where ``gpt2`` is a model of GPT-2 124M's MLPs with little else, and the named sets are files."""
    import torch
    from transformers import GPT2LMHeadModel

    from krony.kronecker import schemes

    monkeypatch.chdir(tmp_path)
    config = GPT2Config(
        n_layer=2, n_embd=48, n_head=4, n_positions=512, vocab_size=257, bos_token_id=256, eos_token_id=256
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    monkeypatch.setitem(schemes.PAPER_NAMES, "81M", "48x48")
    monkeypatch.setattr(schemes.ModelShape, "is_gpt2", property(lambda layout: layout.matrices == ((192, 48),) * 4))
    for name in [n for n in schemes.PAPER_NAMES if n != "81M"]:
        monkeypatch.delitem(schemes.PAPER_NAMES, name)
    for name, file in [("wikitext-2", "wiki.test.tokens"), ("lambada", "lambada_test_plain_text.txt")]:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / file).write_text("some words and a last one\n" * 4)
    return tmp_path


def test_every_command_runs(workplace, monkeypatch, capsys):
    from krony.cli import main

    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        arguments = shlex.split(command)
        for option, value in SMALL.items():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
        if arguments[1] == "eval":
            arguments += ["--data-dir", "data"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 0, (command, capsys.readouterr().err)


def test_the_python_runs(workplace, monkeypatch):
    from krony.data import sets

    monkeypatch.setattr(sets, "_from_hub", lambda name, *_: ["some words"] * 9)
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), {})


def test_the_table_of_gpt2_is_what_schemes_prints():
    from krony.kronecker import schemes

    layout = schemes.ModelShape(124_439_808, ((3072, 768),) * 24)
    for name in ("96M", "92M", "81M", "80M", "67M"):
        shape = schemes.resolve(name, 3072, 768)
        total = layout.parameters_with(name)
        share = f"{100 * total / layout.parameters:.1f} %"
        assert f"| `{name}` | {shape.m1}x{shape.n1} | {shape.factors} | {total:,} | {share} |" in README
