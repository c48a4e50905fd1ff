"""krony: compress the MLPs of pretrained causal language models into sums of Kronecker products.

Importing krony is fast and is all that ``AutoModelForCausalLM.from_pretrained`` needs to load a compressed model:
transformers learns about krony's layers as soon as it loads its quantizers, in whichever order the two are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from krony._register import register
from krony._version import __version__
from krony.errors import KronyError

if TYPE_CHECKING:
    from krony.compression.compress import compress as compress
    from krony.compression.own_text import own_text as own_text
    from krony.compression.report import CompressionReport as CompressionReport
    from krony.config import KronyConfig as KronyConfig
    from krony.data.calibration_set import calibration_set as calibration_set
    from krony.evaluation.inspection import inspect_model as inspect_model
    from krony.evaluation.perplexity import evaluate as evaluate
    from krony.healing.heal import heal as heal
    from krony.healing.recipes import RECIPES as RECIPES
    from krony.healing.recipes import Recipe as Recipe
    from krony.healing.report import HealReport as HealReport
    from krony.interpretation.interpret import interpret as interpret
    from krony.interpretation.views import Interpretation as Interpretation
    from krony.kronecker.linear import KroneckerLinear as KroneckerLinear
    from krony.models.export import export_model as export_model
    from krony.models.loading import demo_model as demo_model
    from krony.models.loading import load_model as load_model
    from krony.models.loading import load_shapes as load_shapes
    from krony.models.loading import load_tokenizer as load_tokenizer
    from krony.sizing.frontier import frontier as frontier
    from krony.sizing.report import Frontier as Frontier
    from krony.sizing.within import Kept as Kept
    from krony.sizing.within import compress_within as compress_within

# The module of each public name; it is imported when the name is first used.
_MODULES = {
    "CompressionReport": "krony.compression.report",
    "Frontier": "krony.sizing.report",
    "HealReport": "krony.healing.report",
    "Interpretation": "krony.interpretation.views",
    "Kept": "krony.sizing.within",
    "KroneckerLinear": "krony.kronecker.linear",
    "KronyConfig": "krony.config",
    "RECIPES": "krony.healing.recipes",
    "Recipe": "krony.healing.recipes",
    "calibration_set": "krony.data.calibration_set",
    "compress": "krony.compression.compress",
    "compress_within": "krony.sizing.within",
    "demo_model": "krony.models.loading",
    "evaluate": "krony.evaluation.perplexity",
    "export_model": "krony.models.export",
    "frontier": "krony.sizing.frontier",
    "heal": "krony.healing.heal",
    "inspect_model": "krony.evaluation.inspection",
    "interpret": "krony.interpretation.interpret",
    "load_model": "krony.models.loading",
    "load_shapes": "krony.models.loading",
    "load_tokenizer": "krony.models.loading",
    "own_text": "krony.compression.own_text",
}

__all__ = ["KronyError", "__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'krony' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
