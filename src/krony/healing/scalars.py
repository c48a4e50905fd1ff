"""The scalars of a model as a trainer logs them, and their trajectories from its log (paper, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from krony.healing.trajectory import Trajectories
from krony.models.surgery import kronecker_layers

PREFIX = "scalars/"  # before the layer's name and the factor's number, in TensorBoard and in a trainer's log


def log_of(model: nn.Module) -> dict[str, float]:
    """Every scalar as ``{"scalars/LAYER/FACTOR": value}``, factors counted from 0; empty without scalars.

    Under sharding all processes call it together, because it gathers what is split.
    """
    logged: dict[str, float] = {}
    for name, layer in kronecker_layers(model).items():
        if layer.scalars is not None:
            whole = getattr(layer.scalars, "full_tensor", lambda own=layer.scalars: own)()
            logged |= {f"{PREFIX}{name}/{number}": value for number, value in enumerate(whole.detach().tolist())}
    return logged


def trajectories(history: Iterable[Mapping[str, Any]], tokens_per_step: int) -> Trajectories:
    """The trajectories in a trainer's log.

    Examples:
        >>> trajectories([{"step": 0, "scalars/h.0.c_fc/0": 4.0, "scalars/h.0.c_fc/1": 1.0}], 512)
        {'h.0.c_fc': [(0, [4.0, 1.0])]}
    """
    found: Trajectories = {}
    for entry in history:
        layers: dict[str, list[float]] = {}
        for key, value in entry.items():  # in the order of the factors, as ``log_of`` writes them
            if key.startswith(PREFIX):
                layers.setdefault(key.removeprefix(PREFIX).rpartition("/")[0], []).append(float(value))
        for name, values in layers.items():
            found.setdefault(name, []).append((int(entry["step"]) * tokens_per_step, values))
    return found
