"""Models are told apart by what they compute, not by their names."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from krony.models.digests import config_digest, model_digest
from small_models import gpt2, llama


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_that_is_saved_and_loaded_is_the_same(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a name")
    assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "a name")) == model_digest(model)


def test_a_weight_a_name_and_a_setting_make_another(tmp_path):
    model = gpt2()
    others = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        others[0].transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    others[1].transformer.register_buffer("more", torch.zeros(1))
    others[2].config.activation_function = "relu"
    assert len({model_digest(each) for each in (model, *others)}) == 4
    assert config_digest(others[2].config) != config_digest(model.config) == config_digest(others[0].config)
