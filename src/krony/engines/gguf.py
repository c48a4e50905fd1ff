"""GGUF, the file that llama.cpp runs: metadata, vocabulary and weights of a plain model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.engines.extras import needed
from krony.engines.families import Family, find_family
from krony.engines.vocabulary import write_vocabulary
from krony.errors import KronyError
from krony.models.surgery import find_groups, is_tied, turned_weights

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # as written on the command line -> in GGUF
BLOCK = 32  # weights that share a scale in Q8_0: a row of another length can't be quantised
LARGEST_F16 = 65_504.0
EXACT = ("position_embd.weight", "rope_freqs.weight")  # matrices that llama.cpp reads in float32 only


def check_kind(kind: str) -> None:
    """Raises KronyError for an unknown kind, or if the package gguf is missing."""
    if kind not in KINDS:
        raise KronyError(f"GGUF type {kind!r} is unknown: it is one of {', '.join(KINDS)}")
    needed("gguf", "gguf")


def takes_widths(model: PreTrainedModel) -> bool:
    """Whether llama.cpp can run this type of model with a hidden width per layer. Raises KronyError for other types."""
    return find_family(model).ragged is not None


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str = "f16", name: str = ""
) -> None:
    """Writes a plain model as a GGUF file.

    Norms and biases are written in float32; the other weights as ``kind`` says, and rows that q8_0 can't divide into
    blocks of 32 as f16. llama.cpp's ``llama`` has one hidden width; where the layers of a Llama have their own, it is
    written as ``deci``, which has one per layer.

    Args:
        model: of one of the types in ``krony.engines.families``.
        tokenizer: the model's.
        file: the file to write.
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0`` (8-bit weights, one scale per block of 32).
        name: the model's name, which engines show.

    Raises:
        KronyError: the package gguf is missing, or llama.cpp has no such kind, type, option or vocabulary.
    """
    check_kind(kind)
    import gguf

    family, widths = find_family(model), hidden_widths(model)
    arch = family.arch if len(set(widths)) == 1 else family.ragged
    if arch is None:
        raise KronyError(f"llama.cpp's {family.arch} has one hidden width, and these layers have {sorted(set(widths))}")
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type("model")
    writer.add_name(name or type(model).__name__)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + KINDS[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_feed_forward_length(widths if len(set(widths)) > 1 else widths[0])
    family.describe(writer, model)
    write_vocabulary(writer, model, tokenizer)
    for key, weight in _weights(model, family, arch):
        stored = _stored_as(key, weight, kind)
        if stored == "F16" and weight.abs().max() > LARGEST_F16:
            raise KronyError(f"{key} has weights up to {weight.abs().max():.3g}, which f16 can't hold: use bf16")
        number = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(key, gguf.quantize(weight.float().numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hidden_widths(model: PreTrainedModel) -> list[int]:
    """The hidden width of each layer's MLP, of a plain model."""
    return [group.sites[-1].in_features for group in find_groups(model)]


def _weights(model: PreTrainedModel, family: Family, arch: str) -> Iterator[tuple[str, Tensor]]:
    """Name in GGUF and weight ``(out, in)`` of every parameter. Raises KronyError for one that has no name there."""
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    turned = turned_weights(model)
    head = "lm_head.weight" if is_tied(model) else None  # llama.cpp takes the embedding where there is no head
    for name, weight in model.state_dict().items():
        if name == head:
            continue
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise KronyError(f"llama.cpp's {arch} has no weight that corresponds to {name}")
        weight = weight.detach().cpu()
        yield key, family.weight(name, weight.T if name in turned else weight, model.config).contiguous()


def _stored_as(key: str, weight: Tensor, kind: str) -> str:
    """The GGUF type of a weight."""
    if weight.ndim == 1 or key in EXACT or re.search(r"norm\.weight$", key):
        return "F32"
    if kind == "q8_0" and weight.shape[-1] % BLOCK:
        return "F16"
    return KINDS[kind]
