"""Every scalar is logged over a training: in the report, in TensorBoard, across resumed runs and recipes in turn."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from healing_runs import TINY, heal, text
from krony import KronyConfig, compress
from krony.healing.chain import train_in_turn
from krony.healing.options import HealOptions
from krony.healing.trainable import adamw
from krony.models.surgery import kronecker_layers
from small_models import gpt2

STEP = 4 * 32  # tokens
RECIPE = replace(TINY, scalar_rate=0.05, evaluations=3)


def scaled():
    model = gpt2()
    compress(model, KronyConfig("48x48:2", init="van-loan", scalar_init=4.0))
    return model


def test_they_are_those_of_the_model_at_each_place(tmp_path):
    model = scaled()
    names = list(kronecker_layers(model))
    report = heal(model, text(), text(8), work=tmp_path, recipe=RECIPE, freeze="none", device="cpu")
    assert list(report.scalars) == names and len(names) == 6
    for points in report.scalars.values():
        assert points[0] == (0, [4.0, 4.0]) and [tokens for tokens, _ in points] == [s * STEP for s in range(16)]
        assert points[-1][1] != [4.0, 4.0]
    for checkpoint in sorted(tmp_path.glob("checkpoint-*")):  # what is on disk, written by transformers
        step, saved = int(checkpoint.name.removeprefix("checkpoint-")), load_file(checkpoint / "model.safetensors")
        for name, points in report.scalars.items():
            assert dict(points)[step * STEP] == saved[f"{name}.scalars"].tolist()
    board = EventAccumulator(str(tmp_path / "runs"))
    board.Reload()
    for name, points in report.scalars.items():
        for factor in (0, 1):
            logged = board.Scalars(f"train/scalars/{name}/{factor}")
            assert [(each.step * STEP, each.value) for each in logged] == [
                (tokens, pytest.approx(values[factor], rel=1e-6)) for tokens, values in points
            ]
    first = report.to_json()["scalars"][names[0]]
    assert first[0] == [0, [4.0, 4.0]] and len(first) == 16


def test_frozen_scalars_stay_and_a_model_without_has_none(tmp_path):
    report = heal(scaled(), text(), text(8), work=tmp_path / "a", freeze="scalars", device="cpu")
    assert {tuple(values) for points in report.scalars.values() for _, values in points} == {(4.0, 4.0)}
    plain = gpt2()
    compress(plain, KronyConfig("keep=0.5", init="van-loan"))
    report = heal(plain, text(), text(8), work=tmp_path / "b", device="cpu")
    assert report.scalars == {} and report.to_json()["scalars"] == {}


def test_recipes_in_turn_have_one_trajectory_and_so_has_a_resumed_run(tmp_path):
    class Stopped(Exception):  # noqa: N818
        pass

    def stop(done, *_):
        if done == 10 and (tmp_path / "cut/then").exists():
            raise Stopped

    recipes = [RECIPE, replace(RECIPE, evaluations=5)]

    def run(name, **options):
        extra = {"progress": options.pop("progress")} if "progress" in options else {}
        own = HealOptions(freeze="none", device="cpu", **options)
        return train_in_turn(scaled(), text(), text(8), work=tmp_path / name, recipes=recipes, options=own, **extra)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("cut", progress=stop)
    assert run("cut", resume=True).scalars == whole.scalars
    for points in whole.scalars.values():
        places = [tokens for tokens, _ in points]
        assert places == sorted(places) and places[-1] == whole.tokens == 30 * STEP and places.count(15 * STEP) == 2


def test_scalars_may_have_a_rate_of_their_own():
    model = scaled()
    rates = {
        id(parameter): group["lr"]
        for group in adamw(model, replace(TINY, factor_rate=1e-4, scalar_rate=0.02)).param_groups
        for parameter in group["params"]
    }
    for layer in kronecker_layers(model).values():
        assert (rates[id(layer.scalars)], rates[id(layer.weight)]) == (0.02, 1e-4)
    with torch.no_grad(), pytest.raises(ValueError, match="scalar_rate is 0: it takes a number above 0"):
        replace(TINY, scalar_rate=0)
