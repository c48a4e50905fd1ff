"""Sets a model's mode for a block of code, and restores it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """No advice and no progress bars of transformers while the block runs.

    Its advice is on calls that krony makes: no row that is measured or trained on has padding, so that none needs an
    attention mask.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode and turns ``requires_grad`` off for every parameter while the block runs.

    Afterwards every submodule has its earlier mode, and every parameter its earlier ``requires_grad``, also if the
    block raises.

    Examples:
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with quiet():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in gradients:
            parameter.requires_grad_(required)
