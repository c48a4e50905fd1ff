"""What a training on CPUs changes of its models, and that nothing else changes."""

import pytest
import torch

from krony.models import fast_training as module
from krony.models import precision
from krony.models.fast_training import fast_training, product_weights
from small_models import gpt2, llama


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def tiles(request, monkeypatch):
    """A processor with fast products in bfloat16, with matrix tiles or without."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(module, "has_tiles", lambda: request.param)
    return request.param


@pytest.mark.parametrize("build", [gpt2, llama, lambda: llama(tie_word_embeddings=False)], ids=["gpt2", "tied", "two"])
def test_a_teacher_says_the_same_to_the_bit(build, tiles, ids):
    """Its matrices are what autocast makes of them; attention is what its config says."""
    teacher, student = build().eval(), build().eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    def logits(attention):
        teacher.set_attn_implementation(attention)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return teacher(ids).logits

    wanted = "sdpa" if tiles else "eager"
    expected = logits(wanted)
    teacher.set_attn_implementation("sdpa")
    with fast_training(student, teacher, device="cpu", length=ids.shape[1]):
        attention = [model.config._attn_implementation for model in (student, teacher)]
        assert attention == ["eager", wanted]
        dtypes = {name: p.dtype for name, p in teacher.named_parameters()}
        assert torch.equal(logits(wanted), expected)
    assert all(p.dtype == torch.float32 for p in student.parameters())
    embeddings, head = teacher.get_input_embeddings().weight, teacher.get_output_embeddings().weight
    halves = [p for name, p in teacher.named_parameters() if dtypes[name] == torch.bfloat16]
    assert {id(p) for p in halves} == {id(p) for p in product_weights(teacher)}
    assert len(halves) >= 2 * 4 and not any(p is embeddings for p in halves)
    assert any(p is head for p in halves) == (head is not embeddings)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_where_nothing_changes(tiles, monkeypatch):
    """Products in another dtype on either side, another device, a model that teaches itself; attention of long rows."""
    plain = llama()

    def dtypes(student, teacher, **options):
        with fast_training(student, teacher, **{"device": "cpu", "length": 8} | options):
            return {p.dtype for p in teacher.parameters()}, teacher.config._attn_implementation

    assert dtypes(llama().double(), plain) == ({torch.float32}, "sdpa")
    assert dtypes(plain, plain)[0] == {torch.float32}
    assert dtypes(llama(), plain, device="cuda") == ({torch.float32}, "sdpa")
    assert dtypes(llama(), plain, length=4096) == ({torch.float32, torch.bfloat16}, "sdpa")
    monkeypatch.setattr(precision, "fast_dtype", lambda _: torch.float32)
    assert dtypes(llama(), plain) == ({torch.float32}, "sdpa")


def test_a_layer_that_may_do_more_than_a_product_stays():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return x @ (2 * self.weight).T

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Scaled
    assert not any(p is model.model.layers[0].mlp.up_proj.weight for p in product_weights(model))
    assert any(p is model.model.layers[1].mlp.up_proj.weight for p in product_weights(model))


def test_an_error_gives_the_weights_back(tiles):
    teacher = llama()
    places = [weight.data_ptr() for weight in product_weights(teacher)]
    with pytest.raises(ZeroDivisionError), fast_training(None, teacher, device="cpu", length=8):
        raise ZeroDivisionError
    assert [weight.data_ptr() for weight in product_weights(teacher)] == places
