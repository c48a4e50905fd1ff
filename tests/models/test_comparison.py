"""A student beside its teacher; tests/test_architectures.py compares the losses for every architecture."""

import copy

import pytest
import torch
from torch import nn

from krony.models.comparison import Comparison, plain_head, plain_heads, without_effect
from small_models import llama


def test_a_head_that_trains_is_not_kept_and_gets_a_gradient():
    model = llama()
    teacher = copy.deepcopy(model)  # its head is not said to be frozen, and doesn't train all the same
    comparison = Comparison(plain_heads(model, teacher), torch.bfloat16)
    ids = torch.randint(0, 200, (1, 9))
    with comparison.headless():
        comparison.loss(*(m(input_ids=ids).logits for m in (model, teacher))).backward()
    assert model.lm_head.weight.grad is not None
    assert teacher.lm_head.weight.grad is None
    assert [(layer, head.weight.dtype) for layer, head in comparison.fixed.items()] == [
        (teacher.lm_head, torch.bfloat16)
    ]


def test_a_sharded_head_is_not_kept():
    """FSDP frees the memory that it was gathered into."""
    model = llama()
    teacher = copy.deepcopy(model)
    teacher.lm_head._is_fsdp_managed_module = True  # what FSDP writes on the modules whose parameters it gathers
    comparison = Comparison(plain_heads(model, teacher))
    states = torch.randn(1, 9, 48)
    comparison.loss(states, states)
    assert not comparison.fixed


def test_a_head_that_somebody_changed_is_not_plain():
    model = llama()
    assert plain_head(model) is model.lm_head
    model.lm_head.register_forward_hook(lambda *_: None)
    assert plain_head(model) is None


def test_a_layer_without_effect_works_again_afterwards():
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    with pytest.raises(RuntimeError, match="in the middle"), without_effect(layer):
        assert layer(x) is x
        raise RuntimeError("in the middle")
    assert layer(x).shape == (4, 3) and "forward" not in vars(layer)
