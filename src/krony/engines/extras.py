"""Packages that only some users need: imported where they are used, with a sentence where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from krony.errors import KronyError


def needed(module: str, extra: str) -> ModuleType:
    """Imports ``module``. Raises KronyError that names the extra of krony that installs it.

    Examples:
        >>> needed("json", "gguf").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KronyError(f"{module} is not installed ({error}): pip install 'krony[{extra}]'") from None
