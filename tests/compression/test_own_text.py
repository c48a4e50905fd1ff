"""Text that a model writes itself: each token is drawn from its own prediction, whatever its generation config says."""

import copy

import pytest
import torch
from transformers import GenerationConfig

import krony
from krony import KronyConfig, KronyError, compress, own_text
from small_models import BUILDERS, gpt2


@pytest.fixture
def misled(tokenizer):
    """Builders whose models ask for another sampling, and end at once."""

    def build(family):
        model = BUILDERS[family]().double()
        model.generation_config = GenerationConfig(
            do_sample=False, top_k=1, top_p=0.5, temperature=0.1, repetition_penalty=3.0, eos_token_id=list(range(250)),
            min_new_tokens=9, suppress_tokens=[1, 2, 3],
        )  # fmt: skip
        return model

    return build


@pytest.mark.parametrize("family", list(BUILDERS))
def test_it_is_what_sampling_by_hand_gives(family, misled, tokenizer, monkeypatch):
    """Token by token without a cache, with the same random numbers."""
    model = misled(family)
    monkeypatch.setattr(krony.compression.own_text, "AT_ONCE", 3)
    got = own_text(model, tokenizer, tokens=16 * 5 + 7, length=16, seed=4)
    assert got.shape == (5, 16) and got.dtype == torch.int64
    torch.manual_seed(4)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids])
    starts = plain[torch.randint(len(plain), (5, 1))]
    rows = []
    for ids in starts.split(3):
        while ids.shape[1] < 16:
            with torch.no_grad():
                likelihoods = model(input_ids=ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat((ids, torch.multinomial(likelihoods, 1)), 1)
        rows.append(ids)
    assert torch.equal(got, torch.cat(rows))


def test_nothing_else_changes(misled, tokenizer):
    model = misled("gpt2").train()
    before, config = copy.deepcopy(model.state_dict()), model.generation_config
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = own_text(model, tokenizer, tokens=64, length=32)
    assert torch.equal(torch.rand(3), expected)
    assert model.generation_config is config and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(first, own_text(model, tokenizer, tokens=64, length=32))
    assert not torch.equal(first, own_text(model, tokenizer, tokens=64, length=32, seed=1))


def test_the_config_comes_back_after_a_mistake(misled, tokenizer, monkeypatch):
    model = misled("gpt2")
    config = model.generation_config
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own_text(model, tokenizer, tokens=64, length=32)
    assert model.generation_config is config


def test_too_few_tokens(tokenizer):
    with pytest.raises(KronyError, match="calibration on 31 tokens: at least 32 are needed"):
        own_text(gpt2(), tokenizer, tokens=31, length=32)


def test_sequences_are_no_longer_than_the_context(tokenizer):
    assert own_text(gpt2(n_positions=64), tokenizer, tokens=200).shape == (3, 64)


def test_it_calibrates(tokenizer):
    model = gpt2()
    ids = own_text(model, tokenizer, tokens=640, length=64)
    report = compress(model, KronyConfig("keep=0.5", allocation="global"), calibration=ids)
    assert report.layers and model.config.quantization_config.made_with["calibration_tokens"] == 640


@pytest.mark.parametrize("name", ["frontier", "calibration_set"])
def test_what_needs_text_that_is_read_says_so(name, tokenizer):
    with pytest.raises(KronyError, match="self is text that the model writes, which krony compress calibrates on"):
        if name == "frontier":
            krony.frontier(gpt2(), "self", tokenizer=tokenizer)
        else:
            krony.calibration_set("self", tokenizer)
