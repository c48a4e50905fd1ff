"""Recipes in turn: the same as one run after another, whole or continued from anywhere, and none stops early."""

from dataclasses import replace

import pytest
import torch

import krony
from healing_runs import TINY, heal, noise, text
from krony.healing.chain import train_in_turn
from krony.healing.options import HealOptions
from small_models import gpt2

FIRST = replace(TINY, epochs=2.0, patience=1)
LAST = replace(TINY, sequences=6, learning_rate=5e-4, final_rate=5e-4, warm_up=0, patience=1)
STEPS = (30, 10)  # 60 rows: two epochs of 15 steps, and one of 10


def model():
    made = gpt2()
    krony.compress(made, krony.KronyConfig("keep=0.5", init="van-loan"))
    return made


def chain(work, made=None, *, recipes=(FIRST, LAST), validation=None, progress=None, **options):
    made = made or model()
    given = {} if progress is None else {"progress": progress}
    held = text(8) if validation is None else validation
    own = HealOptions(freeze="none", device="cpu", **options)
    return made, train_in_turn(made, text(), held, work=work, recipes=recipes, options=own, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return chain(tmp_path_factory.mktemp("whole") / "work")


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_it_is_one_run_after_the_other(whole, tmp_path):
    trained, report = whole
    alone, options = model(), {"freeze": "none", "device": "cpu"}
    by_hand = [
        heal(alone, text(), text(8), work=tmp_path / name, recipe=replace(recipe, patience=None), **options)
        for name, recipe in (("first", FIRST), ("last", LAST))
    ]
    assert same(trained, alone)
    assert report.tokens == sum(one.tokens for one in by_hand) == (STEPS[0] * 4 + STEPS[1] * 6) * 32
    assert report.loss_before == by_hand[0].loss_before and report.loss_after == by_hand[1].loss_after
    assert report.improved and report.validation[-1] == (report.tokens, by_hand[1].validation[-1][1])
    assert by_hand[1].loss_before == pytest.approx(by_hand[0].loss_after, rel=1e-5)


class Stopped(Exception):  # noqa: N818
    pass


def test_what_is_frozen_for_the_caller_is_kept_between_recipes(whole, tmp_path, monkeypatch):
    """Stopped after the first recipe, before the second has begun."""
    train = krony.healing.chain.train_on_rows

    def only_the_first(*given, **options):
        if options["recipe"].sequences != FIRST.sequences:
            raise Stopped
        return train(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("krony.healing.chain.train_on_rows", only_the_first)
        chain(tmp_path / "work", model().requires_grad_(False))
    trained, report = chain(tmp_path / "work", model().requires_grad_(False), resume=True)
    assert same(trained, whole[0]) and report.validation == whole[1].validation


@pytest.mark.parametrize(("recipe", "step"), [(0, 2), (0, 17), (0, 30), (1, 1), (1, 5), (1, 10)])
def test_it_continues_from_any_point(recipe, step, whole, tmp_path):
    """Stopped before the first checkpoint of a recipe, in the middle, and after its last step."""
    at = [0, 0]  # the recipe, and its step

    def stop(done, total, what):
        if done < at[1]:  # another recipe has begun
            at[0] += 1
        at[1] = done
        if at == [recipe, step]:
            raise Stopped

    with pytest.raises(Stopped):
        chain(tmp_path / "work", progress=stop)
    resume = any(tmp_path.glob("work/checkpoint-*"))
    assert resume == ((recipe, step) != (0, 2))
    trained, report = chain(tmp_path / "work", resume=resume)
    assert same(trained, whole[0])
    assert report.tokens == whole[1].tokens and report.loss_after == whole[1].loss_after
    assert report.curve == whole[1].curve and report.validation == whole[1].validation


def test_stopped_between_two_recipes(whole, tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("krony.healing.chain.write_json", stop)
        chain(tmp_path / "work")
    trained, report = chain(tmp_path / "work", resume=True)
    assert same(trained, whole[0]) and report.loss_after == whole[1].loss_after


def test_none_stops_early(tmp_path):
    """Validation text that training makes a model worse at: with a patience of 1 a single run ends at once."""
    kept = {"keep_anyway": True, "validation": noise()}
    alone = heal(model(), text(), noise(), work=tmp_path / "alone", recipe=FIRST, device="cpu", keep_anyway=True)
    assert alone.tokens < STEPS[0] * 4 * 32
    assert chain(tmp_path / "both", **kept)[1].tokens == (STEPS[0] * 4 + STEPS[1] * 6) * 32


def test_after_a_recipe_that_gained_nothing_there_is_no_other(tmp_path):
    trained, report = chain(tmp_path / "work", validation=noise())
    assert not report.improved and report.tokens == STEPS[0] * 4 * 32 and same(trained, model())
    assert not (tmp_path / "work/then").exists()


def test_another_run_is_not_continued(tmp_path):
    chain(tmp_path / "work")
    with pytest.raises(krony.KronyError, match=r"belongs to a run with learning_rate 0.003, and now it is 0.001"):
        chain(tmp_path / "work", recipes=(replace(FIRST, learning_rate=1e-3), LAST), resume=True)
    with pytest.raises(krony.KronyError, match=r"then belongs to a run with learning_rate 0.0005, and now it is 0.001"):
        chain(tmp_path / "work", recipes=(FIRST, replace(LAST, learning_rate=1e-3)), resume=True)


def test_what_the_last_recipe_needs_is_checked_before_the_first_trains(tmp_path):
    with pytest.raises(krony.KronyError, match="60 rows to train on: one step of this recipe takes 320"):
        chain(tmp_path / "work", recipes=(FIRST, replace(LAST, sequences=320)))
    assert not (tmp_path / "work").exists()


def test_in_python(whole, tmp_path):
    report = krony.heal(
        made := model(), text(), val=text(8), recipe=[FIRST, LAST], freeze="none", device="cpu", work=tmp_path / "work"
    )
    assert same(made, whole[0]) and report.tokens == whole[1].tokens
