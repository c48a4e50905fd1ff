"""Sizes of a model: predicted from the cost curves, measured on text that was held back."""

import math
from dataclasses import replace

import pytest
import torch

import krony
from krony import KronyConfig, KronyError
from krony.compression.plan import plan
from krony.models.surgery import count_parameters
from krony.sizing.sizes import Sizes
from krony.sizing.text import hold_back, split
from small_models import gpt2, llama

CONFIG = KronyConfig(allocation="global")


def rows(seed: int, count: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_ladder_falls_and_its_parameters_are_those_of_the_models(build, tmp_path):
    model = build()
    sizes = Sizes(model, CONFIG, rows(1), rows(2), cache=tmp_path)
    ladder = sizes.ladder
    assert [s.params for s in ladder] == sorted((s.params for s in ladder), reverse=True) and len(ladder) > 10
    assert ladder[0].params < count_parameters(model) and 0 < ladder[-1].keep < ladder[0].keep < 1
    for size in (ladder[0], ladder[len(ladder) // 2], ladder[-1]):
        assert size.params == plan(model, replace(CONFIG, scheme=size.scheme)).params_after


def test_the_prediction_rises_as_neurons_go_and_starts_from_the_cost_curves(tmp_path):
    sizes = Sizes(gpt2(), CONFIG, rows(1), rows(2), cache=tmp_path)
    predicted = [sizes.predicted(size) for size in sizes.ladder]
    assert predicted == sorted(predicted) and predicted[0] >= 0
    half = sizes.size(0.5)
    curves = [ranking.costs for ranking in sizes._rankings]  # 3 layers of 192 neurons; the budget keeps half of them
    uniform = sum(float(curve[96]) for curve in curves) / 2
    assert half.keep == 0.5 and 0 < sizes.predicted(half) <= uniform


def test_what_is_measured_is_the_compressed_models_loss(tmp_path):
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = Sizes(model, CONFIG, rows(1), rows(2, count=6), cache=tmp_path)
    size = sizes.size(0.25)
    found = sizes.measure(size)
    small = gpt2()
    krony.compress(small, replace(CONFIG, scheme=size.scheme), calibration=rows(1))
    losses = []
    for one in (small, model):
        logits = one(rows(2, count=6)).logits[:, :-1].double().log_softmax(-1)
        losses.append(-logits.gather(-1, rows(2, count=6)[:, 1:, None]).mean().item())
    assert math.isclose(found.ratio, math.exp(losses[0] - losses[1]), rel_tol=1e-5)
    assert sizes.measure(size) is found and sizes.compare(model).ratio == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neurons_are_ranked_once_for_all_sizes(tmp_path, monkeypatch):
    from krony.compression import allocation
    from krony.init import neurons
    from krony.sizing import sizes as module

    asked = []

    def counted(*arguments, **options):
        asked.append(options)
        return allocation.ranked(*arguments, **options)

    monkeypatch.setattr(module, "ranked", counted)
    sizes = Sizes(gpt2(), CONFIG, rows(1), rows(2, count=6), cache=tmp_path)
    for keep in (0.25, 0.5, 0.75):
        sizes.measure(sizes.size(keep))
    monkeypatch.setattr(allocation, "ranked", None)  # not computed anywhere else
    monkeypatch.setattr(neurons, "drop", None)
    sizes.measure(sizes.size(0.375))
    assert len(asked) == 1


@pytest.mark.parametrize("init", ["van-loan", "flap"])  # the costs of flap order neurons, and are no loss
def test_an_initialisation_without_costs_is_refused(init):
    with pytest.raises(KronyError, match=rf"sizes are compared with init neurons, and the init is {init}"):
        Sizes(gpt2(), KronyConfig(init=init), rows(1), rows(2))


def test_a_scheme_per_layer_is_refused():
    with pytest.raises(KronyError, match="sizes are compared with one scheme for all layers"):
        Sizes(gpt2(), KronyConfig({"transformer.h.0.mlp": "dense", "*.mlp": "keep=0.5"}), rows(1), rows(2))


@pytest.mark.parametrize(("calibration", "val"), [("some/set@test", None), ("python-docs", "some/set@test")])
def test_no_size_is_chosen_on_a_split_to_measure_on(calibration, val, tokenizer):
    with pytest.raises(KronyError, match="some/set@test is a test set"):
        split(calibration, val, tokenizer)


def test_a_tenth_of_the_documents_is_held_back_whatever_their_order():
    documents = [f"text number {n}, of a few words" for n in range(50)]
    kept, held = hold_back(documents, "x.jsonl")
    assert len(held) == 5 and not set(kept) & set(held) and set(kept) | set(held) == set(documents)
    assert set(hold_back(documents[::-1], "x.jsonl")[1]) == set(held)
    assert set(hold_back(documents * 2, "x.jsonl")[1]) == set(held)  # a repeated document is in one part
    with pytest.raises(KronyError, match=r"x.txt is one document, .* name other text with --val"):
        hold_back(["one"], "x.txt")


def test_no_document_is_calibrated_and_measured_on(tmp_path, tokenizer):
    both, own = [f"shared words {n} " * 20 for n in range(3)], [f"calibration words {n} " * 20 for n in range(30)]
    calibration, val = tmp_path / "c.jsonl", tmp_path / "v.jsonl"
    import json

    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in both + own))
    val.write_text("".join(json.dumps({"text": text}) + "\n" for text in both))
    ids, held = split(str(calibration), str(val), tokenizer, tokens=10_000, length=32)
    assert "shared" not in tokenizer.decode(ids.flatten()) and "shared" in tokenizer.decode(held.flatten())
    with pytest.raises(KronyError, match="holds every document"):
        split(str(val), str(calibration), tokenizer, length=32)
    with pytest.raises(KronyError, match="wikitext-2 is a test set: a size is chosen on other text"):
        split("wikitext-2", None, tokenizer, length=32)
