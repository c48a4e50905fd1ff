"""How much the tables train and measure: a quick budget, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from krony.healing.recipes import RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is trained and measured.

    Attributes:
        test_tokens: tokens of each test set; None takes all of them.
        epoch_tokens: tokens of an epoch; None takes all of the text.
        train: the recipe of the first epochs.
        final: the recipe of the last epoch.
        validation_rows: rows of the validation loss.
    """

    test_tokens: int | None
    epoch_tokens: int | None
    train: Recipe
    final: Recipe
    validation_rows: int


_QUICK = replace(RECIPES["quick"], sequences=4, batch=4, learning_rate=5e-4, final_rate=5e-6)
BUDGETS = {
    "quick": Budget(
        test_tokens=32_768,
        epoch_tokens=40_960,  # 20 steps, so that Figure 1's tenths of an epoch end with a step
        train=replace(_QUICK, epochs=3.0),
        final=replace(_QUICK, sequences=16, learning_rate=5e-5, final_rate=5e-5, warm_up=0, epochs=1.0),
        validation_rows=16,
    ),
    "full": Budget(
        test_tokens=None,
        epoch_tokens=None,
        train=RECIPES["paper"],
        final=RECIPES["paper-final"],
        validation_rows=240,
    ),
}
