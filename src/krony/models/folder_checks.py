"""What is checked of a model's folder before transformers opens it: links, config.json, the weights' headers.

transformers follows what config.json says: to a folder of another name, to code on the hub, to a billion layers. A
folder that comes from elsewhere is therefore read here first, and what is wrong with it is one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from krony.errors import KronyError
from krony.storage.tensor_files import Checkpoint, Entry, check_link, read_json

# Bounds of the numbers in config.json, all beyond any model: transformers makes lists, loops and modules of them.
MOST_LAYERS = 1_000
MOST_MODULES = 200_000  # they take 1 GB even on the meta device
MOST_PARTS = 100_000  # what a name with COUNT_PREFIXES says, such as num_experts
COUNT_PREFIXES = ("num_", "n_")
DIMENSIONS = ("positions", "ctx", "embd", "inner", "embeddings", "buckets", "tokens")  # such as n_embd: no counts
MOST_WHOLE = 2**24  # any other whole number, such as a vocabulary
PLAIN_NUMBERS = ("theta", "base", "seed", "length", "window")  # only computed with: a model may have rope_theta 1e9
MOST_PLAIN = 2**31
MOST_FLOAT = 1e38  # what float32 holds
MOST_BUFFERS = 2**28  # elements of buffers that are computed rather than stored: 1 GB in float32
SIZES = (  # what configs call the numbers that must be positive
    *("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "num_heads"),
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "intermediate_size", "ffn_dim", "num_key_value_heads"),
    *("max_position_embeddings", "n_positions", "head_dim"),
)


def check_folder(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, if nothing in the folder leads out of it and the config asks for nothing odd.

    Raises KronyError, naming the file.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise KronyError(f"{path} is a pipe or a device: a model's folder holds regular files")
        if path.is_symlink() and not path.is_dir():
            check_link(folder, path)
    if (folder / "adapter_config.json").exists():
        raise KronyError(
            f"{folder / 'adapter_config.json'}: this is an adapter of another model: merge it into that model first "
            "(peft's merge_and_unload)"
        )
    file = folder / "config.json"
    config = read_json(file)
    check_config(config, file)
    return config


def check_config(config: dict[str, Any], file: Path) -> None:
    """Raises KronyError where ``config`` asks for code from elsewhere, or has sizes that no model has."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise KronyError(f'{file}: "model_type" is missing: it says what kind of model this is, such as gpt2')
    if config.get("auto_map") is not None and not _is_known(kind):
        raise KronyError(
            f"{file} asks for code of its own (auto_map), which krony does not run: if you trust it, load the model "
            "with transformers and give it to krony.compress"
        )
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if isinstance(config.get(name), str) and "/" in config[name]:
            raise KronyError(f"{file} asks for code from the hub ({name}: {config[name]}), which krony does not run")
    if config.get("transformers_weights") is not None:
        raise KronyError(
            f"{file} names other weights (transformers_weights): krony reads model.safetensors and no other"
        )
    for name, value in numbers(config):
        if (excess := _excess(name.rpartition(".")[2].partition("[")[0], value)) is not None:
            raise KronyError(f"{file}: {name} is {value}: no model {excess}")
    for name in SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise KronyError(f"{file}: {name} is {value!r}: it takes a whole number from 1")


def _excess(name: str, value: float) -> str | None:
    """What no model has or is, in words, where a number of this name says so; None where it doesn't."""
    if isinstance(value, float):
        return None if abs(value) <= MOST_FLOAT else "is so large"
    counts_layers = "layer" in name and "per_layer" not in name  # such as Gemma's vocab_size_per_layer_input
    if value > MOST_LAYERS and (counts_layers or name == "attention_types"):
        return "has so many layers"
    if value > MOST_PARTS and name.startswith(COUNT_PREFIXES) and not name.endswith(DIMENSIONS):
        return "has so many"
    most = MOST_PLAIN if any(part in name for part in PLAIN_NUMBERS) else MOST_WHOLE
    return None if abs(value) <= most else "is so large"


@contextmanager
def bounded() -> Iterator[None]:
    """Raises KronyError once more modules are made in the block than a model has, whatever in its config asks for them.

    On the meta device tensors take no memory, and modules still do.
    """
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise KronyError(f"by its config.json it has more than {MOST_MODULES:,} modules: no model has so many")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raises KronyError unless the weights of ``folder`` are sound and of the shapes and types that ``model`` has.

    ``model`` is on the meta device. Tensors of other names are left to transformers, which renames some.
    """
    found = Checkpoint(folder).entries
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, value in model.state_dict().items():
        entry = found.get(name) or found.get(name.removeprefix(prefix))
        if entry is not None:
            check_entry(entry, value)
    _check_sizes(folder, model, sum(math.prod(entry.shape) for entry in found.values()))


def _check_sizes(folder: Path, model: nn.Module, stored: int) -> None:
    """Raises KronyError where the model would need memory for more than its files hold, before any is allocated."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > 2 * stored + 1000:  # a head that isn't stored doubles a small model at most
        raise KronyError(
            f"{folder}: config.json describes {parameters:,} parameters, and the files hold {stored:,}: "
            "the weights are incomplete"
        )
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > max(MOST_BUFFERS, parameters):
        raise KronyError(f"{folder}: by config.json the model computes buffers of {buffers:,} elements: no model does")


def check_entry(entry: Entry, value: Tensor) -> None:
    """Raises KronyError unless a tensor in a file has the shape and the type of the model's ``value``."""
    if entry.shape != tuple(value.shape):
        raise KronyError(
            f"{entry.file}: {entry.name} is {by(entry.shape)}, and by config.json {by(tuple(value.shape))}"
        )
    if value.is_floating_point() and not entry.dtype.is_floating_point:
        kind = str(entry.dtype).removeprefix("torch.")
        raise KronyError(f"{entry.file}: {entry.name} is of type {kind}, and weights are floating-point numbers")


def check_finite(model: nn.Module, name: str) -> None:
    """Raises KronyError if a parameter of ``model`` has a value that is not finite."""
    for key, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            raise KronyError(f"{name}: {key} has values that are not finite: fetch or write its weights again")


def by(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return "x".join(map(str, shape)) or "a single number"


def _is_known(kind: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in nested JSON, with the name of where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, f"{name}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
