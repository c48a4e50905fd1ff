"""A model's mode is set for a while, and restored."""

import pytest
from torch import nn
from transformers.utils import logging

from krony.models.modes import evaluating, quiet


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2)))
    model.train()
    model[1].eval()  # a submodule whose mode differs from the model's
    model[2][0].weight.requires_grad_(False)
    return model


def state(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_every_submodule_and_parameter_is_as_it_was():
    model = network()
    before = state(model)
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert state(model) == before


def test_after_an_error_too():
    model = network()
    before = state(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert state(model) == before


def test_transformers_is_quiet_inside_and_as_before_afterwards():
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    with evaluating(nn.Linear(1, 1)), quiet():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert logging.get_verbosity() == logging.WARNING and not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
