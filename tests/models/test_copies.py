"""A copy of a model with other tensors."""

import pickle

import pytest
import torch

from krony.models.copies import copy_with, copy_without_values
from small_models import gpt2, llama


@pytest.mark.parametrize("build", [gpt2, llama])
def test_structure_is_copied_and_values_are_made(build, ids):
    model = build(tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(False)
    expected = model(ids).logits
    copied = copy_with(model, lambda tensor: tensor.detach().clone())
    assert torch.equal(copied(ids).logits, expected)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight is not model.lm_head.weight
    pairs = list(zip(copied.named_parameters(), model.named_parameters(), strict=True))
    assert all(one[0] == other[0] and one[1].requires_grad == other[1].requires_grad for one, other in pairs)
    empty = pickle.loads(pickle.dumps(copy_without_values(model)))  # as it is sent to another process
    tensors = [(*each.named_parameters(), *each.named_buffers()) for each in (empty, model)]
    assert all(tensor.is_meta for _, tensor in tensors[0])
    assert [(name, t.shape, t.dtype) for name, t in tensors[0]] == [(name, t.shape, t.dtype) for name, t in tensors[1]]
    assert empty.lm_head.weight is empty.get_input_embeddings().weight
    assert torch.equal(model(ids).logits, expected)
