"""What the sizes of a model are by default."""

from __future__ import annotations

from krony.config import KronyConfig

KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # shares of the hidden neurons
GLOBAL = KronyConfig(allocation="global")  # one budget for all layers loses least
