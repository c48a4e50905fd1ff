"""``krony.heal``: one call for text, recipe and options, and what it reports."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import krony
from healing_runs import TINY, noise, text
from krony import KronyConfig, KronyError, Recipe
from krony.errors import KronyWarning
from krony.healing.control import train_control
from krony.healing.options import HealOptions
from krony.healing.report import HealReport, perplexity
from krony.models.surgery import kronecker_layers
from small_models import gpt2

RECKLESS = replace(TINY, learning_rate=0.5, final_rate=0.5, warm_up=0)


@pytest.fixture
def small():
    model = gpt2()
    krony.compress(model, KronyConfig("keep=0.5", init="van-loan"))
    return model


@pytest.fixture
def lines(tmp_path) -> Path:
    """Documents that repeat each other's words."""
    path = tmp_path / "text.jsonl"
    words = "one two three four five six seven eight nine ten. " * 3
    path.write_text("".join(json.dumps({"text": f"{number}: {words}"}) + "\n" for number in range(60)))
    return path


def factors(model) -> dict[str, torch.Tensor]:
    return {name: layer.right.detach().clone() for name, layer in kronecker_layers(model).items()}


def test_one_call(small, lines, tokenizer):
    """A named recipe takes rows that the model can take; right factors stay."""
    before = factors(small)
    report = krony.heal(small, lines, tokenizer=tokenizer, teacher=gpt2(), max_tokens=6000)
    assert report.improved and report.loss_after == report.loss_trained < report.loss_before
    assert 4096 < report.tokens < 6000 - 8 * 64 and report.tokens % (2 * 64) == 0
    assert all(torch.equal(value, before[name]) for name, value in factors(small).items())
    assert not small.training


def test_names_collections_and_folders(small, lines, tokenizer, tmp_path):
    val = tmp_path / "val.jsonl"
    val.write_text(json.dumps({"text": "eleven twelve one two three four five six. " * 40}))
    before = factors(small)
    report = krony.heal(
        small,
        str(lines),
        tokenizer=tokenizer,
        recipe=TINY,
        val=val,
        work=str(tmp_path / "work"),
        freeze={"embeddings"},
        seed=3,
        device="cpu",
    )
    assert report.improved and not any(torch.equal(value, before[name]) for name, value in factors(small).items())
    settings = json.loads((tmp_path / "work/settings.json").read_text())
    assert settings["freeze"] == ["embeddings"] and settings["seed"] == 3 and settings["length"] == 32


def test_rows_are_taken_as_they_are(small):
    train, validation = text(60).split(16)
    report = krony.heal(small, train, val=validation, recipe="quick", freeze=())
    assert report.tokens == 44 * 32
    with pytest.raises(KronyError, match="the text is one document"):
        krony.heal(small, train)


def test_what_improves_nothing_is_said(small, lines, tokenizer):
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    with pytest.warns(KronyWarning, match="training did not improve the model: validation perplexity was") as caught:
        report = krony.heal(small, lines, tokenizer=tokenizer, recipe=RECKLESS, freeze="none")
    assert not report.improved and "it is left as it was before training" in str(report)
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert caught[0].filename == __file__


def test_the_control_may_stay_as_it_is(tmp_path):
    """Its own best state is the first; it has no factors, and learns from the text."""
    options = HealOptions(freeze={"right", "embeddings"}, resume=True, keep_anyway=True, device="cpu")
    original = gpt2()
    before = {name: p.detach().clone() for name, p in original.named_parameters()}
    train, validation = text(60).split(16)
    diverging = replace(RECKLESS, learning_rate=5.0, final_rate=5.0)
    with pytest.warns(KronyWarning, match="training did not improve the control"):
        report = train_control(original, train, noise(), work=tmp_path, recipe=diverging, options=options)
    assert report.loss_after == report.loss_before < report.loss_trained
    assert all(torch.equal(p, before[name]) for name, p in original.named_parameters())
    assert json.loads((tmp_path / "settings.json").read_text())["freeze"] == ["embeddings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronyWarning)
        report = train_control(original, train, validation, work=tmp_path / "b", recipe=TINY)
    assert report.improved


def test_calibrated_documents_do_not_validate(lines, tokenizer):
    """What compress read is in the model's config, and heal holds out something else."""
    model = gpt2()
    config = KronyConfig("keep=0.5")
    krony.compress(model, config, calibration=krony.calibration_set(str(lines), tokenizer, tokens=2048, length=32))
    known = model.config.quantization_config.made_with["calibration_documents"]
    assert 5 < len(known) < 60
    assert krony.heal(model, lines, tokenizer=tokenizer, recipe=TINY).improved
    model = gpt2()
    krony.compress(model, config, calibration=krony.calibration_set(str(lines), tokenizer, tokens=99_999, length=32))
    with pytest.raises(KronyError, match="has no document to validate on that the model was not calibrated on"):
        krony.heal(model, lines, tokenizer=tokenizer, recipe=TINY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "slow"}, "recipe 'slow' is unknown: it is one of quick, paper"),
        ({"freeze": {"left"}}, "freeze 'left' is unknown: it is one of none, right"),
        ({"device": "mps"}, "device is 'mps': healing takes cpu or cuda"),
        ({"recipe": krony.RECIPES["quick"]}, "rows of 512 tokens: the model takes 64"),
        ({"tokenizer": None}, "in Python: give it as tokenizer"),
        ({"val": "wikitext-2"}, "wikitext-2 is a test set"),
    ],
)
def test_mistakes(small, lines, tokenizer, options, words):
    with pytest.raises(KronyError, match=words):
        krony.heal(small, lines, **({"tokenizer": tokenizer} | options))


def test_an_unknown_option_is_a_type_error(small, lines, tokenizer):
    with pytest.raises(TypeError, match="frozen"):
        krony.heal(small, lines, tokenizer=tokenizer, frozen={"right"})


def report(**changes) -> HealReport:
    figures = {"tokens": 12_288, "seconds": 9.6, "loss_before": 3.0, "loss_trained": 2.0, "loss_after": 2.0}
    return HealReport(**(figures | changes))


def test_a_report_reads_well():
    assert str(report()) == "validation perplexity 20.09 before, 7.39 after 12,288 tokens of training (10 s)"
    assert "<td>7.39</td>" in report()._repr_html_()
    worse = report(loss_trained=800.0, loss_after=3.0)
    assert str(worse).endswith("training did not improve the model, and it is left as it was before training")
    assert str(report(loss_trained=4.0, loss_after=4.0)).endswith("left as it was after training")
    assert worse.to_json()["perplexity_trained"] == perplexity(700.0) and not worse.to_json()["improved"]
    sentence = report(loss_trained=4.0, validation=[(0, 3.0), (512, 5.0)]).no_gain("the model")
    assert "was 20.09 before, 54.60 in the best trained state and 148.41 at the end; lower the" in sentence


def test_a_recipe_changes_as_a_whole():
    quick = krony.RECIPES["quick"].changed(learning_rate=1e-3, sequences=1)
    assert quick.final_rate == pytest.approx(1e-5) and quick.batch == 1 and quick.text == 0.25
    assert krony.RECIPES["quick"].changed(learning_rate=1e-3, final_rate=1e-3).final_rate == 1e-3
    assert Recipe(learning_rate=1e-3) == Recipe().changed(learning_rate=1e-3, final_rate=3e-6)
