"""ONNX and OpenVINO, by transformers' own exporters: one graph that reads a prompt, and continues a cache."""

from __future__ import annotations

import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from krony.engines.extras import needed
from krony.errors import KronyError
from krony.runtime.hardware import is_out_of_memory

LOGGERS = ("torch", "torch.onnx", "torch.export", "transformers")
BATCH, PAST, NEW = 2, 5, 3  # of the inputs that the graph is traced with: sizes other than 0 and 1 stay variable


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """An exporter of transformers.

    Attributes:
        exporter: the name of its class.
        config: the name of its options' class.
        packages: what it needs besides transformers.
    """

    exporter: str
    config: str
    packages: tuple[str, ...]


FORMS = {
    "onnx": GraphForm(exporter="OnnxExporter", config="OnnxConfig", packages=("onnx", "onnxscript")),
    "openvino": GraphForm(exporter="OpenVINOExporter", config="OpenVINOConfig", packages=("openvino",)),
}


def check_packages(form: str) -> None:
    """Raises KronyError if a package that ``form`` needs is missing."""
    for package in ("transformers.exporters", *FORMS[form].packages):
        needed(package, form)


def write_graph(model: PreTrainedModel, folder: Path, form: str) -> None:
    """Writes a plain model as a graph, with its config and a description that transformers' runners read.

    The graph takes ``input_ids`` and ``position_ids`` ``(batch, new)``, ``attention_mask`` ``(batch, past + new)``, and
    per layer the keys and values of the past, ``(batch, heads, past, head_dim)``; an empty past is one of length 0. It
    returns ``logits`` ``(batch, new, vocabulary)``, and the keys and values with the new ones. All sizes are variable.

    Args:
        model: a plain causal LM whose cache is transformers' ``DynamicCache``.
        folder: where ``model.onnx`` or ``openvino_model.xml`` is written, with weights beside it.
        form: ``onnx`` or ``openvino``.

    Raises:
        KronyError: packages are missing, the model can't be traced, or the files can't be written.
    """
    check_packages(form)
    known, exporters = FORMS[form], importlib.import_module("transformers.exporters")
    options = getattr(importlib.import_module(f"transformers.exporters.exporter_{form}"), known.config)(dynamic=True)
    with silence():
        try:
            exported = getattr(exporters, known.exporter)().export(model, sample_inputs(model), options)
        except Exception as error:  # a tracer raises whatever the traced code does
            if is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise KronyError(f"export to {form}: transformers can't trace this model: {reason}") from error
    try:
        exported.save_pretrained(folder)
    except RuntimeError as error:  # OpenVINO's own writer raises no OSError
        raise KronyError(
            f"{form} can't be written: {str(error).strip().splitlines()[-1]} (is the disk full?)"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Within it nothing is printed, warned of or logged: the exporters speak of torch's and their own insides."""
    # transformers names the loggers of its exporters by their files, so that none is a child of "transformers"
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.exporters")]
    own = [module.logger for module in modules if hasattr(module, "logger")]
    before = {logger: logger.level for logger in (*own, *map(logging.getLogger, LOGGERS))}
    for logger in before:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


@torch.no_grad()
def sample_inputs(model: PreTrainedModel) -> dict[str, object]:
    """Inputs of the sizes in which the graph is traced."""
    positions = torch.arange(PAST, PAST + NEW, device=model.device)
    return {
        "input_ids": torch.zeros(BATCH, NEW, dtype=torch.long, device=model.device),
        "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.long, device=model.device),
        "position_ids": positions.expand(BATCH, NEW),
        "past_key_values": past(model, BATCH, PAST),
        "use_cache": True,
    }


@torch.no_grad()
def past(model: PreTrainedModel, batch: int = 1, tokens: int = 0) -> DynamicCache:
    """Keys and values of so many tokens, ``(batch, heads, tokens, head_dim)`` each; a graph begins with none.

    ``DynamicCache()`` alone has no tensors yet, which a graph needs as inputs.
    """
    cache = DynamicCache(config=model.config)
    start = torch.zeros(batch, max(tokens, 1), dtype=torch.long, device=model.device)
    with silence():
        model(input_ids=start, attention_mask=torch.ones_like(start), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
    return cache
