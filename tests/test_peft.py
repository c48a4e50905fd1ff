"""PEFT's LoRA on top of a compressed model: it trains, merges into untouched layers, and says no to compressed ones."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from krony import KronyConfig, compress
from krony.models.loading import load_model
from krony.models.surgery import kronecker_layers
from small_models import BUILDERS

ATTENTION = {"gpt2": "c_attn", "llama": "q_proj"}


@pytest.fixture(params=list(BUILDERS))
def saved(request, tmp_path):
    model = BUILDERS[request.param]()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def adapted(family: str, folder):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=[ATTENTION[family]], task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    return get_peft_model(load_model(str(folder)), config)


def test_lora_trains_is_saved_and_merges_into_untouched_layers(saved, ids, tmp_path):
    family, folder = saved
    model = adapted(family, folder)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    logits = model(ids).logits.detach()

    model.save_pretrained(tmp_path / "adapter")
    assert [p.suffix for p in (tmp_path / "adapter").glob("adapter_model*")] == [".safetensors"]
    again = PeftModel.from_pretrained(load_model(str(folder)), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-6)

    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    layers = kronecker_layers(merged)
    assert layers and set(layers) == set(kronecker_layers(load_model(str(folder))))
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_model(str(tmp_path / "merged"))(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_on_a_compressed_layer_peft_says_that_it_can_not(saved):
    _, folder = saved
    name = next(iter(kronecker_layers(load_model(str(folder))))).rpartition(".")[2]
    with pytest.raises(ValueError, match=r"Target module KroneckerLinear\(in=.*\) is not supported"):
        get_peft_model(load_model(str(folder)), LoraConfig(r=4, target_modules=[name], task_type="CAUSAL_LM"))
