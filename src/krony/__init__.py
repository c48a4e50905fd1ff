"""krony: compress the MLPs of pretrained causal language models into sums of Kronecker products.

Importing krony is cheap and is all that ``AutoModelForCausalLM.from_pretrained`` needs to load a compressed model:
the quantizer is registered with transformers as soon as transformers loads its quantizers, in whichever order the two
are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

from krony._version import __version__
from krony.errors import KronyError

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from krony.calibration import calibration_set as calibration_set
    from krony.compression import Report as Report
    from krony.compression import compress as compress
    from krony.config import KronyConfig as KronyConfig
    from krony.evaluation import evaluate as evaluate
    from krony.export import export_model as export_model
    from krony.linear import KroneckerLinear as KroneckerLinear
    from krony.models import demo_model as demo_model
    from krony.models import load_model as load_model
    from krony.models import load_tokenizer as load_tokenizer

# Where each public name lives; it is imported when it is first used.
_HOMES = {
    "KroneckerLinear": "krony.linear",
    "KronyConfig": "krony.config",
    "Report": "krony.compression",
    "calibration_set": "krony.calibration",
    "compress": "krony.compression",
    "demo_model": "krony.models",
    "evaluate": "krony.evaluation",
    "export_model": "krony.export",
    "load_model": "krony.models",
    "load_tokenizer": "krony.models",
}

__all__ = ["KronyError", "__version__", *_HOMES]

_QUANTIZERS = "transformers.quantizers.auto"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'krony' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _RegisterWhenLoaded(importlib.abc.MetaPathFinder):
    """Imports krony.hf, which registers the quantizer, right after transformers' own quantizers."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module("krony.hf")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module("krony.hf")
else:
    sys.meta_path.insert(0, _RegisterWhenLoaded())
