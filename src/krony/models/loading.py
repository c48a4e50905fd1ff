"""MODEL: a folder or a hub name becomes a config, a tokenizer or a model; each way to fail is one sentence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from krony.errors import KronyError
from krony.models import quantizer
from krony.models.folder_checks import check_finite, check_folder, check_weights
from krony.runtime.hardware import is_out_of_memory

DEMO = Path(__file__).parents[1] / "shipped" / "demo"  # the model called ``demo``
GPT2_NAMES = ("gpt2", "openai-community/gpt2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_config(name: str) -> PretrainedConfig:
    """The config of a model, without its weights; GPT-2 124M's is known by name and needs no hub. Raises KronyError."""
    if name in GPT2_NAMES and not Path(name).exists():
        return GPT2Config()
    folder = _locate(name)
    with _Sentences(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config describes, dense, on the meta device: shapes without memory. Raises KronyError."""
    with torch.device("meta"), _Sentences(config.name_or_path or type(config).__name__):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def skeleton(name: str) -> PreTrainedModel:
    """The model on the meta device, with the Kronecker layers that it has. Raises KronyError."""
    config = load_config(name)
    model = empty_model(config)
    if getattr(config, "quantization_config", None) is not None:
        with _Sentences(name):
            quantizer.put_layers_in(model, config.quantization_config)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises KronyError if there is none."""
    folder = _locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the tokenizer's parts do
        raise KronyError(f"{name}: no tokenizer can be loaded from there: {_first_line(error)}") from None
    if not tokenizer("a")["input_ids"]:  # from a folder without one, transformers makes some that know no text
        raise KronyError(f"{name}: no tokenizer can be loaded from there: tokenizer.json is missing")
    return tokenizer


def load_model(name: str, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal LM in eval mode, dense or compressed, from safetensors only.

    Args:
        name: a folder, a hub name, or ``demo`` for the model that comes with krony.
        dtype: ``auto`` for the one it was saved in (``demo``: float32), or one of ``DTYPES``.
        device: as torch names it; ``auto`` spreads the model over what there is.

    Raises:
        KronyError: no such model, no network, a damaged or incomplete file, an architecture that isn't a causal LM.
    """
    folder = _locate(name)
    check_device(device)
    options: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    if Path(folder).is_dir():
        _check(name, Path(folder))
    with _Sentences(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=parse_dtype(wanted_dtype(name, dtype)),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise KronyError(f"{name}: the weights are incomplete: {missing[0]} and {len(missing) - 1} more are missing")
    model = (model if device == "auto" else model.to(device)).eval()
    check_finite(model, name)
    _check_runs(model, name)
    return model


def check_device(device: str) -> None:
    """Raises KronyError unless there is a device of this name; ``auto`` leaves it to what there is."""
    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that isn't there
        raise KronyError(f"device {device!r} can't be used: {_first_line(error)}") from None


def wanted_dtype(name: str, dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype that a model is loaded in: ``demo`` is stored in half precision for its size alone."""
    return torch.float32 if name == "demo" and dtype == "auto" else dtype


def folder_of(name: str) -> Path | None:
    """The folder that a model's files are in; None for a name on the hub."""
    folder = Path(_locate(name))
    return folder if folder.is_dir() else None


def demo_model() -> PreTrainedModel:
    """The GPT-2 of six layers that comes with krony, in float32 and eval mode; ``load_tokenizer("demo")`` fits it."""
    return load_model("demo")


def save(model: PreTrainedModel, folder: Path, *, source: str) -> None:
    """Writes ``model`` with the tokenizer (chat template included) of ``source``; one that has none stays without."""
    model.save_pretrained(folder)
    save_tokenizer(folder, source=source)


def save_tokenizer(folder: Path, *, source: str) -> None:
    """Writes the tokenizer of ``source``, if it has one."""
    with suppress(KronyError):
        load_tokenizer(source).save_pretrained(folder)


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``auto``, or the torch dtype of this name. Raises KronyError."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise KronyError(f"dtype {dtype!r} is unknown: it is auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def context_length(model: PreTrainedModel) -> int:
    """The most tokens the model takes at once."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1024)


def _locate(name: str) -> str:
    """What transformers finds the model by. Raises KronyError where it would answer with a page about the hub."""
    if name == "demo":
        return str(DEMO)
    if "\0" in name:
        raise KronyError(f"{name!r} is no name of a folder: there is a NUL in it")
    path = Path(name)
    if path.is_file():
        raise KronyError(f"{name} is a file: MODEL is a folder with config.json and model.safetensors, or a hub name")
    if path.is_dir() and not (path / "config.json").is_file():
        raise KronyError(f"{name} holds no model: there is no config.json in it")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    if looks_like_a_path and not path.is_dir():
        raise KronyError(f"{name!r}: there is no such folder")
    if path.is_dir():
        check_folder(path)
    return name


@torch.inference_mode()
def _check_runs(model: PreTrainedModel, name: str) -> None:
    """Two tokens go through the model: a config can fit its weights and still not run. Raises KronyError."""
    with _Sentences(name, "by its config.json it can't run"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)


def _check(name: str, folder: Path) -> None:
    """Compares the weights of a folder with its config. Raises KronyError."""
    check_weights(folder, skeleton(name))


class _Sentences:
    """Turns what transformers and safetensors raise while loading ``name`` into one sentence."""

    def __init__(self, name: str, otherwise: str = "it can't be loaded as a causal language model") -> None:
        self.name, self.otherwise = name, otherwise

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KronyError):
            raise KronyError(f"{self.name}: {error}") from None
        if isinstance(error, Exception) and not is_out_of_memory(error):  # which says nothing about the model
            raise KronyError(f"{self.name}: {self._sentence(error)}") from error

    def _sentence(self, error: Exception) -> str:
        if isinstance(error, SafetensorError):
            return f"its weights are damaged, fetch or write them again ({_first_line(error)})"
        if isinstance(error, OSError) and not Path(self.name).is_dir():
            return "there is no such folder, and it can't be fetched from the hub (no network, or no such name)"
        if isinstance(error, RuntimeError) and "mismatched" in str(error):
            return "its weights have other shapes than its config.json says"
        return f"{self.otherwise}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    text = f"{error} is unknown" if isinstance(error, KeyError) else str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
