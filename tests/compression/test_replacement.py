"""Second moments that no text has are refused where they are used: a cache that is damaged may hold such."""

import pytest

from krony import KronyConfig, KronyError
from krony.compression.moments import Calibration
from krony.compression.plan import plan
from krony.compression.replacement import replacements, sound_moments
from krony.models.surgery import find_groups
from small_models import gpt2


def test_moments_without_a_factorisation(ids, monkeypatch):
    model, config = gpt2(), KronyConfig("keep=0.5")
    settled = plan(model, config)
    (moments, *_) = Calibration(model, settled.groups, ids)
    moments.hidden.matrix[3, 5] = moments.hidden.matrix[5, 3] = 1e6 * moments.hidden.matrix.diagonal().max()
    monkeypatch.setattr("krony.init.neurons.regularised", lambda c: c)  # whose ridge hides most such damage
    with pytest.raises(KronyError, match=r"mlp\.c_fc: its second moments are not those of any text .* --no-cache"):
        replacements(model, settled.groups[0], settled.shapes, config, moments)


def test_other_errors_are_left():
    with pytest.raises(ZeroDivisionError), sound_moments(find_groups(gpt2())[0]):
        _ = 1 / 0
