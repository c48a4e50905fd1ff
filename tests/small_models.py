"""Models of both families at random, built in a moment."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel


def gpt2(**changes) -> PreTrainedModel:
    """A GPT-2 at random: 3 layers, width 48, hidden width 192, biases that aren't zero."""
    options = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 64, "vocab_size": 257} | changes
    return _random(GPT2Config(bos_token_id=256, eos_token_id=256, **options))


def llama(**changes) -> PreTrainedModel:
    """A Llama at random with grouped queries and a tied head: 3 layers, width 48, hidden width 144."""
    options = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 144, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 257, "tie_word_embeddings": True}
    return _random(LlamaConfig(bos_token_id=256, eos_token_id=256, **(options | changes)))


def at_random(config) -> PreTrainedModel:
    """A model of this config, with biases that aren't zero and norms that aren't one."""
    model = _random(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                scale = 1 + 0.2 * torch.randn(parameter.shape)
                parameter.copy_(parameter * scale if parameter.any() else scale - 1)  # Gemma's add one
    return model


def _random(config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model: a lost bias would go unnoticed
                parameter.normal_(std=0.1)
    return model


BUILDERS = {"gpt2": gpt2, "llama": llama}
