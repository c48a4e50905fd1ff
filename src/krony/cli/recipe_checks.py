"""What can be known to fail before a recipe's first step: its texts, its models, and forms that can't be exported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from krony.cli.recipe_file import Section
from krony.config import KronyConfig
from krony.data.sets import check_named
from krony.errors import KronyError
from krony.healing.options import parse_freeze
from krony.healing.recipes import default_freeze

TEXTS = ("calibration", "data", "val")  # options that name text
MODELS = ("teacher", "control")  # options that name a model


def values(section: Section, keys: tuple[str, ...]) -> Iterator[Any]:
    """What a section says for these options, each value of those that are given several times."""
    for key in keys:
        found = section.options.get(key, [])
        yield from found if isinstance(found, list) else [found]


def check_texts(section: Section) -> None:
    """Raises KronyError for text that isn't there."""
    for name in values(section, TEXTS):
        check_named(name)


def check_slim(compressed: KronyConfig, heals: list[Section]) -> None:
    """Raises KronyError if no neuron will be left out of the model that is to be exported to slim."""
    else_ = "export with to: dense, which always works"
    if not compressed.drops_neurons:
        epsilon = f" with epsilon {compressed.epsilon:g}" if compressed.epsilon else ""
        raise KronyError(
            f"slim leaves out neurons that init neurons with epsilon 0 drops, and here compress has init "
            f"{compressed.init}{epsilon}: {else_}"
        )
    if compressed.layers != "all":
        raise KronyError(f"slim needs every MLP compressed, and here compress has layers {compressed.layers}: {else_}")
    for section in heals:
        freeze = section.options.get("freeze", default_freeze(section.options.get("recipe", "quick")))
        if "right" not in parse_freeze(freeze):
            raise KronyError(
                f"slim leaves out neurons that healing brings back if it trains the right factors: freeze: right in "
                f"heal keeps them out, or {else_}"
            )
