"""What a model loses without one factor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from krony.kronecker.embedding import KroneckerEmbedding
from krony.kronecker.linear import KroneckerLinear


@contextmanager
def without(layer: KroneckerLinear | KroneckerEmbedding, factor: int) -> Iterator[None]:
    """Leaves one factor out of a layer while the block runs: its right factor is zero. The bias stays.

    The layer gets another parameter for that time. Its own keeps its values, also where other layers share it.
    """
    own = layer.right
    changed = own.detach().clone()
    changed.view(-1, *layer.shape.right)[factor] = 0  # an embedding's has no dimension for factors
    layer.right = nn.Parameter(changed, requires_grad=False)
    try:
        with torch.no_grad():
            yield
    finally:
        layer.right = own
