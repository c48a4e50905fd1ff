"""Small training runs: a recipe of a few steps, text that can be learnt, and options by their names."""

import time
from pathlib import Path

import numpy as np
import torch

from krony import KronyConfig, compress
from krony.data.rows import Rows
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe
from krony.healing.training import train_on_rows
from krony.models import precision
from krony.runtime import distributed
from krony.runtime.signals import interruptible
from small_models import gpt2

TINY = Recipe(
    sequences=4, batch=2, length=32, learning_rate=3e-3, final_rate=1e-4, warm_up=2, epochs=1.0, evaluations=15
)
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


def run_and_save(
    work: Path, out: Path, *, rows: int, resume: bool = False, dtype: torch.dtype = torch.float32, stop_at: int = -1
) -> None:
    """All that a process does: heals a model with dropout, and saves curve, weights and validation losses in ``out``.

    In the middle of step ``stop_at`` it makes ``step-…`` in ``work``, and waits for the signal that is to come.
    """
    precision.fast_dtype = lambda _: torch.float32
    distributed.init()
    model = gpt2(attn_pdrop=0.1).to(dtype)
    compress(model, KronyConfig("keep=0.5", init="van-loan"))

    def watch(done: int, *_: object) -> None:
        if done == stop_at:
            (work / f"step-{done}").touch()
            time.sleep(2)

    with interruptible(lambda: "stopped"):
        options = {"device": "cpu", "resume": resume, "progress": watch}
        report = heal(model, *text(rows).split(5), work=work, **options)
    if distributed.is_first():
        torch.save((report.curve, list(model.state_dict().values()), report.validation), out)
