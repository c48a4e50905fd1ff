"""What llama.cpp calls the models that krony writes, what it reads of their configs, and how it wants their weights.

One record per model type. What llama.cpp's graph of a type doesn't do is refused here: it would run, and give other
logits. The names of keys are those of the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from krony.errors import KronyError

if TYPE_CHECKING:
    from gguf import GGUFWriter

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one type of models is written.

    Attributes:
        arch: llama.cpp's name.
        describe: writes what llama.cpp reads of the config. Raises KronyError for what its graph doesn't do.
        weight: a weight as llama.cpp wants it; takes its name in transformers, the weight, and the config.
        ragged: llama.cpp's name of a type that differs in this alone: every layer has a hidden width of its own; None
            where it has none.
    """

    arch: str
    describe: Callable[[GGUFWriter, PreTrainedModel], None]
    weight: Callable[[str, Tensor, PretrainedConfig], Tensor] = lambda name, weight, config: weight
    ragged: str | None = None


def find_family(model: PreTrainedModel) -> Family:
    """The record of a model's type. Raises KronyError if there is none."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise KronyError(f"export to gguf writes models of the types {', '.join(FAMILIES)}, and this one is {kind}")
    return FAMILIES[kind]


def _require(model: PreTrainedModel, attribute: str, *allowed: object) -> None:
    """Raises KronyError unless the config has one of these values."""
    value = getattr(model.config, attribute, allowed[0])
    if value not in allowed:
        raise KronyError(
            f"export to gguf: llama.cpp's {model.config.model_type} has {attribute} {allowed[0]}, and this one {value}"
        )


def _describe_gpt2(writer: GGUFWriter, model: PreTrainedModel) -> None:
    _require(model, "activation_function", *TANH_GELU)
    _require(model, "scale_attn_weights", True)
    _require(model, "scale_attn_by_inverse_layer_idx", False)
    config = model.config
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _describe_rotary(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """What all models with RMS norms and rotary positions share."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(model))
    writer.add_value_length(_head_dim(model))


def _head_dim(model: PreTrainedModel) -> int:
    """Numbers per attention head; some configs don't name it."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe_llama(writer: GGUFWriter, model: PreTrainedModel) -> None:
    _require(model, "hidden_act", "silu")
    _describe_rotary(writer, model)
    rope = model.config.rope_parameters
    _check_rope(model, rope, "default", "linear", "llama3")
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_rope_dimension_count(_head_dim(model))
    writer.add_rope_freq_base(rope["rope_theta"])
    factors = _frequency_factors(model, rope["rope_theta"])
    if not torch.allclose(factors, torch.ones(())):
        writer.add_tensor("rope_freqs.weight", factors.numpy())


def _describe_qwen2(writer: GGUFWriter, model: PreTrainedModel) -> None:
    _require(model, "hidden_act", "silu")
    _require(model, "use_sliding_window", False)
    _describe_rotary(writer, model)
    rope = model.config.rope_parameters
    _check_rope(model, rope, "default")
    writer.add_rope_freq_base(rope["rope_theta"])


def _describe_gemma3(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    _require(model, "hidden_activation", *TANH_GELU)
    _require(model, "attn_logit_softcapping", None)
    _require(model, "final_logit_softcapping", None)
    _require(model, "use_bidirectional_attention", False, None)
    _require(model, "query_pre_attn_scalar", _head_dim(model))
    pattern = [
        "full_attention" if number % 6 == 5 else "sliding_attention" for number in range(config.num_hidden_layers)
    ]
    _require(model, "layer_types", pattern)
    wide, near = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    _check_rope(model, wide, "default", "linear")
    _check_rope(model, near, "default")
    _describe_rotary(writer, model)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(wide["rope_theta"])
    writer.add_float32("gemma3.rope.freq_base_swa", near["rope_theta"])
    if wide["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(wide["factor"])


def _check_rope(model: PreTrainedModel, rope: dict[str, object], *allowed: str) -> None:
    """Raises KronyError unless the rotary positions are of these types."""
    if rope["rope_type"] not in allowed:
        raise KronyError(
            f"export to gguf writes {model.config.model_type} models with rope_type {' or '.join(allowed)}, and this "
            f"one has {rope['rope_type']}"
        )


def _frequency_factors(model: PreTrainedModel, base: float) -> Tensor:
    """By what each rotary frequency is divided, ``(head_dim / 2,)``: linear and Llama 3 scaling of long contexts."""
    scaled = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    plain = base ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    return (plain / scaled).float()


def _interleaved(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """llama.cpp's Llama rotates neighbouring pairs, and transformers' the halves of a head: the rows change places."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if f".{part}." in name), None)
    if count is None:
        return weight
    return weight.view(count, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _from_one(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """Gemma stores its norms' weights less one; the sum is exact in float32, in which a file holds norms."""
    return weight.float() + 1 if name.endswith("norm.weight") else weight


FAMILIES = {
    "gpt2": Family(arch="gpt2", describe=_describe_gpt2),
    "llama": Family(arch="llama", describe=_describe_llama, weight=_interleaved, ragged="deci"),
    "qwen2": Family(arch="qwen2", describe=_describe_qwen2),
    "gemma3_text": Family(arch="gemma3", describe=_describe_gemma3, weight=_from_one),
}
