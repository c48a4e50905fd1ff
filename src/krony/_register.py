"""The import hook that registers krony with transformers as soon as transformers loads its quantizers."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TRANSFORMERS, KRONY = "transformers.quantizers.auto", "krony.models.quantizer"


def register() -> None:
    """Registers now if transformers' quantizers are loaded, else right after they are."""
    if TRANSFORMERS in sys.modules:
        importlib.import_module(KRONY)
    else:
        sys.meta_path.insert(0, _RegisterWhenLoaded())


class _RegisterWhenLoaded(importlib.abc.MetaPathFinder):
    """Imports krony.models.quantizer, which registers the quantizer, right after transformers' own quantizers."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TRANSFORMERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module(KRONY)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
