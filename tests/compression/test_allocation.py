"""Spending a budget against trying every way to spend it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyConfig, KronyError
from krony.compression.allocation import allocate, allocate_widths
from krony.compression.compress import calibration_for
from krony.compression.plan import plan
from krony.compression.replacement import replacements
from krony.runtime.progress import silent
from small_models import BUILDERS


@st.composite
def convex_curves(draw):
    """Costs of dropping 0, 1, … portions for two to four layers, with rising slopes."""
    layers = draw(st.integers(2, 4))
    slopes = st.lists(st.integers(0, 50), min_size=4, max_size=4).map(sorted)
    return [torch.tensor([0.0, *itertools.accumulate(draw(slopes))]) for _ in range(layers)]


@given(convex_curves(), st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_cheaper_fits_the_budget(curves, data):
    budget = data.draw(st.integers(len(curves), 5 * len(curves)))
    kept = allocate_widths(curves, 1, budget)
    ways = itertools.product(range(1, 6), repeat=len(curves))
    best = min(sum(c[5 - k] for c, k in zip(curves, way, strict=True)) for way in ways if sum(way) <= budget)
    assert sum(kept) <= budget
    assert sum(c[5 - k] for c, k in zip(curves, kept, strict=True)) == best


def test_portions_and_the_widest_layer():
    cheap, dear = torch.arange(61.0), 100 * torch.arange(61.0)  # width 64, portions of 4
    assert allocate_widths([cheap, dear], 4, 72) == [8, 64]
    assert allocate_widths([cheap, dear], 4, 72, max_width=50) == [24, 48]
    assert allocate_widths([cheap, dear], 4, 128) == [64, 64]


def test_a_curve_that_is_not_convex_is_taken_by_its_hull():
    bumpy = torch.tensor([0.0, 10.0, 11.0, 12.0])  # the first portion is dear, all three together aren't
    smooth = torch.tensor([0.0, 5.0, 10.0, 15.0])
    assert allocate_widths([bumpy, smooth], 1, 5) == [1, 4]


def test_a_budget_that_is_too_small():
    with pytest.raises(KronyError, match="a budget of 7 neurons for 2 layers: at least 4 per layer are needed"):
        allocate_widths([torch.arange(61.0)] * 2, 4, 7)


@pytest.mark.parametrize("init", ["neurons", "flap"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_neurons_kept_are_those_that_the_method_chooses_for_these_widths(name, init):
    """Ranking once gives the layers that initialising each with its own choice gives, to the bit."""
    model = BUILDERS[name]()
    config = KronyConfig("keep=0.5", init=init, allocation="global")
    settled = plan(model, config)
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(1))
    moments = list(calibration_for(settled, model, ids))
    found = allocate(model, settled, moments, silent)
    groups = [group for group in settled.groups if group.sites[0].name in found.shapes]
    assert groups and found.kept.keys() == {group.sites[0].name for group in groups}
    with torch.no_grad():
        for group, known in zip(settled.groups, moments, strict=True):
            if group not in groups:
                continue
            chosen = replacements(model, group, found.shapes, config, known)
            given = replacements(model, group, found.shapes, config, known, kept=found.kept[group.sites[0].name])
            for site in group.sites:
                ours, theirs = (one[site.name].layer.state_dict() for one in (given, chosen))
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
                assert given[site.name].report == chosen[site.name].report
