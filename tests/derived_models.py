"""Compressed models whose derived tensors could be outdated, and ways to change their parameters."""

import copy
import functools

import torch

import krony
from krony.models.surgery import kronecker_layers
from small_models import BUILDERS

SCHEMES = {
    "dense from 8 tokens": krony.KronyConfig("512x128:3", init="van-loan", scalars=True),
    "always dense": krony.KronyConfig("512x128:4", init="van-loan", scalars=True),
    "selection": krony.KronyConfig("keep=0.5", init="prune", epsilon=0.0, scalars=True),
}


IDS = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@functools.cache
def compressed(scheme: str):
    """The shipped model, compressed; it never computes anything, so nothing in it can be stale."""
    model = krony.demo_model()
    krony.compress(model, SCHEMES[scheme])
    return model


def built(scheme: str):
    return copy.deepcopy(compressed(scheme)).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def scores(model, **options):
    """The logits of every new token of a generation, ``(steps, batch, vocabulary)``."""
    length = 6
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0} | options
    made = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(made.logits)


def check(model, scheme: str) -> None:
    """Everything equals, to the bit, what a model gives that was built from the same values."""
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(fresh))
    assert torch.equal(scores(model), scores(fresh))


def small(scheme="24x24:2", family="gpt2", **changes):
    model = BUILDERS[family](**changes)
    krony.compress(model, krony.KronyConfig(scheme, init="van-loan", scalars=True))
    return model.eval()


def factors(model):
    return [p for layer in kronecker_layers(model).values() for p in layer.parameters()]


def multiply_data(model):
    for p in factors(model):
        p.data.mul_(1.5)


EXPECTED = {  # 6 layers of two matrices
    "dense from 8 tokens": {"dense_weight": 12, "_combination": 0, "_read_pattern": 0},  # by the prefill alone
    "always dense": {"dense_weight": 12, "_combination": 0, "_read_pattern": 0},
    "selection": {"dense_weight": 0, "_combination": 6, "_read_pattern": 6},
}
