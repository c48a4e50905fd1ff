"""Recipes: what they take, and the paper's."""

from dataclasses import replace

import pytest

from krony import KronyError
from krony.healing.recipes import RECIPES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch is 0: it takes a number from 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: it takes a number above 0"),
        ({"learning_rate": 1e-6}, "final_rate is 3e-06: it is at most the learning_rate, 1e-06"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"hidden": -0.5}, "hidden is -0.5: it takes a number from 0"),
        ({"text": 1.5}, "text is 1.5: it is a share, from 0 to 1"),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(KronyError, match=words):
        replace(RECIPES["quick"], **changes)


def test_the_papers():
    """Section 4.1: 120 sequences of 1024 in batches of 24; 6e-5 to 6e-6; 3 epochs, 4 for the smaller models."""
    paper, small, final = (RECIPES[name] for name in ("paper", "paper-small", "paper-final"))
    assert (paper.sequences, paper.batch, paper.length) == (120, 24, 1024) and paper.sequences * paper.length == 122_880
    assert (paper.learning_rate, paper.final_rate, paper.weight_decay) == (6e-5, 6e-6, 0.1)
    assert 500 <= paper.warm_up <= 1500 and (paper.epochs, small.epochs) == (3, 4)
    assert replace(small, epochs=3.0) == paper
    assert (final.sequences, final.sequences * final.length, final.epochs) == (320, 327_680, 1)
    assert final.learning_rate == final.final_rate == 6e-6 and final.warm_up == 0
