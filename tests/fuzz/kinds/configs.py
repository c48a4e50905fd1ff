"""config.json and generation_config.json: numbers, types, nesting, other families' fields."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.kinds import commands
from fuzz.values import changes

MORE = [
    *("n_inner", "rope_scaling", "rope_theta", "layer_types", "dtype", "torch_dtype", "auto_map", "pruned_heads"),
    *("num_labels", "id2label", "label2id", "quantization_config", "attn_implementation", "sliding_window"),
    *("text_config", "architectures", "tie_word_embeddings", "use_cache", "output_attentions", "return_dict"),
    *("max_position_embeddings", "head_dim", "num_experts", "num_local_experts", "n_ctx", "chunk_size_feed_forward"),
    *("is_decoder", "add_cross_attention", "max_length", "problem_type", "task_specific_params", "name_or_path"),
    *("initializer_range", "pad_token_id", "eos_token_id", "vocab_size", "hidden_act", "gradient_checkpointing"),
    *(
        "rope_parameters",
        "partial_rotary_factor",
        "num_nextn_predict_layers",
        "mlp_only_layers",
        "experts_implementation",
    ),
]
GENERATION = [
    *(
        "temperature",
        "max_new_tokens",
        "max_length",
        "num_beams",
        "top_k",
        "eos_token_id",
        "bad_words_ids",
        "do_sample",
    ),
    *("cache_implementation", "forced_bos_token_id", "suppress_tokens", "num_return_sequences", "stop_strings", "seed"),
    *("watermarking_config", "guidance_scale", "begin_suppress_tokens", "sequence_bias", "min_length", "prompt_lookup"),
]


def draw(random: Random, sound: Path) -> Case:
    if random.random() < 0.2:
        return _of_another_family(random)
    model = random.choice(["dense", "llama", "compressed"])
    if random.random() < 0.15:
        file, more = f"{model}/generation_config.json", GENERATION
    else:
        file, more = f"{model}/config.json", MORE
    edits = changes(random, file, json.loads((sound / file).read_text()), more=more)
    return Case(kind="configs", command=commands.reading(random, model, compressed=model == "compressed"), edits=edits)


def _of_another_family(random: Random) -> Case:
    """A config of any causal language model, made small; the weights are still those of GPT-2."""
    from transformers import AutoConfig

    family = random.choice(_families())
    try:
        said = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    except Exception:  # some have no defaults that fit each other
        said = {"model_type": family}
    said |= {name: 2 for name in said if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")}
    file = "dense/config.json"
    edits = [["write", file, json.dumps(said)], *changes(random, file, said, more=MORE)]
    return Case(kind="configs", command=random.choice([["schemes", "dense"], ["inspect", "dense"]]), edits=edits)


def _families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
