"""MODEL: a folder or a hub name, resolved once to its config and its files; each way to fail is one sentence."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from krony.errors import KronyError
from krony.models import quantizer
from krony.models.folder_checks import bounded, check_finite, check_folder, check_weights
from krony.models.modes import quiet
from krony.models.tokenizer_checks import check_tokenizer, no_panic, try_out
from krony.runtime.hardware import check_device, is_out_of_memory
from krony.storage.hub import ask, cached_model

DEMO = Path(__file__).parents[1] / "shipped" / "demo"  # the model called ``demo``
GPT2_NAMES = ("gpt2", "openai-community/gpt2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSource:
    """A model as the user names it, after its folder was checked and its config was read.

    Attributes:
        name: what the user wrote.
        folder: the folder with its files; None for a name on the hub.
        config: its config.
    """

    name: str
    folder: Path | None
    config: PretrainedConfig

    @classmethod
    def find(cls, name: str) -> ModelSource:
        """Checks the folder and reads the config; GPT-2 124M's is known by name and needs no hub. Raises KronyError."""
        if name in GPT2_NAMES and not Path(name).exists():
            return cls(name, None, GPT2Config())
        where = _locate(name)
        with LoadingErrors(name):
            config = AutoConfig.from_pretrained(where, trust_remote_code=False, **_hub_options(where))
        return cls(name, where if isinstance(where, Path) else None, config)

    @property
    def where(self) -> str:
        """What transformers finds the model by."""
        return self.name if self.folder is None else str(self.folder)

    @cached_property
    def files(self) -> Path | None:
        """The folder with its files: for a name on the hub, that of the hub's cache, if its weights are there."""
        folder = self.folder or cached_model(self.name)
        if folder is not None:
            check_folder(folder)
        return folder

    @property
    def is_compressed(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, with the Kronecker layers that it has, to be read. Raises KronyError."""
        return self._without_values()

    def _without_values(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = empty_model(self.config, dtype)
        if self.is_compressed:
            with LoadingErrors(self.name):
                quantizer.put_layers_in(model, self.config.quantization_config)
        return model

    def dtype(self, dtype: str | torch.dtype = "auto") -> str | torch.dtype:
        """The dtype that the model is loaded in: ``demo`` is stored in half precision only to be small."""
        return torch.float32 if self.name == "demo" and dtype == "auto" else parse_dtype(dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises KronyError if there is none."""
        if self.folder is not None:
            check_tokenizer(self.folder)
        try:
            options = _hub_options(self.folder or self.name)
            with no_panic():
                tokenizer = AutoTokenizer.from_pretrained(self.where, trust_remote_code=False, **options)
                try_out(tokenizer)
        except Exception as error:  # transformers raises whatever the tokenizer's parts do
            raise KronyError(f"{self.name}: no tokenizer can be loaded from there: {first_line(error)}") from None
        if not tokenizer("a")["input_ids"]:  # from a folder without one, transformers makes some that know no text
            raise KronyError(f"{self.name}: no tokenizer can be loaded from there: tokenizer.json is missing")
        return tokenizer

    @property
    def generation_config(self) -> GenerationConfig | None:
        """What its folder says about generation; None if it says nothing. Raises what transformers does."""
        if self.folder is None or not (self.folder / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.folder)

    def check_saves(self) -> None:
        """Saves config, generation config and tokenizer to a temporary folder, as a verb does after its work.

        Raises KronyError for what transformers reads but does not write, such as a temperature that is no number.
        """
        with tempfile.TemporaryDirectory() as folder, LoadingErrors(self.name, "it can be read but not saved again"):
            self.skeleton.config.save_pretrained(folder)  # which knows what the config alone does not, such as sdpa
            if (generation := self.generation_config) is not None:
                generation.save_pretrained(folder)
            if self.has_tokenizer:
                _check_template_names(self.tokenizer)
            self.save_tokenizer(folder)

    @property
    def has_tokenizer(self) -> bool:
        """Whether its folder has a tokenizer, which may be damaged; of a name on the hub, whether one can be loaded."""
        if self.folder is not None:
            return any((self.folder / file).exists() for file in TOKENIZER_FILES)
        try:
            return self.tokenizer is not None
        except KronyError:
            return False

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes a model that was made from this one, with this one's tokenizer and chat template."""
        model.save_pretrained(folder)
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path | str) -> None:
        """Writes its tokenizer, chat template included; nothing if it has none. Raises KronyError for a damaged one."""
        if self.has_tokenizer:
            self.tokenizer.save_pretrained(folder)

    def shapes(self, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
        """The model on the meta device in eval mode, in the dtype in which it is loaded if its config says that."""
        wanted = self.dtype(dtype)
        stored = wanted if isinstance(wanted, torch.dtype) else getattr(self.config, "dtype", None)
        return self._without_values(stored or torch.float32).eval()

    def load(self, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode, from safetensors only; ``krony.load_model`` says the rest."""
        check_device(device)
        options: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
        options |= _hub_options(self.folder or self.name)
        if self.folder is not None:
            check_weights(self.folder, self.skeleton)
        with LoadingErrors(self.name):
            model, info = AutoModelForCausalLM.from_pretrained(
                self.where,
                dtype=self.dtype(dtype),
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                return_dict=True,  # outputs are read by name, whatever config.json says
                **options,
            )
        if missing := sorted(info["missing_keys"]):
            raise KronyError(
                f"{self.name}: the weights are incomplete: {missing[0]} and {len(missing) - 1} more are missing"
            )
        model = (model if device == "auto" else model.to(device)).eval()
        check_finite(model, self.name)
        check_runs(model, self.name)
        return model


def _check_template_names(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RuntimeError for a chat template whose name leads out of the folder: each is saved as a file."""
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for template in templates:
        if not re.fullmatch(r"[\w-]+", str(template)):
            raise RuntimeError(f"its chat template {template!r} can't be a file's name")


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The dense model that a config describes, on the meta device: shapes without memory. Raises KronyError.

    ``dtype``: None for the config's own.
    """
    with torch.device("meta"), bounded(), LoadingErrors(config.name_or_path or type(config).__name__):
        options = {} if dtype is None else {"dtype": dtype}
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``auto``, or the torch dtype of this name. Raises KronyError."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise KronyError(f"dtype {dtype!r} is unknown: it is auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _locate(name: str) -> str | Path:
    """What transformers finds the model by. Raises KronyError where it would answer with a page about the hub."""
    if name == "demo":
        return DEMO
    if "\0" in name:
        raise KronyError(f"{name!r} is not a name of a folder: it contains a NUL")
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
        return path
    return name


def _hub_options(where: str | Path) -> dict[str, Any]:
    """What loading from the hub needs; nothing for a folder. Raises KronyError for a name that the hub doesn't know."""
    if isinstance(where, Path):
        return {}
    answer = ask(where, "model")
    if answer == "unknown":
        raise KronyError(f"{where}: there is no such folder, and no such model on the hub that you may read")
    if answer == "no name":
        raise KronyError(f"{where!r}: there is no such folder, and it can't be a name on the hub")
    return {} if answer == "known" else {"local_files_only": True}


@torch.inference_mode()
def check_runs(model: PreTrainedModel, name: str) -> None:
    """Two tokens go through the model: a config can fit its weights and still not run. Raises KronyError."""
    with quiet(), LoadingErrors(name, "by its config.json it can't run"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)  # generation does


class LoadingErrors:
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
            return f"its weights are damaged, fetch or write them again ({first_line(error)})"
        if isinstance(error, OSError) and not Path(self.name).is_dir():
            if ask(self.name, "model") == "known":  # gated, without safetensors, no space in the cache
                return f"the hub knows it, and it can't be loaded from there: {first_line(error)}"
            return "there is no such folder, it is not in the hub's cache, and the hub can't be reached (no network)"
        if isinstance(error, RuntimeError) and "mismatched" in str(error):
            return "its weights have other shapes than its config.json says"
        return f"{self.otherwise}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; the second too, where the first announces it."""
    text = f"{error} is unknown" if isinstance(error, KeyError) else str(error).strip()
    lines = text.splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
