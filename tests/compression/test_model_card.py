"""The cards say what was done, in the figures of the report."""

import pytest

from krony import KronyConfig, compress
from krony.compression.model_card import exported_card, healed_card, healed_table, layers_table, model_card
from small_models import gpt2

FIGURES = {"tokens": 1024, "recipe": "quick", "teacher": None, "perplexity_before": 30.0, "perplexity_after": 24.0}


def test_what_is_not_known_has_no_column():
    assert healed_table(FIGURES).columns == ["", "validation perplexity"]
    assert healed_table(FIGURES).rows == [["before", "30.00"], ["after", "24.00"]]


def test_ratios_are_to_the_original():
    known = FIGURES | {"perplexity_original": 20.0, "control": {"perplexity_after": 16.0}}
    assert healed_table(known).columns == ["", "validation perplexity", "of the original"]
    names = ["before", "after", "the original", "the original, trained too"]
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
    assert (
        f"| {report.layers[0].name.replace('.1.', '.*.')} | 1 | 96x48 | 2x1 | 1 | {report.layers[0].error:.4f} |"
        in card
    )


def test_layers_that_differ_in_their_number_are_one_row():
    report = compress(gpt2(), KronyConfig("keep=0.5", init="van-loan"))
    first, second = layers_table(report.layers).rows
    errors = sorted(f"{layer.error:.4f}" for layer in report.layers if layer.name.endswith("c_fc"))
    assert first == ["transformer.h.*.mlp.c_fc", "3", "96x48", "2x1", "1", f"{errors[0]} to {errors[-1]}"]
    assert second[:2] == ["transformer.h.*.mlp.c_proj", "3"]


def test_an_exports_card_says_what_it_was_made_of(gpt2_folder):
    card = exported_card("openai-community/gpt2", "slim", {"scheme": "keep=0.5", "init": "neurons", "seed": 3}, (9, 7))
    assert front_matter(card)["base_model"] == "openai-community/gpt2"
    assert "(scheme `keep=0.5`, initialisation `neurons`, seed `3`)" in card and "import krony" not in card
    plain = exported_card(str(gpt2_folder), "gguf", {}, (9, 9), "it is a plain model already")
    assert "compressed by" not in plain and str(gpt2_folder) not in plain and "GGUF, for llama.cpp" in plain


def test_a_healed_card_says_how_the_model_was_compressed():
    assert "Before, it was compressed (scheme `81M`, initialisation `neurons`)." in healed_card(
        "gpt2", FIGURES, {"scheme": "81M", "init": "neurons"}
    )


def front_matter(card):
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


def test_the_metadata_is_what_the_hub_takes(tmp_path, gpt2_folder):
    report = compress(gpt2(), KronyConfig("keep=0.5", init="van-loan"))
    known = front_matter(model_card("openai-community/gpt2", report))
    assert known["base_model"] == "openai-community/gpt2"
    assert known["pipeline_tag"] == "text-generation" and known["library_name"] == "transformers"
    for local in ("demo", str(gpt2_folder), "./somewhere/else"):
        card = model_card(local, report)
        assert "base_model" not in front_matter(card)
        assert str(gpt2_folder) not in card
    assert front_matter(model_card("demo", report))["license"] == "apache-2.0"  # from the demo's own card


def test_a_second_step_inherits_the_first_ones_base(tmp_path):
    report = compress(gpt2(), KronyConfig("keep=0.5", init="van-loan"))
    (tmp_path / "README.md").write_text(model_card("openai-community/gpt2", report))
    known = front_matter(healed_card(str(tmp_path), FIGURES))
    assert known["base_model"] == "openai-community/gpt2"
    (entry,) = known["model-index"][0]["results"]
    assert entry["metrics"] == [{"type": "perplexity", "value": 24.0}]


def test_terms_are_taken_over_and_paths_are_not(tmp_path):
    terms = {"license": "other", "license_name": "gemma-x", "license_link": "https://x.example"}
    said = "".join(f"{name}: {value}\n" for name, value in (terms | {"base_model": "/home/me/secret"}).items())
    (tmp_path / "README.md").write_text(f"---\n{said}---\n")
    known = front_matter(healed_card(str(tmp_path), FIGURES))
    assert {name: known[name] for name in terms} == terms and "base_model" not in known


@pytest.mark.parametrize("form", ["slim", "gguf", "onnx", "openvino"])
def test_transformers_is_named_where_it_loads_the_model(form):
    known = front_matter(exported_card("openai-community/gpt2", form, {}, (9, 7)))
    assert ("library_name" in known) == (form == "slim") == (form not in known["tags"])


def test_a_card_that_cannot_be_read_is_left_out(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: [\n---\n\xff")
    assert front_matter(healed_card(str(tmp_path), FIGURES))["library_name"] == "transformers"


def test_the_card_says_what_happens_without_krony():
    assert "don't set\n`ignore_mismatched_sizes`" in healed_card("gpt2", FIGURES)


def test_a_perplexity_beyond_reason_is_short():
    figures = FIGURES | {"perplexity_after": 1e300, "perplexity_original": 20.0}
    assert "| after | 1e+300 | 5e+298 |" in healed_table(figures).markdown()
