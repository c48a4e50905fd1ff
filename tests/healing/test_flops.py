"""FLOPs against a count by hand, and in the log of a training."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import krony
from healing_runs import TINY, heal, text
from krony.healing.flops import flop_counter, forward_flops, peak, training_flops
from small_models import gpt2, llama


def by_hand(length, mlp):
    """GPT-2 of width 48, 3 layers, 257 tokens: two FLOPs per weight and token, and the scores and sums of attention."""
    attention = 4 * 48 * 48 * length + 2 * 48 * length * length
    return 2 * (3 * (attention + mlp * length) + 257 * 48 * length)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dense_model_takes_what_its_matrices_do(attention):
    model = gpt2()
    model.set_attn_implementation(attention)
    assert forward_flops(model, 32) == by_hand(32, 2 * 192 * 48)
    assert training_flops(model, None, 32) == 3 * by_hand(32, 2 * 192 * 48) / 32
    assert training_flops(model, model, 32) == 4 * by_hand(32, 2 * 192 * 48) / 32
    assert not model.training and model.train() and forward_flops(model, 8) > 0 and model.training


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_backward_pass_takes_twice_as_many(attention):
    model = gpt2().eval()
    model.set_attn_implementation(attention)
    with flop_counter() as counter:
        model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum().backward()
    assert counter.get_total_flops() == 3 * by_hand(32, 2 * 192 * 48)


def test_heads_that_share_keys_and_values_count_each():
    """Scores and sums are those of the queries' heads, as in transformers' plain attention."""
    model = llama()
    counted = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        counted[attention] = forward_flops(model, 32)
    assert counted["sdpa"] == counted["eager"]


def test_a_compressed_model_takes_less():
    """Half of the neurons: the left factors' products, and a few for the right ones."""
    model = gpt2()
    model.set_attn_implementation("eager")
    krony.compress(model, krony.KronyConfig("keep=0.5", init="van-loan"))
    least = by_hand(32, 2 * 96 * 48)
    assert least <= forward_flops(model, 32) < 1.1 * least


def test_the_log_of_a_training_has_flops_per_second(tmp_path):
    heal(gpt2(), text(), text(8), work=tmp_path / "work", recipe=TINY, device="cpu")
    states = [json.loads(file.read_text()) for file in tmp_path.glob("work/checkpoint-*/trainer_state.json")]
    entries = [entry for entry in max(states, key=lambda s: s["global_step"])["log_history"] if "loss" in entry]
    assert entries and all(0 < entry["flops_per_s"] < 1e15 and "mfu" not in entry for entry in entries)


def test_a_resumed_run_counts_its_own_steps_alone(tmp_path, monkeypatch):
    """By a clock that ticks once per look: a loss is logged after as many steps as between two others."""

    def stop(done, total, what):
        if done == 10:
            raise InterruptedError

    monkeypatch.setattr("krony.healing.trainer.training_flops", lambda *_: 1.0)
    monkeypatch.setattr("krony.healing.trainer.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    with pytest.raises(krony.KronyError):  # an OSError, which is taken for one of the disk
        heal(gpt2(), text(), text(8), work=tmp_path / "work", recipe=TINY, device="cpu", progress=stop)
    heal(gpt2(), text(), text(8), work=tmp_path / "work", recipe=TINY, device="cpu", resume=True)
    states = [json.loads(file.read_text()) for file in tmp_path.glob("work/checkpoint-*/trainer_state.json")]
    logged = max(states, key=lambda s: s["global_step"])["log_history"]
    each = TINY.sequences * TINY.length  # tokens of a step, of one FLOP each; a loss is logged after each step
    assert all(0 < entry["flops_per_s"] <= each for entry in logged if "loss" in entry)


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None)])
def test_the_peak_of_a_device(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda"), bf16=True) == expected
    assert peak(torch.device("cuda"), bf16=False) is None and peak(torch.device("cpu"), bf16=True) is None
