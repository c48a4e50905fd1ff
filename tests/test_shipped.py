"""The model that comes with krony: its figures are those of its card, and it is a real GPT-2 to compress."""

import json
from pathlib import Path

import pytest
import torch

import krony
from data_folder import DATA, needs_data
from krony.models.source import DEMO
from krony.models.surgery import count_parameters

CARD = (DEMO / "README.md").read_text()


@pytest.fixture(scope="module")
def tokenizer():
    return krony.load_tokenizer("demo")


def on_card(words: str) -> float:
    """The perplexity that the card gives for a data set."""
    (row,) = [line for line in CARD.splitlines() if line.startswith(f"| {words}")]
    return float(row.split("|")[3])


def test_it_is_a_gpt2_in_float32_with_a_tied_head(tokenizer):
    model = krony.demo_model()
    assert model.config.model_type == "gpt2" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert f"{count_parameters(model):,} parameters" in CARD
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.decode(tokenizer("The function returns a dict.")["input_ids"]) == "The function returns a dict."


def test_held_out_documentation_has_the_perplexity_of_the_card(tokenizer):
    """Topics change with Python's version; what the model knows of them does not."""
    result = krony.evaluate(krony.demo_model(), tokenizer, "python-docs", protocol="token")
    assert result.perplexity == pytest.approx(on_card("`python-docs`"), rel=0.15)


@pytest.mark.slow  # as the test above, on a minute of text
@needs_data
def test_openwebtext_has_the_perplexity_of_the_card(tokenizer):
    model, file = krony.demo_model(), str(DATA / "openwebtext/val.jsonl")
    whole = krony.evaluate(model, tokenizer, file, protocol="token")
    assert whole.perplexity == pytest.approx(on_card("OpenWebText"), rel=1e-3)


def test_the_package_stays_small():
    root = Path(krony.__file__).parent
    sizes = [f.stat().st_size for f in root.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(sizes) < 14 * 1024**2
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 12 * 1024**2


def test_neuron_selection_beats_the_papers_starts_by_far(tokenizer):
    """Half the neurons, no training; the order that the README's table shows."""
    text = krony.calibration_set("python-docs", tokenizer, tokens=8192)
    perplexity = {}
    for init in ("neurons", "van-loan", "prune"):
        model = krony.demo_model()
        report = krony.compress(
            model, krony.KronyConfig("keep=0.5", init=init), calibration=text if init == "neurons" else None
        )
        perplexity[init] = krony.evaluate(model, tokenizer, "python-docs", max_tokens=4096).perplexity
        assert report.params_after == pytest.approx(report.params_before - 6 * 1024 * 256, rel=1e-3)
    assert perplexity["neurons"] < 0.5 * min(perplexity["van-loan"], perplexity["prune"])


def test_the_name_works_on_the_command_line(tmp_path, monkeypatch, capsys):
    import sys

    from krony.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["krony", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.chdir(tmp_path)
    made = run("compress", "demo", "out", "--scheme", "keep=0.5", "--init", "van-loan", "--json", "-")
    assert made["seconds"] < 60
    assert run("eval", "demo", "--data", "python-docs", "--max-tokens", 2048, "--json", "-")["results"][0]["tokens"]
    text = run("generate", "demo", "--prompt", "The function returns", "--json", "-")["text"]
    assert text.startswith("The function returns") and len(text.split()) > 10
