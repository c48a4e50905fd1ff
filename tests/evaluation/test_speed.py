"""What is measured, how turns are taken, and what memory is counted."""

import copy

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.evaluation.memory import peak_bytes, peak_of
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.speed import ModelSpeed, Subject, bench, make_subject, random_model, to_json
from krony.evaluation.speed_tables import ratio_picture, table
from krony.evaluation.workloads import alternate
from small_models import gpt2

QUICK = SpeedSettings(batch=2, length=8, context=4, new_tokens=3, rounds=2)


@pytest.fixture(scope="module")
def subjects():
    dense, small = gpt2(), gpt2()
    compress(small, KronyConfig("keep=0.5", init="van-loan"))
    return [make_subject("dense", dense, loads=1), make_subject("small keep=0.5", small, loads=1)]


def test_every_figure_and_its_ratio(subjects):
    settings = SpeedSettings(batch=2, length=8, context=4, new_tokens=3, rounds=2, batches=(1, 2), lengths=(4,))
    before = {name: value.clone() for name, value in subjects[1].model.state_dict().items()}
    rows = bench(subjects, settings)
    figures = to_json(rows, settings)
    assert set(figures) == {"machine", "models", "settings"}
    first, second = figures["models"]
    promised = {"name", "params", "bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s"}
    assert promised | {"peak_bytes", "ratio"} <= set(first)
    assert first["ratio"] == {"prefill": 1.0, "decode": 1.0, "train": 1.0, "peak": 1.0}
    for work in ("prefill", "decode", "train"):
        speeds = [model[f"{work}_tokens_per_s"] for model in (first, second)]
        assert second["ratio"][work] == pytest.approx(speeds[1] / speeds[0])
        low, high = second["spread"][work]
        assert low <= speeds[1] <= high
    assert second["ratio"]["peak"] == second["peak_bytes"] / first["peak_bytes"] < 1
    assert [(point["batch"], point["length"]) for point in second["sweep"]] == [(1, 4), (2, 4)]
    assert second["params"] == sum(p.numel() for p in subjects[1].model.parameters())
    after = subjects[1].model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # training steps leave it as it is
    assert not subjects[1].model.training


def test_without_training(subjects):
    rows = bench(subjects[:1], SpeedSettings(length=4, context=2, new_tokens=1, rounds=1, train=False))
    written = rows[0].to_json()
    assert written["train_tokens_per_s"] is None and written["ratio"]["train"] is None


def test_models_take_turns_and_the_first_round_is_not_counted():
    seen = []

    def work(model):
        seen.append(model)
        return float(len(seen))

    assert alternate(["a", "b"], work, 2) == [[3.0, 6.0], [4.0, 5.0]]
    assert "".join(seen) == "baabba"


def test_memory_is_that_of_tensors():
    def call():
        first = torch.empty(1000)  # 4000 bytes
        del first
        second, third = torch.empty(500), torch.empty(600, dtype=torch.float64)  # 2000 + 4800
        return second.numel() + third.numel()

    assert peak_of(call) == 6800


def test_peak_counts_weights_once_and_cached_tensors():
    model = gpt2()  # its head is tied to the embedding
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.zeros(1, 8, dtype=torch.long)
    plain = peak_bytes(model, ids)
    assert weights < plain < 2 * weights
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    small = peak_bytes(model, ids)
    assert small < plain
    cached = copy.deepcopy(model)
    for module in cached.modules():
        if hasattr(module, "path"):
            module.path = "dense"
    assert peak_bytes(cached, ids) - small > 5 * 192 * 48 * 4  # six matrices, multiplied out and cached


def test_bytes_are_those_on_disk(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert make_subject("x", model, tmp_path, loads=1).bytes == make_subject("x", model, loads=1).bytes == size
    unloadable = make_subject("x", model, loads=0)
    assert unloadable.load_seconds is None and abs(unloadable.bytes - size) < 0.02 * size + 10_000


def test_random_models_are_those_of_the_config_and_the_seed(gpt2_folder):
    one, same, other = (random_model(str(gpt2_folder), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight) and one.dtype == torch.float32


def test_too_long_for_the_model_and_other_mistakes(subjects):
    with pytest.raises(KronyError, match="dense takes at most 64 tokens, and 65 are to be measured"):
        bench(subjects, SpeedSettings(length=65, context=4, new_tokens=1))
    with pytest.raises(KronyError, match="128 are to be measured"):
        bench(subjects, SpeedSettings(length=8))  # decode needs 128
    with pytest.raises(KronyError, match="rounds is 0"):
        SpeedSettings(rounds=0)
    with pytest.raises(KronyError, match="from 1"):
        SpeedSettings(lengths=(4, 0))
    elsewhere = Subject(name="meta", model=gpt2().to("meta"), bytes=0, load_seconds=0.0)
    with pytest.raises(KronyError, match="measures on cpu and cuda, and meta is on meta"):
        bench([elsewhere], QUICK)


def test_figures_come_back_from_json_and_the_picture_says_what_is_faster(subjects):
    settings = SpeedSettings(length=8, context=4, new_tokens=1, rounds=1, train=False, lengths=(4, 8))
    rows = bench(subjects, settings)
    again = [ModelSpeed.from_json(figures) for figures in to_json(rows, settings)["models"]]
    assert again == rows and table(again) == table(rows)
    svg = ratio_picture(rows)
    title = f"small keep=0.5 runs at {rows[1].ratio['prefill']:.2f} in prefill, {rows[1].ratio['decode']:.2f} in decode"
    assert title in svg and "training" not in svg
    assert "the others would be compared with" in ratio_picture(rows[:1])


def test_random_weights_that_do_not_fit_into_memory_are_refused(gpt2_folder, monkeypatch):
    monkeypatch.setattr("krony.evaluation.speed.memory", lambda: 1000)
    with pytest.raises(KronyError, match=r"its weights would take .* GB, and the memory has"):
        random_model(str(gpt2_folder))
