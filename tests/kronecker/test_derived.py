"""Derived tensors follow the parameters, whoever changes them."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import DynamicCache, StaticCache

from derived_models import IDS, SCHEMES, built, check, factors, logits, multiply_data, scores, small
from krony.models.surgery import kronecker_layers


def optimisers() -> dict[str, tuple[type, dict]]:
    """Every optimiser of torch that takes these parameters, in every variant that runs on this machine."""
    found = {}
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass):
        if kind is torch.optim.Optimizer or name == "Muon":  # it takes matrices only, and factors are stacked
            continue
        for flag in ("", "foreach", "fused", "capturable"):
            options = {flag: True} if flag else {}
            if flag and (flag not in inspect.signature(kind).parameters or flag == "capturable"):
                continue  # capturable needs an accelerator
            found[f"{name} {flag}".strip()] = kind, options
    return found


OPTIMISERS = optimisers()


def test_the_optimisers_are_there():
    assert {"SGD fused", "Adam fused", "AdamW fused", "Adagrad fused", "AdamW foreach", "LBFGS"} <= set(OPTIMISERS)
    assert len(OPTIMISERS) > 25


def step(name: str, parameters: list[nn.Parameter]) -> None:
    kind, options = OPTIMISERS[name]
    optimiser = kind(parameters, lr=0.1, **options)

    def closure():
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            if kind is torch.optim.SparseAdam:
                parameter.grad = parameter.grad.to_sparse()
        return torch.ones(())

    closure()
    optimiser.step(closure)
    optimiser.zero_grad()


@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_after_every_optimiser(name):
    model = small()
    before, _ = logits(model, IDS % 257), model.generate(IDS % 257, max_new_tokens=3, pad_token_id=0)
    step(name, factors(model))
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    after = logits(model, IDS % 257)
    assert not torch.equal(after, before) and torch.equal(after, logits(fresh, IDS % 257))
    options = {"max_new_tokens": 3, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    generated, expected = (torch.stack(m.generate(IDS % 257, **options).logits) for m in (model, fresh))
    assert torch.equal(generated, expected)


def fused_step(model):
    step("AdamW fused", factors(model))


def assign_data(model):
    for p in factors(model):
        p.data = p.data * 1.5


def copy_data(model):
    for p in factors(model):
        p.data.copy_(p.data * 1.5)


def dropped_neurons_return(model):
    """In the selection, zeros of the right factors become other numbers."""
    for layer in kronecker_layers(model).values():
        layer.right.data.add_(0.25)


@torch.no_grad()
def copy_in_place(model):
    for p in factors(model):
        p.copy_(p * 1.5)


@torch.no_grad()
def set_storage(model):
    for p in factors(model):
        p.set_((p * 1.5).clone())


def other_state(model):
    return {name: tensor * 1.25 for name, tensor in model.state_dict().items()}


def load(model):
    model.load_state_dict(other_state(model))


def load_by_assignment(model):
    model.load_state_dict(other_state(model), assign=True)


def replace_parameters(model):
    for layer in kronecker_layers(model).values():
        layer.weight, layer.right = (nn.Parameter(p.detach() * 1.5) for p in (layer.weight, layer.right))


def vector(model):
    parameters = factors(model)
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat * 1.5, parameters)


@torch.no_grad()
def moving_average(model):
    own = factors(model)
    torch._foreach_lerp_([p.data for p in own], [p.detach() * 2 for p in own], 0.5)


CHANGES = [
    fused_step, assign_data, copy_data, multiply_data, dropped_neurons_return, copy_in_place, set_storage, load,
    load_by_assignment, replace_parameters, vector, moving_average,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_after_every_change(scheme, change):
    model = built(scheme)
    before = logits(model)
    scores(model)
    change(model)
    assert not torch.allclose(logits(model), before)
    check(model, scheme)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_averaged_models(scheme):
    model = built(scheme)
    average = AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2)
    for _ in range(2):
        average.update_parameters(model)
        check(average.module, scheme)
        fused_step(model)
        check(model, scheme)


@pytest.mark.parametrize("change", [fused_step, copy_data, assign_data])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_cache_that_is_reset_and_reused(scheme, kind, change):
    model = built(scheme)
    options = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    scores(model, past_key_values=cache, disable_compile=True)
    change(model)
    cache.reset()
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    after = scores(model, past_key_values=cache, disable_compile=True)
    assert torch.equal(after, scores(fresh, past_key_values=kind(config=model.config, **options), disable_compile=True))


@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("scheme", ["always dense", "selection"])
@torch.no_grad()
def test_a_cache_that_another_model_filled_in_between(scheme, kind, length):
    """The hooks of this model don't see that its cache was reset."""
    model, other = built(scheme), built(scheme)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    for _ in range(2):
        model(IDS[:, :4], past_key_values=cache)
    multiply_data(model)
    cache.reset()
    other(IDS[:, :length], past_key_values=cache)
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    expected = fresh(IDS[:, 4:6], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(IDS[:, 4:6], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("change", ["copy_", "training"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_change_in_the_middle_of_a_generation(scheme, change):
    model = built(scheme)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        for _ in range(2):
            model(IDS[:, :1], past_key_values=cache)
    if change == "training":
        model(IDS, labels=IDS).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    else:
        copy_in_place(model)
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = fresh(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, expected)


def test_training_with_frozen_right_factors_reads_them_in_every_step():
    model = built("selection")
    for layer in kronecker_layers(model).values():
        layer.right.requires_grad_(False)
    for _ in range(2):
        fresh = built("selection")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(IDS).logits, fresh(IDS).logits)
        dropped_neurons_return(model)
