"""The import hook that lets transformers and PEFT know krony's layers as soon as they are loaded."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# A module of another library -> the module of krony that is imported right after it.
FOLLOWERS = {
    "transformers.quantizers.auto": "krony.models.quantizer",
    "peft.tuners.lora.model": "krony.models.lora",
}


def register() -> None:
    """Imports krony's module now if the other library's is loaded, else right after that is."""
    for name, follower in FOLLOWERS.items():
        if name in sys.modules:
            importlib.import_module(follower)
        else:
            sys.meta_path.insert(0, _ImportAfter(name, follower))


class _ImportAfter(importlib.abc.MetaPathFinder):
    """Imports the module ``follower`` right after the module ``name``."""

    def __init__(self, name: str, follower: str) -> None:
        self.name, self.follower = name, follower

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module(self.follower)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
