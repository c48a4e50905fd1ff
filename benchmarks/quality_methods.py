"""The methods that ``quality.py`` compares, and the models that they make."""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import rivals
import torch
from quality_bytes import BITS, bits_of, quantised, slim_facts
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import krony
from krony.config import EFFORTS
from krony.models.surgery import count_parameters, find_groups
from krony.storage.files import cache_folder

STEPS = 150  # of reconstruction, per MLP
TUNING, LONG = (EFFORTS[name]["tune"] for name in ("tuned", "best"))  # steps, with one sequence each
METHODS: dict[str, dict] = {
    "neurons": {},
    "neurons, global": {"allocation": "global"},
    "neurons, global, reconstructed": {"allocation": "global", "reconstruct": STEPS},
    "neurons, global, tuned": {"allocation": "global", "tune": TUNING, "tune_text": 0.0},
    "neurons, global, all weights tuned": EFFORTS["tuned"],
    "neurons, global, reconstructed, tuned": {
        "allocation": "global",
        "reconstruct": STEPS,
        "tune": TUNING,
        "tune_text": 0.0,
    },
    "neurons, global, reconstructed, all weights tuned": EFFORTS["tuned"] | {"reconstruct": STEPS},
    f"neurons, global, all weights tuned, {LONG} steps": EFFORTS["best"],
    "svd": {"init": "svd"},
    "van-loan": {"init": "van-loan"},
    "prune": {"init": "prune"},
    **{f"neurons, slim, {name}": {} for name in BITS},
}
PAPERS: dict[str, dict] = {  # tokens are weighed as in the papers: all the same
    "flap": {"init": "flap", "token_weighting": False},
    "flap, global": {"init": "flap", "token_weighting": False, "allocation": "global"},
    "wanda": {"init": "wanda", "token_weighting": False},
    "magnitude": {"init": "magnitude"},
    "random-neurons": {"init": "random-neurons"},
}
RIVALS = (*PAPERS, *rivals.WAYS)
WAYS = (*METHODS, *RIVALS)
ORIGINALS = {"base": "the original"} | {name: f"the original, {name}" for name in BITS}


class Starts:
    """Compresses copies of one model by each method.

    Args:
        base: the original, in float32; it does not change.
        ids: the calibration text, ``(sequences, length)``.
        options: ``seed`` is read.
    """

    def __init__(self, base: PreTrainedModel, ids: Tensor, facts: dict[str, Any], options: argparse.Namespace) -> None:
        self.base, self.ids, self.facts, self.options = base, ids, facts, options
        self.rivals = rivals.Rivals(base, ids)

    def knows(self, way: str) -> bool:
        """Whether this method can compress this model."""
        return way not in rivals.WAYS or self.rivals.knows(way)

    def make(self, way: str, keep: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The compressed model in float32, and its parameters and times for the table."""
        start = time.perf_counter()
        read = way in ("torch-pruning, Taylor", "optipfair, calibrated")
        if way in rivals.WAYS:
            model = self.rivals.pruned(way, keep)
            expected = slim_facts(self.facts, 1 - keep)["params"]
            if count_parameters(model) != expected:
                raise SystemExit(f"{way} made {count_parameters(model):,} parameters, and not {expected:,}")
        else:
            options = (METHODS | PAPERS)[way]
            model = copy.deepcopy(self.base)
            if options.get("init") == "flap":
                add_biases(model)
            config = krony.KronyConfig(f"keep={keep:g}", seed=self.options.seed, **options)
            text = self.ids if config.needs_text_for else None
            report = krony.compress(model, config, calibration=text, cache=cache_folder())
            if report.tuned is not None and not report.tuned.improved:
                raise SystemExit(f"{way}: {report.tuned.summary()}")
            read = report.calibration is not None and "is read" in report.calibration
        seconds = time.perf_counter() - start
        times = {"seconds": seconds, "calibrated": read, "threads": torch.get_num_threads()}
        return model, {"params": count_parameters(model), **times}


def add_biases(model: PreTrainedModel) -> None:
    """Gives every down layer without a bias one of zeros, in which FLAP keeps the mean of what it drops.

    This is the paper's model for Llama. Its biases add less than a thousandth to the parameters.
    """
    for group in find_groups(model):
        layer = model.get_submodule(group.sites[-1].name)
        if layer.bias is None:
            out = layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.weight.shape[0]
            layer.bias = torch.nn.Parameter(layer.weight.new_zeros(out))


def finished(model: PreTrainedModel, way: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model as it is measured: in ``dtype``, and for a quantised row slim and with fewer bits."""
    model = model.to(dtype)
    bits = bits_of(way)
    return model if bits is None else quantised(krony.export_model(model, to="slim"), bits)
