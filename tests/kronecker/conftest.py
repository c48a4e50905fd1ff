"""Counting how often derived tensors are made."""

import pytest

from derived_models import SCHEMES, compressed
from krony.kronecker import fused_mlp
from krony.kronecker.linear import KroneckerLinear


@pytest.fixture
def made(monkeypatch):
    """Counts how often derived values are made: dense matrices, combinations, patterns."""
    for scheme in SCHEMES:
        compressed(scheme)  # kept for all tests; compressing makes dense matrices too, to report errors
    counts = {"dense_weight": 0, "_combination": 0, "_read_pattern": 0}

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(KroneckerLinear, "dense_weight")
    count(fused_mlp, "_combination")
    count(fused_mlp, "_read_pattern")
    return counts
