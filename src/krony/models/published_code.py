"""The layout of the published code's checkpoints (padas-lab-de/krony-PT): read and written.

A ``.pt`` file of tensors, named as in nanoGPT with GPT-2's names, and for each MLP ``c_fc_0: (k, d1, d2)``,
``c_fc_1: (k, d/d1, 4d/d2)``, ``c_proj_0``, ``c_proj_1`` (both turned around), ``c_fc_bias`` and ``c_proj_bias``. The
matrices of attention are ``(out, in)``, the factors ``(in, out)``: their model multiplies ``x @ kron(c_fc_0, c_fc_1)``.
Training by many processes leaves ``module.`` before every name, compiling ``_orig_mod.``.

The layout says neither how many heads there are nor which activation the MLP runs. Their training runs ``nn.GELU()``
(erf), their conversion to GPT-2, with which they measure, GPT-2's tanh approximation: ``activation`` chooses.
"""

from __future__ import annotations

import copy
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models import quantizer
from krony.models.source import DTYPES
from krony.models.surgery import kronecker_embeddings, kronecker_layers, put_in
from krony.storage.paths import check_regular

ACTIVATIONS = ("gelu_new", "gelu")  # what GPT-2 runs, and so their figures; what their training runs (erf)
PREFIXES = ("module.", "_orig_mod.")
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight")  # Conv1D in GPT-2, nn.Linear in nanoGPT
NAMES = ("c_fc", "c_proj")
MOST_NAMES = 3  # names of the same bytes: a head that is tied to the embedding has two


def read_reference(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without prefixes; nanoGPT's own files hold them as ``model``.

    Raises KronyError: a file that can't be read, one that holds more than tensors, or one of another layout.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
        if not is_zip:  # the format before torch 1.6; torch's reader of it takes any text for a pickle
            raise KronyError(
                f"{path}: it isn't a file of torch.save, or it is damaged; only tensors are read (weights_only)"
            )
        _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except KronyError:
        raise
    except OSError as error:
        raise KronyError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # torch's reader raises whatever a damaged file makes it trip over
        why = (
            "it holds more than tensors"
            if "weights_only" in str(error)
            else "it isn't a file of torch.save, or it is damaged"
        )
        raise KronyError(f"{path}: {why}; only tensors are read (weights_only)") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise KronyError(f"{path}: it takes a dictionary of tensors, as torch.save(model.state_dict()) writes")
    masks = (".attn.bias", ".attn.masked_bias")  # buffers of causal attention, in some versions
    bare = {_bare(str(name)): value for name, value in loaded.items()}
    tensors = {name: value for name, value in bare.items() if not name.endswith(masks)}
    if "transformer.h.0.mlp.c_fc_0" not in tensors:
        raise KronyError(
            f"{path}: there is no transformer.h.0.mlp.c_fc_0 in it, so it is no checkpoint of the published code"
        )
    for name, value in tensors.items():
        if (problem := _unusable(value)) is not None:
            raise KronyError(f"{path}: {name} {problem}")
    total, size = sum(value.numel() * value.itemsize for value in tensors.values()), path.stat().st_size
    if total > MOST_NAMES * size:  # many names for the same bytes
        raise KronyError(f"{path} has {size:,} bytes, and its tensors would take {total:,}: it is damaged")
    return tensors


def _check_archive(path: Path) -> None:
    """Raises KronyError for an archive that isn't as ``torch.save`` writes it: it stores, and never compresses."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise KronyError(f"{path}: {entry.filename} in it is compressed, and torch.save compresses nothing")


def _unusable(value: Tensor) -> str | None:
    """What keeps a tensor from being a weight, in words; None if nothing does."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return "has no values (it was saved from the meta device)"
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantised: save plain tensors"
    if value.dtype not in DTYPES.values():
        return f"is of type {kind}: weights are {', '.join(DTYPES)}"
    if value.ndim == 0:
        return "is a single number: weights have dimensions"
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        return "has more elements than the file holds for it"
    if not torch.isfinite(value).all():
        return "has values that are not finite"
    return None


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def from_reference(
    tensors: dict[str, Tensor], like: PretrainedConfig, *, activation: str = "gelu_new"
) -> PreTrainedModel:
    """A compressed GPT-2 with these tensors; nothing is rounded.

    Args:
        tensors: as ``read_reference`` gives them.
        like: config of the GPT-2 that was compressed: its heads, and all else that the file doesn't say.
        activation: ``gelu_new`` as GPT-2 and their conversion to it, or ``gelu`` (erf) as their training.

    Raises:
        KronyError: tensors that are missing, of unknown names or of shapes that don't fit each other or ``like``.
    """
    if activation not in ACTIVATIONS:
        raise KronyError(f"activation {activation!r} is unknown: it is gelu_new (GPT-2's) or gelu (erf)")
    config = _config(tensors, like, activation)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = set()
    for number in range(config.n_layer):
        for name in NAMES:
            place = f"transformer.h.{number}.mlp.{name}"
            shape = _shape(tensors, place, config)
            shapes.add(shape if name == "c_fc" else shape.transposed)
            put_in(model, place, KroneckerLinear(shape, dtype=tensors[f"{place}_0"].dtype, device="meta"))
    wanted = model.state_dict()
    given = {ours: value for name, value in tensors.items() for ours, value in [_ours(name, value)]}
    if missing := [_theirs(name) for name in wanted if name not in given]:
        raise KronyError(f"the checkpoint lacks {missing[0]}" + _and_more(missing))
    if unknown := [_theirs(name) for name in given if name not in wanted]:
        raise KronyError(f"the checkpoint has {unknown[0]}, which no GPT-2 has" + _and_more(unknown))
    for name, value in given.items():
        if value.shape != wanted[name].shape:
            sizes = ["x".join(map(str, s)) for s in (value.shape, wanted[name].shape)]
            raise KronyError(f"{_theirs(name)} makes {sizes[0]}, and the rest of the checkpoint needs {sizes[1]}")
    model.load_state_dict(given, assign=True)
    model.tie_weights()
    quantizer.attach_quantizer(model, {"scheme": str(min(shapes, key=str)), "init": "reference", "seed": 0})
    return model.eval()


def _config(tensors: dict[str, Tensor], like: PretrainedConfig, activation: str) -> GPT2Config:
    if not isinstance(like, GPT2Config):
        raise KronyError(f"the published code compresses GPT-2, and this is a config of {like.model_type}")
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        if name not in tensors:
            raise KronyError(f"the checkpoint lacks {name}")
        if tensors[name].ndim != 2:
            raise KronyError(f"{name} has shape {tuple(tensors[name].shape)}: it is a matrix")
    vocabulary, width = tensors["transformer.wte.weight"].shape
    if width != like.n_embd:
        raise KronyError(f"the checkpoint is {width} wide, and the model that it is to be like {like.n_embd}")
    config = copy.deepcopy(like)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    numbers = [int(m[1]) for name in tensors if (m := re.match(r"transformer\.h\.(\d+)\.", name))]
    config.n_layer = len(set(numbers))
    if max(numbers) != config.n_layer - 1:
        raise KronyError(
            f"the checkpoint has layer {max(numbers)}, and {config.n_layer} layers in all: some are missing"
        )
    config.vocab_size, config.n_positions = vocabulary, tensors["transformer.wpe.weight"].shape[0]
    config.n_inner, config.activation_function = None, activation
    head = tensors.get("lm_head.weight", tensors["transformer.wte.weight"])
    config.tie_word_embeddings = torch.equal(head, tensors["transformer.wte.weight"])
    config.dtype = tensors["transformer.wte.weight"].dtype
    return config


def _shape(tensors: dict[str, Tensor], place: str, config: GPT2Config) -> KronShape:
    left, right = tensors.get(f"{place}_0"), tensors.get(f"{place}_1")
    if left is None or right is None:
        raise KronyError(f"the checkpoint lacks {place}_{0 if left is None else 1}")
    if left.dim() != 3 or right.dim() != 3 or len(left) != len(right):
        raise KronyError(
            f"{place}: its factors are {tuple(left.shape)} and {tuple(right.shape)}, and take 3 dimensions"
        )
    (k, n1, m1), (_, n2, m2) = left.shape, right.shape
    shape = KronShape(m1, n1, m2, n2, k)
    size = (4 * config.n_embd, config.n_embd) if place.endswith("c_fc") else (config.n_embd, 4 * config.n_embd)
    if (shape.rows, shape.columns) != size:
        raise KronyError(f"{place}: its factors make {n1 * n2}x{m1 * m2}, and GPT-2's is {size[1]}x{size[0]}")
    return shape


def _ours(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Our name of their tensor, and its values as ours lie."""
    if name.endswith(TURNED):
        return name, value.T.contiguous()
    match = re.fullmatch(r"(.*\.mlp\.(?:c_fc|c_proj))_(0|1|bias)", name)
    if match is None:
        return name, value
    part = {"0": "weight", "1": "right", "bias": "bias"}[match[2]]
    return f"{match[1]}.{part}", value if part == "bias" else value.transpose(1, 2).contiguous()


def _theirs(name: str) -> str:
    """Their name of our tensor."""
    match = re.fullmatch(r"(.*\.mlp\.(?:c_fc|c_proj))\.(weight|right|bias)", name)
    return name if match is None else f"{match[1]}_{ {'weight': '0', 'right': '1', 'bias': 'bias'}[match[2]] }"


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@torch.no_grad()
def to_reference(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a compressed GPT-2 in the published code's layout; scalars go into the left factors.

    Raises KronyError: a model that isn't GPT-2, or whose MLPs aren't all compressed to one scheme.
    """
    layers = kronecker_layers(model)
    wanted = {f"transformer.h.{i}.mlp.{name}" for i in range(model.config.num_hidden_layers) for name in NAMES}
    if not isinstance(model.config, GPT2Config) or model.config.n_inner not in (None, 4 * model.config.n_embd):
        raise KronyError(
            f"the published code's layout is that of GPT-2, hidden width 4 times the model's, and this is "
            f"{type(model).__name__}"
        )
    if set(layers) != wanted or kronecker_embeddings(model):
        raise KronyError(
            "the published code's layout has the MLP of every layer compressed and nothing else, "
            f"and here {len(layers)} layers are where {len(wanted)} would be"
        )
    shapes = {layer.shape if name.endswith("c_fc") else layer.shape.transposed for name, layer in layers.items()}
    if len(shapes) > 1:
        raise KronyError(f"the published code's layout has one scheme for all layers: here are {len(shapes)}")
    tensors = {}
    for name, value in model.state_dict().items():
        layer = layers.get(name.rpartition(".")[0])
        if name.endswith(".scalars"):
            continue
        if layer is not None and name.endswith(".weight"):
            value = value if layer.scalars is None else value * layer.scalars[:, None, None]
        if (layer is not None and not name.endswith(".bias")) or name.endswith(TURNED):
            value = value.transpose(-1, -2)
        tensors[_theirs(name) if layer is not None else name] = value.detach().clone().contiguous()
    return tensors


def write_reference(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a ``.pt`` file completely or not at all. Raises KronyError if it can't be written."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:  # opened here, because torch's own writer gives no reason
            torch.save(tensors, file)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        raise KronyError(
            f"{path} can't be written: {getattr(error, 'strerror', None) or 'is the disk full?'}"
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
