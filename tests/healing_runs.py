"""Small training runs: a recipe of a few steps, text that can be learnt, and options by their names."""

import numpy as np

from krony.data.rows import Rows
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe
from krony.healing.training import train_on_rows

TINY = Recipe(sequences=4, batch=2, length=32, learning_rate=3e-3, final_rate=1e-4, warm_up=2, epochs=1.0)
ARGUMENTS = ("work", "recipe", "teacher", "tokenizer", "progress")


def text(rows: int = 60) -> Rows:
    """Counting up by steps of three: something that can be learnt."""
    return Rows((np.arange(rows * 32) * 3 % 250).astype(np.uint16), 32)


def noise(rows: int = 8) -> Rows:
    """Text that training on ``text`` makes a model worse at."""
    return Rows(np.random.default_rng(3).integers(0, 256, rows * 32).astype(np.uint16), 32)


def heal(model, train, validation, **given):
    """``train_on_rows`` with the recipe ``TINY``; options need no ``HealOptions`` around them."""
    arguments = {"recipe": TINY} | {name: given.pop(name) for name in ARGUMENTS if name in given}
    return train_on_rows(model, train, validation, options=HealOptions(**given), **arguments)
