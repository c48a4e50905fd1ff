"""What the quality benchmark computes and keeps: figures of a model, means over seeds, rows of several runs."""

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import krony
from krony.models.surgery import count_parameters, find_groups, kronecker_layers
from small_models import llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quality
import quality_bytes
import quality_measures
import quality_page
import rivals
from distilled import Lesson, recipe
from quality_methods import METHODS, PAPERS, WAYS, Starts, add_biases, finished


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("data")
    (folder / "openwebtext").mkdir()
    text = "A short text about the weather, which was fine, and about the sea. " * 60
    (folder / "openwebtext/val.jsonl").write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    return argparse.Namespace(
        data_dir=folder, tokens=900, lambada_tokens=200, dtype=torch.float32, seed=0, rate=None, distil=2048,
        calibration="python-docs", out="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return krony.load_tokenizer("demo")


def text(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(seed))


def made(way: str, seed: int, loss: float, **more) -> dict:
    """A row that was measured on three windows."""
    web = {"perplexity": math.exp(loss), "accuracy": None, "losses": [loss - 1, loss, loss + 1]}
    other = {"perplexity": math.exp(loss), "accuracy": None}
    sets = {"OpenWebText": web, "WikiText-2": other, "LAMBADA": other | {"accuracy": loss / 10}}
    facts = {"params": 10, "bytes": 40, "seconds": 2.0 + seed, "kl": loss / 5}
    return {"way": way, "removed": 0.5, "seed": seed, "sets": sets} | facts | more


def test_the_perplexity_is_that_of_eval_and_the_divergence_that_of_the_logits(options, tokenizer):
    model = krony.demo_model()
    measures = quality_measures.Measures(model, tokenizer, options)
    found = measures.web(model)
    file = str(options.data_dir / "openwebtext/val.jsonl")
    expected = krony.evaluate(model, tokenizer, file, protocol="token", max_tokens=900)
    assert found["tokens"] == expected.tokens and math.isclose(found["perplexity"], expected.perplexity, rel_tol=1e-9)
    assert len(found["losses"]) == 900 // measures.window  # complete windows only
    other = krony.demo_model()
    with torch.no_grad():
        other.transformer.ln_f.weight.mul_(0.8)
    assert measures.divergence(model) < 1e-6
    lost = 0.0
    for piece in measures.ids.split(measures.window):
        with torch.no_grad():
            ours, theirs = (m(piece[None]).logits[0].double().log_softmax(-1) for m in (other, model))
        lost += float((theirs.exp() * (theirs - ours)).sum())
    assert math.isclose(measures.divergence(other), lost / len(measures.ids), rel_tol=1e-4)


def test_rows_of_several_seeds_are_one_row_of_means():
    one, two = made("neurons", 0, 3.0), made("neurons", 1, 3.2)
    (row,) = quality_page.over_seeds([two, one])
    assert math.isclose(row["sets"]["OpenWebText"]["perplexity"], math.exp(3.1))
    assert row["sets"]["OpenWebText"]["losses"] == pytest.approx([2.1, 3.1, 4.1])
    assert row["kl"] == pytest.approx(0.62) and row["sets"]["LAMBADA"]["accuracy"] == pytest.approx(0.31)
    assert len(row["runs"]) == 2
    assert len(quality_page.over_seeds([one, two | {"distilled": 9}, two | {"way": "wanda"}])) == 3


def test_intervals_are_paired_and_absent_where_no_losses_were_kept():
    base, row = made("x", 0, 2.0), made("neurons", 0, 2.5)
    found = quality_page.interval(row, base)
    assert found.low == pytest.approx(found.high) == pytest.approx(math.exp(0.5))  # every window lost the same
    row["sets"]["OpenWebText"]["losses"] = [1.0, 2.5, 4.0]
    found = quality_page.interval(row, base)
    assert found.low < math.exp(0.5) < found.high and found.low == pytest.approx(1.0)
    del base["sets"]["OpenWebText"]["losses"]
    assert quality_page.interval(row, base) is None


def test_the_page_shows_trained_rows_apart_with_their_spread():
    results = {
        "model": "m", "seed": 0, "calibration_tokens": 9, "tokens": 9, "dtype": "float32",
        "machine": {"threads": 1, "processor": "p"}, "base": made("x", 0, 2.0),
        "rows": [made("neurons", 0, 3.0), made("wanda", 0, 4.0)]
        + [made("wanda", seed, 3 + seed / 10, distilled=1000) for seed in (0, 1)],
    }  # fmt: skip
    page = quality_page.document(results, "test")
    before, after = page.split("## After the same training")
    assert "| 50% | wanda |" in before and "| 50% | 1,000 | wanda |" not in before
    line = next(line for line in after.splitlines() if line.startswith("| 50%"))
    assert line.startswith("| 50% | 1,000 | wanda | 10 | 7.39 | 21.12 | 2.86 |")  # e², e^3.05, e^1.05
    assert line.endswith("| 2: 2.72 to 3.00 |")  # e^1.0, e^1.1
    assert set(quality_page.pictures(results)) == {"", "-rivals"} and "-distilled-" not in page  # one size is no curve
    results["rows"].append(made("wanda", 0, 3.5, distilled=1000) | {"removed": 0.25})
    assert set(quality_page.pictures(results)) == {"", "-rivals", "-distilled-1000"}
    assert "quality-test-distilled-1000.svg" in quality_page.document(results, "test")


def test_a_run_keeps_what_another_run_wrote_meanwhile():
    results = {"seed": 0, "rows": [made("neurons", 0, 3.0)]}
    stored = {"rows": [made("neurons", 0, 9.0), made("wanda", 0, 4.0), made("neurons", 0, 5.0, distilled=8)]}
    del stored["rows"][0]["seed"]  # of an earlier version: the first seed
    quality.take_over(results, stored | {"int8": {"bytes": 1}})
    assert [(row["way"], row.get("distilled", 0)) for row in results["rows"]] == [
        ("neurons", 0), ("wanda", 0), ("neurons", 8),
    ]  # fmt: skip
    assert results["rows"][0]["kl"] == 0.6 and results["int8"] == {"bytes": 1}
    assert quality.has(results, "wanda", 0.5, 0, 0) and not quality.has(results, "wanda", 0.5, 0, 1)


def test_results_measured_in_another_way_are_not_mixed(options):
    found = {"calibration_tokens": 64, "facts": {}}
    chosen = argparse.Namespace(**vars(options), model="m", label=None)
    results = {"rows": []}
    quality.start_results(results, chosen, found)
    quality.start_results(results, chosen, found)
    chosen.tokens = 901
    with pytest.raises(SystemExit, match=r"quality-test\.json was measured with tokens 900, and now it is 901"):
        quality.start_results(results, chosen, found)


def test_every_method_of_the_papers_and_of_krony_makes_a_model(options):
    base = llama()
    starts = Starts(base, text(), quality_bytes.model_facts(base), options)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for way in ("neurons", "flap", "flap, global", "wanda", "magnitude", "random-neurons"):
        model, facts = starts.make(way, 0.5)
        assert facts["params"] == count_parameters(model) < count_parameters(base), way
        assert (
            len(kronecker_layers(model)) == 9
            and torch.isfinite(finished(model, way, torch.float32)(text()).logits).all()
        )
        biases = [layer.bias for name, layer in kronecker_layers(model).items() if name.endswith("down_proj")]
        assert all((bias is not None) == way.startswith("flap") for bias in biases)
        assert not way.startswith("flap") or all(bias.any() for bias in biases)  # the mean of what was dropped
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert set(METHODS) | set(PAPERS) | set(rivals.WAYS) == set(WAYS)


def test_biases_of_zeros_change_nothing():
    base, other = llama(), llama()
    add_biases(other)
    assert torch.equal(base(text()).logits, other(text()).logits)
    assert count_parameters(other) == count_parameters(base) + 3 * 48


def test_all_starts_learn_from_the_same_rows(options, tokenizer):
    lesson, again = (Lesson(krony.demo_model(), tokenizer, options) for _ in range(2))
    assert len(lesson.train) * lesson.train.length == 2048 and len(lesson.held) == 8
    assert torch.equal(lesson.train[0]["input_ids"], again.train[0]["input_ids"])
    ids = krony.calibration_set("python-docs", tokenizer, tokens=2048)
    assert torch.equal(ids[0], lesson.train[0]["input_ids"])  # the text that calibrated, from its beginning
    chosen = recipe(10 * 131_072, 512, 1e-3)
    assert (chosen.evaluations, chosen.learning_rate, chosen.text, chosen.weight_decay) == (10, 1e-3, 0.0, 0.0)
    assert lesson.work("neurons", 0.5) == again.work("neurons", 0.5) != lesson.work("neurons", 0.25)


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="pip install --group bench installs the packages")
@pytest.mark.parametrize("way", rivals.WAYS)
def test_packages_prune_the_mlps_alone(way):
    if way.startswith("optipfair") and find_spec("optipfair") is None:
        pytest.skip("optipfair is not installed")
    base = llama()
    model = rivals.Rivals(base, text()).pruned(way, 0.5)
    facts = quality_bytes.slim_facts(quality_bytes.model_facts(base), 0.5)
    assert count_parameters(model) == facts["params"] and model.config.intermediate_size == 72
    assert all(site.out_features == 72 for g in find_groups(model) for site in g.sites[:-1])
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.skipif(find_spec("torchao") is None, reason="pip install --group bench installs torchao")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bytes_are_the_tensors(bits):
    model = llama(hidden_size=64, intermediate_size=128)
    facts = quality_bytes.model_facts(model)
    before = model(text()).logits
    small = quality_bytes.quantised(model, bits)
    assert quality_bytes.tensor_bytes(small) == quality_bytes.quantised_bytes(facts, 4, bits)
    assert (small(text()).logits - before).norm() < (0.02 if bits == 8 else 0.2) * before.norm()
