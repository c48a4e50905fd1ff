"""How long a compression takes: the arithmetic, and that measuring changes nothing. No time is asserted."""

import copy
from dataclasses import replace

import pytest
import torch

from krony import KronyConfig, compress
from krony.compression import estimate
from krony.compression.estimate import CompressionPace, compression_pace
from krony.compression.plan import plan
from small_models import BUILDERS, gpt2

PACE = CompressionPace(
    kept=False, backward=7.0, forward=2.0, factors=100.0, trained=(0.5, 3.0), step=11.0, original=1.0, held=5.0
)
IDS = torch.zeros(40, 512, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 100 + 40 * 2),
        ({"allocation": "global"}, 100 + 32 * 7 + 8 * 2),  # 16,384 tokens are 32 sequences
        ({"reconstruct": 4}, 100 + 32 * 7 + 8 * 2 + 0.5 * 40 * 512 + 3 * 4),
        ({"tune": 10}, 100 + 40 * 2 + 5 * 5 + 10 * (11 + 1)),  # an eighth of the sequences is held back
        ({"tune": 50}, 100 + 40 * 2 + 5 * 5 + 50 * 11 + 35 * 1),  # the second time the original's states are kept
    ],
)
def test_each_kind_of_work_counts_as_often_as_it_is_done(options, seconds):
    config = KronyConfig("keep=0.5", **options)
    assert PACE.seconds(config, IDS) == pytest.approx(seconds)
    reading = 32 * 7 + 8 * 2 if config.needs_gradient else 40 * 2
    assert replace(PACE, kept=True).seconds(config, IDS) == pytest.approx(seconds - reading)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "global", "reconstruct": 3},
        {"init": "van-loan", "tune": 2},
        {"allocation": "global", "epsilon": 0.1, "tune": 2, "tune_all": True},
        {"scheme": {"*.mlp": "keep=0.5"}, "tune": 2},
        {"init": "van-loan", "reinit": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_measuring_changes_nothing(family, options, tmp_path, recwarn):
    model = BUILDERS[family]()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))
    config = KronyConfig(**{"scheme": "keep=0.5"} | options)
    pace = compression_pace(model, plan(model, config), ids, cache=tmp_path)
    assert not list(tmp_path.iterdir()) and not pace.kept
    assert not recwarn.list
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert min(pace.backward, pace.forward, pace.factors) > 0
    assert (max(pace.step, pace.original) > 0) == bool(options.get("tune"))
    assert (max(pace.trained) > 0) == bool(options.get("reconstruct"))


def test_moments_in_the_cache_take_no_time(tmp_path):
    model, ids = gpt2(), torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))
    config = KronyConfig("keep=0.5", allocation="global")
    compress(copy.deepcopy(model), config, calibration=ids, cache=tmp_path)
    assert compression_pace(model, plan(model, config), ids, cache=tmp_path).kept
    assert not compression_pace(model, plan(model, config), ids[:-1], cache=tmp_path).kept


def test_what_is_timed_is_proportional(monkeypatch):
    """With a clock that counts calls of the model instead of seconds."""
    model, ids = gpt2(), torch.randint(0, 256, (60, 64), generator=torch.Generator().manual_seed(0))
    tokens = 0

    def count(_, args) -> None:
        nonlocal tokens
        tokens += args[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(count)

    def clock(_, call) -> float:
        start = tokens
        call()
        return float(tokens - start)

    monkeypatch.setattr(estimate, "timed", clock)
    pace = compression_pace(model, plan(model, KronyConfig("keep=0.5", allocation="global", tune=1)), ids)
    assert pace.forward == pace.backward == pace.original == 64  # tokens of a sequence, each read once


def test_parts_of_attention_too():
    model, ids = gpt2(), torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))
    config = KronyConfig("keep=0.5", init="van-loan", modules="mlp|c_attn", split_attention=True, tune=1)
    assert compression_pace(model, plan(model, config), ids).step > 0
    assert not any(name.endswith(".q") for name, _ in model.named_modules())
