"""What is measured, how turns are taken, and what memory is counted."""

import copy
import statistics

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.evaluation.memory import peak_bytes, peak_of
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.speed import ModelSpeed, Subject, bench, make_subject, random_model, to_json
from krony.evaluation.speed_tables import bench_page, caption, ratio_picture, sweep_table, table, verdicts
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
    assert set(figures) == {"machine", "models", "settings", "spread"} and figures["spread"] is None  # of two turns
    first, second = figures["models"]
    promised = {"name", "params", "bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s"}
    assert promised | {"peak_bytes", "ratio"} <= set(first)
    assert first["ratio"] == {"prefill": 1.0, "decode": 1.0, "train": 1.0, "peak": 1.0}
    for work in ("prefill", "decode", "train"):
        speeds = [model[f"{work}_tokens_per_s"] for model in (first, second)]
        turns = [model["seconds"][work] for model in (first, second)]
        assert second["ratio"][work] == statistics.mean(
            a / b for a, b in zip(*turns, strict=True)
        )  # of two: the median
        assert speeds[1] == pytest.approx({"prefill": 16, "decode": 3, "train": 16}[work] / statistics.mean(turns[1]))
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
    seen.clear()
    assert alternate(["a", "b"], work, 2, warm_up=False) == [[1.0, 4.0], [2.0, 3.0]]


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
    with pytest.raises(KronyError, match="several models are called dense: tables and pictures tell them apart"):
        bench([*subjects, subjects[0]], QUICK)
    elsewhere = Subject(name="meta", model=gpt2().to("meta"), bytes=0, load_seconds=0.0)
    with pytest.raises(KronyError, match="measures on cpu and cuda, and meta is on meta"):
        bench([elsewhere], QUICK)


def test_figures_come_back_from_json_and_the_picture_says_what_is_faster(subjects):
    settings = SpeedSettings(length=8, context=4, new_tokens=1, rounds=1, train=False, lengths=(4, 8))
    rows = bench(subjects, settings)
    again = [ModelSpeed.from_json(figures) for figures in to_json(rows, settings)["models"]]
    assert again == rows and table(again) == table(rows)
    svg = ratio_picture(rows)
    prefill, decode = (f"{rows[1].ratio[work]:.2f} in {work} (no verdict)" for work in ("prefill", "decode"))
    assert f"small keep=0.5 runs at {prefill}, {decode}, relative" in svg and "training" not in svg
    assert "the others would be compared with" in ratio_picture(rows[:1])


def test_random_weights_that_do_not_fit_into_memory_are_refused(gpt2_folder, monkeypatch):
    monkeypatch.setattr("krony.evaluation.speed.memory", lambda: 1000)
    with pytest.raises(KronyError, match=r"its weights would take .* GB, and the memory has"):
        random_model(str(gpt2_folder))


BASE = [2.0, 2.0, 2.0, 2.0, 2.0]  # seconds
TURNS = {  # of three models, the first one's the same in every workload
    "prefill": [BASE, [1.6, 1.6, 1.6, 1.6, 1.5625], [2.5, 2.5, 2.5, 2.5, 2.5]],  # 1.25, of which 1.28 once; and 0.8
    "decode": [BASE, [1.6, 1.6, 1.6, 1.25, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0]],  # 1 to 1.6
    "sweep": [BASE, [1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 4.0]],
}


@pytest.fixture
def measured(subjects, monkeypatch):
    """Measures three models without a clock: every workload takes the seconds of ``TURNS``."""
    third = Subject(name="third", model=subjects[1].model, bytes=1, load_seconds=None)

    def rows(*, models=3, turns=5, **settings):
        settings = SpeedSettings(length=8, context=4, new_tokens=2, rounds=turns, train=False, **settings)
        order = iter(["prefill", "decode", *["sweep"] * len(settings.sweep)])

        def made(*_):
            return [seconds[:turns] for seconds in TURNS[next(order)][:models]]

        monkeypatch.setattr("krony.evaluation.speed.alternate", made)
        found = bench([*subjects, third][:models], settings)
        return found, to_json(found, settings, dtype="float32")

    return rows


def test_a_verdict_per_workload_and_model(measured):
    rows, figures = measured()
    assert verdicts(rows) == [
        "prefill: small keep=0.5 is 1.25 times as fast as dense (spread 2.4%)",
        "prefill: third is 0.80 times as fast as dense (spread 0.0%)",
        "decode: no verdict on small keep=0.5: 1.25 times as fast as dense, and the spread is 48.0%: measure with more "
        "--rounds on a quiet machine",
        "decode: no verdict on third: 1.00 times as fast as dense, and the spread is 0.0%: measure with more --rounds "
        "on a quiet machine",
    ]
    assert [model["verdict"] for model in figures["models"]] == [
        {"prefill": None, "decode": None},
        {"prefill": "faster", "decode": None},
        {"prefill": "slower", "decode": None},
    ]
    assert figures["models"][1]["ratio_spread"]["decode"] == pytest.approx(0.6 / 1.25)
    assert figures["models"][1]["seconds"]["decode"] == TURNS["decode"][1]
    assert figures["models"][1]["spread"]["decode"] == 0.75 / 1.6
    assert figures["spread"] == figures["models"][1]["ratio_spread"]["decode"]  # the largest of all
    assert "1.25 in prefill, 1.25 in decode (no verdict), relative" in ratio_picture(rows)


def test_the_largest_spread_may_be_that_of_a_model_or_of_the_sweep(measured, monkeypatch):
    monkeypatch.setitem(TURNS, "decode", [[1.0, 1.0, 1.0, 1.0, 1.75]] * 3)  # all are slow in the same turn
    rows, figures = measured()
    assert rows[1].ratio_spread["decode"] == 0.0 and figures["spread"] == rows[0].spread["decode"] == 0.75
    assert measured(lengths=(8,))[1]["spread"] == 1.0  # of the third model's turns


def test_a_single_model_and_few_turns_have_no_verdict(measured):
    assert verdicts(measured(models=1)[0]) == []
    rows, figures = measured(turns=4)
    assert all("no verdict" in sentence and "ask for --rounds 5" in sentence for sentence in verdicts(rows))
    assert figures["spread"] is None and caption(figures).endswith("medians of 4 turns, too few for a spread")


def test_the_sweep_is_a_table(measured):
    shown = sweep_table(measured(batches=(4, 1), lengths=(8, 16))[0])
    assert shown.columns[:5] == [
        "prefill, batch x tokens",
        "dense, tok/s",
        "small keep=0.5, tok/s",
        "of first",
        "spread",
    ]
    assert shown.rows[0] == ["4 x 8", "16.0", "32.0", "2.00x", "0.0%", "16.0", "1.00x", "50.0%"]
    assert [row[0] for row in shown.rows] == ["4 x 8", "4 x 16", "1 x 8", "1 x 16"]
    assert sweep_table(measured(turns=1, batches=(1,))[0]).rows == [
        ["1 x 8", "4.0", "8.0", "2.00x", "", "4.0", "1.00x", ""]
    ]
    assert sweep_table(measured()[0]).rows == []


def test_the_page_has_the_verdicts_and_a_picture_along_what_was_swept(measured):
    page = bench_page(*measured(batches=(4, 1)))
    assert "third is 0.80 times as fast as dense" in page and "<td>4 x 8</td>" in page
    assert page.count("<svg") == 3 and "Prefill of 8 tokens per sequence" in page
    assert "small keep=0.5 is fastest at 4 sequences: 2.00 times dense" in page
    page = bench_page(*measured(batches=(1, 4), lengths=(8, 16)))
    assert page.count("<svg") == 4 and "Prefill with a batch of 4" in page and "fastest at 16 tokens" in page
    assert "speed (no verdict)" in bench_page(*measured(turns=4, lengths=(8,)))
    alone = bench_page(*measured(models=1, lengths=(8,)))
    assert "dense reads 4 tokens per second at 8 tokens" in alone and "MB for a prefill" in alone


def test_no_model_is_faster_than_the_first(measured, monkeypatch):
    monkeypatch.setitem(TURNS, "sweep", [BASE, [3.0] * 5, [4.0] * 5])
    assert "No model is faster than dense at 8 tokens" in bench_page(*measured(lengths=(8,)))


def test_the_caption_names_what_measured(measured):
    figures = measured()[1]
    figures["machine"] = {"processor": "a CPU", "accelerator": "a GPU", "threads": 1}
    assert caption(figures) == (
        "a CPU, 1 thread, float32, eager; prefill of 1 x 8 tokens, decode of 2 after 4, medians of 5 turns "
        "(spread up to 48.0%)"
    )
    assert caption(figures | {"device": "cpu"}).startswith("a CPU, 1 thread")  # the machine has a GPU, too
    assert caption(figures | {"device": "cuda:0"}).startswith("a GPU, 1 thread")
    del figures["spread"]  # of an earlier version
    assert caption(figures).endswith("medians of 5 turns")
