"""What the sizes of a model are by default."""

from __future__ import annotations

from typing import Any

KEEPS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # shares of the hidden neurons
GLOBAL_ALLOCATION: dict[str, Any] = {"allocation": "global"}  # of KronyConfig: one budget for all layers loses least
