"""The cards say what was done, in the figures of the report."""

from krony import KronyConfig, compress
from krony.compression.model_card import healed_card, healed_table, model_card
from small_models import gpt2

FIGURES = {"tokens": 1024, "recipe": "quick", "teacher": None, "perplexity_before": 30.0, "perplexity_after": 24.0}


def test_what_is_not_known_has_no_column():
    assert healed_table(FIGURES).columns == ["", "validation perplexity"]
    assert healed_table(FIGURES).rows == [["before", "30.00"], ["after", "24.00"]]


def test_ratios_are_to_the_original():
    known = FIGURES | {"perplexity_original": 20.0, "control": {"perplexity_after": 16.0}}
    assert healed_table(known).columns == ["", "validation perplexity", "of the original"]
    names = ["before", "after", "the original", "the original, trained alike"]
    assert healed_table(known).rows == [
        [name, *cells]
        for name, *cells in zip(
            names, ("30.00", "24.00", "20.00", "16.00"), ("1.500", "1.200", "1.000", "0.800"), strict=True
        )
    ]
    assert "taught by" not in healed_card("gpt2", known)
    assert "taught by `gpt2`" in healed_card("gpt2", known | {"teacher": "gpt2"})


def test_options_that_are_not_the_default_are_named():
    report = compress(gpt2(), KronyConfig("keep=0.5", init="van-loan", rescale=False, layers="odd", seed=3))
    card = model_card("gpt2", report, "errors of outputs measured on 512 tokens of t.txt")
    assert "initialisation `van-loan`, layers `odd`, rescale `False`, seed `3`, errors of outputs measured on" in card
    assert f"| {report.layers[0].name} | 96x48 | 2x1 | 1 | {report.layers[0].error:.4f} |" in card
