"""Spending a budget against trying every way to spend it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyError
from krony.compression.allocation import allocate_widths


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
